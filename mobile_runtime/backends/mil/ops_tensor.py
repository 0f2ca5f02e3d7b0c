"""Operations that move or make elements: shapes, slices, joins, fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor


def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """0 keeps the size of x's axis, counted from the last one (1 where x has none); -1 infers."""
    ranks_apart = x.dim() - len(shape)
    sizes = []
    for axis, size in enumerate(shape):
        if size == 0:
            size = x.shape[axis + ranks_apart] if axis + ranks_apart >= 0 else 1
        sizes.append(size)
    return x.reshape(sizes)


def reshape_like(
    x: Tensor,
    ref_tensors: list[Tensor],
    begins: tuple[int, ...],
    ends: tuple[int, ...],
    end_masks: tuple[bool, ...],
) -> Tensor:
    """The shape is joined from a range of the axes of each reference."""
    shape: list[int] = []
    for ref, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += ref.shape[begin:] if masked else ref.shape[begin:end]
    return x.reshape(shape)


def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Axes that are not of size 1 stay, as in PyTorch."""
    return x.squeeze() if axes is None else x.squeeze(axes)


def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    before = x.shape[: axis % x.dim() if axis else 0].numel()
    return x.reshape(before, -1)


def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> list[Tensor]:
    if split_sizes is None:
        split_sizes = [x.shape[axis] // (num_splits or 1)] * (num_splits or 1)
    return list(torch.split(x, split_sizes, axis))


def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    """interleave: the elements along the axis take turns."""
    values = [value.reshape(1) if value.dim() == 0 else value for value in values]
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].dim()
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """numpy's x[begin:end:stride]; a mask drops a bound; squeeze takes x[begin] of an axis."""
    rank = x.dim()
    strides = stride or [1] * rank
    for axis in reversed(range(rank)):
        first = None if begin_mask and begin_mask[axis] else begin[axis]
        if squeeze_mask and squeeze_mask[axis]:
            x = x.select(axis, first or 0)
            continue
        last = None if end_mask and end_mask[axis] else end[axis]
        taken = range(x.shape[axis])[first : last : strides[axis]]
        if taken.step == 1:
            x = x.narrow(axis, taken.start, len(taken))
        else:
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.long))
    return x


def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """size -1 takes the rest."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        first = first + x.shape[axis] if first < 0 else first
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def tile(x: Tensor, reps: list[int]) -> Tensor:
    return torch.tile(x, reps)


def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    return (torch.zeros(()) if value is None else value).expand(shape)


def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(list(ref_tensor.shape), value)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def identity(x: Tensor) -> Tensor:
    return x


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step, ... before end, computed in the type of start."""
    count = int(np.ceil((end.item() - start.item()) / step.item()))
    return start + step * torch.arange(max(0, count)).to(start.dtype)


def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Keep `lower` diagonals below the main one and `upper` above; negative keeps all."""
    rows = torch.arange(x.shape[-2])[:, None]
    columns = torch.arange(x.shape[-1])
    keep = torch.ones(x.shape[-2:], dtype=torch.bool)
    if lower >= 0:
        keep &= rows - columns <= lower
    if upper >= 0:
        keep &= columns - rows <= upper
    return torch.where(keep, x, torch.zeros_like(x))


def pad(
    x: Tensor,
    pad: list[int],
    mode: Literal["constant", "reflect", "replicate"] = "constant",
    constant_val: float = 0.0,
) -> Tensor:
    """(before, after) for each of the last axes."""
    if mode == "constant":
        pairs = [amount for i in range(len(pad), 0, -2) for amount in pad[i - 2 : i]]
        return torch.nn.functional.pad(x, pairs, value=constant_val)
    widths = [(0, 0)] * (x.dim() - len(pad) // 2)
    widths += [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    filled = np.pad(x.numpy(), widths, "edge" if mode == "replicate" else "reflect")
    return torch.from_numpy(filled)


def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return torch.nn.functional.pixel_shuffle(x, upscale_factor)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return torch.nn.functional.pixel_unshuffle(x, downscale_factor)


def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """(n, C, H, W) to (n, C / b^2, H b, W b); the place in a block is the slower channel index."""
    n, c, h, w = x.shape
    b = block_size
    blocks = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """The inverse of depth_to_space."""
    n, c, h, w = x.shape
    b = block_size
    blocks = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * b * b, h // b, w // b)


OPS: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "concat": concat,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "flatten2d": flatten2d,
    "identity": identity,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": range_1d,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
