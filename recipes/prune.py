"""The prune stage: blocks and attention of the UNet go; what stays keeps its weights.

Both go by way of the UNet's configuration (blocks.py), so diffusers opens the result as any other.
"""

from typing import Any

from recipes import blocks
from recipes.measure import with_modules
from recipes.schema import Recipe
from recipes.settings import PruneSettings
from recipes.work import Outcome, Work


def check(pipeline: Any, settings: PruneSettings, recipe: Recipe) -> None:
    """Refuse what cannot go: what `blocks.preset` and `blocks.remove` refuse."""
    _pruned(pipeline.unet, settings)


def reshape(pipeline: Any, settings: PruneSettings, recipe: Recipe) -> Any:
    """The pipeline with the UNet that is left, on the device where it is."""
    unet, _ = _pruned(pipeline.unet, settings)
    return with_modules(pipeline, {"unet": unet})


def run(pipeline: Any, settings: PruneSettings, work: Work) -> Outcome:
    """Prune the UNet. The one that was given stays as it is, and shares its tensors."""
    unet, gone = _pruned(pipeline.unet, settings)
    record = {
        "blocks_removed": list(gone),
        "attention_removed_at_levels": list(settings.attention_levels),
    }
    return Outcome(with_modules(pipeline, {"unet": unet}), record=record)


def _pruned(unet: Any, settings: PruneSettings) -> tuple[Any, tuple[str, ...]]:
    """The UNet that is left, and the blocks that went."""
    named = settings.blocks
    gone = blocks.preset(unet, named) if isinstance(named, str) else named
    return blocks.remove(unet, gone, settings.attention_levels), gone
