"""Captions to pictures in plain PyTorch: what training watches and evaluation measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from transformers import CLIPTokenizer

from recipes.pocket.tokenizer import tokenize
from recipes.pocket.training import step_generator, to_pictures


@dataclass
class Parts:
    """The five parts of the pipeline. (Diffusers' classes do not tell their attributes' types.)"""

    tokenizer: CLIPTokenizer
    text_encoder: Any
    """CLIPTextModel"""
    unet: Any
    """UNet2DConditionModel"""
    vae: Any
    """AutoencoderKL"""
    scheduler: Any
    """DDIMScheduler"""


@torch.no_grad()
def generate(
    parts: Parts,
    captions: list[str],
    *,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Draw captions with DDIM and classifier-free guidance: uint8 (N, 64, 64, 3).

    The noise of picture i depends on (seed, i) alone, so a batch size changes nothing.
    """
    device = parts.unet.device
    config = parts.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    scheduler = DDIMScheduler.from_config(parts.scheduler.config)
    scheduler.set_timesteps(steps)
    pictures = []
    for start in range(0, len(captions), batch):
        words = captions[start : start + batch]
        ids = torch.from_numpy(tokenize(parts.tokenizer, [*words, *[""] * len(words)])).to(device)
        states = parts.text_encoder(ids).last_hidden_state
        rows = range(start, start + len(words))
        noise = [torch.randn(shape, generator=step_generator(seed, row, 7)) for row in rows]
        x_t = torch.stack(noise).to(device)
        for t in scheduler.timesteps:
            said, unsaid = parts.unet(torch.cat([x_t, x_t]), t, states).sample.float().chunk(2)
            v = unsaid + guidance * (said - unsaid)
            x_t = scheduler.step(v, t, x_t).prev_sample
        decoded = parts.vae.decode(x_t / parts.vae.config.scaling_factor).sample
        pictures.append(to_pictures(decoded))
        if progress:
            progress(len(words))
    return np.concatenate(pictures)
