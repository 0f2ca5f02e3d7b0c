"""Mixed palettes: each layer alone at each width, and the bits where they pay most.

A layer's noise is what its palette alone makes of its component's output (as MixDQ measures
activations, arXiv 2405.17873). The noise powers of layers are added up, as if they had nothing to
do with each other; what all palettes together leave is measured, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from converters.palettes import Palette, palettized
from recipes import calibrate
from recipes.journal import digest_of, journal
from recipes.palette_settings import MixedPalettes
from recipes.quantize import component_modules
from recipes.schema import Recipe
from recipes.sensitivity import Reference
from recipes.settings import CalibrationSettings


@dataclass(frozen=True)
class Choice:
    """What a layer may become: a palette of so many bits, or float (None)."""

    bits: int | None
    stored: int
    """Bits in the file, the tables with them."""


@dataclass(frozen=True)
class Options:
    """What one layer may become, the reason, and the number of its tables."""

    choices: tuple[Choice, ...]
    reason: str
    tables: int


def allot(
    options: Mapping[str, Sequence[Choice]],
    noise: Mapping[str, Mapping[int | None, float]],
    budget: float | None,
    loudest: float | None,
) -> dict[str, Choice]:
    """The choice of each layer: from the smallest on, the step that pays most is taken.

    noise: of each layer and each number of bits, the noise power that it alone adds to the output,
    the signal's being 1. budget: bits that all may take together. loudest: the noise of all
    together to come down to. One of the two is given. A step may skip a width, so that a width that
    gains little does not bar the next.
    """
    taken = {path: min(choices, key=lambda c: c.stored) for path, choices in options.items()}
    while loudest is None or sum(noise[p][c.bits] for p, c in taken.items()) > loudest:
        left = math.inf if budget is None else budget - sum(c.stored for c in taken.values())
        steps = [
            ((noise[path][now.bits] - noise[path][choice.bits]) / extra, path, choice)
            for path, now in taken.items()
            for choice in options[path]
            if 0 < (extra := choice.stored - now.stored) <= left
        ]
        gain, path, choice = max(steps, key=lambda s: (s[0], s[1]), default=(0.0, "", None))
        if choice is None or gain <= 0:
            break
        taken[path] = choice
    return taken


def palettize(layer: Any, bits: int, tables: int) -> Palette:
    """Put the weight of a palette in the place of a layer's; the old one is left as it was."""
    weight, palette = palettized(layer.weight.detach().float().numpy(), bits, tables)
    layer.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    return palette


def reference_of(
    pipeline: Any, recipe: Recipe, components: Sequence[str], mixed: MixedPalettes
) -> Reference:
    """The components, and what they see in the first, middle and last calls of some pictures."""
    modules = {
        name: [module for _, module in component_modules(pipeline, name)] for name in components
    }
    drawn = CalibrationSettings(samples=mixed.samples, prompts=mixed.prompts, seed=mixed.seed)
    roots = {name: parts[0] for name, parts in modules.items()}
    calls = calibrate.calibrate(pipeline, {}, [], roots, recipe, drawn, mixed.samples).calls
    spread = {
        name: [every[k] for k in sorted({0, len(every) // 2, len(every) - 1})]
        for name, every in calls.items()
    }
    return Reference(modules, spread)


def noises(
    layers: Mapping[str, Any], options: Mapping[str, Options], reference: Reference
) -> dict[str, dict[int | None, float]]:
    """The noise of each layer alone with each of its palettes, in the output's power.

    What was measured stays when the run is killed (journal.py).
    """
    found: dict[str, dict[int | None, float]] = {}
    bar = tqdm(layers.items(), desc="palettes alone", unit="layer", delay=2, leave=False)
    with journal("palettes", reference.digest()) as figure:
        for path, layer in bar:
            found[path] = {None: 0.0}
            known = digest_of([layer.weight])
            for choice in options[path].choices:
                if choice.bits is not None:
                    tables = options[path].tables
                    alone = partial(_alone, layer, choice.bits, tables, reference, path)
                    snr_db = figure(f"{path} {known} {choice.bits} {tables}", alone)
                    found[path][choice.bits] = 10 ** (-snr_db / 10)
    return found


def _alone(layer: Any, bits: int, tables: int, reference: Reference, path: str) -> float:
    """The SNR in dB of the component's output with this layer's palette alone."""
    weight = layer.weight
    palettize(layer, bits, tables)
    try:
        return reference.snr_db(path.split(".")[0])
    finally:
        layer.weight = weight


def decibels(noise: float) -> float:
    """A noise power, the signal's being 1, as an SNR in dB; at most 200."""
    return round(-10 * math.log10(max(noise, 1e-20)), 2)
