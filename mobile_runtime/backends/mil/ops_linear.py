"""Products: linear, matmul, einsum, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*, in) @ weight (out, in).T + bias (out,)"""
    return torch.nn.functional.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """The transposes swap the last two axes and have no effect on a vector."""
    if transpose_x and x.dim() > 1:
        x = x.transpose(-1, -2)
    if transpose_y and y.dim() > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


def einsum(values: list[Tensor], equation: str) -> Tensor:
    """Dimensions of size 1 broadcast in the batch axes, as torch.einsum broadcasts them."""
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v; q (B, *, L, E), k (B, *, S, E), v (B, *, S, EV)."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


OPS: dict[str, Callable[..., Any]] = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
