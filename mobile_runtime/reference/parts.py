"""What the reference pipeline is made of, and who opens it.

This package reads bundles and knows no recipes. What opens sources and runs stages registers itself
as an entry point of the group below (the converters do), so that the import goes the other way.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import Generation, ScheduleTable
from mobile_runtime.pipeline import Tokenizer

GROUP = "pocket_diffusion.reference"


@dataclass(frozen=True)
class Judge:
    """What reads pictures and says how many show what their prompts ask for."""

    prompts: Sequence[str]
    right: Callable[[np.ndarray], Sequence[bool]]
    """Of pictures (N, H, W, 3) uint8 of the first N prompts, which are right."""


@dataclass(frozen=True)
class Parts:
    """A pipeline's modules (PyTorch, float32, on the CPU, eval) and what drives them.

    vae: with `decode`, and `encode` where it has an encoder. schedule: the table of a number of
    steps of a scheduler by its short name, None for the pipeline's own; UserError where there is
    none. open_tiny: an AutoencoderTiny by folder or hub id, or `random` (untrained: for speed).
    diffusers: the whole as diffusers' StableDiffusionPipeline over the same modules, with the
    scheduler of `schedule`.
    """

    name: str
    text_encoder: Any
    unet: Any
    vae: Any
    tokenizer: Tokenizer
    generation: Generation
    schedule: Callable[[int, str | None], ScheduleTable]
    schedulers: tuple[str, ...]
    prompts: tuple[str, ...]
    open_tiny: Callable[[str], Any]
    diffusers: Any
    judge: Judge | None = None


class Opener(Protocol):
    """What an entry point of GROUP is: a module or an object with these functions."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options that say what to open."""

    def asked_for(self, arguments: argparse.Namespace) -> bool:
        """Whether the command line says what to open."""

    def open_asked(self, arguments: argparse.Namespace) -> Parts:
        """Open what the command line says."""

    def open_named(self, recipe: str, changes: Mapping[str, Any]) -> Parts:
        """Open a recipe by its name or file; changes: dotted keys to values."""

    def open_recipe(self, recipe: Mapping[str, Any]) -> Parts:
        """Open the source of a resolved recipe (a manifest's), and run its float stages."""


def opener() -> Opener:
    """The installed opener; UserError where there is none."""
    found = next(iter(entry_points(group=GROUP)), None)
    if found is None:
        raise UserError(
            "nothing that opens pipelines is installed here; install the project with: "
            "pip install -e '.[torch]'"
        )
    loaded: Opener = found.load()
    return loaded
