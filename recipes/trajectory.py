"""A student beside its teacher, at the calls of the few steps that a pipeline draws in.

Nothing is noised: the teacher walks its own steps from pure noise, so all that it takes is prompts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recipes import drawn
from recipes.losses import Features, feature_loss
from recipes.prompts import Draw
from recipes.schedulers import with_steps
from recipes.trainer import Batch


@dataclass(frozen=True)
class Call:
    """What a UNet is called with, and what the teacher makes of it."""

    x: Tensor
    t: Tensor
    states: Tensor
    out: Tensor
    features: Features


@dataclass(frozen=True)
class Trajectory:
    """The teacher's way from noise to a picture.

    pipeline: for its text encoder and tokenizer, on the device to work on, as the teacher (a UNet)
    is. scheduler: its steps are walked, `steps` of them; of several numbers, each call of a UNet is
    as likely as any other. size: height and width of the latents. teacher_guidance,
    student_guidance: the scales under which outputs are compared; 1 or less: none.
    """

    pipeline: Any
    teacher: Any
    scheduler: Any
    steps: tuple[int, ...]
    size: tuple[int, int]
    draw_prompts: Draw
    teacher_guidance: float
    student_guidance: float

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every call: the number of steps, and which of them it is."""
        return [(steps, index) for steps in self.steps for index in range(steps)]

    def call(self, batch: Batch, place: tuple[int, int] | None = None) -> Call:
        """One of the calls (`places`), of pictures that the batch's random numbers choose.

        place: None for any.
        """
        rng, generator = batch.rng(), batch.generator()
        states = drawn.text_states(self.pipeline, self.draw_prompts(rng, batch.size))
        channels = self.teacher.config.in_channels
        noise = torch.randn(batch.size, channels, *self.size, generator=generator)
        steps, stop = place or self.places[int(rng.integers(len(self.places)))]
        scheduler = with_steps(self.scheduler, steps)
        options = {"generator": generator} if drawn.adds_noise(scheduler) else {}
        x = noise.to(states.device) * scheduler.init_noise_sigma
        with torch.no_grad():
            for index, t in enumerate(scheduler.timesteps):
                scaled, at = scheduler.scale_model_input(x, t), t.to(x.device)
                with Features(self.teacher) as features:
                    out = self.guided(self.teacher, scaled, at, states, self.teacher_guidance)
                if index == stop:
                    if self.teacher_guidance > 1 >= self.student_guidance:
                        features.keep_second_half()  # of the empty prompt and the said one
                    return Call(scaled, at, states, out, features)
                x = scheduler.step(out, t, x, **options).prev_sample
        raise AssertionError(f"{steps} steps have no step {stop}")

    def guided(self, unet: Any, x: Tensor, t: Tensor, states: Tensor, scale: float) -> Tensor:
        """A UNet's output under guidance, float32."""
        empty = drawn.text_states(self.pipeline, [""]) if scale > 1 else None
        return drawn.guided(unet, x, t, states, empty, scale).float()

    def answer(self, student: Any, call: Call) -> Tensor:
        """The student's output for a call."""
        return self.guided(student, call.x, call.t, call.states, self.student_guidance)

    def loss(self, student: Any, batch: Batch, feature_weight: float) -> Tensor:
        """The mean squared error of the student's output, and of its blocks' (losses.py)."""
        call = self.call(batch)
        inner = getattr(student, "module", student)  # what accelerate has wrapped
        with Features(inner) as mine:
            out = self.answer(student, call)
        total = nn.functional.mse_loss(out, call.out)
        return (
            total + feature_weight * feature_loss(mine, call.features) if feature_weight else total
        )
