"""What a lowering gives back: the file that it made, and what it has to say about it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lowered:
    """One component in a target's format. `path` is a file, or a folder for .mlpackage."""

    path: Path
    format: str
    details: dict[str, Any] = field(default_factory=dict)
