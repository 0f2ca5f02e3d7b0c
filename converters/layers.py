"""Linears and their kin, float or quantized, changed without touching a quantized layer's integers.

A float layer holds `weight`; a quantized one (recipes/quantize.py) `weight_int8`, `weight_scale`
and `weight_zero_point`, with the output channels on axis 0. Both may hold `bias`.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import nn


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds int8 weights with a scale for each output channel."""
    return hasattr(module, "weight_int8")


def linear_rows(linear: nn.Module) -> int:
    """The number of output channels of a float or quantized linear."""
    return _weight(linear).shape[0]


def scaled_linear(linear: nn.Module, factor: float) -> nn.Module:
    """A linear whose output is `factor` times that of `linear`; integers stay as they are."""
    scaled = _copy(linear)
    _set(scaled, "weight_scale" if is_quantized(linear) else "weight", lambda w: w * factor)
    _set(scaled, "bias", lambda bias: bias * factor)
    static = getattr(linear, "static", None)
    if static is not None:
        output = dataclasses.replace(static.output, scale=static.output.scale * factor)
        scaled.static = dataclasses.replace(static, output=output)
    return scaled


def sliced_linear(linear: nn.Module, rows: slice) -> nn.Module:
    """A linear with some of the output channels of `linear`."""
    part = _copy(linear)
    for name in ("weight", "weight_int8", "weight_scale", "weight_zero_point", "bias"):
        _set(part, name, lambda tensor: tensor[rows].clone())
    part.out_features = linear_rows(part)  # type: ignore[assignment]
    return part


def _copy(layer: nn.Module) -> nn.Module:
    """A layer of the same tensors whose tensors can be replaced."""
    other = copy.copy(layer)
    other._parameters, other._buffers = dict(layer._parameters), dict(layer._buffers)
    return other


def _weight(linear: nn.Module) -> torch.Tensor:
    weight = linear.weight_int8 if is_quantized(linear) else linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _set(module: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a tensor of a module, if it has it, in the same role."""
    if module._parameters.get(name) is not None:
        changed = change(module._parameters[name].detach())  # type: ignore[union-attr]
        module._parameters[name] = nn.Parameter(changed, requires_grad=False)
    elif module._buffers.get(name) is not None:
        module._buffers[name] = change(module._buffers[name])  # type: ignore[arg-type]
