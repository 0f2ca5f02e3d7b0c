"""LoRA weights, added into the weights of the UNet and the text encoder.

A LoRA (arXiv:2106.09685) holds two thin matrices for a layer, `down` and `up`, and a number
`alpha`; what it adds to the layer's weight is `scale * alpha / rank * up @ down`. Once added it
costs nothing. LCM-LoRA (arXiv:2311.05556), which makes a pipeline draw in few steps, is one; so are
the styles that sd-scripts (kohya) and diffusers train.

Files are safetensors whose keys are spelled as sd-scripts does
(`lora_unet_down_blocks_0_....lora_down.weight`, `.lora_up.weight`, `.alpha`) or as diffusers and
peft do (`unet.down_blocks.0....lora_A.weight`, `.lora.down.weight`, `.processor.to_q_lora....`).
The adding is ours: peft adds in place, into the source's own tensors, and passes over keys that
match no layer.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mobile_runtime.errors import UserError
from recipes.measure import share_structure, with_modules
from recipes.paths import user_path
from recipes.schema import Recipe
from recipes.settings import AdaptersSettings, Lora
from recipes.sources.hub import fetch
from recipes.work import Outcome, Work

# How a key ends, in the spelling of sd-scripts and of peft -> what it holds.
ROLES = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}
# The components that a LoRA may change, and what sd-scripts' keys of theirs begin with.
COMPONENTS = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")}
# What diffusers writes into a file's header: the settings of peft, where alpha is.
METADATA = "lora_adapter_metadata"
NAMED = 3
"""How many of many faulty keys a message names."""


@dataclass(frozen=True)
class LayerLora:
    """The keys of a file that belong to one layer."""

    component: str
    path: str
    down: str
    up: str
    alpha: str | None
    default_alpha: float | None


def check(pipeline: Any, settings: AdaptersSettings, recipe: Recipe) -> None:
    """Refuse a file that is missing, is no plain LoRA, or does not fit; all faults of it told."""
    for lora in settings.loras:
        _read(find(lora), pipeline)


def run(pipeline: Any, settings: AdaptersSettings, work: Work) -> Outcome:
    """Add the LoRAs, one after the other, into copies of the weights that they change.

    The record: of each its file, scale, layers and ranks. Raises UserError for what `check`
    refuses, and for values that are not finite.
    """
    modules = {name: share_structure(getattr(pipeline, name)) for name in COMPONENTS}
    told = []
    for lora in settings.loras:
        file = find(lora)
        layers = _read(file, pipeline)
        ranks = [_add(lora.scale, file, layer, modules) for layer in layers]
        told.append(
            {
                "file": file.name,
                "scale": lora.scale,
                "layers": len(layers),
                "ranks": sorted(set(ranks)),
            }
        )
    return Outcome(with_modules(pipeline, modules), record={"loras": told})


def find(lora: Lora) -> Path:
    """The LoRA's file: named itself, in a folder, or downloaded; UserError where there is none."""
    path = user_path(lora.model)
    if path.is_dir():
        return _in_folder(path, lora.weight_name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is no .safetensors file; a pickle (.bin, .ckpt, .pt) may run code when "
                "opened, so convert it first"
            )
        return path
    is_path = lora.model.startswith(("/", "./", "../", "~")) or lora.model.count("/") != 1
    if is_path or path.suffix in (".safetensors", ".bin", ".ckpt", ".pt"):
        raise UserError(
            f"there is no LoRA at {lora.model}; give a .safetensors file, a folder with one, or a "
            "hub id (owner/name)"
        )
    ways_out = "download its .safetensors file on a machine with access and name that"
    wanted = [lora.weight_name or "*.safetensors"]
    folder, _ = fetch(lora.model, lora.revision, lambda files: wanted, wanted, ways_out)
    return _in_folder(folder, lora.weight_name)


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if weight_name is not None and weight_name in files:
        return folder / weight_name
    there = f"it has: {', '.join(files)}" if files else "it has no .safetensors file"
    if weight_name is not None:
        raise UserError(f"{folder} has no LoRA file {weight_name!r}; {there}")
    if len(files) != 1:
        raise UserError(f"{folder} should have one LoRA file, or name it with weight_name; {there}")
    return folder / files[0]


def _read(file: Path, pipeline: Any) -> list[LayerLora]:
    """What a file changes, from its header alone; UserError tells all keys that do not fit."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is no safetensors file, or cut short ({error}); download or save it again"
        ) from None
    alphas = _metadata_alphas(file, metadata)
    layers = _layers(pipeline)
    spelled = {
        f"{prefix}_{name.partition('.')[2].replace('.', '_')}": name
        for name in layers
        for prefix in COMPONENTS[name.partition(".")[0]]
    }
    found: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    for key in shapes:
        name, role = _split(key)
        layer = spelled.get(name, name)
        if layer not in layers or role in (None, *found[layer]):
            unknown.append(key)
        else:
            found[layer][str(role)] = key
    half = [keys for keys in found.values() if keys and not {"up", "down"} <= keys.keys()]
    unknown += [key for keys in half for key in keys.values()]
    if unknown:
        raise UserError(
            f"{file} does not fit the pipeline: of its {len(shapes)} keys, {len(unknown)} are no "
            f"part of a LoRA of one of its layers ({_some(unknown)}); use one that was trained for "
            "this model, and no LoHa, LoKr or DoRA"
        )
    if not found:
        raise UserError(f"{file} holds no LoRA: it is empty; name another file")
    misfits = [
        f"{name} is {tuple(layers[name].weight.shape)} and the LoRA's down and up are "
        f"{shapes[keys['down']]} and {shapes[keys['up']]}"
        for name, keys in found.items()
        if not _fits(layers[name].weight.shape, shapes[keys["down"]], shapes[keys["up"]])
        or math.prod(shapes[keys["alpha"]] if "alpha" in keys else ()) != 1
    ]
    if misfits:
        raise UserError(
            f"{file} was trained for another model: {len(misfits)} layers have other shapes "
            f"({_some(misfits, '; ')})"
        )
    return [
        LayerLora(
            component,
            path,
            keys["down"],
            keys["up"],
            keys.get("alpha"),
            alphas.get(component),
        )
        for name, keys in found.items()
        for component, _, path in [name.partition(".")]
    ]


def _layers(pipeline: Any) -> dict[str, Any]:
    """Every layer that a LoRA can change, by its path after its component's name."""
    return {
        f"{component}.{path}": layer
        for component in COMPONENTS
        for path, layer in getattr(pipeline, component).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def _split(key: str) -> tuple[str, str | None]:
    """A key's layer, in peft's spelling or as sd-scripts has it, and what it holds of it."""
    if key.startswith("unet."):
        (key,) = convert_unet_state_dict_to_peft({key: None})
    elif key.startswith("text_encoder."):
        # This table has the new names of diffusers' own spelling, too.
        (key,) = convert_state_dict_to_peft({key: None}, StateDictType.DIFFUSERS_OLD)
    for ending, role in ROLES.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return key, None


def _fits(weight: torch.Size, down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Whether up @ down has a weight's shape. A linear layer may be written as a 1x1 kernel."""
    weight_sides, down_sides, up_sides = map(_plain, (tuple(weight), down, up))
    rank = down_sides[0] if down_sides else 0
    return rank > 0 and down_sides[1:] == weight_sides[1:] and up_sides == (weight[0], rank)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _metadata_alphas(file: Path, metadata: dict[str, str]) -> dict[str, float]:
    """alpha by component, where diffusers wrote peft's settings into the header."""
    try:
        settings = json.loads(metadata.get(METADATA, "{}"))
        named = {key: value for key, value in settings.items() if value}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: the header's {METADATA} is no JSON; save it again") from None
    unknown = [
        key
        for key in named
        if key.endswith((".use_dora", ".use_rslora", ".alpha_pattern", ".lora_bias"))
    ]
    if unknown:
        raise UserError(
            f"{file} is more than a plain LoRA ({', '.join(unknown)}); fuse it with peft, and give "
            "the fused folder as the source"
        )
    alphas = {name: named.get(f"{name}.lora_alpha") for name in COMPONENTS}
    odd = [alpha for alpha in alphas.values() if type(alpha) not in (int, float, type(None))]
    if odd:
        raise UserError(f"{file}: the header's lora_alpha {odd[0]!r} is no number; save it again")
    return {name: float(alpha) for name, alpha in alphas.items() if alpha is not None}


def _add(scale: float, file: Path, lora: LayerLora, modules: dict[str, Any]) -> int:
    """Add one layer's LoRA to its weight, which becomes a new tensor; the rank."""
    layer = modules[lora.component].get_submodule(lora.path)
    with safe_open(file, framework="pt") as opened:
        down, up = (opened.get_tensor(key).float().flatten(1) for key in (lora.down, lora.up))
        stored = opened.get_tensor(lora.alpha).item() if lora.alpha else lora.default_alpha
    rank = len(down)
    alpha = rank if stored is None else stored
    if not (math.isfinite(alpha) and bool(down.isfinite().all()) and bool(up.isfinite().all())):
        raise UserError(
            f"{file}: the LoRA of {lora.component}.{lora.path} holds NaN or Inf; download or save "
            "it again"
        )
    if scale:
        weight: Tensor = layer.weight
        added = (scale * alpha / rank * (up @ down)).view(weight.shape)
        fused = weight.detach() + added.to(weight.dtype)
        if not bool(fused.isfinite().all()):
            raise UserError(
                f"{file}: with it, weights of {lora.component}.{lora.path} are no longer finite; "
                "lower its scale, or use another file"
            )
        layer.weight = nn.Parameter(fused, requires_grad=weight.requires_grad)
    return rank


def _some(told: list[str], between: str = ", ") -> str:
    more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return between.join(told[:NAMED]) + more
