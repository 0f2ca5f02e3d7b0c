"""Tiny ML programs for tests: written with coremltools' builder, saved, and run from their file."""

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobile_runtime.backends.mil import Arithmetic, Program

# What a program may take and give; other types are cast inside it.
IO_TYPES = ("float32", "float16", "int32")
PROGRAM_TYPES = ("fp32", "fp16", "int32")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """coremltools warns about versions and about what only a Mac has."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@functools.cache
def coremltools() -> Any:
    with quiet():
        import coremltools
    return coremltools


@dataclass(frozen=True)
class Case:
    """One use of an operation.

    build: (mb, variables...) -> variable, or a list of them. expected: the same with torch
    tensors. official: compare also with the numpy definition that coremltools has of it.
    """

    build: Callable[..., Any]
    inputs: tuple[np.ndarray, ...]
    expected: Callable[..., Any]
    official: bool = True
    rtol: float = 1e-5
    atol: float = 1e-6


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def write_program(
    inputs: dict[str, np.ndarray],
    build: Callable[..., dict[str, Any]],
    path: Path,
    opset: str = "iOS17",
) -> Path:
    """Save a program whose body is `build(mb, variables)`, unchanged by any pass."""
    ct = coremltools()
    from coremltools.converters.mil import mil
    from coremltools.converters.mil.mil import types

    mb = mil.Builder

    placeholders = {
        name: mb.placeholder(
            value.shape,
            types.numpy_type_to_builtin_type(
                value.dtype if value.dtype.name in IO_TYPES else np.int32
            ),
        )
        for name, value in inputs.items()
    }
    target = getattr(ct.target, opset)
    with quiet():
        program = mil.Program()
        with mil.Function(placeholders, opset_version=target) as function:
            variables = {
                name: function.inputs[name]
                if value.dtype.name in IO_TYPES
                else mb.cast(x=function.inputs[name], dtype=value.dtype.name)
                for name, value in inputs.items()
            }
            outputs = []
            for name, variable in build(mb, variables).items():
                if types.builtin_to_string(variable.dtype) not in PROGRAM_TYPES:
                    variable = mb.cast(x=variable, dtype="int32")
                elif variable.op is None:  # an input of the program
                    variable = mb.identity(x=variable)
                variable.name = name
                outputs.append(variable)
            function.set_outputs(outputs)
        program.add_function("main", function)
        model = ct.convert(
            program,
            pass_pipeline=ct.PassPipeline.EMPTY,
            minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


def run_cases(
    cases: dict[str, Case],
    path: Path,
    opset: str = "iOS17",
    arithmetic: Arithmetic = "float32",
) -> dict[str, list[np.ndarray]]:
    """Every case in one program; the results by case."""
    # A program's names must be identifiers.
    plain = {name: re.sub(r"\W", "_", name) for name in cases}
    feeds = {
        f"{plain[name]}_in{i}": value
        for name, case in cases.items()
        for i, value in enumerate(case.inputs)
    }
    counts: dict[str, int] = {}

    def build(mb: Any, variables: dict[str, Any]) -> dict[str, Any]:
        outputs = {}
        for name, case in cases.items():
            given = [variables[f"{plain[name]}_in{i}"] for i in range(len(case.inputs))]
            try:
                results = _as_list(case.build(mb, *given))
            except Exception as error:
                error.add_note(f"while building the case {name}")
                raise
            counts[name] = len(results)
            outputs.update({f"{plain[name]}_out{i}": result for i, result in enumerate(results)})
        return outputs

    program = Program.open(write_program(feeds, build, path, opset))
    given = {
        name: value if value.dtype.name in IO_TYPES else value.astype(np.int32)
        for name, value in feeds.items()
    }
    results = program.run(given, arithmetic=arithmetic)
    return {
        name: [results[f"{plain[name]}_out{i}"] for i in range(count)]
        for name, count in counts.items()
    }


def check_expected(case: Case, results: list[np.ndarray]) -> None:
    """Compare a case's results with torch's."""
    expected = _as_list(case.expected(*(torch.from_numpy(value.copy()) for value in case.inputs)))
    compare(case, results, [np.asarray(value) for value in expected])


def official_values(case: Case, opset: str = "iOS17") -> list[np.ndarray] | None:
    """What coremltools' own numpy definition of the operation gives for these inputs, if any."""
    from coremltools.converters.mil import mil

    mb = mil.Builder
    with quiet(), mil.Function({}, opset_version=getattr(coremltools().target, opset)):
        results = _as_list(case.build(mb, *(mb.const(val=value) for value in case.inputs)))
    if any(result.val is None for result in results):
        return None
    return [np.asarray(result.val) for result in results]


def compare(case: Case, results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(results) == len(expected)
    for got, want in zip(results, expected, strict=True):
        assert got.shape == want.shape
        if want.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)
        else:
            np.testing.assert_array_equal(got, want)


def snr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """Signal to noise in dB, of the reference's power."""
    noise = np.square(reference.astype(np.float64) - value).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(noise, 1e-300)))
