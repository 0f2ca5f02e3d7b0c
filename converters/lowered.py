"""What a lowering gives back: the file that it made, and what it has to say about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Watch:
    """How to look at the values inside a file.

    backend: that runs it. names: of the values; None for every one that the backend shows.
    runs: the backend's options, by the arithmetic that they mean; the first finds the values.
    """

    backend: str
    names: tuple[str, ...] | None
    runs: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """How to run a file of which nobody can look inside. call: named arrays in and out."""

    backend: str
    call: Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Lowered:
    """One component in a target's format. `path` is a file, or a folder for .mlpackage.

    watch: None where nobody can look inside; `run` is there instead.
    """

    path: Path
    format: str
    details: dict[str, Any] = field(default_factory=dict)
    watch: Watch | None = None
    run: Run | None = None
