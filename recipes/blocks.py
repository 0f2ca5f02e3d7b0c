"""Whole blocks of a UNet, and the attention of whole levels, go by way of its configuration.

The result is a UNet2DConditionModel that diffusers builds from its configuration alone, as in
BK-SDM (Kim et al., arXiv 2305.15798). What stays keeps its weights, shared and not copied.

Every layer on the way down hands a skip to one layer on the way up, and so does every change of
level; so layers go in pairs, and of the levels only the innermost can go.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from mobile_runtime.errors import UserError
from recipes import widths
from recipes.faults import did_you_mean

Preset = Literal["bk_base", "bk_small", "bk_tiny"]

# Of a configuration, what has an entry for each level.
_OUTERMOST_FIRST = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)
_INNERMOST_FIRST = ("up_block_types", "reverse_transformer_layers_per_block")

_WITHOUT_ATTENTION = {
    "CrossAttnDownBlock2D": "DownBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
}
_LAYER = re.compile(r"(down|up)_blocks\.(\d+)(?:\.(resnets|attentions)\.(\d+))?(?=\.|$)")


def names(unet: Any) -> list[str]:
    """What can be named to go: the mid block, blocks, and layers (`down_blocks.0.resnets.1`)."""
    found = [] if unet.mid_block is None else ["mid_block"]
    for block, layers in _layers(unet).items():
        found += [block, *(f"{block}.resnets.{index}" for index in range(layers))]
    return found


def preset(unet: Any, name: Preset) -> tuple[str, ...]:
    """The blocks that BK-SDM takes out, in a UNet of any depth.

    bk_base: of each level one layer on the way down stays, the first, and two on the way up, the
    first and the last. bk_small: the mid block goes too. bk_tiny: so does the innermost level.
    """
    gone = []
    for block, layers in _layers(unet).items():
        stay = {0} if block.startswith("down") else {0, layers - 1}
        gone += [f"{block}.resnets.{index}" for index in range(layers) if index not in stay]
    if name != "bk_base" and unet.mid_block is not None:
        gone.append("mid_block")
    if name == "bk_tiny":
        gone += [f"down_blocks.{len(unet.down_blocks) - 1}", "up_blocks.0"]
    if not gone:
        raise UserError(
            f"blocks: {name} takes nothing from this UNet, whose levels have one layer each; "
            "list the blocks that should go, or remove the stage"
        )
    return tuple(gone)


def remove(unet: Any, gone: Sequence[str], attention_levels: Sequence[int] = ()) -> Any:
    """A UNet without some blocks, and without the attention of some levels; weights are shared.

    unet: a UNet2DConditionModel, left alone; on the meta device too. gone: of `names`; a layer
    takes its attention with it. attention_levels: 0 has the most pixels; the mid block keeps its
    attention. Raises UserError, which tells all faults, where the rest would not be connected.
    """
    known = names(unet)
    unknown = [_unknown(name, known) for name in dict.fromkeys(gone) if name not in known]
    if unknown:
        raise UserError("; ".join(unknown))
    kept = {
        block: [index for index in range(layers) if f"{block}.resnets.{index}" not in gone]
        for block, layers in _layers(unet).items()
        if block not in gone
    }
    faults = _connection_faults(unet, kept) or _attention_faults(unet, kept, attention_levels)
    if faults:
        raise UserError("; ".join(faults))
    config = _config(unet, kept, "mid_block" in gone, attention_levels)
    types = [config["mid_block_type"], *config["down_block_types"], *config["up_block_types"]]
    if not any("CrossAttn" in str(kind) for kind in types):
        raise UserError(
            "no cross attention would be left, so the prompt would have no effect; keep it at one "
            "level at least, or keep mid_block"
        )
    return _carry_over(unet, config, kept)


def _layers(unet: Any) -> dict[str, int]:
    """Layers of each block."""
    return {
        f"{side}.{index}": len(block.resnets)
        for side in ("down_blocks", "up_blocks")
        for index, block in enumerate(getattr(unet, side))
    }


def _unknown(name: str, known: list[str]) -> str:
    layer = re.fullmatch(r"(.*)\.(attentions|downsamplers|upsamplers|motion_modules)(\.\d+)*", name)
    if layer and layer.group(1) in known:
        advice = {
            "attentions": "attention goes with its layer (resnets), or for a whole level through "
            "attention_levels",
        }.get(layer.group(2), "it goes with its level alone, since without it sizes would not fit")
        return f"blocks: {name} cannot go by itself: {advice}"
    hint = did_you_mean(name, known)
    return (
        f"blocks: this UNet has no block {name!r}{hint}; name mid_block, a block (down_blocks.3) "
        "or a layer (down_blocks.0.resnets.1)"
    )


def _connection_faults(unet: Any, kept: dict[str, list[int]]) -> list[str]:
    """Where skips or levels would not be connected."""
    depth = len(unet.down_blocks)
    downs = [level for level in range(depth) if f"down_blocks.{level}" in kept]
    ups = [level for level in range(depth) if f"up_blocks.{depth - 1 - level}" in kept]
    if not downs and not ups:
        return [
            f"blocks: every level would go; keep down_blocks.0 and up_blocks.{depth - 1} at least"
        ]
    faults = []
    for level in range(depth):
        down, up = f"down_blocks.{level}", f"up_blocks.{depth - 1 - level}"
        if (level in downs) != (level in ups):
            goes, stays = (up, down) if level in downs else (down, up)
            faults.append(
                f"blocks: {goes} would go and {stays} stay, and the two are one level, joined by "
                "skips; name both or neither"
            )
        elif level not in downs and any(inner in downs for inner in range(level, depth)):
            faults.append(
                f"blocks: {down} and {up} are not the innermost level, so the levels inside them "
                f"would be cut off; keep them, or let down_blocks.{depth - 1} and up_blocks.0 go"
            )
        elif level in downs:
            faults += _skip_faults(unet, kept, down, up)
    return faults


def _skip_faults(unet: Any, kept: dict[str, list[int]], down: str, up: str) -> list[str]:
    """Where one level's layers on the way down and on the way up are not as many as they should."""
    if not kept[down]:
        return [
            f"blocks: {down} would have no layer; keep one, or name all of {down} and {up} (only "
            "the innermost level can go)"
        ]
    extra = len(kept[up]) - len(kept[down]) - 1
    if not extra:
        return []
    side, count = (up, extra) if extra > 0 else (down, -extra)
    return [
        f"blocks: {down} would keep {len(kept[down])} of its layers and {up} {len(kept[up])}, and "
        f"the way up needs one for each of their skips and one for the skip from outside, "
        f"{len(kept[down]) + 1}: name {count} more of {side}.resnets, or {count} fewer of "
        f"{down if side == up else up}.resnets"
    ]


def _attention_faults(unet: Any, kept: dict[str, list[int]], levels: Sequence[int]) -> list[str]:
    depth = len(unet.down_blocks)
    types = (unet.config.down_block_types, unet.config.up_block_types[::-1])
    faults = []
    for level in dict.fromkeys(levels):
        if level >= depth:
            faults.append(
                f"attention_levels: there is no level {level}; this UNet has 0 to {depth - 1}, "
                "and 0 has the most pixels"
            )
        elif not any(kinds[level] in _WITHOUT_ATTENTION for kinds in types):
            faults.append(
                f"attention_levels: level {level} has no attention to remove; take it off the list"
            )
        elif f"down_blocks.{level}" not in kept:
            faults.append(
                f"attention_levels: level {level} goes altogether through blocks; take it off "
                "this list"
            )
    return faults


def _config(
    unet: Any, kept: dict[str, list[int]], without_mid: bool, attention_levels: Sequence[int]
) -> dict[str, Any]:
    """The configuration of what stays."""
    config = dict(unet.config)
    # diffusers' note of what was left at its default, which it would set back to that.
    config.pop("_use_default_values", None)
    before = len(unet.down_blocks)
    depth = sum(block.startswith("down") for block in kept)
    down_types, up_types = list(config["down_block_types"]), list(config["up_block_types"])
    for level in attention_levels:
        for types, index in ((down_types, level), (up_types, before - 1 - level)):
            types[index] = _WITHOUT_ATTENTION.get(types[index], types[index])
    config["down_block_types"], config["up_block_types"] = down_types, up_types
    for key in (*_OUTERMOST_FIRST, *_INNERMOST_FIRST):
        value = config.get(key)
        if isinstance(value, list | tuple):
            inner = key in _INNERMOST_FIRST
            config[key] = list(value[before - depth :] if inner else value[:depth])
    layers = [len(kept[f"down_blocks.{level}"]) for level in range(depth)]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if without_mid:
        config["mid_block_type"] = None
    return config


def _carry_over(unet: Any, config: dict[str, Any], kept: dict[str, list[int]]) -> Any:
    """A UNet of the new configuration with the old one's weights, inner widths included."""
    lost = len(unet.down_blocks) - len(config["down_block_types"])

    def original(path: str) -> str:
        """Where a module or tensor of the new UNet was in the old one."""

        def renumbered(found: re.Match[str]) -> str:
            side, block, layers, index = found.groups()
            name = f"{side}_blocks.{int(block) + (lost if side == 'up' else 0)}"
            return f"{name}.{layers}.{kept[name][int(index)]}" if layers else name

        return _LAYER.sub(renumbered, path, count=1)

    made = widths.empty(config)
    before = widths.groups(unet)
    made = widths.narrow(
        made,
        {
            path: range(before[original(path)].width)
            for path, group in widths.groups(made).items()
            if original(path) in before and before[original(path)].width < group.width
        },
    )
    weights = unet.state_dict()
    faults: dict[str, str] = {}
    for key, tensor in made.state_dict().items():
        old = weights.get(original(key))
        if old is None or old.shape != tensor.shape:
            where = _LAYER.match(key)
            layer = where.group() if where else "mid_block"
            faults.setdefault(layer, _misfit(unet, made, layer, original(layer)))
    if made.mid_block is not None and _heads(made.mid_block) != _heads(unet.mid_block):
        faults["mid_block"] = _misfit(unet, made, "mid_block", "mid_block")
    if faults:
        raise UserError("; ".join(faults.values()))
    made.load_state_dict({key: weights[original(key)] for key in made.state_dict()}, assign=True)
    return made.requires_grad_(False).train(unet.training)


def _heads(block: Any) -> list[int]:
    return [module.heads for module in block.modules() if hasattr(module, "heads")]


def _misfit(unet: Any, made: Any, layer: str, old: str) -> str:
    """Why a layer that should stay does not fit in its new place."""
    innermost = f"down_blocks.{len(unet.down_blocks) - 1} and up_blocks.0"
    if layer == "mid_block":
        return (
            "blocks: mid_block fits only the level that is the innermost now; name mid_block too, "
            f"or keep {innermost}"
        )
    takes, given = unet.get_submodule(old).in_channels, made.get_submodule(layer).in_channels
    block, _, index = old.rpartition(".resnets.")
    first = layer.endswith(".resnets.0")
    wanted = 0 if first else len(unet.get_submodule(block).resnets) - 1
    stay = f"{block}.resnets.{wanted}" if int(index) != wanted else innermost
    return f"blocks: {old} takes {takes} channels and would be given {given}, so {stay} must stay"
