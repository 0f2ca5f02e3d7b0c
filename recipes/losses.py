"""What a student learns from its teacher: targets and losses, as the papers have them.

Times are timesteps of the noise schedule, x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1.
Tensors are (N, C, h, w); times (N,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobile_runtime.errors import UserError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, timesteps) -> the model's output."""


@dataclass(frozen=True)
class Noise:
    """A noise schedule: alpha^2 by timestep, and what the model predicts."""

    alphas_cumprod: Tensor
    prediction: str

    @classmethod
    def of(cls, scheduler: Any, device: torch.device) -> "Noise":
        """That of a diffusers scheduler; UserError where it has none."""
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(scheduler).__name__} has no noise schedule to distill by; choose a "
                "pipeline with DDIM, Euler, DPM-Solver, DDPM or LCM"
            )
        return cls(scheduler.alphas_cumprod.to(device).float(), scheduler.config.prediction_type)

    @property
    def last(self) -> int:
        """The noisiest timestep."""
        return len(self.alphas_cumprod) - 1

    def pair(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps, each (N, 1, 1, 1); timestep -1 is free of noise."""
        squared = torch.where(t >= 0, self.alphas_cumprod[t.clamp(min=0)], 1.0)
        return squared.sqrt()[:, None, None, None], (1 - squared).sqrt()[:, None, None, None]

    def add(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x at timesteps."""
        alpha, sigma = self.pair(t)
        return alpha * x0 + sigma * eps

    def x0(self, x: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """What a model's output says of the noiseless latents."""
        alpha, sigma = self.pair(t)
        if self.prediction == "v_prediction":
            return alpha * x - sigma * out
        if self.prediction == "epsilon":
            return (x - sigma * out) / alpha
        return out

    def output(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a model should give for x0 and the noise on it."""
        alpha, sigma = self.pair(t)
        if self.prediction == "v_prediction":
            return alpha * eps - sigma * x0
        return eps if self.prediction == "epsilon" else x0

    def ddim(self, x: Tensor, x0: Tensor, t: Tensor, after: Tensor) -> Tensor:
        """One DDIM step (arXiv:2010.02502, eta 0) from t to `after`."""
        alpha, sigma = self.pair(t)
        alpha_after, sigma_after = self.pair(after)
        return alpha_after * x0 + sigma_after / sigma * (x - alpha * x0)

    def x0_of_step(self, x: Tensor, x_after: Tensor, t: Tensor, after: Tensor) -> Tensor:
        """The x0 with which one DDIM step leads from x to x_after."""
        alpha, sigma = self.pair(t)
        alpha_after, sigma_after = self.pair(after)
        ratio = sigma_after / sigma
        return (x_after - ratio * x) / (alpha_after - ratio * alpha)

    def grid(self, steps: int) -> Tensor:
        """The timesteps of `steps` even (trailing) steps, falling, and -1 at the end."""
        total = self.last + 1
        times = [round(total * (steps - index) / steps) - 1 for index in range(steps)]
        return torch.tensor([*times, -1], device=self.alphas_cumprod.device)


def progressive(
    noise: Noise,
    student: Denoise,
    teacher: Denoise,
    x0: Tensor,
    eps: Tensor,
    steps: int,
    at: Tensor,
) -> Tensor:
    """Progressive distillation (arXiv:2202.00512): one step of the student is two of the teacher.

    steps: the student's. at: (N,) which of them each row is at. The loss is on x0, weighted by
    max(SNR, 1) ("truncated SNR").
    """
    fine = noise.grid(2 * steps)
    t, middle, after = fine[2 * at], fine[2 * at + 1], fine[2 * at + 2]
    x = noise.add(x0, eps, t)
    with torch.no_grad():
        half = noise.ddim(x, noise.x0(x, teacher(x, t), t), t, middle)
        whole = noise.ddim(half, noise.x0(half, teacher(half, middle), middle), middle, after)
        target = noise.x0_of_step(x, whole, t, after)
    alpha, sigma = noise.pair(t)
    weight = (alpha / sigma).square().clamp(min=1)
    said = noise.x0(x, student(x, t).float(), t)
    return (weight * (said - target).square()).mean()


SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
HUBER = 0.001


def consistency(noise: Noise, x: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """f(x, t) = c_skip x + c_out x0, which is x itself at t = 0 (arXiv:2303.01469)."""
    scaled = (t.float() * TIMESTEP_SCALING)[:, None, None, None]
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip * x + c_out * noise.x0(x, out, t)


def latent_consistency(
    noise: Noise,
    student: Denoise,
    target: Denoise,
    teacher: Denoise,
    x0: Tensor,
    eps: Tensor,
    solver_steps: int,
    at: Tensor,
) -> Tensor:
    """Latent consistency (arXiv:2310.04378): f agrees at both ends of one step of the solver.

    solver_steps: of DDIM, by the teacher. at: (N,) which of them each row is at, 0 the noisiest.
    target: the student's average. The loss is pseudo-Huber with c = 0.001.
    """
    stride = (noise.last + 1) // solver_steps
    t = noise.last - at * stride
    after = (t - stride).clamp(min=0)
    x = noise.add(x0, eps, t)
    with torch.no_grad():
        before = noise.ddim(x, noise.x0(x, teacher(x, t), t), t, after)
        goal = consistency(noise, before, target(before, after).float(), after)
    said = consistency(noise, x, student(x, t).float(), t)
    return ((said - goal).square() + HUBER**2).sqrt().mean() - HUBER


class Features:
    """The outputs of a UNet's blocks in its latest call, by the block's name."""

    def __init__(self, unet: Any) -> None:
        self.seen: dict[str, Tensor] = {}
        blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
        # Counted from the end, so that a UNet without its deepest level lines up with a whole one.
        blocks |= {f"up_blocks.-{i}": b for i, b in enumerate(reversed(unet.up_blocks), start=1)}
        if unet.mid_block is not None:
            blocks["mid_block"] = unet.mid_block
        self._hooks = [
            block.register_forward_hook(lambda module, args, out, name=name: self._see(name, out))
            for name, block in blocks.items()
        ]

    def _see(self, name: str, out: Any) -> None:
        self.seen[name] = out[0] if isinstance(out, tuple) else out

    def keep_second_half(self) -> None:
        """Of a pair of batches in one call, the outputs of the second."""
        self.seen = {name: out.chunk(2)[1] for name, out in self.seen.items()}

    def __enter__(self) -> "Features":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def feature_loss(student: Features, teacher: Features) -> Tensor:
    """The mean of the blocks' squared errors (arXiv:2305.15798), of blocks of the same shape."""
    terms = [
        F.mse_loss(out.float(), teacher.seen[name].float())
        for name, out in student.seen.items()
        if name in teacher.seen and teacher.seen[name].shape == out.shape
    ]
    if not terms:
        raise UserError(
            "no block of the student gives what one of the teacher gives; set feature_weight to 0"
        )
    return torch.stack(terms).mean()


def snr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to noise of a tensor against its reference, in dB."""
    noise = float((other.double() - reference.double()).square().sum())
    signal = float(reference.double().square().sum())
    if not signal:
        return -math.inf if noise else math.inf
    return 10 * math.log10(signal / noise) if noise else math.inf


def check_fit(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a teacher and a student of other latents or other text."""
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        theirs, mine = (getattr(unet.config, key) for unet in (teacher, student))
        if theirs != mine:
            raise UserError(
                f"the teacher's UNet has {key} {theirs} and the student's {mine}; a student needs "
                "a teacher of the same latents and text"
            )
