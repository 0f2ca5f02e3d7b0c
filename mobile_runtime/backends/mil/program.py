"""An ML program, opened from its `.mlpackage` and run by interpreting its operations in order.

The file's protobuf is the only source: nothing is converted, optimized or folded, so what runs is
what the file says. Weights are read from the mapped weight file and decompressed when the
operation that uses them runs, and dropped after it; a value is dropped after its last use.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_runtime.backends.mil import _torch as torch
from mobile_runtime.backends.mil.ops import Signature, find_kernel
from mobile_runtime.backends.mil.package import Package
from mobile_runtime.backends.mil.values import (
    ARITHMETICS,
    Arithmetic,
    Constant,
    ValueType,
    export,
    hold,
    parse_constant,
    parse_type,
    settle,
)
from mobile_runtime.errors import BundleError, UserError, choices

if TYPE_CHECKING:
    from torch import Tensor

Observer = Callable[[str, np.ndarray], None]
TOLD_FAULTS = 5


@dataclass(frozen=True)
class Name:
    """A value that is computed while the program runs."""

    name: str


@dataclass(frozen=True)
class Decompressed:
    """An output of a constexpr operation: computed anew for each operation that uses it."""

    step: Step
    index: int


Source = Name | Constant | Decompressed


@dataclass(frozen=True)
class Step:
    """One operation, bound to its kernel.

    settings: arguments that are constant Python values. sources: where tensors come from (a list
    for a variadic argument). computed: Python values (a shape, say) that the program computes.
    """

    kind: str
    kernel: Callable[..., Any]
    outputs: tuple[tuple[str, ValueType], ...]
    settings: dict[str, Any]
    sources: dict[str, Source | list[Source]]
    computed: dict[str, Source]

    def needs(self) -> set[str]:
        """The names of the values that it reads."""
        flat: list[Source] = [*self.computed.values()]
        for source in self.sources.values():
            flat += source if isinstance(source, list) else [source]
        return {source.name for source in flat if isinstance(source, Name)}

    def __str__(self) -> str:
        return f"op {self.kind} (output {self.outputs[0][0]!r})"


class Program:
    """A program that runs. `inputs` and `outputs` are the declared types, by name."""

    def __init__(self, path: Path, function: Any, package: Package) -> None:
        self.path = path
        self.inputs = {value.name: parse_type(value.type) for value in function.inputs}
        self._known: dict[str, Source] = {name: Name(name) for name in self.inputs}
        self._types = dict(self.inputs)
        self._steps: list[Step] = []
        self._package = package
        block = function.block_specializations.get(function.opset)
        if block is None:
            raise BundleError(f"{path}: the program has no block for its opset {function.opset!r}")
        self.opset: str = function.opset
        self.kinds = Counter(operation.type for operation in block.operations)
        faults = [fault for op in block.operations if (fault := self._add(op)) is not None]
        if faults:
            more = len(faults) - TOLD_FAULTS
            told = "; ".join(faults[:TOLD_FAULTS]) + (f"; and {more} more" if more > 0 else "")
            raise UserError(f"the interpreter cannot run {path}: {told}")
        for name in block.outputs:
            if name not in self._types:
                raise BundleError(f"{path}: the program's output {name!r} is never computed")
        self.outputs = {name: self._types[name] for name in block.outputs}

    @classmethod
    def open(cls, path: str | os.PathLike[str], function: str = "main") -> Program:
        """Open a `.mlpackage`, and check that every operation in it can be run.

        function: which of a package with several functions.
        Raises UserError that names each operation or attribute value that is not supported with
        the name of its output, and BundleError when the package is damaged.
        """
        package = Package(path)
        functions = package.spec.mlProgram.functions
        if function not in functions:
            raise choices(f"function of {package.path}", function, list(functions))
        return cls(package.path, functions[function], package)

    def _add(self, operation: Any) -> str | None:
        """Take in one operation; what is wrong with it, if it cannot run."""
        label = f"op {operation.type}"
        if operation.outputs:
            label += f" (output {operation.outputs[0].name!r})"
        try:
            outputs = tuple((v.name, parse_type(v.type)) for v in operation.outputs)
            self._types.update(outputs)
            # What follows may refer to an output even where its own operation has a fault.
            self._known.update({name: Name(name) for name, _ in outputs})
            if operation.type == "const":
                value = parse_constant(operation.attributes["val"], self._package)
                self._known[outputs[0][0]] = value
                return None
            signature = find_kernel(operation.type)
            if signature is None or operation.blocks:
                return f"{label} is not supported"
            step = self._bind(operation, outputs, signature)
            fault = signature.fault(step.settings, self._input_types(step), outputs)
            if fault is not None:
                return f"{label}: {fault}"
        except BundleError:
            raise
        except UserError as error:
            return f"{label}: {error}"
        if operation.type.startswith("constexpr_"):
            for index, (name, _) in enumerate(outputs):
                self._known[name] = Decompressed(step, index)
        else:
            self._steps.append(step)
        return None

    def _bind(
        self, operation: Any, outputs: tuple[tuple[str, ValueType], ...], signature: Signature
    ) -> Step:
        settings: dict[str, Any] = {}
        sources: dict[str, Source | list[Source]] = {}
        computed: dict[str, Source] = {}
        arguments: dict[str, list[Source]] = {
            name: [parse_constant(value, self._package)]
            for name, value in operation.attributes.items()
            if name != "name"
        }
        for name, argument in operation.inputs.items():
            arguments[name] = [self._source(binding) for binding in argument.arguments]
        for name, given in arguments.items():
            form = signature.form(name)
            if form == "tensors":
                sources[name] = given
            elif form == "tensor":
                sources[name] = given[0]
            elif form == "values":
                settings[name] = [_constant(name, source).python() for source in given]
            elif isinstance(given[0], Constant):
                settings[name] = given[0].python()
            else:
                computed[name] = given[0]
        signature.require({*settings, *sources, *computed}, set(computed))
        return Step(operation.type, signature.kernel, outputs, settings, sources, computed)

    def _source(self, binding: Any) -> Source:
        if binding.WhichOneof("binding") == "value":
            return parse_constant(binding.value, self._package)
        if binding.name not in self._known:
            raise BundleError(f"{self.path}: {binding.name!r} is used before it is computed")
        return self._known[binding.name]

    def _input_types(self, step: Step) -> dict[str, ValueType]:
        types = {}
        for name, source in step.sources.items():
            first = source[0] if isinstance(source, list) else source
            if isinstance(first, Constant):
                types[name] = first.type
            elif isinstance(first, Name):
                types[name] = self._types[first.name]
            else:
                types[name] = first.step.outputs[first.index][1]
        return types

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        arithmetic: Arithmetic = "float32",
        outputs: Iterable[str] | None = None,
        observe: Observer | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the program; arrays in, arrays out, by name, of the declared types and shapes.

        arithmetic: see `values`. outputs: names of any values of the program, instead of its own
        outputs; only what they need is computed. observe: called with the name and the value of
        each operation's result, in order, as soon as it is computed; floats come as float32
        arrays, not rounded to a declared fp16 unless the arithmetic did so, and must be copied by
        an observer that keeps them.
        Raises UserError for a missing, unknown or unfitting input, and for an unknown output.
        """
        if arithmetic not in ARITHMETICS:
            raise choices("arithmetic", arithmetic, list(ARITHMETICS))
        wanted = list(self.outputs if outputs is None else outputs)
        for name in wanted:
            if name not in self._types:
                raise UserError(f"{self.path}: the program computes no value named {name!r}")
        steps, released = self._plan(wanted)
        with torch.inference_mode():
            values = self._bind_inputs(inputs, arithmetic)
            for step, dead in zip(steps, released, strict=True):
                for (name, _), result in zip(
                    step.outputs, _compute(step, values, arithmetic), strict=True
                ):
                    values[name] = result
                    if observe is not None:
                        observe(name, result.contiguous().numpy())
                for name in dead:
                    del values[name]
            return {
                name: export(_fetch(self._known[name], values, arithmetic), self._types[name])
                for name in wanted
            }

    def _plan(self, wanted: list[str]) -> tuple[list[Step], list[set[str]]]:
        """The steps that the wanted values need, and the values that each step is the last to use.

        A result that nobody reads is released by the step that computed it.
        """
        needed = set(wanted)
        steps: list[Step] = []
        for step in reversed(self._steps):
            if any(name in needed for name, _ in step.outputs):
                needed |= step.needs()
                steps.append(step)
        released: list[set[str]] = []
        alive = set(wanted)
        for step in steps:  # from the last to the first
            touched = step.needs() | {name for name, _ in step.outputs}
            released.append(touched - alive - set(self.inputs))
            alive |= touched
        return steps[::-1], released[::-1]

    def _bind_inputs(
        self, inputs: Mapping[str, np.ndarray], arithmetic: Arithmetic
    ) -> dict[str, Tensor]:
        if set(inputs) != set(self.inputs):
            raise UserError(
                f"{self.path} takes the inputs {', '.join(self.inputs)}; "
                f"given: {', '.join(inputs) or 'none'}"
            )
        values = {}
        for name, declared in self.inputs.items():
            array = np.asarray(inputs[name])
            kind = "f" if declared.is_float else "iu"
            if array.dtype.kind not in kind or not declared.admits(array.shape):
                raise UserError(
                    f"{self.path}: the input {name!r} must be {declared}, "
                    f"not {array.dtype} {list(array.shape)}"
                )
            held = hold(array.astype(np.float32 if kind == "f" else declared.numpy), declared.dtype)
            values[name] = settle(held, declared, arithmetic)
        return values


def _constant(parameter: str, source: Source) -> Constant:
    if not isinstance(source, Constant):
        raise UserError(f"{parameter} must be a constant")
    return source


def _fetch(source: Source, values: Mapping[str, Tensor], arithmetic: Arithmetic) -> Tensor:
    if isinstance(source, Name):
        return values[source.name]
    if isinstance(source, Constant):
        return source.tensor()
    return _compute(source.step, values, arithmetic)[source.index]


def _compute(step: Step, values: Mapping[str, Tensor], arithmetic: Arithmetic) -> list[Tensor]:
    arguments = dict(step.settings)
    for name, source in step.sources.items():
        arguments[name] = (
            [_fetch(one, values, arithmetic) for one in source]
            if isinstance(source, list)
            else _fetch(source, values, arithmetic)
        )
    for name, one in step.computed.items():
        arguments[name] = _fetch(one, values, arithmetic).tolist()
    try:
        results = step.kernel(**arguments)
    except Exception as error:
        error.add_note(f"while interpreting {step}")
        raise
    if not isinstance(results, list | tuple):
        results = [results]
    for (name, declared), result in zip(step.outputs, results, strict=True):
        if not declared.admits(tuple(result.shape)):
            raise BundleError(
                f"{step} computes shape {list(result.shape)} where the program declares "
                f"{name!r} as {declared}"
            )
    return [
        settle(result, declared, arithmetic)
        for (_, declared), result in zip(step.outputs, results, strict=True)
    ]
