"""Small exact rewrites of modules, for what a target cannot take as diffusers writes it.

Each is a function `module -> module` that changes a tree in place and returns it; `apply` runs a
list of them on a copy that shares its tensors, so the pipeline itself stays as it was. A rewrite
leaves the function alone up to float32 rounding, and the integers of a quantized layer alone
altogether: rows are split and scales are multiplied, never requantized.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPTextEmbeddings

from converters.attention import ExplicitAttention, ExplicitClipAttention
from converters.layers import is_quantized, linear_rows, sliced_linear
from mobile_runtime.errors import UserError, choices
from recipes.measure import share_structure

Rewrite = Callable[[nn.Module], nn.Module]


def apply(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """Run the named rewrites in order on a copy of `module` that shares its tensors."""
    for name in names:
        if name not in REWRITES:
            raise choices("rewrite", name, list(REWRITES))
    rewritten = share_structure(module)
    for name in names:
        rewritten = REWRITES[name](rewritten)
    return rewritten


def explicit_attention(module: nn.Module) -> nn.Module:
    """Replace every Attention and CLIPAttention by its explicit form."""
    module = _replace(module, Attention, ExplicitAttention)
    return _replace(module, CLIPAttention, ExplicitClipAttention)


class SplitGeglu(nn.Module):
    """GEGLU with one linear for the values and one for the gates: no split of a tensor."""

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        half = linear_rows(geglu.proj) // 2
        self.proj_value = sliced_linear(geglu.proj, slice(None, half))
        self.proj_gate = sliced_linear(geglu.proj, slice(half, None))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, 4D)."""
        return self.proj_value(hidden_states) * F.gelu(self.proj_gate(hidden_states))


def split_geglu(module: nn.Module) -> nn.Module:
    """Replace every GEGLU's wide linear by two."""
    return _replace(module, GEGLU, SplitGeglu)


class DecomposedGroupNorm(nn.Module):
    """GroupNorm from means over the picture, 1x1 convolutions, and products.

    The mean of a group's channels is a grouped 1x1 convolution and the affine part a depthwise one,
    so nothing changes the layout of the picture (a reshape would, in a channels-last runtime).
    """

    group_mean: torch.Tensor
    eps: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        channels = norm.num_channels
        self.channels, self.groups = channels, norm.num_groups
        size = channels // norm.num_groups
        weight = norm.weight.detach() if norm.affine else torch.ones(channels)
        constants = {
            "group_mean": torch.full((channels, size, 1, 1), 1 / size),
            "eps": torch.full((channels,), norm.eps),
            "scale": weight.reshape(channels, 1, 1, 1),
            "bias": norm.bias.detach() if norm.affine else torch.zeros(channels),
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) or (B, C, L) -> the same shape."""
        if x.ndim == 3:
            return self.forward(x[..., None])[..., 0]
        mean = F.conv2d(x.mean((2, 3), keepdim=True), self.group_mean, groups=self.groups)
        centred = x - mean
        power = (centred * centred).mean((2, 3), keepdim=True)
        variance = F.conv2d(power, self.group_mean, self.eps, groups=self.groups)
        standard = centred * variance.rsqrt()
        return F.conv2d(standard, self.scale, self.bias, groups=self.channels)


def decomposed_group_norm(module: nn.Module) -> nn.Module:
    """Replace every GroupNorm by means and 1x1 convolutions."""
    return _replace(module, nn.GroupNorm, DecomposedGroupNorm)


class DecomposedLayerNorm(nn.Module):
    """LayerNorm over the last axis, its means taken by a linear of one row."""

    mean_row: torch.Tensor
    variance_bias: torch.Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        self.weight = norm.weight
        self.bias = norm.bias
        self.register_buffer("mean_row", torch.full((1, width), 1 / width), persistent=False)
        self.register_buffer("variance_bias", torch.full((1,), norm.eps), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> the same shape."""
        centred = x - F.linear(x, self.mean_row)
        variance = F.linear(centred * centred, self.mean_row, self.variance_bias)
        out = centred * variance.rsqrt()
        if self.weight is not None:
            out = out * self.weight
        return out if self.bias is None else out + self.bias


def decomposed_layer_norm(module: nn.Module) -> nn.Module:
    """Replace every LayerNorm by linears and products."""
    return _replace(module, nn.LayerNorm, DecomposedLayerNorm)


class CroppedUpsample(nn.Module):
    """Upsample2D as a whole doubling, cropped by a row or a column where an odd size is asked for.

    A UNet halves 2n - 1 rows to n, and asks its upsampler for 2n - 1 again. Of the nearest
    neighbours, row i is then row floor(i * n / (2n - 1)) = floor(i / 2) of the n: the doubled
    picture without its last row. So no target resizes by a fraction.
    """

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        if upsample.norm is not None or upsample.use_conv_transpose or not upsample.interpolate:
            raise UserError(
                "an upsampler of this pipeline is no nearest-neighbour doubling with a "
                "convolution; only that kind can be lowered here"
            )
        self.conv_name = upsample.name if upsample.name == "conv" else "Conv2d_0"
        if upsample.use_conv:
            self.add_module(self.conv_name, getattr(upsample, self.conv_name))

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', h, w), with h 2H or 2H - 1, and w as well; None: 2H and 2W."""
        doubled = [2 * side for side in hidden_states.shape[-2:]]
        size = doubled if output_size is None else list(output_size)
        if any(side - wanted not in (0, 1) for side, wanted in zip(doubled, size, strict=True)):
            raise ValueError(f"doubling gives {doubled}, and {size} is no crop of it by one")
        x = self.enlarge(hidden_states, None if size == doubled else size)
        for conv in self.children():
            x = conv(x)
        return x

    def enlarge(self, x: torch.Tensor, size: list[int] | None) -> torch.Tensor:
        """The doubled picture, its upper left corner of `size`; None: all of it."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if size is None else x[:, :, : size[0], : size[1]]


def cropped_upsample(module: nn.Module) -> nn.Module:
    """Replace every Upsample2D by a doubling and a crop."""
    return _replace(module, Upsample2D, CroppedUpsample)


class ConcatUpsample(CroppedUpsample):
    """The same by concatenating a picture with itself."""

    def enlarge(self, x: torch.Tensor, size: list[int] | None) -> torch.Tensor:
        """As the base class."""
        return double(x, size)


class ConcatDouble(nn.Module):
    """nn.Upsample(scale_factor=2), nearest, by concatenation."""

    def __init__(self, upsample: nn.Upsample) -> None:
        super().__init__()
        if upsample.mode != "nearest" or upsample.scale_factor not in (2, (2, 2)):
            raise UserError(
                f"an upsampler of this pipeline is not a nearest-neighbour doubling: {upsample}"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return double(x)


def double(x: torch.Tensor, size: list[int] | None = None) -> torch.Tensor:
    """Every pixel twice in both directions: (B, C, H, W) -> (B, C, 2H, 2W), or its corner.

    size: height and width of the upper left corner that is wanted; None: everything.
    In channels-last order, a row of pixels beside itself on the channel axis is the wider row.
    """
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)
    wide = _twice(pixels, (batch, height * width, channels))
    tall = _twice(wide, (batch, height, 2 * width * channels))
    doubled = tall.reshape(batch, 2 * height, 2 * width, channels)
    if size is not None:
        doubled = doubled[:, : size[0], : size[1]]
    return doubled.permute(0, 3, 1, 2)


def _twice(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`x` beside itself on the last axis; two views, as XNNPACK joins no node to itself."""
    return torch.cat([x.reshape(shape), x.reshape(shape)], -1)


def upsample_by_concat(module: nn.Module) -> nn.Module:
    """Replace every nearest-neighbour upsampler by concatenations."""
    module = _replace(module, Upsample2D, ConcatUpsample)
    return _replace(module, nn.Upsample, ConcatDouble)


class FloatTinyDecoder(nn.Module):
    """DecoderTiny with float constants; whole numbers would be tensors of integers to convert."""

    def __init__(self, decoder: DecoderTiny) -> None:
        super().__init__()
        self.layers = decoder.layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) to pictures (B, 3, H, W) in [-1, 1]."""
        return self.layers(torch.tanh(x / 3.0) * 3.0) * 2.0 - 1.0


def float_tiny_decoder(module: nn.Module) -> nn.Module:
    """Replace the whole numbers in an AutoencoderTiny's decoder by floats."""
    return _replace(module, DecoderTiny, FloatTinyDecoder)


class ConstantTimesteps(nn.Module):
    """Sinusoidal timestep embedding whose frequencies are computed once."""

    frequencies: torch.Tensor

    def __init__(self, timesteps: Timesteps) -> None:
        super().__init__()
        half, odd = divmod(timesteps.num_channels, 2)
        if odd:
            raise UserError(
                f"the UNet's timestep embedding has an odd width ({timesteps.num_channels}); "
                "only even widths can be lowered here"
            )
        self.cosine_first = timesteps.flip_sin_to_cos
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        exponent = exponent / (half - timesteps.downscale_freq_shift)
        frequencies = exponent.exp()[None] * timesteps.scale
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, D)."""
        phase = timesteps[:, None] * self.frequencies
        sine, cosine = phase.sin(), phase.cos()
        return torch.cat([cosine, sine] if self.cosine_first else [sine, cosine], -1)


class OneTimestepUNet(UNet2DConditionModel):
    """A UNet that embeds its one timestep once; broadcasting gives it to the whole batch."""

    def get_time_embed(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """timestep (1,) -> (1, D)."""
        return self.time_proj(timestep)


def constant_timesteps(module: nn.Module) -> nn.Module:
    """Precompute the frequencies of the timestep embedding, and embed a timestep once a call."""
    for part in module.modules():
        if type(part) is UNet2DConditionModel and type(part.time_proj) is Timesteps:
            part.time_proj = ConstantTimesteps(part.time_proj)
            # A class of the same attributes: only the one method differs.
            part.__class__ = OneTimestepUNet
    return module


class GatheredEmbeddings(nn.Module):
    """CLIP's embeddings with constant positions; an int8 table is gathered before it is scaled.

    Only the rows of the prompt's tokens become floats, never the whole table.
    """

    positions: torch.Tensor
    integers: torch.Tensor
    scales: torch.Tensor

    def __init__(self, embeddings: CLIPTextEmbeddings) -> None:
        super().__init__()
        table = embeddings.token_embedding
        with torch.no_grad():
            positions = embeddings.position_embedding(embeddings.position_ids).detach()
        self.register_buffer("positions", positions, persistent=False)
        if is_quantized(table):
            self.register_buffer("integers", table.get_buffer("weight_int8"))
            scales = table.get_buffer("weight_scale").unsqueeze(1)
            self.register_buffer("scales", scales)
        else:
            self.token_embedding = table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(1, L) -> (1, L, D)."""
        if not hasattr(self, "integers"):
            return self.token_embedding(input_ids) + self.positions
        rows = F.embedding(input_ids, self.integers).to(torch.float32)
        return rows * F.embedding(input_ids, self.scales) + self.positions


def gathered_embeddings(module: nn.Module) -> nn.Module:
    """Make CLIP's embeddings a gather of rows plus a constant."""
    return _replace(module, CLIPTextEmbeddings, GatheredEmbeddings)


def _replace(module: nn.Module, kind: type[Any], make: Callable[[Any], nn.Module]) -> nn.Module:
    """Replace every module of a kind in the tree, each once however often it is named."""
    if isinstance(module, kind):
        return make(module)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and isinstance(child, kind):
                if child not in made:
                    made[child] = make(child)
                parent._modules[name] = made[child]
    return module


REWRITES: dict[str, Rewrite] = {
    "explicit_attention": explicit_attention,
    "split_geglu": split_geglu,
    "decomposed_group_norm": decomposed_group_norm,
    "decomposed_layer_norm": decomposed_layer_norm,
    "cropped_upsample": cropped_upsample,
    "upsample_by_concat": upsample_by_concat,
    "float_tiny_decoder": float_tiny_decoder,
    "constant_timesteps": constant_timesteps,
    "gathered_embeddings": gathered_embeddings,
}
