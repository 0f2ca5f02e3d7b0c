"""The table of operations: MIL's name of each kind, and the function that computes it.

A kernel's signature is the schema of its operation: its parameters have MIL's names, a default
means optional, and the annotation says what arrives:

    Tensor               a tensor, constant or computed
    list[Tensor]         a variadic argument of tensors
    tuple[int, ...]      a variadic argument of constants
    int, float, bool, str, list[int], list[bool]   a Python value
    Literal[...]         a constant that must be one of these: others are refused when loading

What a kernel returns is cast, and rounded where the arithmetic says so, to the type that the
program declares for the output; so kernels compute in the type they are handed (float32 for
every float type) and need not care. The definitions follow coremltools' documentation of the
operations (its opsets iOS15 to iOS18); a kernel that serves several opsets takes the union of
their parameters.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from mobile_runtime.backends.mil import (
    ops_constexpr,
    ops_convolution,
    ops_elementwise,
    ops_gather,
    ops_image,
    ops_linear,
    ops_normalization,
    ops_reduction,
    ops_tensor,
)
from mobile_runtime.backends.mil.values import ValueType
from mobile_runtime.errors import UserError

Kernel = Callable[..., Any]
Outputs = tuple[tuple[str, ValueType], ...]

OPS: dict[str, Kernel] = {
    **ops_constexpr.OPS,
    **ops_convolution.OPS,
    **ops_elementwise.OPS,
    **ops_gather.OPS,
    **ops_image.OPS,
    **ops_linear.OPS,
    **ops_normalization.OPS,
    **ops_reduction.OPS,
    **ops_tensor.OPS,
}


class _TensorMark:
    """Stands for torch's Tensor when annotations are read, so that reading needs no torch."""


class Signature:
    """What a kernel takes, read from its annotations."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._hints = typing.get_type_hints(kernel, localns={"Tensor": _TensorMark})
        self._hints.pop("return", None)
        self._required = [
            name
            for name, parameter in inspect.signature(kernel).parameters.items()
            if parameter.default is parameter.empty
        ]

    def form(self, name: str) -> Literal["tensor", "tensors", "values", "python"]:
        """How the argument of this name arrives; UserError for one that the kernel lacks."""
        if name not in self._hints:
            raise UserError(f"the argument {name!r} is not supported")
        hint = self._hints[name]
        if hint is _TensorMark or _TensorMark in typing.get_args(hint):
            return "tensors" if typing.get_origin(hint) is list else "tensor"
        return "values" if typing.get_origin(hint) is tuple else "python"

    def require(self, given: set[str], computed: set[str]) -> None:
        """Refuse a missing argument, and a computed one that decides what the kernel does."""
        for name in self._required:
            if name not in given:
                raise UserError(f"the argument {name!r} is missing")
        for name in computed:
            if typing.get_origin(self._hints[name]) is Literal:
                raise UserError(f"{name} must be a constant")

    def fault(
        self, settings: Mapping[str, Any], inputs: Mapping[str, ValueType], outputs: Outputs
    ) -> str | None:
        """Why the kernel cannot take these constants and types, or None."""
        for name, value in settings.items():
            known = _literals(self._hints[name])
            if known and value not in known:
                return f"{name} {value!r} is not supported (only {', '.join(map(str, known))})"
        check = CHECKS.get(self.kernel)
        return None if check is None else check(settings, inputs, outputs)


def _literals(hint: Any) -> tuple[Any, ...]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next((found for arg in typing.get_args(hint) if (found := _literals(arg))), ())
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


@functools.cache
def find_kernel(kind: str) -> Signature | None:
    """The kernel of an operation kind, or None."""
    return Signature(OPS[kind]) if kind in OPS else None


def _float_division(
    settings: Mapping[str, Any], inputs: Mapping[str, ValueType], outputs: Outputs
) -> str | None:
    if not outputs[0][1].is_float:
        return "division of integers is not supported: Core ML does not say how it rounds"
    return None


def _whole_scale(
    settings: Mapping[str, Any], inputs: Mapping[str, ValueType], outputs: Outputs
) -> str | None:
    for name in ("scale_factor_height", "scale_factor_width"):
        scale = settings.get(name, 1)
        if scale != int(scale) or scale < 1:
            return f"{name} {scale} is not supported (only whole factors)"
    return None


def _nearest_default(
    settings: Mapping[str, Any], inputs: Mapping[str, ValueType], outputs: Outputs
) -> str | None:
    mode = settings.get("sampling_mode", "DEFAULT")
    if settings.get("interpolation_mode") == "NEAREST_NEIGHBOR" and mode != "DEFAULT":
        return f"sampling_mode {mode!r} of nearest-neighbour is not supported (only DEFAULT)"
    return None


Check = Callable[[Mapping[str, Any], Mapping[str, ValueType], Outputs], str | None]

# What annotations cannot say, by kernel.
CHECKS: dict[Kernel, Check] = {
    OPS["real_div"]: _float_division,
    ops_image.upsample_nearest_neighbor: _whole_scale,
    ops_image.resize: _nearest_default,
}
