"""Operations on each element: arithmetic, comparison, activations, casts, quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mobile_runtime.backends.mil import _torch as torch

if TYPE_CHECKING:
    from torch import Tensor


def along_axis(values: Tensor, rank: int, axis: int | None) -> Tensor:
    """A vector laid along one axis of a tensor of this rank, to broadcast; a scalar stays."""
    if values.dim() == 0 or axis is None:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _unary(function: str) -> Callable[[Tensor], Tensor]:
    def kernel(x: Tensor) -> Tensor:
        return getattr(torch, function)(x)

    return kernel


def _binary(function: str) -> Callable[[Tensor, Tensor], Tensor]:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return getattr(torch, function)(x, y)

    return kernel


def cast(
    x: Tensor,
    dtype: Literal["fp16", "fp32", "int8", "uint8", "int16", "uint16", "int32", "bool"],
) -> Tensor:
    """The cast itself is made by the declared type of the output; floats truncate to integers."""
    return x


def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: Literal["int8", "uint8"],
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point); ties round to even, all in float32."""
    q = torch.round(input / along_axis(scale, input.dim(), axis))
    if zero_point is not None:
        q = q + along_axis(zero_point.float(), input.dim(), axis)
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    return q.clamp(low, high)


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    """scale * (input - zero_point)"""
    q = input.float()
    if zero_point is not None:
        q = q - along_axis(zero_point.float(), q.dim(), axis)
    return q * along_axis(scale, q.dim(), axis)


def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


def elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def gelu(
    x: Tensor,
    mode: Literal["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"] = "EXACT",
) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    approximate = "none" if mode == "EXACT" else "tanh"
    return torch.nn.functional.gelu(x, approximate=approximate)


def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, along_axis(alpha, x.dim(), 1) * x)


def relu6(x: Tensor) -> Tensor:
    return x.clamp(0, 6)


def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    scaled = along_axis(beta, x.dim(), 1) * x
    return along_axis(alpha, x.dim(), 1) * softplus(scaled)


def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


OPS: dict[str, Callable[..., Any]] = {
    # The functions of torch that compute the same; `round` takes ties to even.
    **{
        name: _unary(name)
        for name in (
            "abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2",
            "floor", "logical_not", "relu", "round", "sigmoid", "sign", "sin", "sinh", "sqrt",
            "square", "tan", "tanh",
        )
    },
    # MIL's name and torch's; mod and floor_div round towards negative infinity.
    **{
        name: _binary(function)
        for name, function in {
            "add": "add",
            "equal": "eq",
            "floor_div": "floor_divide",
            "greater": "gt",
            "greater_equal": "ge",
            "less": "lt",
            "less_equal": "le",
            "logical_and": "logical_and",
            "logical_or": "logical_or",
            "logical_xor": "logical_xor",
            "maximum": "maximum",
            "minimum": "minimum",
            "mod": "remainder",
            "mul": "mul",
            "not_equal": "ne",
            "pow": "pow",
            "real_div": "true_divide",
            "sub": "sub",
        }.items()
    },
    "cast": cast,
    "clamped_relu": clamped_relu,
    "clip": clip,
    "dequantize": dequantize,
    "elu": elu,
    "gelu": gelu,
    "inverse": inverse,
    "leaky_relu": leaky_relu,
    "linear_activation": linear_activation,
    "log": log,
    "prelu": prelu,
    "quantize": quantize,
    "relu6": relu6,
    "rsqrt": rsqrt,
    "scaled_tanh": scaled_tanh,
    "select": select,
    "sigmoid_hard": sigmoid_hard,
    "silu": silu,
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softsign": softsign,
    "threshold": threshold,
    "thresholded_relu": thresholded_relu,
}  # fmt: skip
