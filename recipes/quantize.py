"""The plan: which layers become integers, and why. Made once; every target lowers the result.

The layers themselves are in quantized_layers.py, those of 4 bits in int4_layers.py. Scales of
static activations come from a run of the float pipeline (calibrate.py), and a budget may keep the
most sensitive layers' activations in float (sensitivity.py).

The first token of a prompt is an outlier in SDXL-Turbo, and MixDQ keeps its keys and values in
float. In the embedded model it is none: of the layers that make keys and values of text, measured
one by one, the most sensitive leaves 63 dB of the UNet's output (the median of its layers: 81 dB;
the least, conv_out: 33 dB; the plan in the manifest of `pocket_turbo_w8a8` tells each), so there is
no such exception here. A real model's recipes name those layers in a rule.
"""

import difflib
import fnmatch
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from mobile_runtime.errors import UserError
from mobile_runtime.manifest import LayerPlan
from recipes import calibrate, int4_layers, sensitivity
from recipes.faults import collected
from recipes.measure import measure
from recipes.quantized_layers import (
    REPLACEMENTS,
    SkipConv2d,
    Static,
    quantized,
    weight_snr_db,
)
from recipes.schema import Recipe
from recipes.settings import Activations, QuantizeSettings

SENSITIVE = ("*.conv_in", "*.conv_out")
"""Layers that int4 passes over unless a rule names them: the first and the last of a component.

They are the most sensitive ones of SDXL-Turbo (MixDQ, arXiv:2405.17873), and small.
"""


def component_modules(pipeline: Any, component: str) -> list[tuple[str, nn.Module]]:
    """The parts of a pipeline that make up a component, as (path in the plan, module)."""
    vae = pipeline.vae
    table: dict[str, list[tuple[str, nn.Module | None]]] = {
        "text_encoder": [("text_encoder", pipeline.text_encoder)],
        "unet": [("unet", pipeline.unet)],
        "vae_decoder": [
            ("vae_decoder.post_quant_conv", getattr(vae, "post_quant_conv", None)),
            ("vae_decoder.decoder", vae.decoder),
        ],
        "vae_encoder": [
            ("vae_encoder.encoder", vae.encoder),
            ("vae_encoder.quant_conv", getattr(vae, "quant_conv", None)),
        ],
    }
    return [(path, module) for path, module in table[component] if module is not None]


def quantizable_layers(pipeline: Any, components: Sequence[str]) -> dict[str, nn.Module]:
    """Every layer that could be quantized, by its path in the plan, in the pipeline's order."""
    return {
        ".".join(part for part in (path, name) if part): module
        for component in components
        for path, root in component_modules(pipeline, component)
        for name, module in root.named_modules()
        if type(module) in REPLACEMENTS
    }


def check(pipeline: Any, settings: QuantizeSettings, recipe: Recipe | None = None) -> None:
    """Refuse, before any work, a rule that matches no layer, and prompts that cannot be used.

    recipe: None only where the settings ask for no calibration and no budget. UserError tells all
    faults.
    """
    faults = []
    layers = list(quantizable_layers(pipeline, settings.components))
    faults += [
        _no_match(rule.layers, layers, settings.components)
        for rule in settings.rules
        if not fnmatch.filter(layers, rule.layers)
    ]
    if settings.keep or "int8_static" in settings.every_activations:
        if recipe is None:
            raise ValueError("layers are measured on a recipe's schedule")
        with collected(faults):
            calibrate.check(recipe, settings.calibration)
    if settings.keep and settings.keep.bytes is not None and not faults:
        plans = _planned(pipeline, settings)
        faults += _beyond(pipeline, plans, settings.keep.bytes, settings.components)
    if faults:
        raise UserError("; ".join(faults))


def _no_match(pattern: str, layers: list[str], components: Sequence[str]) -> str:
    prefixes = {
        ".".join(name.split(".")[:depth]) + ".*"
        for name in layers
        for depth in range(1, name.count(".") + 1)
    }
    known = [*layers, *sorted(prefixes)]
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    hint = f"; close: {', '.join(close)}" if close else ""
    return (
        f"the rule for layers {pattern!r} matches no conv, linear or embedding of "
        f"{', '.join(components)}{hint}"
    )


def make_plan(
    pipeline: Any, settings: QuantizeSettings, recipe: Recipe | None = None
) -> list[LayerPlan]:
    """What happens to each layer, and why; of several rules that match, the last one wins.

    A calibration, when it has run, adds its scales, and keeps layers that are too sensitive.
    """
    check(pipeline, settings, recipe)
    return _planned(pipeline, settings)


def _planned(pipeline: Any, settings: QuantizeSettings) -> list[LayerPlan]:
    """The plan by settings and rules alone."""
    sizes: dict[str, int] = {
        component: sum(
            parameter.numel()
            for _, module in component_modules(pipeline, component)
            for parameter in module.parameters()
        )
        for component in settings.components
    }
    plans = []
    for layer, module in quantizable_layers(pipeline, settings.components).items():
        weights: Literal["int8", "int4", "float32"] = settings.weights
        activations: Activations = settings.activations
        reason = "default"
        if weights == "int4" and any(fnmatch.fnmatchcase(layer, name) for name in SENSITIVE):
            weights, reason = "int8", "int8: first and last layers are sensitive to 4 bits"
        if isinstance(module, nn.Embedding):
            activations = "none"
            weights = "int8"
            # int8 takes a quarter of float32's bytes.
            saving = 0.75 * module.weight.numel() / sizes[layer.split(".")[0]]
            if saving < settings.embedding_min_saving:
                weights = "float32"
                reason = (
                    f"embedding: would save {saving:.2%} of its component, "
                    f"less than {settings.embedding_min_saving:.2%}"
                )
        for rule in settings.rules:
            if fnmatch.fnmatchcase(layer, rule.layers):
                weights = rule.weights
                reason = f"rule {rule.layers}: {rule.reason}"
                if rule.activations is not None and not isinstance(module, nn.Embedding):
                    activations = rule.activations
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            weights, reason = "float32", f"padding mode {module.padding_mode} is not supported"
        if weights == "float32":
            activations = "none"
        block = rank = None
        if weights == "int4":
            obstacle = int4_layers.obstacle(module)
            if obstacle:
                weights, reason = "int8", f"{reason}; int8: {obstacle}"
            else:
                form = int4_layers.form(module, settings.int4)
                block, rank = form.block, form.rank
                if form != int4_layers.Form(settings.int4.block, settings.int4.rank):
                    reason += f"; its size leaves blocks of {block} and rank {rank}"
        plans.append(
            LayerPlan(
                layer=layer,
                weights=weights,
                activations=activations,
                block=block,
                rank=rank,
                reason=reason,
            )
        )
    return plans


def _beyond(
    pipeline: Any, plans: Sequence[LayerPlan], most: float, components: Sequence[str]
) -> list[str]:
    """The components whose integers alone take more than a budget of bytes, a sentence each."""
    sizes = _sizes(pipeline, plans, components)
    faults = []
    for name in components:
        mine = [size for path, size in sizes.items() if path.split(".")[0] == name]
        taken = sum(size.planned for size in mine) / max(1, sum(size.float32 for size in mine))
        if taken > most:
            faults.append(
                f"keep.bytes: {most:g} of {name}'s float bytes are fewer than the {taken:.4f} that "
                "the plan takes with no layer kept; raise it, or quantize more"
            )
    return faults


def _sizes(
    pipeline: Any, plans: Sequence[LayerPlan], components: Sequence[str]
) -> dict[str, sensitivity.Sizes]:
    """The bytes of every layer of a plan."""
    layers: dict[str, Any] = quantizable_layers(pipeline, components)
    sizes = {}
    for plan in plans:
        shape = tuple(layers[plan.layer].weight.shape)
        floats = 4 * math.prod(shape)
        planned = floats
        if plan.weights == "int8":
            planned = math.prod(shape) + 4 * shape[0]
        elif plan.weights == "int4":
            planned = int4_layers.weight_bytes(shape, int4_layers.form_of(plan))
        sizes[plan.layer] = sensitivity.Sizes(floats, planned)
    return sizes


def quantize(
    pipeline: Any, settings: QuantizeSettings, recipe: Recipe | None = None
) -> tuple[Any, list[LayerPlan]]:
    """Replace the layers that the settings name, in place; see `run` for the figures."""
    pipeline, plans, _ = run(pipeline, settings, recipe)
    return pipeline, plans


def run(
    pipeline: Any, settings: QuantizeSettings, recipe: Recipe | None = None
) -> tuple[Any, list[LayerPlan], dict[str, Any]]:
    """Replace the layers that the settings name, one by one, so that each float weight is freed.

    pipeline: a StableDiffusionPipeline, changed in place. recipe: what static activations are
    calibrated for; needed for these alone. Returns the pipeline, the plan, and a record of what was
    done (JSON). Raises UserError where a rule matches nothing, a weight is not finite, or a
    calibration makes no scale.
    """
    plans = make_plan(pipeline, settings, recipe)
    _check_finite(pipeline, plans, settings.components)
    static: dict[str, Static] = {}
    calibrated: dict[str, Any] = {}
    measured = settings.keep or any(plan.activations == "int8_static" for plan in plans)
    if recipe is not None and measured:
        plans, static, calibrated = _calibrated(pipeline, plans, settings, recipe)
    layers = quantizable_layers(pipeline, settings.components)
    parents = dict(_parents(pipeline, settings.components))
    counts: dict[str, int] = {}
    snr_db: dict[str, float] = {}
    in_4_bits: dict[str, float | None] = {}
    parameters = bytes_before = bytes_after = kept = 0
    for plan in tqdm(plans, desc="quantize", unit="layer", delay=2, mininterval=2, leave=False):
        module: Any = layers.pop(plan.layer)
        bytes_before += module.weight.numel() * 4
        if plan.weights == "float32":
            kept += 1
            bytes_after += module.weight.numel() * 4
            continue
        replacement = _replacement(module, plan, settings, static)
        if plan.weights == "int4":
            figure = int4_layers.weight_snr_db(module.weight, replacement)
            in_4_bits[plan.layer] = figure
            bytes_after += replacement.bytes
        else:
            integers, scale = replacement.weight_int8, replacement.weight_scale
            figure = weight_snr_db(module.weight, integers, scale)
            bytes_after += integers.numel() + 4 * scale.numel()
        if figure is not None:
            snr_db[plan.layer] = figure
        counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
        parameters += module.weight.numel()
        parent, name = parents[plan.layer]
        setattr(parent, name, replacement)
        module.weight = None
    worst = min(snr_db, key=lambda layer: snr_db[layer]) if snr_db else None
    record = {
        "stage": "quantize",
        "layers": counts,
        "layers_kept_float": kept,
        "quantized_parameters": parameters,
        "weight_bytes_before": bytes_before,
        "weight_bytes_after": bytes_after,
        "weight_snr_db_min": round(snr_db[worst], 2) if worst else None,
        "weight_snr_db_min_layer": worst,
        "weight_snr_db_median": round(statistics.median(snr_db.values()), 2) if worst else None,
        **({"int4": _of_int4(plans, in_4_bits)} if in_4_bits else {}),
        **calibrated,
    }
    return pipeline, plans, record


def _replacement(
    module: nn.Module, plan: LayerPlan, settings: QuantizeSettings, static: Mapping[str, Static]
) -> Any:
    """The layer as the plan has it; static: the scales of those with static activations."""
    if plan.weights == "int4":
        return int4_layers.quantized(module, int4_layers.form_of(plan), settings.int4.iterations)
    return quantized(module, plan.activations, static.get(plan.layer))


def _of_int4(plans: Sequence[LayerPlan], snr_db: Mapping[str, float | None]) -> dict[str, Any]:
    """What the record tells of the layers in 4 bits alone; the SNR of each by its path."""
    found = [figure for figure in snr_db.values() if figure is not None]
    return {
        "layers": len(snr_db),
        "ranks": sorted({plan.rank for plan in plans if plan.rank is not None}),
        "weight_snr_db_min": round(min(found), 2) if found else None,
        "weight_snr_db_median": round(statistics.median(found), 2) if found else None,
    }


def _check_finite(pipeline: Any, plans: Sequence[LayerPlan], components: Sequence[str]) -> None:
    layers = quantizable_layers(pipeline, components)
    for plan in plans:
        module: Any = layers[plan.layer]
        if plan.weights == "float32":
            continue
        bounds = torch.stack(module.weight.aminmax())
        if not bool(bounds.isfinite().all()):
            raise UserError(
                f"the weight of {plan.layer} holds NaN or Inf; the source's files are damaged"
            )
        if plan.weights == "int4" and float(bounds.abs().max()) > int4_layers.LARGEST:
            raise UserError(
                f"the weight of {plan.layer} goes beyond {int4_layers.LARGEST:g}, and 4 bits have "
                "float16 scales; name it in a rule with weights: int8"
            )


def _calibrated(
    pipeline: Any, plans: list[LayerPlan], settings: QuantizeSettings, recipe: Recipe
) -> tuple[list[LayerPlan], dict[str, Static], dict[str, Any]]:
    """The plan with scales, and without the layers that a budget keeps; the scales; a record."""
    if settings.split_skips:
        plans = _split_skips(pipeline, plans, settings.components)
    modules: dict[str, list[nn.Module]] = {
        name: [module for _, module in component_modules(pipeline, name)]
        for name in settings.components
    }
    layers = quantizable_layers(pipeline, settings.components)
    calls = measure(pipeline, recipe.height, recipe.width, guided=False)
    static = [plan.layer for plan in plans if plan.activations == "int8_static"]
    calibration, keep = settings.calibration, settings.keep
    if keep and not static:
        # Without scales to find, the pictures to measure on are all that is drawn.
        calibration = calibration.model_copy(update={"samples": keep.samples})
    found = calibrate.calibrate(
        pipeline,
        {path: each for path, each in layers.items() if not isinstance(each, nn.Embedding)},
        static,
        {name: parts[0] for name, parts in modules.items()},
        recipe,
        calibration,
        keep.samples if keep else 0,
    )
    snr_db: dict[str, float] = {}
    if keep:
        own = {
            plan.layer: plan
            for plan in plans
            if plan.weights != "float32" and not _is_ruled(plan.layer, settings)
        }
        if not settings.keeps_weights:
            own = {path: plan for path, plan in own.items() if path in found.static}
        parents = dict(_parents(pipeline, settings.components))
        snr_db = sensitivity.sensitivities(
            modules,
            {path: layers[path] for path in own},
            found.calls,
            lambda path, layer: _replacement(layer, own[path], settings, found.static),
            lambda path, module: setattr(*parents[path], module),
        )
        sizes = _sizes(pipeline, plans, settings.components)
        plans = sensitivity.kept(plans, snr_db, found.macs, sizes, keep)
    plans = [_with_scales(plan, found.static) for plan in plans]
    scales = {
        plan.layer: found.static[plan.layer] for plan in plans if plan.activations == "int8_static"
    }
    record: dict[str, Any] = {
        "sensitivity_db_min": min(snr_db.values(), default=None),
        "layers_kept_by_sensitivity": 0,
    }
    if keep:
        record["layers_kept_by_sensitivity"] = sum(
            (plan.weights, plan.activations)
            != (own[plan.layer].weights, own[plan.layer].activations)
            for plan in plans
            if plan.layer in own
        )
    if static:
        record |= {
            "calibration": {
                "pictures": calibration.samples,
                "steps": list(recipe.schedule.every_steps),
                "observer": calibration.observer,
            },
            "int8_macs_of_layers": {
                name: round(sensitivity.share(found.macs, name, scales), 4) for name in modules
            },
            "int8_macs": _of_all_macs(found.macs, scales, calls),
            "layers_int8_static": len(scales),
        }
        least = keep.macs if keep and keep.macs is not None else 0.0
        for name, reached in record["int8_macs_of_layers"].items():
            if reached < least:
                tqdm.write(
                    f"quantize: keep.macs asks for {least:.1%} of the multiply-adds of {name}'s "
                    f"layers in INT8, and the rules and defaults leave {reached:.1%}"
                )
    return plans, scales, record


def _is_ruled(layer: str, settings: QuantizeSettings) -> bool:
    """Whether a rule names a layer, or the one that it is a half of."""
    whole = layer.removesuffix(".hidden").removesuffix(".skip")
    return any(
        fnmatch.fnmatchcase(name, rule.layers) for rule in settings.rules for name in (layer, whole)
    )


def _of_all_macs(
    macs: Mapping[str, int],
    static: Collection[str],
    components: Mapping[str, Mapping[str, int]],
) -> dict[str, float]:
    """The share of all multiply-adds that is in integers, attention's two products included.

    Those are no layers, and stay in float on every target. macs: of each layer. components: as
    `measure` has them.
    """
    shares = {}
    for name, figures in components.items():
        mine = sum(macs[layer] for layer in static if layer.split(".")[0] == name)
        shares[name] = round(mine / figures["macs"], 4)
    return shares


def _with_scales(plan: LayerPlan, static: dict[str, Static]) -> LayerPlan:
    if plan.activations != "int8_static":
        return plan
    scales = static[plan.layer]
    return plan.model_copy(
        update={
            "activation_scale": scales.input.scale,
            "activation_zero_point": scales.input.zero_point,
            "output_scale": scales.output.scale,
            "output_zero_point": scales.output.zero_point,
        }
    )


def skip_channels(unet: Any) -> dict[str, int]:
    """For each convolution that reads a skip concat as it is, the channels of its first half.

    These are the shortcuts of the resnets in the up blocks; their first convolutions read the
    concat after a norm, which evens the halves out.
    """
    channels = unet.config.block_out_channels[-1]
    found = {}
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if type(resnet.conv_shortcut) is nn.Conv2d and channels < resnet.in_channels:
                found[f"unet.up_blocks.{i}.resnets.{j}.conv_shortcut"] = channels
            channels = resnet.out_channels
    return found


def _split_skips(
    pipeline: Any, plans: Sequence[LayerPlan], components: Sequence[str]
) -> list[LayerPlan]:
    """Make one convolution of each half of a skip concat, in the pipeline and in the plan."""
    parents = dict(_parents(pipeline, components))
    channels = skip_channels(pipeline.unet)
    split = []
    for plan in plans:
        if plan.layer not in channels or plan.activations != "int8_static":
            split.append(plan)
            continue
        parent, name = parents[plan.layer]
        setattr(parent, name, SkipConv2d(getattr(parent, name), channels[plan.layer]))
        split += [
            plan.model_copy(
                update={
                    "layer": f"{plan.layer}.{half}",
                    "reason": f"{plan.reason}; {half} half of a skip concat",
                }
            )
            for half in ("hidden", "skip")
        ]
    return split


def _parents(
    pipeline: Any, components: Sequence[str]
) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for component in components:
        for path, root in component_modules(pipeline, component):
            if type(root) in REPLACEMENTS:
                yield path, (pipeline.vae, path.split(".")[-1])
            for name, parent in root.named_modules():
                for child, _ in parent.named_children():
                    yield ".".join(p for p in (path, name, child) if p), (parent, child)
