"""The scheduler that a recipe names, and the timesteps that it makes."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from mobile_runtime.errors import UserError

# A recipe's name for a scheduler, and the diffusers class.
CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "dpm_solver_pp_2m": "DPMSolverMultistepScheduler",
    "ddpm": "DDPMScheduler",
}


def choose_scheduler(own: Any, name: str) -> Any:
    """The recipe's scheduler with the noise schedule of the pipeline's own; 'source' keeps that.

    A class that would clip its samples to [-1, 1] by default, as pictures want it, does not do so
    with latents: diffusers' StableDiffusionPipeline switches that off for every scheduler too.
    """
    if name == "source":
        return own
    import diffusers

    chosen = getattr(diffusers, CLASSES[name]).from_config(own.config)
    if getattr(chosen.config, "clip_sample", False):
        chosen = type(chosen).from_config(chosen.config, clip_sample=False)
    return chosen


def with_steps(scheduler: Any, steps: int) -> Any:
    """A copy of a diffusers scheduler with its timesteps set; UserError where it cannot."""
    ready = copy.deepcopy(scheduler)
    try:
        with warnings.catch_warnings():
            # diffusers 0.39 makes numpy arrays of tensors in a way that numpy 2 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            ready.set_timesteps(steps)
    except ValueError as error:
        name = type(scheduler).__name__
        raise UserError(f"{name} cannot make {steps} steps: {error}") from error
    return ready


def every_timestep(scheduler: Any, every_steps: Iterable[int]) -> tuple[float, ...]:
    """All timesteps of some numbers of steps, each once, falling; as float32 holds them."""
    found: set[float] = set()
    for steps in every_steps:
        found |= set(with_steps(scheduler, steps).timesteps.to(torch.float32).tolist())
    return tuple(sorted(found, reverse=True))
