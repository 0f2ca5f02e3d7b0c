"""Windows that slide: convolution, transposed convolution, pooling; one to three dimensions.

Padding `same` follows TensorFlow's rule (the output has ceil(size / stride) elements, and an odd
element of padding goes behind); `same_lower` puts the odd element in front; `custom` lists
(before, after) of each spatial dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor

PadType = Literal["valid", "same", "same_lower", "custom"]


def padding(
    pad_type: str, pad: list[int] | None, sizes: list[int], windows: list[int], strides: list[int]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension; windows count their dilation."""
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        pad = pad or [0] * (2 * len(sizes))
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(len(sizes))]
    totals = [
        max(0, stride * -(-size // stride) - size + window - stride)
        for size, window, stride in zip(sizes, windows, strides, strict=True)
    ]
    if pad_type == "same":
        return [(total // 2, total - total // 2) for total in totals]
    return [(total - total // 2, total // 2) for total in totals]


def _pad(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    # torch wants the last dimension first.
    flat = [amount for pair in reversed(pads) for amount in pair]
    return torch.nn.functional.pad(x, flat, value=value)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: PadType = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """x (n, C_in, *D), weight (C_out, C_in / groups, *K)."""
    spatial = x.dim() - 2
    strides = strides or [1] * spatial
    dilations = dilations or [1] * spatial
    windows = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pads = padding(pad_type, pad, list(x.shape[2:]), windows, strides)
    function = getattr(torch.nn.functional, f"conv{spatial}d")
    if all(before == after for before, after in pads):
        symmetric = [before for before, _ in pads]
        return function(x, weight, bias, strides, symmetric, dilations, groups)
    return function(_pad(x, pads), weight, bias, strides, 0, dilations, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: Literal["valid", "same", "custom"] = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """x (n, C_in, *D), weight (C_in, C_out / groups, *K): what the gradient of conv computes.

    The whole result is cut by the padding; where output_shape asks for more than there is, the
    rest is what the bias alone gives.
    """
    spatial = x.dim() - 2
    strides = strides or [1] * spatial
    dilations = dilations or [1] * spatial
    function = getattr(torch.nn.functional, f"conv_transpose{spatial}d")
    whole = function(x, weight, None, strides, 0, 0, groups, dilations)
    sizes = list(whole.shape[2:])
    if output_shape is not None:
        wanted = output_shape[2:]
    elif pad_type == "same":
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    else:
        pads = padding(pad_type, pad, sizes, [], [])
        wanted = [size - sum(cut) for size, cut in zip(sizes, pads, strict=True)]
    if pad_type == "same":
        before = [max(0, size - want) // 2 for size, want in zip(sizes, wanted, strict=True)]
    else:
        before = [front for front, _ in padding(pad_type, pad, sizes, [], [])]
    cuts = [
        (-front, want + front - size)
        for front, want, size in zip(before, wanted, sizes, strict=True)
    ]
    cut = _pad(whole, cuts)
    return cut if bias is None else cut + bias.reshape(-1, *[1] * spatial)


def _windows(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int] | None,
    ceil_mode: bool,
) -> tuple[list[tuple[int, int]], list[int]]:
    """The padding, and how much more a last, partial window needs behind it (ceil_mode)."""
    sizes = list(x.shape[2:])
    pads = padding(pad_type, pad, sizes, kernel_sizes, strides)
    extra = [0] * len(sizes)
    if ceil_mode:
        for i, (size, kernel, stride) in enumerate(zip(sizes, kernel_sizes, strides, strict=True)):
            total = size + sum(pads[i])
            count = -(-(total - kernel) // stride) + 1
            # A window must not start in the padding behind the values.
            if (count - 1) * stride >= size + pads[i][0] and sum(pads[i]) > 0:
                count -= 1
            extra[i] = max(0, (count - 1) * stride + kernel - total)
    return pads, extra


def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: PadType,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    spatial = x.dim() - 2
    strides = strides or [1] * spatial
    pads, extra = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    behind = [(0, more) for more in extra]
    function = getattr(torch.nn.functional, f"avg_pool{spatial}d")
    counted = torch.ones_like(x[:1, :1])
    counted = _pad(_pad(counted, pads, 0.0 if exclude_padding_from_average else 1.0), behind)
    sums = function(_pad(_pad(x, pads), behind), kernel_sizes, strides)
    return sums / function(counted, kernel_sizes, strides)


def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: PadType,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    spatial = x.dim() - 2
    strides = strides or [1] * spatial
    pads, extra = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    pads = [(before, after + more) for (before, after), more in zip(pads, extra, strict=True)]
    function = getattr(torch.nn.functional, f"max_pool{spatial}d")
    return function(_pad(x, pads, float("-inf")), kernel_sizes, strides)


OPS: dict[str, Callable[..., Any]] = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": max_pool,
}
