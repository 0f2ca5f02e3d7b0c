"""The reference interpreter of ML programs: runs a saved `.mlpackage` from its file, anywhere.

    runner = load(bundle, "unet", arithmetic="float16")
    outputs = runner({"sample": ..., "timestep": ..., "encoder_hidden_states": ...})

    program = Program.open("Unet.mlpackage")
    outputs = program.run({...}, arithmetic="float32", observe=lambda name, array: ...)

It is a yardstick, not a race car: it computes with torch on the CPU, operation by operation.
What the two arithmetics mean is told in `values`, what the operations compute in `ops`.
"""

import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mobile_runtime.backends.mil.package import Package
from mobile_runtime.backends.mil.program import Observer, Program
from mobile_runtime.backends.mil.values import ARITHMETICS, Arithmetic, ValueType
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, choices, missing_backend

__all__ = [
    "ARITHMETICS",
    "Arithmetic",
    "Observer",
    "Program",
    "Runner",
    "ValueType",
    "load",
    "watch",
]


class Runner:
    """A program with its arithmetic: a callable, as every backend's runner is."""

    def __init__(self, program: Program, arithmetic: Arithmetic) -> None:
        self.program = program
        self.arithmetic = arithmetic

    def __call__(
        self, inputs: dict[str, np.ndarray], observe: Observer | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays in, arrays out, by name; see `Program.run`."""
        return self.program.run(inputs, arithmetic=self.arithmetic, observe=observe)


def load(bundle: Bundle, component: str, *, arithmetic: Arithmetic = "float32") -> Runner:
    """Open one component of a Core ML bundle.

    arithmetic: "float32", or "float16" for rounding to fp16 as the program declares it.
    Raises UserError for a component that is no `.mlpackage`, an operation that the interpreter
    lacks, or a library that is not installed.
    """
    if arithmetic not in ARITHMETICS:
        raise choices("arithmetic", arithmetic, list(ARITHMETICS))
    entry = bundle.component(component)
    if entry.format != "mlpackage":
        raise UserError(
            f"the mil backend runs .mlpackage files, and {component} of {bundle.path} is "
            f"{entry.format}; choose the backend that fits the bundle's target"
        )
    if importlib.util.find_spec("torch") is None:
        raise missing_backend("torch", "coreml", "the ML-program interpreter")
    Package(bundle.file(entry.path)).check_interface(entry)
    return Runner(Program.open(bundle.file(entry.path)), arithmetic)


def watch(
    path: Path,
    feeds: dict[str, np.ndarray],
    wanted: Mapping[str, int],
    outputs: Collection[str],
    observe: Observer,
    *,
    arithmetic: Arithmetic = "float32",
) -> None:
    """Run an `.mlpackage` and show those of its values that are wanted, by name.

    outputs: the program's own; here they are values like the others.
    """

    def look(name: str, value: np.ndarray) -> None:
        if name in wanted:
            observe(name, value)

    Program.open(path).run(feeds, arithmetic=arithmetic, observe=look)


def some_values(
    path: Path,
    names: Sequence[str],
    cases: Iterable[dict[str, np.ndarray]],
    *,
    arithmetic: Arithmetic = "float32",
) -> Iterator[dict[str, np.ndarray]]:
    """Values of an `.mlpackage` for each case; only what they need is computed."""
    program = Program.open(path)
    for feeds in cases:
        yield program.run(feeds, arithmetic=arithmetic, outputs=names)
