"""Opens what the reference pipeline draws with: a recipe's source, after its float stages.

Registered in pyproject.toml as the entry point `pocket_diffusion.reference`, so that
`mobile_runtime`, which may not import this package, finds it.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mobile_runtime.manifest import ScheduleTable
from mobile_runtime.reference.parts import Judge, Parts
from recipes import overrides, schema
from recipes.quiet import IMPORT_CHATTER, import_torch, quiet
from recipes.schema import Recipe

DEFAULT_RECIPE = "pocket_turbo"
JUDGED = 512
RANDOM = "random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and what the command line changes in it."""
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME",
        help="whose source, schedule and float stages to take, all but fold and quantize "
        f"(default: {DEFAULT_RECIPE}); see `python -m recipes list`",
    )
    overrides.add_arguments(parser)


def asked_for(arguments: argparse.Namespace) -> bool:
    """Whether the command line says what to open."""
    return arguments.recipe != DEFAULT_RECIPE or bool(overrides.from_arguments(arguments))


def open_asked(arguments: argparse.Namespace) -> Parts:
    """Open the recipe that the command line names."""
    return _open(schema.load(arguments.recipe, overrides.from_arguments(arguments)))


def open_named(recipe: str, changes: Mapping[str, Any]) -> Parts:
    """Open a recipe by its name or file, with some of its keys changed."""
    return _open(schema.load(recipe, dict(changes)))


def open_recipe(recipe: Mapping[str, Any]) -> Parts:
    """Open a resolved recipe, as a manifest holds it."""
    return _open(schema.parse(dict(recipe)))


def _open(recipe: Recipe) -> Parts:
    import_torch("torch", "the reference pipeline")
    with quiet(*IMPORT_CHATTER):
        from converters.convert import compile_generation, read_tokenizer, write_tokenizer
        from recipes import stages
        from recipes.schedulers import choose_scheduler
        from recipes.sources import check_resolution, open_source
    source = open_source(recipe.source.model, recipe.source.revision)
    check_resolution(source.pipeline, recipe.height, recipe.width)
    pipeline = stages.apply(source.pipeline, recipe, stages.changing(recipe)).pipeline
    generation, _ = compile_generation(pipeline, recipe)
    schedule = _schedules(pipeline.scheduler, recipe.schedule.scheduler)
    with quiet():
        pipeline.scheduler = choose_scheduler(pipeline.scheduler, recipe.schedule.scheduler)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = read_tokenizer(write_tokenizer(pipeline, Path(folder)), Path(folder))
    return Parts(
        name=recipe.name,
        text_encoder=pipeline.text_encoder,
        unet=pipeline.unet,
        vae=pipeline.vae,
        tokenizer=tokenizer,
        generation=generation,
        schedule=schedule,
        schedulers=_schedulers(),
        prompts=tuple(recipe.golden_prompts),
        open_tiny=lambda model: _open_tiny(model, pipeline),
        diffusers=pipeline,
        judge=_judge() if recipe.source.model == "embedded" else None,
    )


def _schedulers() -> tuple[str, ...]:
    from recipes.schedulers import CLASSES

    return tuple(CLASSES)


def _schedules(own: Any, default: str) -> Any:
    from converters.schedule import compile_schedule
    from mobile_runtime.errors import choices
    from recipes.schedulers import CLASSES, choose_scheduler

    @cache
    def schedule(steps: int, scheduler: str | None) -> ScheduleTable:
        if scheduler is not None and scheduler not in CLASSES:
            raise choices("scheduler", scheduler, list(CLASSES))
        with quiet():  # diffusers makes arrays in a way that numpy deprecates
            return compile_schedule(choose_scheduler(own, scheduler or default), steps)

    return schedule


def _open_tiny(model: str, pipeline: Any) -> Any:
    """An AutoencoderTiny by folder or hub id; `random`: TAESD's sizes, untrained."""
    import torch

    from recipes.measure import vae_factor
    from recipes.sources.tiny_autoencoder import open_tiny

    if model != RANDOM:
        return open_tiny(model)
    from diffusers import AutoencoderTiny

    sizes = vae_factor(pipeline.vae).bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny: Any = AutoencoderTiny(
            latent_channels=pipeline.unet.config.in_channels,
            encoder_block_out_channels=(64,) * sizes,
            decoder_block_out_channels=(64,) * sizes,
            num_encoder_blocks=(1, *(3,) * (sizes - 1)),
            num_decoder_blocks=(*(3,) * (sizes - 1), 1),
        )
    return tiny.eval().requires_grad_(False)


def _judge() -> Judge:
    """The embedded model's judge, on its held-out captions."""
    from recipes.pocket.evaluate import held_out_scenes
    from recipes.pocket.judge import judge

    cases = held_out_scenes(JUDGED)

    def right(pictures: np.ndarray) -> Sequence[bool]:
        pairs = zip(pictures, cases, strict=False)
        return [judge(picture, scene).ok for picture, (_, scene) in pairs]

    return Judge(tuple(caption for caption, _ in cases), right)
