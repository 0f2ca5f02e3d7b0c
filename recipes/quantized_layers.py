"""Layers that hold integers and compute through the operators that every target lowers.

A `Conv2d`, `Linear` or `Embedding` becomes a module of int8 weights with one float scale an output
channel (for an embedding: one a row), symmetric in -127..127. Scales are max-abs: on the 328 layers
of the embedded model, a search for the clipping with the least squared error gained 0.01 dB
(median) to 0.08 dB (most), not worth its time.

Static activations are int8 too, asymmetric, with one scale for a tensor: the layer rounds what it
reads and what it gives, because the integer kernels of ONNX Runtime (QLinearConv) and XNNPACK write
integers, and the same numbers are to reach every target.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch

# Registers the torch.ops.quantized_decomposed operators.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.settings import Activations

QUANT_MIN, QUANT_MAX = -127, 127
ACTIVATION_MIN, ACTIVATION_MAX = -128, 127

ops = torch.ops.quantized_decomposed

_DROPPED_BITS = (1 << (23 - 10)) - 1
"""Of a float32's 23 stored bits, those that a float16 has no room for."""
_TINY = torch.finfo(torch.float32).tiny
_SMALLEST_RATIO = 2.0**-30
"""Of a product's step to the output's: XNNPACK's kernels go no lower than 2^-32."""


def rounded_up(scale: Tensor) -> Tensor:
    """Positive float32 scales, rounded up to the 11 significant bits that a float16 has.

    A target that keeps its scales in float16 then holds the same number as one that keeps them in
    float32. NaN and infinity stay.
    """
    rounded = (scale.view(torch.int32) + _DROPPED_BITS) & ~_DROPPED_BITS
    return torch.where(scale.isfinite(), rounded.view(torch.float32), scale)


def max_abs_scale(weight: Tensor) -> Tensor:
    """The symmetric scale of each channel (axis 0): max|w| / 127, and 1 for a channel of zeros.

    weight: (channels, ...) float32, finite. Returns (channels,) float32, finite, positive, and
    exact in float16.
    """
    low, high = weight.flatten(1).aminmax(dim=1)
    peak = torch.maximum(-low, high)
    # Below the smallest normal number 1 / scale would overflow.
    scale = rounded_up((peak / QUANT_MAX).clamp(min=_TINY))
    # Asked this way, NaN and Inf stay in the scale, where `quantize.run` sees them.
    return torch.where(peak == 0, torch.ones_like(scale), scale)


def floored_scale(weight: Tensor, floor: Tensor | None = None) -> Tensor:
    """The scales (channels,) of a weight; see `quantize_weight`."""
    scale = max_abs_scale(weight)
    return scale if floor is None else torch.where(scale < floor, rounded_up(floor), scale)


def quantize_weight(weight: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight to int8, symmetric per channel (axis 0).

    weight: (channels, ...) float. floor: (channels,), scales are not below. Returns the integers
    (same shape, int8) and the scales ((channels,) float32); `integers * scale` is within half a
    scale of the weight.
    """
    weight = weight.detach().float()
    scale = floored_scale(weight, floor)
    zero_point = torch.zeros(len(scale), dtype=torch.int8)
    integers = ops.quantize_per_channel(
        weight, scale, zero_point, 0, QUANT_MIN, QUANT_MAX, torch.int8
    )
    return integers, scale


@dataclass(frozen=True)
class Affine:
    """How a tensor of floats is written as int8: float = scale * (integer - zero_point)."""

    scale: float
    zero_point: int

    @classmethod
    def covering(cls, low: float, high: float) -> "Affine":
        """The finest that holds low..high and, exactly, zero; its scale is exact in float16.

        The scale of a range that is nothing but zero is 0, and of one that is not finite, NaN.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        exact = torch.tensor((high - low) / (ACTIVATION_MAX - ACTIVATION_MIN))
        if not bool(exact.isfinite()) or exact == 0:
            return cls(0.0 if exact == 0 else float("nan"), 0)
        scale = float(rounded_up(exact.clamp(min=_TINY)))
        return cls(scale, max(ACTIVATION_MIN, min(ACTIVATION_MAX, round(-128 - low / scale))))

    def __call__(self, x: Tensor) -> Tensor:
        """Round a tensor to the integers' floats."""
        bounds = (self.scale, self.zero_point, ACTIVATION_MIN, ACTIVATION_MAX, torch.int8)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *bounds), *bounds)


@dataclass(frozen=True)
class Static:
    """The calibrated scales of a layer: of what it reads, and of what it gives."""

    input: Affine
    output: Affine

    def weight_floor(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The smallest weight scale of each channel that integer kernels can work with.

        Their int32 sums must hold the bias, and they multiply a sum by input * weight / output.
        """
        lowest = _SMALLEST_RATIO * self.output.scale
        floor = torch.full((weight.shape[0],), lowest, device=weight.device)
        if bias is not None:
            floor = torch.maximum(floor, bias.detach().float().abs() * _SMALLEST_RATIO)
        return floor / self.input.scale

    def whole_bias(self, bias: Tensor, weight_scale: Tensor) -> Tensor:
        """A bias as whole numbers of input scale * weight scale, as integer kernels hold it."""
        step = weight_scale.double() * self.input.scale
        return ((bias.detach().double() / step).round() * step).float()


class QuantizedModule(nn.Module):
    """A layer whose weight is stored as int8 with a scale for each channel of axis 0.

    weight_int8: (channels, ...) int8; weight_scale: (channels,) float32; weight_zero_point:
    (channels,) int8, all zero, there because XNNPACK and Core ML want the operand.
    static: the scales of its activations, where they are `int8_static`; the bias is then a whole
    number of input scale * weight scale, as integer kernels hold it.
    """

    weight_int8: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        activations: Activations,
        static: Static | None,
    ) -> None:
        super().__init__()
        if (activations == "int8_static") != (static is not None):
            raise ValueError(f"activations {activations} with the scales {static}")
        self.activations = activations
        self.static = static
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", torch.zeros(len(weight_scale), dtype=torch.int8))

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return ops.dequantize_per_channel(
            self.weight_int8,
            self.weight_scale,
            self.weight_zero_point,
            0,
            QUANT_MIN,
            QUANT_MAX,
            torch.int8,
        )

    def to_float(self) -> nn.Module:
        """The ordinary PyTorch layer that holds the dequantized weight."""
        raise NotImplementedError

    def _keep_bias(self, bias: Tensor | None) -> None:
        if bias is not None and self.static is not None:
            whole = self.static.whole_bias(bias, self.weight_scale)
            bias = nn.Parameter(whole, requires_grad=False)
        self.bias = bias


class QuantizedConv2d(QuantizedModule):
    """`nn.Conv2d` with int8 weights. Dynamic activations: a scale a sample, or a pixel if 1x1."""

    def __init__(
        self,
        layer: nn.Conv2d,
        integers: Tensor,
        scale: Tensor,
        activations: Activations = "none",
        static: Static | None = None,
    ) -> None:
        super().__init__(integers, scale, activations, static)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation, self.groups = layer.padding, layer.dilation, layer.groups
        self._keep_bias(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) float32."""
        if self.activations == "int8_dynamic":
            x = fake_quantize_dynamic(self, x)
        if self.static is not None:
            x = self.static.input(x)
        y = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return y if self.static is None else self.static.output(y)

    def to_float(self) -> nn.Conv2d:
        layer = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        return _with_weights(layer, self.weight, self.bias)


class QuantizedLinear(QuantizedModule):
    """`nn.Linear` with int8 weights. Dynamic activations: one scale for each token."""

    def __init__(
        self,
        layer: nn.Linear,
        integers: Tensor,
        scale: Tensor,
        activations: Activations = "none",
        static: Static | None = None,
    ) -> None:
        super().__init__(integers, scale, activations, static)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._keep_bias(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) float32."""
        if self.activations == "int8_dynamic":
            x = fake_quantize_dynamic(self, x)
        if self.static is not None:
            x = self.static.input(x)
        y = F.linear(x, self.weight, self.bias)
        return y if self.static is None else self.static.output(y)

    def to_float(self) -> nn.Linear:
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        return _with_weights(layer, self.weight, self.bias)


class QuantizedEmbedding(QuantizedModule):
    """`nn.Embedding` with int8 rows."""

    def __init__(
        self,
        layer: nn.Embedding,
        integers: Tensor,
        scale: Tensor,
        activations: Activations = "none",
        static: Static | None = None,
    ) -> None:
        super().__init__(integers, scale, activations, static)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape of integers below num_embeddings."""
        return F.embedding(ids, self.weight, self.padding_idx)

    def to_float(self) -> nn.Embedding:
        layer = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        return _with_weights(layer, self.weight, None)


def _with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


class SkipConv2d(nn.Module):
    """A convolution of [hidden, skip] as the sum of one of each, so that each has its own scale."""

    def __init__(self, layer: nn.Conv2d, channels: int) -> None:
        """channels: those of `hidden`, which come first."""
        super().__init__()
        self.channels = channels
        weight = layer.weight.detach()
        self.hidden = _conv_like(layer, weight[:, :channels], layer.bias)
        self.skip = _conv_like(layer, weight[:, channels:], None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float32."""
        return self.hidden(x[:, : self.channels]) + self.skip(x[:, self.channels :])

    def to_float(self) -> nn.Conv2d:
        """The one convolution again."""
        halves: list[Any] = [
            half.to_float() if isinstance(half, QuantizedModule) else half
            for half in (self.hidden, self.skip)
        ]
        hidden, skip = halves
        return _conv_like(hidden, torch.cat([hidden.weight, skip.weight], 1).detach(), hidden.bias)


def _conv_like(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=bias is not None,
        device="meta",
    )
    return _with_weights(conv, weight.clone(), bias)


def fake_quantize_dynamic(layer: Any, x: Tensor) -> Tensor:
    """Round what a convolution or a linear reads, with a scale for each sample, pixel or token."""
    if not hasattr(layer, "kernel_size"):
        return fake_quantize_per_token(x)
    # As XNNPACK does: a 1x1 convolution is a linear of the pixels.
    pointwise = layer.kernel_size == layer.stride == (1, 1)
    return fake_quantize_per_pixel(x) if pointwise else fake_quantize_per_sample(x)


def fake_quantize_per_sample(x: Tensor) -> Tensor:
    """Round an activation to int8 with an asymmetric scale for each sample of the batch."""
    return fake_quantize_per_token(x.flatten(1)).view(x.shape)


def fake_quantize_per_pixel(x: Tensor) -> Tensor:
    """Round an activation (B, C, H, W) to int8 with an asymmetric scale for each pixel."""
    return fake_quantize_per_token(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Round an activation to int8 with an asymmetric scale for each row of its last axis."""
    scale, zero_point = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    integers = ops.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8)
    return ops.dequantize_per_token(
        integers, scale, zero_point, -128, 127, torch.int8, torch.float32
    )


# By exact type: a subclass may compute something else.
REPLACEMENTS: dict[type[nn.Module], Any] = {
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def quantized(
    layer: Any, activations: Activations = "none", static: Static | None = None
) -> QuantizedModule:
    """The quantized form of a float layer of one of the types of REPLACEMENTS."""
    floor = None if static is None else static.weight_floor(layer.weight, layer.bias)
    integers, scale = quantize_weight(layer.weight, floor)
    return REPLACEMENTS[type(layer)](layer, integers, scale, activations, static).eval()


def weight_snr_db(weight: Tensor, integers: Tensor, scale: Tensor) -> float | None:
    """Signal to rounding noise of a quantized weight; None where nothing was lost (or all zero)."""
    signal = noise = 0.0
    # In blocks, so that a large layer needs no second float copy.
    for rows, whole, step in zip(
        weight.split(256), integers.split(256), scale.split(256), strict=True
    ):
        rows = rows.detach().float()
        error = rows - whole * step.view(-1, *[1] * (rows.dim() - 1))
        signal += float(torch.linalg.vector_norm(rows)) ** 2
        noise += float(torch.linalg.vector_norm(error)) ** 2
    if signal == 0 or noise == 0:
        return None
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)))


def dequantized(module: nn.Module) -> nn.Module:
    """A copy of a module tree in which every quantized layer is an ordinary float one again.

    What its weights stand for is kept, and the rounding of activations is not.
    """
    parts: list[Any] = list(module.modules())
    # Layers of 8 bits and of 4 (int4_layers.py), and what was made of a skip concat's.
    memo: dict[int, Any] = {
        id(part): part.to_float() for part in parts if hasattr(part, "to_float")
    }
    # deepcopy takes what the memo already holds in place of the original.
    return copy.deepcopy(module, memo)
