"""Stage 5: the decoder learns to turn what the denoiser really makes into crisp drawings.

Latents of true drawings are noised part of the way and denoised again by the trained UNet, with
guidance and in few steps. They come back at their place but with the denoiser's own flaws, and
the decoder is trained to draw the true picture from them. The encoder and the latents stay.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from recipes.pocket.captions import caption
from recipes.pocket.evaluate import GUIDANCE
from recipes.pocket.sampling import Parts
from recipes.pocket.scenes import draw_many, sample_scene
from recipes.pocket.tokenizer import tokenize
from recipes.pocket.train_vae import PAIR_SHARE, drawings, psnr_db
from recipes.pocket.training import (
    Stage,
    autocast,
    fit,
    pick_device,
    step_generator,
    step_rng,
    to_tensor,
)

BATCH = 16
REDRAWN = 10
"""How many of a batch go through the denoiser; the others are true latents with slight noise."""
LATENT_NOISE = 0.05
PEAK_RATE = 5e-4
START_RANGE = (150, 600)
"""The timesteps up to which latents are noised: enough to redraw edges, and to keep the place."""
REDRAW_STEPS = 3


@torch.no_grad()
def redraw(
    parts: Parts, x0: torch.Tensor, captions: list[str], start: int, eps: torch.Tensor
) -> torch.Tensor:
    """Noise scaled latents (B, 4, 16, 16) up to timestep `start` and denoise them in few steps."""
    device = x0.device
    words = tokenize(parts.tokenizer, [*captions, *[""] * len(captions)])
    states = parts.text_encoder(torch.from_numpy(words).to(device)).last_hidden_state
    alpha_bar = parts.scheduler.alphas_cumprod.to(device)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    timesteps = np.linspace(start, 0, REDRAW_STEPS + 1).astype(int)
    x_t = signal[start] * x0 + noise[start] * eps
    for t, after in pairwise(timesteps):
        said, unsaid = parts.unet(torch.cat([x_t, x_t]), int(t), states).sample.float().chunk(2)
        v = unsaid + GUIDANCE * (said - unsaid)
        x0_told, eps_told = signal[t] * x_t - noise[t] * v, signal[t] * v + noise[t] * x_t
        x_t = signal[after] * x0_told + noise[after] * eps_told
    return x0_told


def train_decoder(
    parts: Parts, folder: Path, seed: int, steps: int, stop_after: int | None = None
) -> None:
    """Train the decoder of `parts.vae` in place."""
    device = pick_device()
    vae = parts.vae.to(device).train()
    parts.unet.to(device).eval()
    parts.text_encoder.to(device).eval()
    scale = vae.config.scaling_factor
    unseen = drawings(np.random.default_rng([seed, 99]), 128, "held_out")

    def loss(step: int) -> torch.Tensor:
        rng, generator = step_rng(seed, step, 3), step_generator(seed, step, 3)
        scenes = [sample_scene(rng, pairs=rng.random() < PAIR_SHARE) for _ in range(BATCH)]
        images = to_tensor(draw_many(scenes, rng)).to(device)
        start = int(rng.integers(*START_RANGE))
        with autocast(device):
            with torch.no_grad():
                x0 = vae.encode(images).latent_dist.mean.float() * scale
                eps = torch.randn(x0.shape, generator=generator).to(device)
                told = [caption(scene, rng) for scene in scenes[:REDRAWN]]
                redrawn = redraw(parts, x0[:REDRAWN], told, start, eps[:REDRAWN])
                noised = x0[REDRAWN:] + LATENT_NOISE * eps[REDRAWN:]
            decoded = vae.decode(torch.cat([redrawn, noised]) / scale).sample
        error = decoded.float() - images
        return error.abs().mean() + error.square().mean()

    learned = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    stage = Stage(
        "decoder",
        vae,
        loss,
        [{"params": learned, "lr": PEAK_RATE}],
        steps,
        watch=lambda step: f"held-out PSNR {psnr_db(vae, unseen):.2f} dB",
    )
    fit(stage, folder, stop_after)
    vae.eval()
