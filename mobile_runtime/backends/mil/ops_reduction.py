"""Reductions over axes, and running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor


def _over_axes(reduce: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """A reduction; no axes means all of them."""

    def kernel(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        return reduce(x, list(range(x.dim())) if axes is None else axes, keep_dims)

    return kernel


def _mean(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    # torch averages floats only; float64 holds every int32 sum that can occur here.
    return (x if x.is_floating_point() else x.double()).mean(axes, keepdim=keep_dims)


def _product(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    ordered = sorted((axis % x.dim() for axis in axes), reverse=True)
    for axis in ordered:
        x = x.prod(axis, keepdim=keep_dims)
    return x


def _log_sum_exp(x: Tensor, axes: list[int], keep_dims: bool) -> Tensor:
    return torch.logsumexp(x.float(), axes, keepdim=keep_dims)


def reduce_argmax(
    x: Tensor,
    axis: int = -1,
    keep_dims: bool = False,
    output_dtype: Literal["int32", "uint16"] = "int32",
) -> Tensor:
    return torch.argmax(x, axis, keepdim=keep_dims)


def reduce_argmin(
    x: Tensor,
    axis: int = -1,
    keep_dims: bool = False,
    output_dtype: Literal["int32", "uint16"] = "int32",
) -> Tensor:
    return torch.argmin(x, axis, keepdim=keep_dims)


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """exclusive: an element does not count itself. reverse: sums run from the end."""
    if reverse:
        x = x.flip(axis)
    sums = torch.cumsum(x, axis)
    if exclusive:
        sums = sums - x
    return sums.flip(axis) if reverse else sums


OPS: dict[str, Callable[..., Any]] = {
    "cumsum": cumsum,
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "reduce_l1_norm": _over_axes(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": _over_axes(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": _over_axes(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "reduce_log_sum_exp": _over_axes(_log_sum_exp),
    "reduce_max": _over_axes(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": _over_axes(_mean),
    "reduce_min": _over_axes(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": _over_axes(_product),
    "reduce_sum": _over_axes(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": _over_axes(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
}
