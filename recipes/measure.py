"""Sizes and work of a pipeline's modules, and copies of modules that cost no memory."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

COMPONENTS = ("text_encoder", "unet", "vae")
"""The modules of a pipeline."""


def share_structure(
    module: nn.Module,
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Any:
    """A copy of the tree of modules whose tensors are not copied: shared, or `convert`ed.

    What changes the tree afterwards leaves the original alone, at no cost in memory.
    """
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        converted = convert(tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(converted, nn.Parameter):
            converted = nn.Parameter(converted, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = converted
    return copy.deepcopy(module, memo)


def on_meta(module: nn.Module) -> Any:
    """A copy of a module on the meta device: its shapes alone."""
    return share_structure(module, lambda tensor: tensor.to("meta"))


def with_modules(pipeline: Any, modules: dict[str, Any]) -> Any:
    """A pipeline of the same kind and the other's parts, some of them (also the scheduler) new."""
    return type(pipeline)(
        **{**pipeline.components, **modules},
        requires_safety_checker=False,
    )


def outline(pipeline: Any) -> Any:
    """The pipeline with its modules on the meta device; the original is left alone."""
    return with_modules(pipeline, {name: on_meta(getattr(pipeline, name)) for name in COMPONENTS})


def count_parameters(module: nn.Module) -> int:
    """Weights of a module, each once; integers count where they took a weight's place."""
    weights = {
        id(tensor): tensor.numel()
        for tensor in [*module.parameters(), *module.buffers()]
        # A layer's integers have two axes or more; its zero points, one.
        if isinstance(tensor, nn.Parameter) or (tensor.dtype == torch.int8 and tensor.dim() > 1)
    }
    return sum(weights.values())


def count_macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Multiply-adds of one call: convolutions, linears, matrix products, attention."""
    shapes = [tensor.to("meta") for tensor in inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(module)(*shapes)
    return counter.get_total_flops() // 2


def vae_factor(vae: Any) -> int:
    """Pixels of a picture's side for one of its latents' side."""
    config = vae.config
    widths = getattr(config, "block_out_channels", None) or config.decoder_block_out_channels
    return 2 ** (len(widths) - 1)


# The blocks that ask their upsampler for the size that was halved, also where it is odd.
_ANY_SIZE = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def size_multiple(pipeline: Any) -> int:
    """What a picture's height and width have to be a multiple of, in pixels.

    The VAE's factor: diffusers' UNets halve n latents to ceil(n / 2), and double these to n again.
    A UNet of other blocks, or whose halving drops the odd latent (`downsample_padding` 0), needs
    latents that halve evenly at all its levels.
    """
    config = pipeline.unet.config
    plain = all(set(config[key]) <= set(kinds) for key, kinds in _ANY_SIZE.items())
    if plain and config.downsample_padding == 1:
        return vae_factor(pipeline.vae)
    return vae_factor(pipeline.vae) * 2 ** (len(config.block_out_channels) - 1)


def latent_size(pipeline: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of the latents of a picture."""
    factor = vae_factor(pipeline.vae)
    return height // factor, width // factor


class _Decode(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents) if self.post_quant_conv else latents)


def measure(pipeline: Any, height: int, width: int, guided: bool) -> dict[str, dict[str, int]]:
    """Parameters, and multiply-adds of one call, of each component.

    height, width: of the picture, in pixels. guided: the UNet works on a pair.
    """
    config = pipeline.text_encoder.config
    length = config.max_position_embeddings
    batch = 2 if guided else 1
    size = latent_size(pipeline, height, width)
    latents = torch.empty(batch, pipeline.unet.config.in_channels, *size)
    states = torch.empty(batch, length, pipeline.unet.config.cross_attention_dim)
    ids = torch.empty(1, length, dtype=torch.int64)
    calls: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        "text_encoder": (pipeline.text_encoder, (ids,)),
        "unet": (pipeline.unet, (latents, torch.empty(()), states)),
        "vae_decoder": (_Decode(pipeline.vae), (latents[:1],)),
    }
    return {
        name: {"parameters": count_parameters(module), "macs": count_macs(module, *inputs)}
        for name, (module, inputs) in calls.items()
    }
