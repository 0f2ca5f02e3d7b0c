"""Resizing of the last axes: nearest neighbour and bilinear, by factor or by size.

Where an output element i of n_out reads an input of n_in elements is told by the sampling mode;
the position is clamped to [0, n_in - 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor

SamplingMode = Literal[
    "DEFAULT", "STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "OFFSET_CORNERS", "UNALIGN_CORNERS"
]


def positions(n_in: int, n_out: int, mode: str) -> np.ndarray:
    """Where each of n_out elements lies among n_in, (n_out,) float64."""
    i = np.arange(n_out, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if n_out == 1:
            found = np.full(1, 0.0 if mode == "STRICT_ALIGN_CORNERS" else (n_in - 1) / 2)
        else:
            found = i * (n_in - 1) / (n_out - 1)
    elif mode == "OFFSET_CORNERS":
        found = (i + 0.5) * max(1, n_in - 1) / n_out
    elif mode == "UNALIGN_CORNERS":
        found = (i + 0.5) * n_in / n_out - 0.5
    else:
        found = i * n_in / n_out
    return found.clip(0, n_in - 1)


def _linear(x: Tensor, axis: int, n_out: int, mode: str) -> Tensor:
    n_in = x.shape[axis]
    if n_in == n_out and mode != "OFFSET_CORNERS":
        return x
    where = positions(n_in, n_out, mode)
    low = np.floor(where).astype(np.int64)
    high = np.minimum(low + 1, n_in - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    share = torch.from_numpy((where - low).astype(np.float32)).reshape(shape)
    below = x.index_select(axis, torch.from_numpy(low))
    above = x.index_select(axis, torch.from_numpy(high))
    return below + (above - below) * share


def _nearest(x: Tensor, axis: int, n_out: int) -> Tensor:
    n_in = x.shape[axis]
    # In integers: i * n_in / n_out may come out a hair below a whole number in floats.
    return x.index_select(axis, torch.arange(n_out) * n_in // n_out)


def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    """Each element of the last two axes repeated; whole factors only."""
    y = _nearest(x, -2, int(scale_factor_height) * x.shape[-2])
    return _nearest(y, -1, int(scale_factor_width) * x.shape[-1])


def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Element i reads floor(i * n_in / n_out), in the last two axes."""
    return _nearest(_nearest(x, -2, target_size_height), -1, target_size_width)


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The factor is computed again from the sizes, which are rounded down."""
    half_pixel = not align_corners if half_pixel_centers is None else half_pixel_centers
    if align_corners:
        mode = "STRICT_ALIGN_CORNERS"
    else:
        mode = "UNALIGN_CORNERS" if half_pixel else "DEFAULT"
    height = math.floor(x.shape[-2] * scale_factor_height)
    width = math.floor(x.shape[-1] * scale_factor_width)
    return _linear(_linear(x, -2, height, mode), -1, width, mode)


def resize_bilinear(
    x: Tensor,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: SamplingMode = "DEFAULT",
) -> Tensor:
    y = _linear(x, -2, target_size_height, sampling_mode)
    return _linear(y, -1, target_size_width, sampling_mode)


def resize(
    x: Tensor,
    shape: list[int],
    resized_dims: int,
    interpolation_mode: Literal["LINEAR", "NEAREST_NEIGHBOR"] = "LINEAR",
    sampling_mode: SamplingMode = "DEFAULT",
) -> Tensor:
    """Resize the last `resized_dims` axes to the last numbers of `shape`; 0 keeps a size."""
    for axis in range(-resized_dims, 0):
        n_out = shape[axis] or x.shape[axis]
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, n_out, sampling_mode)
        else:
            x = _nearest(x, axis, n_out)
    return x


OPS: dict[str, Callable[..., Any]] = {
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
