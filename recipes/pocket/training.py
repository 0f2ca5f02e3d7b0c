"""The training loop that every stage shares: seeded, checkpointed, resumable.

A stage's batch is a pure function of (seed, step), and a checkpoint holds weights, optimizer and
averages, so a run that was killed and started again ends where an uninterrupted one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic where it is safe."""
    return torch.autocast(device.type, torch.bfloat16)


def step_rng(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step."""
    return np.random.default_rng([seed, stream, step])


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The random tensors of one step, drawn on the CPU so that every device sees the same."""
    state = np.random.SeedSequence([seed, stream, step]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """float (N, 3, H, W) in -1 to 1 -> uint8 (N, H, W, 3)."""
    scaled = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def save_atomically(state: object, path: Path) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


class Average:
    """An exponential moving average of a module's parameters, with a warm-up of its decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().float().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.values[name].lerp_(value.float(), 1 - decay)


@dataclass
class Stage:
    """One stage of training: what is learned, for how long, and how it is watched.

    `loss(step)` draws the step's batch and returns its loss; `watch(step)` returns figures to
    print. `groups` are AdamW parameter groups, each with its own peak `lr`.
    """

    name: str
    module: nn.Module
    loss: Callable[[int], torch.Tensor]
    groups: Iterable[dict]
    steps: int
    warmup: int = 100
    clip_norm: float = 1.0
    average_decay: float | None = None
    save_every: int = 200
    watch_every: int = 200
    watch: Callable[[int], str] | None = None
    decay_steps: int | None = None
    """Where the cosine decay would end, if that is not the stage's last step."""


def _rate(step: int, stage: Stage) -> float:
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    end = stage.decay_steps or stage.steps
    done = (step - stage.warmup) / max(1, end - stage.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(stage: Stage, folder: Path, stop_after: int | None = None) -> Average | None:
    """Train to the stage's end, from its checkpoint in `folder` if there is one.

    `stop_after` ends the call early at that step, as a kill would, with a checkpoint on disk.
    Returns the average of the weights, if the stage keeps one.
    """
    path = folder / f"{stage.name}.ckpt"
    optimizer = torch.optim.AdamW(
        list(stage.groups), betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = Average(stage.module, stage.average_decay) if stage.average_decay else None
    start = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        stage.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.values = state["average"]
        start = state["step"]
    end = min(stage.steps, stop_after if stop_after is not None else stage.steps)

    def save(step: int) -> None:
        save_atomically(
            {
                "module": stage.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values if average else {},
                "step": step,
                "steps": stage.steps,
            },
            path,
        )

    began, cpu = time.monotonic(), time.process_time()
    recent: float | None = None
    bar = tqdm(range(start, end), initial=start, total=stage.steps, desc=stage.name, mininterval=5)
    for step in bar:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _rate(step, stage)
        loss = stage.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(stage.module.parameters(), stage.clip_norm)
        if torch.isfinite(norm):
            optimizer.step()
        if average:
            average.update(stage.module, step)
        value = float(loss.detach())
        recent = value if recent is None else 0.98 * recent + 0.02 * value
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        done = step + 1
        if done % stage.save_every == 0 or done == end:
            save(done)
        if stage.watch and (done % stage.watch_every == 0 or done == stage.steps):
            minutes = (time.monotonic() - began) / 60
            cpu_minutes = (time.process_time() - cpu) / 60
            tqdm.write(
                f"{stage.name} {done}/{stage.steps} loss {recent:.4f} {stage.watch(done)}"
                f" [{minutes:.1f} min, {cpu_minutes:.1f} cpu min]"
            )
    return average
