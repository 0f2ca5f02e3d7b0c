"""Stage 3: the denoiser, on latents of drawings made once and captions made anew each step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from tqdm import tqdm

from recipes.component_folder import attend_as_opened
from recipes.pocket.captions import caption
from recipes.pocket.evaluate import GUIDANCE, sample_scenes, score, shares
from recipes.pocket.sampling import Parts, generate
from recipes.pocket.scenes import Scene, draw_many, leave_open, sample_scene
from recipes.pocket.tokenizer import tokenize
from recipes.pocket.training import (
    Stage,
    autocast,
    fit,
    pick_device,
    save_atomically,
    step_generator,
    step_rng,
    to_tensor,
)

BATCH = 48
AVERAGE_DECAY = 0.998
DRAWINGS = 20_000
EXTRA_PAIRS = 8_000
"""More drawings of pairs, for when single objects are known."""
PAIR_SHARE = 0.3
"""Pairs among the first `DRAWINGS`."""
OPEN_SHARE = 0.08
EMPTY_SHARE = 0.1
"""The share of captions replaced by the empty prompt, for guidance."""
LAST_STEP_SHARE = 0.05
"""Trailing sampling begins at the very last timestep, so it is trained more than its share."""


@dataclass(frozen=True)
class Phase:
    """One phase of the denoiser's training."""

    name: str
    peak_rate: float
    noise_power: float
    """Timesteps are 1000 u^power for uniform u: below 1 drawn towards noise."""
    pairs_from_step: int
    """Until then mostly single objects; then the binding of words to two of them."""
    pair_share: float
    """From that step on."""
    small_share: float
    """Of the single objects from that step on."""


PHASES = (
    Phase("unet", 1.5e-3, 0.75, pairs_from_step=1750, pair_share=0.55, small_share=0.5),
    # What the first phase gets wrong are the edges of small objects: they are settled late, when
    # little noise is left.
    Phase("unet_fine", 8e-4, 1.0, pairs_from_step=0, pair_share=0.45, small_share=0.7),
)
WATCH_CAPTIONS = 48
WATCH_STEPS = 12


def training_scenes(seed: int, count: int, extra_pairs: int = 0) -> list[Scene]:
    """The scenes of the training drawings, a fixed share of them pairs, and then more pairs."""
    rng = np.random.default_rng([seed, 96])
    mixed = [sample_scene(rng, "train", rng.random() < PAIR_SHARE) for _ in range(count)]
    return mixed + [sample_scene(rng, "train", pairs=True) for _ in range(extra_pairs)]


@torch.no_grad()
def encode_drawings(parts: Parts, scenes: list[Scene], seed: int, path: Path) -> torch.Tensor:
    """Scaled latents of one drawing a scene: float32 (N, 4, 16, 16), kept at `path`.

    What is kept is used again only for the same autoencoder, scenes and seed.
    """
    digest = hashlib.sha256(repr((seed, scenes)).encode())
    for name, value in parts.vae.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    if path.exists():
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(kept, dict) and kept["inputs"] == digest.hexdigest():
            return kept["latents"].float()
    rng = np.random.default_rng([seed, 95])
    device = parts.vae.device
    latents = []
    for start in tqdm(range(0, len(scenes), 64), desc="latents", mininterval=5):
        images = to_tensor(draw_many(scenes[start : start + 64], rng)).to(device)
        with autocast(device):
            mean = parts.vae.encode(images).latent_dist.mean
        latents.append((mean.float() * parts.vae.config.scaling_factor).half().cpu())
    made = torch.cat(latents)
    save_atomically({"inputs": digest.hexdigest(), "latents": made}, path)
    return made.float()


def train_unet(
    parts: Parts,
    phase: Phase,
    folder: Path,
    seed: int,
    steps: int,
    stop_after: int | None = None,
    drawings: int = DRAWINGS,
    extra_pairs: int = EXTRA_PAIRS,
    watch_every: int = 500,
) -> None:
    """Train `parts.unet` in place through one phase, and leave the average of its weights in it.

    The text encoder is as stage 2 left it, and stays so.
    """
    device = pick_device()
    unet = parts.unet.to(device).train()
    if device.type == "cpu":
        # The fused attention's backward pass costs more there than all else together.
        unet.set_attn_processor(AttnProcessor())
    parts.vae.to(device).eval()
    text_encoder = parts.text_encoder.to(device).eval()
    scenes = training_scenes(seed, drawings, extra_pairs)
    is_pair = np.array([scene.relation is not None for scene in scenes])
    is_small = np.array([scene.objects[0].size == "small" for scene in scenes])
    pairs, small, large = (
        np.flatnonzero(rows) for rows in (is_pair, ~is_pair & is_small, ~is_pair & ~is_small)
    )
    latents = encode_drawings(parts, scenes, seed, folder / "latents.pt")
    alpha_bar = parts.scheduler.alphas_cumprod.to(device)
    last = len(alpha_bar) - 1

    stream = 2 + PHASES.index(phase)

    def pick_rows(rng: np.random.Generator, step: int) -> np.ndarray:
        if step < phase.pairs_from_step:
            return rng.integers(drawings, size=BATCH)
        single = np.where(
            rng.random(BATCH) < phase.small_share,
            rng.choice(small, BATCH),
            rng.choice(large, BATCH),
        )
        return np.where(rng.random(BATCH) < phase.pair_share, rng.choice(pairs, BATCH), single)

    def loss(step: int) -> torch.Tensor:
        rng, generator = step_rng(seed, step, stream), step_generator(seed, step, stream)
        rows = pick_rows(rng, step)
        texts = [
            ""
            if rng.random() < EMPTY_SHARE
            else caption(leave_open(scenes[i], rng, OPEN_SHARE), rng)
            for i in rows
        ]
        ids = torch.from_numpy(tokenize(parts.tokenizer, texts)).to(device)
        t_drawn = ((last + 1) * rng.random(BATCH) ** phase.noise_power).astype(np.int64)
        t_drawn[rng.random(BATCH) < LAST_STEP_SHARE] = last
        t = torch.from_numpy(t_drawn).to(device)
        x0 = latents[torch.from_numpy(rows)].to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        signal = alpha_bar[t].sqrt()[:, None, None, None]
        noise = (1 - alpha_bar[t]).sqrt()[:, None, None, None]
        with autocast(device):
            with torch.no_grad():
                states = text_encoder(ids).last_hidden_state
            v = unet(signal * x0 + noise * eps, t, states).sample
        return nn.functional.mse_loss(v.float(), signal * eps - noise * x0)

    stage = Stage(
        phase.name,
        unet,
        loss,
        [{"params": list(unet.parameters()), "lr": phase.peak_rate}],
        steps,
        warmup=200,
        average_decay=AVERAGE_DECAY,
        save_every=250,
        watch_every=watch_every,
    )
    stage.watch = lambda step: watch_line(averaged(parts, folder, phase.name), seed)
    average = fit(stage, folder, stop_after)
    if average:
        unet.load_state_dict(average.values)
    attend_as_opened(unet)
    unet.eval()


def averaged(parts: Parts, folder: Path, phase: str) -> Parts:
    """The parts with the averaged UNet of the phase's latest checkpoint."""
    state = torch.load(folder / f"{phase}.ckpt", map_location="cpu", weights_only=True)
    unet = type(parts.unet).from_config(parts.unet.config)
    unet.load_state_dict(state["average"])
    return replace(parts, unet=unet.to(parts.unet.device).eval())


def watch_line(parts: Parts, seed: int, captions: int = WATCH_CAPTIONS) -> str:
    """The judge's figures on seen and unseen combinations and on unseen pairs."""
    told = []
    for name, split, pairs in (
        ("seen", "train", False),
        ("held-out", "held_out", False),
        ("held-out pairs", "held_out", True),
    ):
        cases = sample_scenes(captions, seed + 1, pairs, split)
        with autocast(parts.unet.device):
            pictures = generate(
                parts, [text for text, _ in cases], steps=WATCH_STEPS, guidance=GUIDANCE, seed=seed
            )
        told.append(f"\n  {name}: {shares(score(pictures, [scene for _, scene in cases]))}")
    return "".join(told)
