"""Normalization: softmax, and layer, instance, batch and L2 norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mobile_runtime.backends.mil import _torch as torch
from mobile_runtime.backends.mil.ops_elementwise import along_axis

if TYPE_CHECKING:
    from torch import Tensor


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """gamma and beta have the sizes of the normalized axes, in the order of x."""
    rank = x.dim()
    normalized = sorted(axis % rank for axis in axes) if axes is not None else list(range(rank))
    if normalized == list(range(rank - len(normalized), rank)):
        kept = x.shape[rank - len(normalized) :]
        return torch.nn.functional.layer_norm(x, kept, gamma, beta, epsilon)
    variance, mean = torch.var_mean(x, normalized, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + epsilon)
    shape = [size if axis in normalized else 1 for axis, size in enumerate(x.shape)]
    return _scale(y, gamma, beta, shape)


def _scale(y: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    """x (n, C, *D) normalized over D; gamma and beta (C,)."""
    spatial = list(range(2, x.dim()))
    variance, mean = torch.var_mean(x, spatial, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + epsilon)
    return _scale(y, gamma, beta, [-1, *[1] * len(spatial)])


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """x (n, C, *D) by given statistics; all of them (C,)."""
    y = (x - along_axis(mean, x.dim(), 1)) * along_axis(torch.rsqrt(variance + epsilon), x.dim(), 1)
    return _scale(y, gamma, beta, [-1, *[1] * (x.dim() - 2)])


def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """x (*, C, H, W) divided by the root of the sum of squares of its last three axes."""
    squares = x.square().sum((-3, -2, -1), keepdim=True)
    return x * torch.rsqrt(squares + epsilon)


OPS: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "softmax": softmax,
}
