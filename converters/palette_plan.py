"""Which layers get a palette, and of how many bits: Core ML's target option, planned and applied.

Palettes go over what the stages left as float: a layer of integers keeps them. The bits are the
same for all layers, or mixed by what each costs (palette_bits.py).
"""

import fnmatch
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from tqdm import tqdm

from converters.palette_bits import (
    Choice,
    Options,
    allot,
    decibels,
    noises,
    palettize,
    reference_of,
)
from converters.palettes import FLOAT16_MAX, Palette
from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import prompts
from recipes.faults import collected, did_you_mean
from recipes.palette_settings import MixedPalettes, PaletteSettings
from recipes.quantize import quantizable_layers
from recipes.schema import Recipe

WHERE = "targets.coreml.palettes"
INTEGERS = ("int8", "int4")
FLOAT_BITS = {"float16": 16, "float32": 32}
Arithmetic = Literal["float16", "float32"]


@dataclass(frozen=True)
class Palettes:
    """What `apply` made: the whole plan, the palettes by layer, and a record of them (JSON)."""

    plans: list[LayerPlan]
    palettes: dict[str, Palette]
    record: dict[str, Any]


def check(
    pipeline: Any, plans: Sequence[LayerPlan], settings: PaletteSettings, arithmetic: Arithmetic
) -> None:
    """Refuse, before any work, palettes that nothing would get, or that no budget allows.

    pipeline: after the stages; the meta device will do. plans: what they decided. arithmetic: what
    a float weight is stored in. UserError tells all faults.
    """
    faults = []
    layers = _float_layers(pipeline, plans, settings)
    named = ", ".join(settings.components)
    if not layers:
        faults.append(f"no layer of {named} is left in float; leave palettes out, or quantize less")
    faults += [
        f"the rule for layers {rule.layers!r} matches no float layer of {named}"
        + did_you_mean(rule.layers, list(layers))
        for rule in settings.rules
        if layers and not fnmatch.filter(layers, rule.layers)
    ]
    options = _options(layers, settings, FLOAT_BITS[arithmetic])
    if layers and not any(choice.bits for option in options.values() for choice in option.choices):
        faults.append(f"no layer of {named} would get one: see the rules, and bits and group_size")
    if settings.mixed is not None:
        with collected(faults):
            prompts.check(settings.mixed.prompts)
        average = settings.mixed.average_bits
        for component, mine in _by_component(layers).items():
            least = sum(min(c.stored for c in options[path].choices) for path in mine)
            lowest = least / _weights(mine)
            if average is not None and average < lowest:
                faults.append(
                    f"mixed.average_bits is {average:g}, and {component} takes at least "
                    f"{math.ceil(lowest * 100) / 100:g} with its tables; give more, or smaller "
                    "widths"
                )
    if faults:
        raise UserError(f"{WHERE}: {'; '.join(faults)}")


def stored_bits(
    pipeline: Any, plans: Sequence[LayerPlan], settings: PaletteSettings, arithmetic: Arithmetic
) -> dict[str, float]:
    """The bits that each palettized layer's weight will take, for `--dry-run`.

    A mixed plan is made when all is measured. Until then a layer has what its average allows, or,
    with an SNR to reach, its float weight.
    """
    layers = _float_layers(pipeline, plans, settings)
    if settings.mixed is not None and settings.mixed.average_bits is not None:
        return {p: settings.mixed.average_bits * x.weight.numel() for p, x in layers.items()}
    options = _options(layers, settings, FLOAT_BITS[arithmetic])
    return {path: option.choices[-1].stored for path, option in options.items()}


def apply(
    pipeline: Any,
    plans: Sequence[LayerPlan],
    recipe: Recipe,
    settings: PaletteSettings,
    arithmetic: Arithmetic,
) -> Palettes:
    """Give the pipeline's float layers the weights of their palettes, in place.

    pipeline: after the stages. Raises UserError as `check` does, and for a weight that is not
    finite.
    """
    check(pipeline, plans, settings, arithmetic)
    layers = _float_layers(pipeline, plans, settings)
    options = _options(layers, settings, FLOAT_BITS[arithmetic])
    noise: dict[str, dict[int | None, float]] = {}
    mixed = settings.mixed
    if mixed is None:
        taken = {path: option.choices[0] for path, option in options.items()}
    else:
        reference = reference_of(pipeline, recipe, settings.components, mixed)
        noise = noises(layers, options, reference)
        taken = _mixed(layers, options, noise, mixed)
    palettes: dict[str, Palette] = {}
    snr_db: dict[str, float] = {}
    for path, choice in tqdm(taken.items(), desc="palettes", unit="layer", delay=2, leave=False):
        if choice.bits is not None:
            before = layers[path].weight
            palettes[path] = palettize(layers[path], choice.bits, options[path].tables)
            error = (layers[path].weight - before).double().square().sum()
            snr_db[path] = decibels(float(error / before.double().square().sum().clamp_min(1e-300)))
    record = _record(layers, taken, snr_db)
    if mixed is not None:
        record["predicted_snr_db"] = {
            name: decibels(sum(noise[path][taken[path].bits] for path in mine))
            for name, mine in _by_component(layers).items()
        }
        record["measured_snr_db"] = {name: reference.snr_db(name) for name in settings.components}
    decided = {
        path: _plan(path, choice, options[path], noise.get(path), arithmetic)
        for path, choice in taken.items()
    }
    return Palettes(_merged(plans, decided, settings), palettes, record)


def _mixed(
    layers: Mapping[str, Any],
    options: Mapping[str, Options],
    noise: Mapping[str, Mapping[int | None, float]],
    mixed: MixedPalettes,
) -> dict[str, Choice]:
    """Each layer's choice; every component has the budget to itself."""
    taken: dict[str, Choice] = {}
    for mine in _by_component(layers).values():
        budget = None if mixed.average_bits is None else mixed.average_bits * _weights(mine)
        loudest = None if mixed.snr_db is None else 10 ** (-mixed.snr_db / 10)
        taken |= allot({path: options[path].choices for path in mine}, noise, budget, loudest)
    return taken


def _record(
    layers: Mapping[str, Any], taken: Mapping[str, Choice], snr_db: Mapping[str, float]
) -> dict[str, Any]:
    """What was done (JSON). snr_db: of each palettized weight."""
    counts = Counter(choice.bits for choice in taken.values())
    worst = min(snr_db, key=lambda path: snr_db[path], default=None)
    return {
        "stage": "palettes",
        "layers": {str(bits or "float"): counts[bits] for bits in sorted(counts, key=str)},
        "bits_a_weight": {
            name: round(sum(taken[path].stored for path in mine) / _weights(mine), 3)
            for name, mine in _by_component(layers).items()
        },
        "weight_snr_db_min": snr_db[worst] if worst else None,
        "weight_snr_db_min_layer": worst,
        "weight_snr_db_median": round(statistics.median(snr_db.values()), 2) if worst else None,
    }


def _float_layers(
    pipeline: Any, plans: Sequence[LayerPlan], settings: PaletteSettings
) -> dict[str, Any]:
    """Every layer that is float, by its path; parts of a layer of integers are none."""
    integers = tuple(f"{plan.layer}." for plan in plans if plan.weights in INTEGERS)
    found = quantizable_layers(pipeline, settings.components)
    return {path: x for path, x in found.items() if not f"{path}.".startswith(integers)}


def _by_component(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path, layer in layers.items():
        found.setdefault(path.split(".")[0], {})[path] = layer
    return found


def _weights(layers: Mapping[str, Any]) -> int:
    return sum(layer.weight.numel() for layer in layers.values())


def _options(
    layers: Mapping[str, Any], settings: PaletteSettings, float_bits: int
) -> dict[str, Options]:
    return {path: _options_of(path, layer, settings, float_bits) for path, layer in layers.items()}


def _options_of(path: str, layer: Any, settings: PaletteSettings, float_bits: int) -> Options:
    """What a layer may become, the smallest first; float is among it where the bits are mixed."""
    weights, channels = layer.weight.numel(), len(layer.weight)
    unpalettized = Choice(None, weights * float_bits)
    group = settings.group_size
    # The rows of an embedding are looked up one by one; they share a table.
    grouped = group and not isinstance(layer, nn.Embedding) and channels % group == 0
    tables = channels // group if group and grouped else 1
    reason = f"{settings.bits} bits for all" if settings.mixed is None else "mixed"
    if group and not grouped:
        reason += f", one table (no groups of {group} in {channels} channels)"
    widths: list[int] = list(settings.mixed.widths if settings.mixed else [])
    widths = [settings.bits] if settings.bits is not None else widths
    mixed = settings.mixed is not None
    for rule in settings.rules:
        if fnmatch.fnmatchcase(path, rule.layers):
            widths, mixed = [] if rule.bits == "float" else [rule.bits], False
            reason = f"rule {rule.layers}: {rule.reason}"
    if not layer.weight.is_meta:
        low, high = (float(bound) for bound in layer.weight.aminmax())
        if not math.isfinite(low - high):
            raise UserError(
                f"the weight of {path} holds NaN or Inf; the source's files are damaged"
            )
        if max(-low, high) > FLOAT16_MAX:
            return Options((unpalettized,), "its weight does not fit float16", tables)
    choices = [Choice(b, weights * b + tables * 2**b * float_bits) for b in sorted(widths)]
    choices = [choice for choice in choices if choice.stored < unpalettized.stored]
    if widths and not choices:
        reason += "; but with its table it would take more than the float weight"
    if mixed or not choices:
        choices.append(unpalettized)
    return Options(tuple(choices), reason, tables)


def _plan(
    path: str,
    choice: Choice,
    options: Options,
    noise: Mapping[int | None, float] | None,
    arithmetic: Arithmetic,
) -> LayerPlan:
    alone = {bits: decibels(power) for bits, power in (noise or {}).items() if bits is not None}
    told = ", ".join(f"{bits} bits {db} dB" for bits, db in alone.items())
    reason = options.reason + (f"; alone: {told}" if told else "")
    if choice.bits is None:
        return LayerPlan(layer=path, weights=arithmetic, reason=f"palettes: {reason}")
    return LayerPlan(
        layer=path,
        weights="palette",
        bits=choice.bits,
        tables=options.tables,
        reason=f"palettes: {reason}",
    )


def _merged(
    plans: Sequence[LayerPlan], decided: Mapping[str, LayerPlan], settings: PaletteSettings
) -> list[LayerPlan]:
    """The stages' plan with what the palettes decided in its place, and what they add."""
    merged = []
    for plan in plans:
        if plan.layer in decided:
            plan = decided[plan.layer]
        elif plan.weights in INTEGERS and plan.layer.split(".")[0] in settings.components:
            told = f"{plan.reason}; keeps its integers, so no palette"
            plan = plan.model_copy(update={"reason": told})
        merged.append(plan)
    known = {plan.layer for plan in plans}
    return merged + [plan for path, plan in decided.items() if path not in known]
