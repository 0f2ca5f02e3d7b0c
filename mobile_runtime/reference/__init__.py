"""The desktop pipeline: one object that is exact, as the yardstick, or fast, with switches on."""

from mobile_runtime.reference.parts import Parts
from mobile_runtime.reference.pipeline import Drawn, ReferencePipeline
from mobile_runtime.reference.switches import EXACT, Settings

__all__ = ["EXACT", "Drawn", "Parts", "ReferencePipeline", "Settings"]
