"""The inner widths of a UNet: what can get narrower while everything between layers stays.

Three kinds, each one group of channels for a module: the channels between the two convolutions of
a residual block, the hidden units of a feed-forward, the heads of an attention. What makes the
channels and what reads them lose the same ones (the dependency groups of Torch-Pruning, Fang et
al., arXiv 2301.12900, and Diff-Pruning, arXiv 2305.10924), and the residual stream keeps its width.

diffusers' configuration cannot express such widths. So a narrowed UNet's folder has a table beside
config.json, `widths.json`: module path -> channels, where they differ from what config.json would
build. It tells, too, why plain diffusers cannot open the folder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mobile_runtime.errors import UserError
from recipes.faults import did_you_mean
from recipes.measure import share_structure

FILE = "widths.json"
NOTE = (
    "Inner widths that config.json cannot express, so plain diffusers does not open this UNet (its "
    "from_pretrained stops at tensors of other shapes); Pocket Diffusion does, as --model FOLDER."
)
Kind = Literal["resnets", "feed_forward", "heads"]

# A layer's attributes that tell the length of its weight's axes.
_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.GroupNorm: ("num_channels",),
}


@dataclass(frozen=True)
class Part:
    """A tensor that has a group's channels on one axis, several times over for GEGLU's halves."""

    key: str
    axis: int
    copies: int = 1


@dataclass(frozen=True)
class Group:
    """Channels of one module that can go.

    width: how many there are. block: so many, side by side, go together (one head). bands: each of
    so many equal runs keeps as many as the others (the groups of a GroupNorm, which normalizes
    the same channels together as before). parts: the weight that reads the channels comes last.
    """

    kind: Kind
    width: int
    block: int
    bands: int
    parts: tuple[Part, ...]

    @property
    def multiple(self) -> int:
        """What a width must be a multiple of."""
        return self.block * self.bands

    @property
    def read_by(self) -> Part:
        """The weight that reads the channels."""
        return self.parts[-1]

    @property
    def least(self) -> int:
        """The least width that still computes something.

        A GroupNorm of one channel a group makes zeros of a picture of one pixel.
        """
        return self.multiple * (2 if self.kind == "resnets" else 1)


def groups(unet: nn.Module) -> dict[str, Group]:
    """The groups of a UNet by their module's path; of modules that are not the plain kind, none."""
    found = {}
    for path, module in unet.named_modules():
        group = _group(path, module)
        if group is not None:
            found[path] = group
    return found


def _group(path: str, module: Any) -> Group | None:
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    def parts(name: str, axis: int, copies: int = 1) -> Iterator[Part]:
        layer = module.get_submodule(name)
        yield Part(f"{path}.{name}.weight", axis, copies)
        if axis == 0 and layer.bias is not None:
            yield Part(f"{path}.{name}.bias", 0, copies)

    if type(module) is ResnetBlock2D:
        if module.time_embedding_norm != "default" or type(module.norm2) is not nn.GroupNorm:
            return None
        made_by = ["conv1", "norm2"]
        if type(module.time_emb_proj) is nn.Linear:
            made_by.append("time_emb_proj")
        tensors = [part for name in made_by for part in parts(name, 0)]
        tensors += parts("conv2", 1)
        width, bands = module.conv1.out_channels, module.norm2.num_groups
        return Group("resnets", width, 1, bands, tuple(tensors))
    if type(module) is FeedForward:
        last: Any = module.net[2]
        width = last.in_features
        # GEGLU makes values and gates.
        copies = module.get_parameter("net.0.proj.weight").shape[0] // width
        tensors = [*parts("net.0.proj", 0, copies), *parts("net.2", 1)]
        return Group("feed_forward", width, 1, 1, tuple(tensors))
    if type(module) is Attention:
        if module.norm_q is not None or module.added_kv_proj_dim is not None:
            return None
        tensors = [part for name in ("to_q", "to_k", "to_v") for part in parts(name, 0)]
        tensors += parts("to_out.0", 1)
        width = module.to_q.out_features
        return Group("heads", width, width // module.heads, 1, tuple(tensors))
    return None


def narrow(unet: Any, kept: Mapping[str, Sequence[int]]) -> Any:
    """A UNet with some groups' channels alone; what does not change is shared with the original.

    kept: module path -> the channels that stay, rising; works on the meta device too.
    """
    narrowed = share_structure(unet)
    every = groups(narrowed)
    for path, channels in kept.items():
        group = every[path]
        for part in group.parts:
            name, _, kind = part.key.rpartition(".")
            layer = narrowed.get_submodule(name)
            tensor = getattr(layer, kind)
            index = torch.cat(
                [torch.tensor(channels) + copy * group.width for copy in range(part.copies)]
            )
            cut = tensor.detach().index_select(part.axis, index.to(tensor.device))
            setattr(layer, kind, nn.Parameter(cut, requires_grad=tensor.requires_grad))
            if kind == "weight":
                setattr(layer, _SIZES[type(layer)][part.axis], cut.shape[part.axis])
        if group.kind == "heads":
            attention = narrowed.get_submodule(path)
            attention.heads = attention.sliceable_head_dim = len(channels) // group.block
            attention.inner_dim = attention.inner_kv_dim = len(channels)
    return narrowed


def empty(config: Mapping[str, Any]) -> Any:
    """The UNet that a configuration builds, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return unet.eval().requires_grad_(False)


def table(unet: Any) -> dict[str, int]:
    """The widths that a UNet's configuration does not tell: module path -> channels."""
    whole = groups(empty(unet.config))
    return {
        path: group.width
        for path, group in groups(unet).items()
        if group.width != whole[path].width
    }


def told(unet: Any) -> dict[str, str]:
    """For a stage's record: why plain diffusers does not open the UNet; empty if it does."""
    return {"plain_diffusers": NOTE} if table(unet) else {}


def write(unet: Any, folder: Path) -> None:
    """Write the table beside config.json, if the UNet needs one."""
    widths = table(unet)
    if widths:
        contents = {"note": NOTE, "widths": widths}
        (folder / FILE).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def read(unet: Any, folder: Path) -> Any:
    """The UNet (on the meta device, as config.json builds it) with a folder's widths.

    Without a table that is the UNet itself. Raises UserError where the table is none, or does not
    fit the UNet.
    """
    file = folder / FILE
    if not file.is_file():
        return unet
    try:
        contents = json.loads(file.read_bytes(), object_pairs_hook=_no_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}; save the folder again") from None
    widths = contents.get("widths") if isinstance(contents, dict) else None
    if not isinstance(widths, dict) or not widths:
        raise UserError(
            f'{file} should be a JSON object with "widths", an object of module paths and widths; '
            "save the folder again"
        )
    every = groups(unet)
    faults = [fault for path, width in widths.items() if (fault := _fault(path, width, every))]
    if faults:
        raise UserError(f"{file} does not fit config.json: {'; '.join(faults)}")
    return narrow(unet, {path: range(width) for path, width in widths.items()})


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _fault(path: str, width: Any, every: dict[str, Group]) -> str | None:
    group = every.get(path)
    if group is None:
        return f"{path!r} has no inner width{did_you_mean(path, list(every))}"
    if type(width) is not int or not group.least <= width < group.width or width % group.multiple:
        return (
            f"{path} should have a multiple of {group.multiple} from {group.least} to below "
            f"{group.width}, and it has {width!r}"
        )
    return None


def open_unet(folder: Path, files: Sequence[Path]) -> Any:
    """A UNet in float32 from a folder that has a table. files: its safetensors files."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_bytes())
    unet = read(empty(config), folder)
    weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
    try:
        unet.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"the weights in {folder} do not fit config.json and {FILE}: {' '.join(lines)[:300]}"
        ) from None
    return unet.float().eval().requires_grad_(False)
