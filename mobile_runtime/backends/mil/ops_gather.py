"""Reading and writing by index, and sorting.

A negative index counts from the end, as opset iOS15 has it (iOS17 leaves it undefined, and its
converters normalize indices first); an index out of range raises IndexError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor

ScatterMode = Literal["update", "add", "sub", "mul", "div", "max", "min"]
UPDATES: dict[str, Callable[..., None]] = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
}


def _from_start(indices: Tensor, size: int) -> Tensor:
    wide = indices.long()
    return torch.where(wide < 0, wide + size, wide)


def gather(
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:]"""
    axis %= x.dim()
    where = _from_start(indices, x.shape[axis])
    shape = [*x.shape[:axis], *indices.shape[batch_dims:], *x.shape[axis + 1 :]]
    if batch_dims == 0:
        return x.index_select(axis, where.reshape(-1)).reshape(shape)
    batch = x.shape[:batch_dims].numel()
    before, after = x.shape[batch_dims:axis].numel(), x.shape[axis + 1 :].numel()
    flat = x.reshape(batch, before, x.shape[axis], after)
    where = where.reshape(batch, 1, -1, 1).expand(-1, before, -1, after)
    return flat.gather(2, where).reshape(shape)


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    """indices have the rank of x, and its sizes except along the axis."""
    return x.gather(axis, _from_start(indices, x.shape[axis]))


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """The last axis of indices is a place in the axes of x that follow the batch axes."""
    places = [
        _from_start(part, x.shape[batch_dims + axis])
        for axis, part in enumerate(indices.unbind(-1))
    ]
    for axis in range(batch_dims):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = -1
        places.insert(axis, torch.arange(x.shape[axis]).reshape(shape))
    return x[tuple(places)]


def _write(data: Tensor, places: tuple[Any, ...], updates: Tensor, mode: str) -> Tensor:
    result = data.numpy().copy()
    if mode == "update":
        result[places] = updates.numpy()
    else:
        UPDATES[mode](result, places, updates.numpy())
    return torch.from_numpy(result)


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: ScatterMode = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Whole slices along the axis; indices (C,)."""
    places = (slice(None),) * (axis % data.dim()) + (indices.long().numpy(),)
    return _write(data, places, updates, mode)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: ScatterMode = "add",
    validate_indices: bool = False,
) -> Tensor:
    """Element by element; indices and updates have the same shape."""
    places = list(np.indices(tuple(indices.shape), sparse=True))
    places[axis] = indices.long().numpy()
    return _write(data, tuple(places), updates, mode)


def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: ScatterMode = "add",
    validate_indices: bool = False,
) -> Tensor:
    """The last axis of indices is a place in the first axes of data."""
    places = tuple(part.long().numpy() for part in indices.unbind(-1))
    return _write(data, places, updates, mode)


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: Literal["int32", "uint16"] = "int32",
) -> list[Tensor]:
    values, indices = torch.topk(x, k, axis, largest=not ascending, sorted=True)
    return [values, indices] if return_indices else [values]


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True)


def non_zero(x: Tensor) -> Tensor:
    """(N, rank) places of the elements that are not zero."""
    return torch.nonzero(x)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: float = 1,
    off_value: float = 0,
) -> Tensor:
    """A new axis that holds on_value at the index and off_value elsewhere."""
    hot = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    filled = torch.where(hot, on_value, off_value)
    return filled.movedim(-1, axis)


OPS: dict[str, Callable[..., Any]] = {
    "argsort": argsort,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "topk": topk,
}
