"""The settings of Core ML's palettes; what is done with them is in converters/palette_plan.py."""

from typing import Literal

from pydantic import Field

from mobile_runtime.manifest import ComponentName
from recipes.settings import NEEDED_COMPONENTS, Strict

PaletteBits = Literal[1, 2, 3, 4, 6, 8]


class PaletteRule(Strict):
    """What happens to the float layers that match; of several that match, the last one wins."""

    layers: str = Field(min_length=1, description="glob on module paths, e.g. unet.conv_in")
    bits: Literal[1, 2, 3, 4, 6, 8, "float"]
    reason: str = Field(min_length=1)


class MixedPalettes(Strict):
    """Bits by sensitivity: each layer alone at each width. One of two budgets."""

    average_bits: float | None = Field(
        default=None,
        gt=0,
        le=16,
        description="of each component's float layers, a weight, tables included",
    )
    snr_db: float | None = Field(
        default=None, gt=0, description="of each component's output, as the layers alone predict it"
    )
    widths: tuple[PaletteBits, ...] = Field(
        default=(2, 4, 6, 8), strict=False, min_length=1, description="to choose from; or float"
    )
    samples: int = Field(default=4, ge=1, le=256, description="pictures that it is measured on")
    prompts: str | None = Field(
        default=None, min_length=1, description="file, a prompt a line; default: the source's own"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    def faults(self) -> list[str]:
        """What does not fit together, one sentence each."""
        found = []
        if (self.average_bits is None) == (self.snr_db is None):
            found.append("give average_bits or snr_db, one of the two")
        if len(set(self.widths)) < len(self.widths):
            found.append("widths: repeats a number; list each number once")
        return found


class PaletteSettings(Strict):
    """Weights as indices into tables: of the same bits for every layer, or mixed."""

    bits: PaletteBits | None = Field(default=None, description="of every layer; or give mixed")
    mixed: MixedPalettes | None = None
    group_size: int | None = Field(
        default=None,
        ge=1,
        description="output channels that share a table, from iOS18 on; None: one table a layer",
    )
    components: tuple[ComponentName, ...] = Field(
        default=NEEDED_COMPONENTS, strict=False, min_length=1
    )
    rules: tuple[PaletteRule, ...] = Field(default=(), strict=False)

    @property
    def every_bits(self) -> set[int]:
        """All widths that a layer may get."""
        asked = {self.bits, *(self.mixed.widths if self.mixed else ())}
        asked |= {rule.bits for rule in self.rules if rule.bits != "float"}
        return {bits for bits in asked if isinstance(bits, int)}

    def faults(self, deployment_target: str) -> list[str]:
        """What does not fit together, one sentence each."""
        found = []
        if (self.bits is None) == (self.mixed is None):
            found.append("bits: give bits or mixed, one of the two")
        if self.mixed is not None:
            found += [f"mixed: {fault}" for fault in self.mixed.faults()]
        if deployment_target != "iOS18":
            way_out = f"and deployment_target is {deployment_target}; set it to iOS18"
            if self.group_size is not None:
                found.append(f"group_size: needs iOS18, {way_out}, or leave group_size out")
            if 3 in self.every_bits:
                found.append(f"bits: 3 need iOS18, {way_out}, or choose other bits")
        for index, rule in enumerate(self.rules):
            head = rule.layers.split(".")[0]
            if not set(head) & set("*?[") and head not in self.components:
                found.append(
                    f"rules.{index}.layers: {rule.layers!r} begins with {head!r}, which is none of "
                    f"palettes.components ({', '.join(self.components)})"
                )
        return found
