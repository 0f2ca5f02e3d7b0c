"""Stage 1: the autoencoder, 64x64 pictures to 16x16 latents of 4 channels and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.pocket.scenes import draw_many, sample_scene
from recipes.pocket.training import (
    Stage,
    autocast,
    fit,
    pick_device,
    step_generator,
    step_rng,
    to_tensor,
)

PAIR_SHARE = 0.5
"""Pairs carry more edges than single objects, so the autoencoder sees more of them."""
KL_WEIGHT = 1e-3


@dataclass(frozen=True)
class Phase:
    """One phase of the autoencoder's training."""

    name: str
    batch: int
    peak_rate: float
    latent_noise: float
    """Noise on the latents that the decoder sees, as a share of their spread."""


PHASES = (
    Phase("vae", batch=16, peak_rate=2e-3, latent_noise=0.0),
    # Many small steps for the fine edges, with noise, so that what tells a small star from a
    # small circle is written large in the latents, where the denoiser can hit it.
    Phase("vae_fine", batch=8, peak_rate=5e-4, latent_noise=0.05),
)


def drawings(rng: np.random.Generator, count: int, split: str = "train") -> np.ndarray:
    """Pictures of one and of two objects: uint8 (count, 64, 64, 3)."""
    scenes = [sample_scene(rng, split, pairs=rng.random() < PAIR_SHARE) for _ in range(count)]
    return draw_many(scenes, rng)


def psnr_db(vae: Any, pictures: np.ndarray) -> float:
    """How well pictures come back, in dB against the peak of 255."""
    images = to_tensor(pictures).to(vae.device)
    with torch.no_grad():
        parts = [vae.decode(vae.encode(x).latent_dist.mean).sample for x in images.split(32)]
    error = (torch.cat(parts).clamp(-1, 1) - images).square().mean() / 4
    return float(-10 * torch.log10(error))


def train_vae(
    vae: Any,
    phase: Phase,
    folder: Path,
    seed: int,
    steps: int,
    stop_after: int | None = None,
) -> Any:
    """Train in place: L1 and L2 on pixels, and a light KL that keeps the latents smooth."""
    device = pick_device()
    vae.to(device).train()
    unseen = drawings(np.random.default_rng([seed, 99]), 128, "held_out")
    stream = PHASES.index(phase) * 10

    def loss(step: int) -> torch.Tensor:
        images = to_tensor(drawings(step_rng(seed, step, stream), phase.batch)).to(device)
        with autocast(device):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=step_generator(seed, step, stream))
            spread = posterior.mean.detach().std((0, 2, 3), keepdim=True)
            spread = posterior.std + phase.latent_noise * spread
            decoded = vae.decode(posterior.mean + spread * noise.to(device)).sample
        error = decoded.float() - images
        kl = posterior.kl().float().mean() / images[0].numel()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    stage = Stage(
        phase.name,
        vae,
        loss,
        [{"params": list(vae.parameters()), "lr": phase.peak_rate}],
        steps,
        watch=lambda step: f"held-out PSNR {psnr_db(vae, unseen):.2f} dB",
    )
    fit(stage, folder, stop_after)
    return vae.eval()


@torch.no_grad()
def normalize_latents(vae: Any, seed: int, count: int = 2048) -> None:
    """Make latents times the scaling factor zero-mean, of unit variance and uncorrelated.

    Exact, and in place: with W the whitening and m the mean, z' = W (z - m) goes into the mean
    rows of quant_conv, and z = W^-1 z' + m into post_quant_conv. The rows of the log variance,
    which only sampled latents use, take the diagonal part of W.
    """
    vae.float()
    pictures = drawings(np.random.default_rng([seed, 97]), count)
    parts = [vae.encode(x.to(vae.device)).latent_dist.mean for x in to_tensor(pictures).split(64)]
    values = torch.cat(parts).permute(1, 0, 2, 3).flatten(1).double().cpu()
    mean = values.mean(1, keepdim=True)
    spread, axes = torch.linalg.eigh(torch.cov(values))
    scale = vae.config.scaling_factor
    whiten = axes @ torch.diag(spread.rsqrt()) @ axes.T / scale
    restore = torch.linalg.inv(whiten)

    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None
    assert post is not None
    assert quant.bias is not None
    assert post.bias is not None
    channels = mean.shape[0]
    weight, bias = quant.weight[:, :, 0, 0].double().cpu(), quant.bias.double().cpu()
    weight[:channels] = whiten @ weight[:channels]
    bias[:channels] = whiten @ (bias[:channels] - mean[:, 0])
    bias[channels:] += 2 * whiten.diagonal().abs().log()
    quant.weight.copy_(weight[:, :, None, None])
    quant.bias.copy_(bias)
    weight, bias = post.weight[:, :, 0, 0].double().cpu(), post.bias.double().cpu()
    post.bias.copy_(bias + weight @ mean[:, 0])
    post.weight.copy_((weight @ restore)[:, :, None, None])
