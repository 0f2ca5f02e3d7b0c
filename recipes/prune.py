"""The prune stage: blocks, attention and inner channels of the UNet go; the rest keeps its weights.

Blocks and attention go by way of the UNet's configuration (blocks.py), so diffusers opens the
result as any other. Channels go by groups (widths.py), until the target in multiply-adds is met.
With an even spread every group loses about the same share, so the widths follow from the UNet's
shapes alone, and importance (importance.py) only chooses which channels of a group stay. With a
spread by importance the groups compete, too.
"""

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobile_runtime.errors import UserError
from recipes import blocks, importance, prompts, widths
from recipes.faults import did_you_mean
from recipes.measure import count_macs, latent_size, on_meta, with_modules
from recipes.schema import Recipe
from recipes.settings import ChannelSettings, PruneSettings
from recipes.work import Outcome, Work

HIDDEN_STEP = 8
"""Hidden units of a feed-forward that go together, where their number allows it."""
MOST = 7 / 8
"""Of each group's channels, the most that go."""


def check(pipeline: Any, settings: PruneSettings, recipe: Recipe) -> None:
    """Refuse what cannot go (see blocks.remove), a target out of reach, a bad prompt file."""
    if settings.channels:
        prompts.check(settings.channels.prompts)
    reshape(pipeline, settings, recipe)


def reshape(pipeline: Any, settings: PruneSettings, recipe: Recipe) -> Any:
    """The pipeline with a UNet of the shapes that `run` leaves, on the device where it is.

    A spread by importance needs weights to look at; then the shapes are those of the even spread,
    whose multiply-adds are the same to a unit, and whose parameters are not.
    """
    unet, _ = _without_blocks(pipeline.unet, settings)
    if settings.channels:
        cuts = _cuts(unet, pipeline, settings.channels, recipe)
        unet = widths.narrow(unet, {path: range(cut.width) for path, cut in cuts.items()})
    return with_modules(pipeline, {"unet": unet})


def run(pipeline: Any, settings: PruneSettings, work: Work) -> Outcome:
    """Prune the UNet. The one that was given stays as it is, and shares what does not change."""
    unet, gone = _without_blocks(pipeline.unet, settings)
    record: dict[str, Any] = {
        "blocks_removed": list(gone),
        "attention_removed_at_levels": list(settings.attention_levels),
    }
    chosen = settings.channels
    if chosen:
        if chosen.importance == "taylor":
            matters = importance.taylor(unet, pipeline, chosen, work.recipe)
        else:
            matters = importance.magnitude(unet)
        _check_finite(matters)
        competing = matters if chosen.spread == "importance" else None
        cuts = _cuts(unet, pipeline, chosen, work.recipe, competing)
        record["channels"] = {
            path: [cut.group.width, cut.width] for path, cut in sorted(cuts.items())
        }
        unet = widths.narrow(unet, {path: cut.stay(matters[path]) for path, cut in cuts.items()})
    record |= widths.told(unet)
    return Outcome(with_modules(pipeline, {"unet": unet}), record=record)


def _check_finite(matters: dict[str, Tensor]) -> None:
    """Refuse to choose by figures that are none."""
    broken = [path for path, values in matters.items() if not bool(values.isfinite().all())]
    if broken:
        raise UserError(
            f"channels.importance: that of {broken[0]} is not finite, as are {len(broken)} of "
            f"{len(matters)}; the UNet's weights, or what they give, overflow"
        )


def _without_blocks(unet: Any, settings: PruneSettings) -> tuple[Any, tuple[str, ...]]:
    """The UNet that is left, and the blocks that went."""
    named = settings.blocks
    gone = blocks.preset(unet, named) if isinstance(named, str) else named
    return blocks.remove(unet, gone, settings.attention_levels), gone


@dataclass(frozen=True)
class Cut:
    """How many units of a group go.

    A unit is the least that can go at a time: a head, some hidden units, or one channel from each
    group of a GroupNorm. step: blocks of channels of a band in one unit.
    """

    group: widths.Group
    step: int
    gone: int = 0

    @classmethod
    def none(cls, group: widths.Group) -> "Cut":
        """Nothing goes yet."""
        per_band = group.width // group.multiple
        return cls(group, math.gcd(per_band, HIDDEN_STEP) if group.kind == "feed_forward" else 1)

    @property
    def unit(self) -> int:
        """Channels that go at a time."""
        return self.group.multiple * self.step

    @property
    def units(self) -> int:
        """As many as there are."""
        return self.group.width // self.unit

    @property
    def most(self) -> int:
        """As many as may go."""
        keep = math.ceil(self.group.least / self.unit)
        return max(0, min(self.units - keep, math.floor(self.units * MOST)))

    @property
    def width(self) -> int:
        """Channels that stay."""
        return self.group.width - self.gone * self.unit

    def stay(self, matters: Tensor) -> list[int]:
        """The channels that stay, rising. matters: the importance of each block of channels."""
        group = self.group
        bands = matters.view(group.bands, -1)
        kept = bands.argsort(dim=1, stable=True)[:, self.gone * self.step :]
        first = torch.arange(group.bands)[:, None] * bands.shape[1]
        starts = ((kept + first) * group.block).view(-1, 1)
        return sorted((starts + torch.arange(group.block)).flatten().tolist())

    def costs(self, matters: Tensor) -> list[float]:
        """The importance of each unit, rising."""
        rising = matters.view(self.group.bands, -1).sort(dim=1).values
        units: list[float] = rising.sum(0).view(-1, self.step).sum(1).tolist()
        return units


def _cuts(
    unet: Any,
    pipeline: Any,
    settings: ChannelSettings,
    recipe: Recipe,
    competing: dict[str, Tensor] | None = None,
) -> dict[str, Cut]:
    """Module path -> what goes, where anything does.

    Units go until the target is reached, in the order of the share of their group that is gone with
    them, or of the importance per multiply-add where groups are `competing`. Raises UserError for a
    target that is out of reach.
    """
    macs, total = _macs(unet, pipeline, recipe)
    groups = widths.groups(unet)
    idle = [glob for glob in settings.keep if not fnmatch.filter(groups, glob)]
    if idle:
        raise UserError(
            f"channels.keep: no module with an inner width matches {', '.join(map(repr, idle))}"
            f"{did_you_mean(idle[0], list(groups)) or '; name e.g. up_blocks.0.resnets.*'}"
        )
    every = {
        path: Cut.none(group)
        for path, group in groups.items()
        if group.kind in settings.parts
        and not any(fnmatch.fnmatchcase(path, glob) for glob in settings.keep)
    }
    candidates = []
    for path, cut in every.items():
        scores = [number / cut.units for number in range(1, cut.units + 1)]
        if competing is not None:
            scores = [cost / (cut.unit * macs[path]) for cost in cut.costs(competing[path])]
        candidates += [(score, path) for score in scores[: cut.most]]
    candidates.sort()
    reach = sum(macs[path] * every[path].unit for _, path in candidates)
    if reach < settings.macs * total:
        raise UserError(
            f"channels.macs: {settings.macs:g} of the UNet's multiply-adds cannot go from "
            f"{', '.join(settings.parts)}, which can lose {math.floor(1000 * reach / total) / 1000}"
            " at most; lower it, keep less, name more parts, or remove blocks too"
        )
    gone: dict[str, int] = {}
    saved = 0.0
    for _, path in candidates:
        if saved >= settings.macs * total:
            break
        gone[path] = gone.get(path, 0) + 1
        saved += macs[path] * every[path].unit
    return {path: Cut(every[path].group, every[path].step, count) for path, count in gone.items()}


def _macs(unet: nn.Module, pipeline: Any, recipe: Recipe) -> tuple[dict[str, float], int]:
    """Module path -> the multiply-adds of one of its channels, and those of the whole UNet.

    For one picture of the recipe's size. No layer's multiply-adds hang on two inner widths, so what
    goes adds up.
    """
    config: Any = unet.config
    inputs = (
        torch.empty(1, config.in_channels, *latent_size(pipeline, recipe.height, recipe.width)),
        torch.empty(()),
        torch.empty(
            1, pipeline.text_encoder.config.max_position_embeddings, config.cross_attention_dim
        ),
    )
    positions: dict[str, int] = {}
    probe = on_meta(unet)
    for name, layer in probe.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(_count_positions(name, positions))
    with torch.no_grad():
        probe(*(tensor.to("meta") for tensor in inputs))
    weights = probe.state_dict()
    found = {}
    for path, group in widths.groups(probe).items():
        layers = {part.key.removesuffix(".weight"): weights[part.key] for part in group.parts}
        whole = sum(
            weight.numel() * positions[layer] for layer, weight in layers.items() if weight.ndim > 1
        )
        if group.kind == "heads":
            # The products of queries with keys, and of their softmax with values.
            whole += 2 * group.width * positions[f"{path}.to_q"] * positions[f"{path}.to_k"]
        found[path] = whole / group.width
    return found, count_macs(unet, *inputs)


def _count_positions(name: str, positions: dict[str, int]) -> Callable[..., None]:
    """A hook that notes for how many pixels or tokens a layer computes."""

    def note(layer: Any, inputs: Any, output: Tensor) -> None:
        channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
        positions[name] = output.numel() // channels

    return note
