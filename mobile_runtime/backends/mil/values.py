"""Types and constants of an ML program, and the two arithmetics.

A value is a torch tensor while a program runs. Both float types are held as float32 tensors:

- arithmetic "float32": every float operation is computed in float32, whatever type the program
  declares; a cast between float types changes nothing. Constants have their stored values, and
  compressed ones the float32 result of their decompression.
- arithmetic "float16": the same, and then each result that the program declares as fp16 (an
  input, an operation's output, a decompressed constant) is rounded once to the nearest fp16, ties
  to even; beyond 65504 it becomes infinite, and subnormals stay. So an operation sees fp16
  numbers, accumulates and composes in float32 inside, and rounds at its end. Where a device
  accumulates in fp16, or fuses operations, it differs from this by such roundings.

Integers and booleans are exact in both. Unsigned types wider than a byte are held in the next
wider signed type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mobile_runtime.backends.mil import _torch as torch
from mobile_runtime.backends.mil.package import Package
from mobile_runtime.backends.mil.weights import NUMPY_TYPES, packed_bytes, unpack
from mobile_runtime.errors import BundleError, UserError

if TYPE_CHECKING:
    from torch import Tensor

Arithmetic = Literal["float32", "float16"]
ARITHMETICS: tuple[Arithmetic, ...] = ("float32", "float16")

# torch's type of a value while a program runs, by MIL's name of the declared type.
HELD_AS = {
    "BOOL": "bool",
    "FLOAT16": "float32",
    "FLOAT32": "float32",
    "INT4": "int8",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT1": "uint8",
    "UINT2": "uint8",
    "UINT3": "uint8",
    "UINT4": "uint8",
    "UINT6": "uint8",
    "UINT8": "uint8",
    "UINT16": "int32",
    "UINT32": "int64",
}


@dataclass(frozen=True)
class ValueType:
    """The declared type of a value: MIL's name of the element type; None for an open dimension."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def numpy(self) -> np.dtype:
        """The numpy type of an array of this type."""
        return NUMPY_TYPES[self.dtype][0]

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("FLOAT")

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits the declared one."""
        return len(shape) == len(self.shape) and all(
            want in (None, have) for want, have in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype.lower()} {list(self.shape)}".replace("None", "?")


@dataclass(frozen=True)
class Constant:
    """A stored value; `read` gives an array (a view of the file where it can), or a string."""

    type: ValueType
    read: Callable[[], Any]

    def python(self) -> Any:
        """The value as a Python number, string, or list of them."""
        value = self.read()
        return value.tolist() if isinstance(value, np.ndarray) else value

    def tensor(self) -> Tensor:
        """The value as a tensor of the type that it is held as."""
        return hold(self.read(), self.type.dtype)


def hold(array: np.ndarray, dtype: str) -> Tensor:
    """An array of the declared type as the tensor that stands for it; shares memory if it can."""
    if array.dtype in (np.uint16, np.uint32):
        array = array.astype(HELD_AS[dtype])
    return torch.from_numpy(array).to(getattr(torch, HELD_AS[dtype]))


def settle(result: Tensor, declared: ValueType, arithmetic: Arithmetic) -> Tensor:
    """What an operation computed, as the declared type says; rounds in arithmetic "float16"."""
    held = result.to(getattr(torch, HELD_AS[declared.dtype]))
    if arithmetic == "float16" and declared.dtype == "FLOAT16":
        return held.to(torch.float16).to(torch.float32)
    return held


def export(value: Tensor, declared: ValueType) -> np.ndarray:
    """A value as an own array of exactly the declared type."""
    if declared.dtype == "FLOAT16":
        value = value.to(torch.float16)  # numpy's own conversion would warn where it overflows
    return value.contiguous().numpy().astype(declared.numpy, copy=True)


def parse_type(proto: Any) -> ValueType:
    """A type of the program; raises UserError for one that is no tensor of a known element."""
    kind = proto.WhichOneof("type")
    if kind == "listType":
        element = parse_type(proto.listType.type)
        return ValueType(element.dtype, (proto.listType.length.constant.size, *element.shape))
    if kind != "tensorType":
        raise UserError(f"values of kind {kind} are not supported by the interpreter")
    tensor = proto.tensorType
    dtype = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type
    name = dtype.values_by_number[tensor.dataType].name
    if name != "STRING" and name not in HELD_AS:
        raise UserError(f"values of type {name.lower()} are not supported by the interpreter")
    shape = tuple(
        d.constant.size if d.WhichOneof("dimension") == "constant" else None
        for d in tensor.dimensions
    )
    return ValueType(name, shape)


def parse_constant(proto: Any, package: Package) -> Constant:
    """A value of the program: in place, or in a weight file, whose record is checked here."""
    declared = parse_type(proto.type)
    shape = tuple(size or 0 for size in declared.shape)
    if proto.WhichOneof("value") == "blobFileValue":
        weights = package.weights(proto.blobFileValue.fileName)
        offset = proto.blobFileValue.offset
        weights.check(offset, declared.dtype, shape)
        return Constant(declared, lambda: weights.read(offset, declared.dtype, shape))
    value = _parse_immediate(proto.immediateValue, declared, shape)
    return Constant(declared, lambda: value)


def _parse_immediate(proto: Any, declared: ValueType, shape: tuple[int, ...]) -> Any:
    if proto.WhichOneof("value") == "list":
        return [_parse_immediate(v.immediateValue, declared, ()) for v in proto.list.values]
    field = proto.tensor.WhichOneof("value")
    if field is None:
        return np.zeros(shape, declared.numpy)
    stored = getattr(proto.tensor, field).values
    if declared.dtype == "STRING":
        return list(stored) if shape else stored[0]
    try:
        if field != "bytes":
            return np.array(stored, declared.numpy).reshape(shape)
        raw = np.frombuffer(bytearray(stored), np.uint8)
        if raw.size != packed_bytes(declared.dtype, shape):
            raise ValueError(f"{raw.size} bytes")
        return unpack(raw, declared.dtype, shape)
    except ValueError as error:
        raise BundleError(
            f"a constant of the program does not hold its declared type {declared}: {error}"
        ) from error
