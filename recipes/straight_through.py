"""Float layers that compute what their integers would, with gradients: to train for the integers.

The forward pass rounds weights, biases and activations as quantized_layers.py does, the scales of
the weights made anew from the current ones. The backward pass takes rounding for the identity where
a value lies within the range of its scale, and for a constant outside (the straight-through
estimator, arXiv:1308.3432, as arXiv:1712.05877 trains with it).

A layer keeps its parameters and their names; only its class changes, and changes back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.quantized_layers import (
    ACTIVATION_MAX,
    ACTIVATION_MIN,
    QUANT_MAX,
    QUANT_MIN,
    Affine,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    SkipConv2d,
    Static,
    fake_quantize_dynamic,
    floored_scale,
)
from recipes.settings import Activations


def rounded(x: Tensor, affine: Affine) -> Tensor:
    """A tensor rounded as `Affine` does; the gradient is 1 within its range, and 0 outside."""
    return torch.fake_quantize_per_tensor_affine(
        x.float(), affine.scale, affine.zero_point, ACTIVATION_MIN, ACTIVATION_MAX
    )


def rounded_dynamic(layer: Any, x: Tensor) -> Tensor:
    """What a layer reads, rounded with scales that hold all of it, so that the gradient is 1."""
    x = x.float()
    return x + (fake_quantize_dynamic(layer, x.detach()) - x.detach())


@dataclass(frozen=True)
class Rounding:
    """How a layer rounds, of the type of quantized_layers.py's."""

    activations: Activations
    static: Static | None

    @classmethod
    def of(cls, layer: QuantizedModule) -> "Rounding":
        """That of a quantized layer."""
        return cls(layer.activations, layer.static)

    def reads(self, layer: Any, x: Tensor) -> Tensor:
        """The layer's input, rounded."""
        if self.activations == "int8_dynamic":
            return rounded_dynamic(layer, x)
        return x if self.static is None else rounded(x, self.static.input)

    def gives(self, y: Tensor) -> Tensor:
        """The layer's output, rounded."""
        return y if self.static is None else rounded(y, self.static.output)

    def parameters(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, rounded. No weight is outside of its range, so the gradient is 1."""
        with torch.no_grad():
            floor = None if self.static is None else self.static.weight_floor(weight, bias)
            scale = floored_scale(weight.detach().float(), floor)
            zero_point = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        weight = torch.fake_quantize_per_channel_affine(
            weight, scale, zero_point, 0, QUANT_MIN, QUANT_MAX
        )
        if bias is not None and self.static is not None:
            bias = bias + (self.static.whole_bias(bias, scale) - bias.detach())
        return weight, bias


class RoundedConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes as QuantizedConv2d, or as a SkipConv2d of two of them."""

    roundings: tuple[Rounding, ...]
    hidden_channels: int | None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W)."""
        if self.hidden_channels is None:
            return self._part(self.roundings[0], x, self.weight, self.bias)
        first, hidden, skip = self.hidden_channels, *self.roundings
        return self._part(hidden, x[:, :first], self.weight[:, :first], self.bias) + self._part(
            skip, x[:, first:], self.weight[:, first:], None
        )

    def _part(self, rounding: Rounding, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight, bias = rounding.parameters(weight, bias)
        x = rounding.reads(self, x)
        return rounding.gives(
            F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        )


class RoundedLinear(nn.Linear):
    """`nn.Linear` that computes as QuantizedLinear."""

    roundings: tuple[Rounding, ...]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features)."""
        (rounding,) = self.roundings
        weight, bias = rounding.parameters(self.weight, self.bias)
        return rounding.gives(F.linear(rounding.reads(self, x), weight, bias))


class RoundedEmbedding(nn.Embedding):
    """`nn.Embedding` that computes as QuantizedEmbedding."""

    roundings: tuple[Rounding, ...]

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape of integers below num_embeddings."""
        (rounding,) = self.roundings
        weight, _ = rounding.parameters(self.weight, None)
        return F.embedding(ids, weight, self.padding_idx)


_KINDS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    QuantizedConv2d: (nn.Conv2d, RoundedConv2d),
    QuantizedLinear: (nn.Linear, RoundedLinear),
    QuantizedEmbedding: (nn.Embedding, RoundedEmbedding),
}


def round_as(module: nn.Module, quantized: nn.Module) -> int:
    """Let the layers of a float module compute as those of its quantized copy do.

    Changes the classes of the layers in place, and no tensor. Returns how many. Raises ValueError
    for a quantized layer that this file does not know.
    """
    count = 0
    halves: set[int] = set()
    for path, part in quantized.named_modules():
        if isinstance(part, SkipConv2d):
            layers: list[Any] = [part.hidden, part.skip]
            halves |= {id(half) for half in layers}
        elif isinstance(part, QuantizedModule) and id(part) not in halves:
            layers = [part]
        else:
            continue
        layer: Any = module.get_submodule(path)
        if any(type(one) not in _KINDS for one in layers):
            raise ValueError(f"{path}: there is no gradient for a {type(layers[0]).__name__}")
        ordinary, kind = _KINDS[type(layers[0])]
        found = type(layer)
        if found is not ordinary:
            raise ValueError(f"{path}: a {found.__name__} in place of a {ordinary.__name__}")
        layer.__class__ = kind
        layer.roundings = tuple(Rounding.of(one) for one in layers)
        if kind is RoundedConv2d:
            layer.hidden_channels = part.channels if isinstance(part, SkipConv2d) else None
        count += 1
    return count


def plain(module: nn.Module) -> None:
    """Undo `round_as`: the layers are ordinary float ones again, in place."""
    classes = {kind: ordinary for ordinary, kind in _KINDS.values()}
    for layer in module.modules():
        ordinary = classes.get(type(layer))
        if ordinary is None:
            continue
        layer.__class__ = ordinary
        for name in ("roundings", "hidden_channels"):
            layer.__dict__.pop(name, None)
