"""Latents that a pipeline draws itself: the pictures that training needs, where nobody has any.

EdgeFusion found synthetic pictures better than scraped ones for small students; and what a student
is to learn is what its teacher draws.
"""

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mobile_runtime.errors import UserError
from recipes.prompts import Draw
from recipes.schedulers import with_steps

CHUNK = 32
"""Pictures drawn together, and kept together on disk."""


def text_states(pipeline: Any, prompts: list[str]) -> torch.Tensor:
    """The text encoder's last hidden states of prompts, cut at its length: (N, L, D)."""
    device = pipeline.text_encoder.device
    ids = pipeline.tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=pipeline.text_encoder.config.max_position_embeddings,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        return pipeline.text_encoder(ids.to(device)).last_hidden_state


def guided(
    unet: Any,
    x: torch.Tensor,
    t: Any,
    states: torch.Tensor,
    empty: torch.Tensor | None,
    scale: float | torch.Tensor,
) -> torch.Tensor:
    """The UNet's output under classifier-free guidance; `empty` None: without."""
    if empty is None:
        return unet(x, t, states).sample
    pair = torch.cat([empty.expand_as(states), states])
    unsaid, said = unet(torch.cat([x, x]), _twice(t), pair).sample.chunk(2)
    return unsaid + scale * (said - unsaid)


def _twice(t: Any) -> Any:
    return torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.dim() == 1 else t


@torch.no_grad()
def sample(
    pipeline: Any,
    unet: Any,
    prompts: list[str],
    noise: torch.Tensor,
    steps: int,
    scale: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Latents (N, C, h, w) of prompts, by the pipeline's scheduler with another UNet.

    noise: unit normal, (N, C, h, w). scale: of guidance; 1 or less: none.
    """
    scheduler = with_steps(pipeline.scheduler, steps)
    states = text_states(pipeline, prompts)
    empty = text_states(pipeline, [""]) if scale > 1 else None
    x = noise * scheduler.init_noise_sigma
    options = {"generator": generator} if adds_noise(scheduler) else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        out = guided(unet, scaled, t.to(x.device), states, empty, scale).float()
        x = scheduler.step(out, t, x, **options).prev_sample
    return x


def adds_noise(scheduler: Any) -> bool:
    """Whether a scheduler's step draws fresh noise, and takes a generator for it."""
    return type(scheduler).__name__ in (
        "LCMScheduler",
        "DDPMScheduler",
        "EulerAncestralDiscreteScheduler",
    )


def pictures(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    """Latents decoded: uint8 (N, H, W, 3)."""
    decoded = []
    with torch.no_grad():
        for rows in tqdm(latents.split(8), desc="decode", delay=2, mininterval=2, leave=False):
            decoded.append(pipeline.vae.decode(rows / pipeline.vae.config.scaling_factor).sample)
    scaled = ((torch.cat(decoded).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


@contextlib.contextmanager
def told_if_damaged(path: Path) -> Iterator[None]:
    """Turn whatever an unreadable file of a stopped training raises into one sentence."""
    try:
        yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); delete it, and what it held is made again"
        ) from error


def draw(
    pipeline: Any,
    prompts: Draw,
    count: int,
    size: tuple[int, int],
    *,
    steps: int,
    scale: float,
    seed: int,
    folder: Path,
    key: str,
) -> tuple[list[str], torch.Tensor]:
    """`count` prompts and their latents (count, C, *size), float32, kept in `folder`.

    A run that was killed goes on with the chunk that is missing. key: names what draws; chunks of
    another key are refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "drawn.json"
    mine = {"key": key, "seed": seed, "steps": steps, "scale": scale, "size": list(size)}
    if note.exists():
        with told_if_damaged(note):
            found = json.loads(note.read_text())
        if found != mine:
            raise UserError(f"{folder} holds pictures of another training; delete it")
    else:
        partial = note.with_suffix(".partial")
        partial.write_text(json.dumps(mine))
        partial.replace(note)
    channels = pipeline.unet.config.in_channels
    said: list[str] = []
    drawn: list[torch.Tensor] = []
    with tqdm(total=count, desc="draw pictures", mininterval=2) as bar:
        for start in range(0, count, CHUNK):
            n = min(CHUNK, count - start)
            words = prompts(np.random.default_rng([seed, 21, start]), n)
            path = folder / f"drawn-{start:06d}.pt"
            if path.exists():
                with told_if_damaged(path):
                    latents = torch.load(path, map_location="cpu", weights_only=True)
                    if latents.shape != (n, channels, *size):
                        raise ValueError(f"it holds {tuple(latents.shape)}")
            else:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
                noise = torch.randn(n, channels, *size, generator=generator)
                noise = noise.to(pipeline.unet.device)
                latents = sample(pipeline, pipeline.unet, words, noise, steps, scale, generator)
                latents = latents.float().cpu()
                partial = path.with_suffix(".partial")
                torch.save(latents, partial)
                partial.replace(path)
            said += words
            drawn.append(latents)
            bar.update(n)
    return said, torch.cat(drawn)
