"""Compressed constants: decompressed as Core ML defines it, in float32.

A program of opset iOS16 or iOS17 packs indices and masks itself, into bytes; from iOS18 on they
have types narrower than a byte, and groups of elements may have their own scales and tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mobile_runtime.backends.mil import _torch as torch
from mobile_runtime.backends.mil.ops_elementwise import along_axis
from mobile_runtime.backends.mil.weights import unpack

if TYPE_CHECKING:
    from torch import Tensor


def affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    """scale * (q - zero_point); scale and zero point are scalars or run along the axis."""
    q = _own_float(quantized_data)
    q -= along_axis(zero_point.float(), q.dim(), axis)
    q *= along_axis(scale, q.dim(), axis)
    return q


def _own_float(stored: Tensor) -> Tensor:
    """A float copy, to be worked on in place: a new array for each step takes three times as long.

    Never the stored value itself, which is the file's own memory.
    """
    return stored.to(torch.float32, copy=True)


def blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), each block of data having one scale.

    The size of a block along a dimension is that of data divided by that of scale.
    """
    blocks: list[int] = []
    for size, count in zip(data.shape, scale.shape, strict=True):
        blocks += [count, size // count]
    grouped = _own_float(data).reshape(blocks)
    if offset is not None:
        grouped -= _beside_blocks(offset.float())
    grouped *= _beside_blocks(scale)
    return grouped.reshape(data.shape)


def _beside_blocks(values: Tensor) -> Tensor:
    return values.reshape([size for count in values.shape for size in (count, 1)])


def lut_to_dense(
    indices: Tensor,
    lut: Tensor,
    shape: list[int] | None = None,
    vector_axis: int | None = None,
) -> Tensor:
    """Look up each index in its table (palettization).

    iOS16 gives `shape`: indices are packed bits, lut is (2^bits,). iOS18: lut is
    (groups along each dimension of indices..., 2^bits, vector); each index becomes a vector,
    which lies along vector_axis of the result.
    """
    if shape is not None:
        bits = int(lut.numel()).bit_length() - 1
        unpacked = unpack(indices.numpy(), f"UINT{bits}", tuple(shape))
        return lut[torch.from_numpy(unpacked).int()]
    groups, palette, vector = lut.shape[:-2], lut.shape[-2], lut.shape[-1]
    blocks: list[int] = []
    for size, count in zip(indices.shape, groups, strict=True):
        blocks += [count, size // count]
    first = torch.arange(lut[..., 0, 0].numel(), dtype=torch.int32).reshape(groups) * palette
    places = (indices.int().reshape(blocks) + _beside_blocks(first)).reshape(indices.shape)
    values = lut.reshape(-1, vector)[places]
    if vector == 1:
        return values[..., 0]
    axis = (vector_axis or 0) % indices.dim()
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


def sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """The non-zero values at the places where the mask is 1, row by row; zeros elsewhere."""
    if shape is not None:
        mask = torch.from_numpy(unpack(mask.numpy(), "UINT1", tuple(shape)))
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask != 0] = nonzero_data
    return dense


def lut_to_sparse(
    indices_mask: Tensor,
    indices_nonzero_data: Tensor,
    lut: Tensor,
    vector_axis: int | None = None,
) -> list[Tensor]:
    """lut_to_dense of sparse indices: the mask of the result, and its non-zero values."""
    indices = sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = lut_to_dense(indices, lut, None, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = mask.repeat_interleave(lut.shape[-1], dim=vector_axis)
    return [mask, dense[mask != 0]]


def sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> list[Tensor]:
    """blockwise_shift_scale of sparse data: the mask, and the scaled non-zero values."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return [data_mask, dense[data_mask != 0]]


def constexpr_cast(source_val: Tensor, output_dtype: Literal["fp32"]) -> Tensor:
    """fp16 constants as fp32."""
    return source_val


OPS: dict[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
