"""The training loop of every stage that trains: seeded, resumable, on one process or many.

It runs through `accelerate`: plainly on this machine's CPU or GPU, or on several with
`accelerate launch -m recipes.distill ...`. A batch is a pure function of (seed, step, part,
process) and a checkpoint holds weights, optimizer and average, so a run that was killed ends where
an uninterrupted one does. Weights that are not trained are held once, and are in no checkpoint.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from tqdm import tqdm

from mobile_runtime.errors import UserError
from recipes.drawn import told_if_damaged
from recipes.measure import share_structure
from recipes.settings import TrainingSettings

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SMOOTHING = 0.98
CURVE_POINTS = 500
"""About as many points has the curve of the loss."""
MAX_NORM = 1.0
"""Gradients are clipped to this norm."""


@dataclass(frozen=True)
class Batch:
    """What one batch may draw from: the same numbers wherever and whenever it is computed."""

    seed: int
    step: int
    part: int
    process: int
    size: int
    device: torch.device
    average: nn.Module
    """The average of the weights so far: a consistency model's target."""

    def rng(self) -> np.random.Generator:
        """The batch's random numbers."""
        return np.random.default_rng([self.seed, self.step, self.part, self.process])

    def generator(self) -> torch.Generator:
        """The batch's random tensors, drawn on the CPU so that every device sees the same."""
        words = [self.seed, self.step, self.part, self.process, 1]
        state = np.random.SeedSequence(words).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


Loss = Callable[[nn.Module, Batch], torch.Tensor]
Watch = Callable[[nn.Module], np.ndarray]


@dataclass
class Job:
    """One training: `module` (float32) is trained in place on `loss(module, batch)`.

    trainable(name): whether a parameter is trained; the average shares the others with the module.
    folder: for its checkpoint, `loss.csv`, `loss.png` and the watched pictures. key: names what is
    trained; a checkpoint of another key is refused. watch(average) gives pictures (uint8,
    (H, W, 3)) to keep.
    """

    name: str
    module: nn.Module
    loss: Loss
    settings: TrainingSettings
    folder: Path
    key: str
    watch: Watch | None = None
    trainable: Callable[[str], bool] = field(default=lambda name: True)


def beside(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of pictures (N, H, W, 3) as one picture, to be watched."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def accelerator() -> Accelerator:
    """Where to train: what `accelerate launch` arranged, else this machine's GPU or CPU."""
    # Others wait while the first process draws pictures, for longer than the usual ten minutes.
    waits = InitProcessGroupKwargs(timeout=timedelta(days=2))
    # The recipe says both; else accelerate's own configuration would change what a key names.
    once = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(
        mixed_precision="no", gradient_accumulation_plugin=once, kwargs_handlers=[waits]
    )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Arithmetic in a precision; float32 is none at all."""
    dtype = _DTYPES.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def train(job: Job) -> Any:
    """Train to the end, from the job's checkpoint if there is one.

    Returns the average of the weights as a module of its own (or the last weights, where the
    settings ask for no average), in eval mode on the CPU. Raises UserError for a checkpoint of
    another training, and for a loss or a gradient that is not finite.
    """
    settings, where = job.settings, accelerator()
    module = job.module.train().to(where.device)
    weights = [tensor for name, tensor in module.named_parameters() if job.trainable(name)]
    for name, tensor in module.named_parameters():
        tensor.requires_grad_(job.trainable(name))
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, betas=(0.9, 0.99), fused=True)
    average = copied(module, job.trainable).requires_grad_(False)
    scaler = torch.amp.GradScaler(where.device.type, enabled=settings.precision == "float16")
    start, history = _resume(job, module, optimizer, scaler, average)
    wrapped, optimizer = where.prepare(module, optimizer)
    smooth = history[-1][1] if history else None
    bar = tqdm(
        range(start, settings.iterations),
        initial=start,
        total=settings.iterations,
        desc=job.name,
        mininterval=2,
        disable=not where.is_main_process,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings)
        total = 0.0
        for part in range(settings.accumulate):
            batch = Batch(
                settings.seed,
                step,
                part,
                where.process_index,
                settings.batch,
                where.device,
                average,
            )
            last = part == settings.accumulate - 1
            # Gradients travel between processes once a step.
            with where.no_sync(wrapped) if not last else autocast(where.device, "float32"):
                with autocast(where.device, settings.precision):
                    loss = job.loss(wrapped, batch) / settings.accumulate
                where.backward(scaler.scale(loss))
            total += float(loss.detach())
        if not np.isfinite(total) and step == 0:
            raise UserError(
                f"{job.name}: the loss is {total} before anything was trained; the source's "
                "weights overflow, or the precision does not hold what they give: take float32, "
                "or another source"
            )
        if not np.isfinite(total):
            raise UserError(
                f"{job.name}: the loss is {total} at step {step}; lower learning_rate, or train in "
                "bfloat16 or float32"
            )
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(weights, MAX_NORM))
        # Of float16 the scaler leaves such a step out, and scales the next one less.
        if not np.isfinite(norm) and not scaler.is_enabled():
            raise UserError(
                f"{job.name}: the gradient is {norm} at step {step}; lower learning_rate, or train "
                "in float32"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        _follow(job, average, module, step)
        smooth = total if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * total
        bar.set_postfix(loss=f"{smooth:.4g}", refresh=False)
        done = step + 1
        end = done == settings.iterations
        if where.is_main_process:
            if end or done % max(1, settings.iterations // CURVE_POINTS) == 0:
                history.append((done, smooth))
            if end or done % settings.save_every == 0 or done % settings.watch_every == 0:
                _save(job, module, optimizer, scaler, average, done, history)
            if end or done % settings.watch_every == 0:
                _show(job, average.eval(), done, history)
    where.wait_for_everyone()
    module.zero_grad(set_to_none=True)
    return average.eval().to("cpu")


def _rate(step: int, settings: TrainingSettings) -> float:
    """A linear warm-up, then a cosine to a tenth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.iterations - settings.warmup)
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * done)))


@torch.no_grad()
def _follow(job: Job, average: nn.Module, module: nn.Module, step: int) -> None:
    decay = job.settings.average_decay
    decay = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    values = _trained(job, module)
    for name, mean in _trained(job, average).items():
        mean.lerp_(values[name], 1 - decay)


def copied(module: nn.Module, own: Callable[[str], bool]) -> Any:
    """A copy of a module whose parameters are the module's but for its own ones, `own(name)`."""
    shared = {id(tensor) for name, tensor in module.named_parameters() if not own(name)}
    return share_structure(
        module, lambda tensor: tensor if id(tensor) in shared else tensor.detach().clone()
    )


def _trained(job: Job, module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.named_parameters() if job.trainable(name)}


@torch.no_grad()
def _fill(weights: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(kept[name])


def _checkpoint(job: Job) -> Path:
    return job.folder / f"{job.name}.ckpt"


def _resume(
    job: Job, module: nn.Module, optimizer: Any, scaler: Any, average: nn.Module
) -> tuple[int, list[tuple[int, float]]]:
    path = _checkpoint(job)
    if not path.exists():
        return 0, []
    with told_if_damaged(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("key") != job.key:
        raise UserError(
            f"{path} is a checkpoint of another training; delete it, or name another folder"
        )
    processes = state.get("processes", 1)
    if processes != accelerator().num_processes:
        raise UserError(
            f"{path} was trained by {processes} processes, and there are "
            f"{accelerator().num_processes}; start as many, or delete it to begin anew"
        )
    with told_if_damaged(path):
        _fill(_trained(job, module), state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # of float16 alone
            scaler.load_state_dict(state["scaler"])
        _fill(_trained(job, average), state["average"])
        return state["step"], [(step, loss) for step, loss in state["history"]]


def _save(
    job: Job,
    module: nn.Module,
    optimizer: Any,
    scaler: Any,
    average: nn.Module,
    step: int,
    history: list[tuple[int, float]],
) -> None:
    """Write the checkpoint whole or not at all."""
    state = {
        "key": job.key,
        "processes": accelerator().num_processes,
        "module": _trained(job, module),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "average": _trained(job, average),
        "step": step,
        "history": history,
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    partial = _checkpoint(job).with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(_checkpoint(job))


def _show(job: Job, average: nn.Module, step: int, history: list[tuple[int, float]]) -> None:
    """Keep the watched pictures, if any, and the loss as a table and as a curve."""
    from matplotlib.figure import Figure
    from PIL import Image

    if job.watch is not None:
        Image.fromarray(job.watch(average)).save(job.folder / f"{job.name}-{step:06d}.png")
    with (job.folder / f"{job.name}-loss.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *history])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history, strict=True))
    axes.set(xlabel="optimizer step", ylabel="loss (smoothed)", title=job.name)
    if any(loss > 0 for _, loss in history):
        axes.set_yscale("log")
    figure.savefig(job.folder / f"{job.name}-loss.png")
