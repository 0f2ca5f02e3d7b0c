"""The components of a pipeline: modules with static shapes and named tensors, and their export.

Each component is a small wrapper around the pipeline's own module: positional tensors in, one
tensor out. The wrapper shares the pipeline's weights and keeps diffusers' module paths under the
component's name (`unet.down_blocks.0...`, `vae_decoder.decoder.conv_in`), which are the layer names
of a quantization plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobile_runtime.errors import UserError, choices
from mobile_runtime.manifest import TensorSpec
from recipes import measure
from recipes.fold import FoldedUNet
from recipes.int4_layers import Form
from recipes.sources import check_resolution

# Added to the scores of hidden positions. Finite in float16, and far enough below any score for
# softmax to give exactly zero in float32.
MASKED_SCORE = -10000.0

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
}


@dataclass(frozen=True)
class Component:
    """One model of the pipeline: a module of positional tensors, in the order of `inputs`."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def example_inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Seeded inputs of the right shapes: whole numbers in a spec's range, else normal noise."""
        generator = torch.Generator().manual_seed(seed)
        return {spec.name: _example(spec, generator) for spec in self.inputs}


class TextEncoder(nn.Module):
    """CLIP's text model with a finite causal mask: (1, L) int32 -> (1, L, D), after the last norm.

    The hidden states are what diffusers' Stable Diffusion pipeline takes; the pooled output, which
    it ignores, is not computed.
    """

    causal_mask: torch.Tensor

    def __init__(self, text_encoder: Any, length: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        mask = torch.full((length, length), MASKED_SCORE).triu(1)[None, None]
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of the last layer, layer-normed."""
        text_model = self.text_encoder.text_model
        hidden = text_model.embeddings(input_ids=input_ids)
        encoded = text_model.encoder(inputs_embeds=hidden, causal_attention_mask=self.causal_mask)
        return text_model.final_layer_norm(encoded.last_hidden_state)


class UNet(nn.Module):
    """The denoiser: (B, C, h, w), (1,), (B, L, D) -> (B, C, h, w)."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The model's output; the one timestep serves the whole batch."""
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class _AutoencoderPart(nn.Module):
    """One half of an autoencoder, under the names that the autoencoder gives its modules."""

    def __init__(self, modules: dict[str, nn.Module | None]) -> None:
        super().__init__()
        for name, module in modules.items():
            if module is not None:
                self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


class VaeDecoder(nn.Module):
    """Latents, divided by the scaling factor, to a picture: (1, C, h, w) -> (1, 3, H, W)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.vae_decoder = _AutoencoderPart(
            {"post_quant_conv": post_quant_conv, "decoder": vae.decoder}
        )

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """A picture in [-1, 1], not clipped."""
        return self.vae_decoder(latent_sample)


class VaeEncoder(nn.Module):
    """A picture to its latents' distribution: (1, 3, H, W) -> (1, 2C, h, w)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        quant_conv = getattr(vae, "quant_conv", None)
        self.vae_encoder = _AutoencoderPart({"encoder": vae.encoder, "quant_conv": quant_conv})

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance, one after the other on the channel axis; not scaled."""
        return self.vae_encoder(sample)


def build(pipeline: Any, name: str, *, height: int, width: int, batch: int) -> Component:
    """Wrap one module of a StableDiffusionPipeline. Sizes in pixels; `batch` is the UNet's.

    Raises UserError for an unknown name or a size that the modules cannot take.
    """
    if name not in BUILDERS:
        raise choices("component", name, list(BUILDERS))
    check_resolution(pipeline, height, width)
    component = BUILDERS[name](pipeline, height, width, batch)
    component.module.eval().requires_grad_(False)
    return component


def export(component: Component) -> torch.export.ExportedProgram:
    """One torch.export of the component, with static shapes, for all targets."""
    inputs = tuple(component.example_inputs().values())
    with torch.no_grad():
        return torch.export.export(component.module, inputs)


def count_macs(component: Component) -> int:
    """Multiply-adds of one call: convolutions, linears, matrix products, attention."""
    return measure.count_macs(component.module, *component.example_inputs().values())


def count_parameters(component: Component) -> int:
    """Weights of the component, each once; integers count where they took a weight's place."""
    return measure.count_parameters(component.module)


def count_branches(component: Component, forms: Mapping[str, Form]) -> tuple[int, int]:
    """Parameters, and multiply-adds of one call, of the float branches beside 4-bit layers.

    forms: of the layers that are going to be 4 bits, by their paths in the component.
    """
    module, parameters, macs = measure.on_meta(component.module), 0, 0

    def hook(rank: int) -> Callable[[Any, Any, torch.Tensor], None]:
        def count(layer: Any, inputs: Any, out: torch.Tensor) -> None:
            nonlocal parameters, macs
            rows, columns = layer.weight.shape[0], layer.weight[0].numel()
            parameters += rank * (rows + columns)
            macs += out.numel() // rows * rank * (rows + columns)

        return count

    for path, layer in module.named_modules():
        if path in forms:
            layer.register_forward_hook(hook(forms[path].rank))
    with torch.no_grad():
        module(*(tensor.to("meta") for tensor in component.example_inputs().values()))
    return parameters, macs


def _example(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.range is not None and spec.name in ("input_ids", "timestep"):
        low, high = (int(bound) for bound in spec.range)
        whole = torch.randint(low, high + 1, spec.shape, generator=generator)
        return whole.to(_DTYPES[spec.dtype])
    noise = torch.randn(spec.shape, generator=generator, dtype=_DTYPES[spec.dtype])
    return noise.clamp(*spec.range) if spec.range is not None else noise


def _text_encoder(pipeline: Any, height: int, width: int, batch: int) -> Component:
    config = pipeline.text_encoder.config
    if getattr(config, "use_attention_mask", False):
        raise UserError(
            "the text encoder's config asks for an attention mask (use_attention_mask), "
            "which mobile bundles do not have; use a pipeline without it"
        )
    length = config.max_position_embeddings
    input_ids = TensorSpec(
        name="input_ids",
        shape=(1, length),
        dtype="int32",
        layout="NL",
        range=(0, config.vocab_size - 1),
        description="Token ids of one prompt, padded to the model's length.",
    )
    hidden = TensorSpec(
        name="last_hidden_state",
        shape=(1, length, config.hidden_size),
        dtype="float32",
        layout="NLD",
        description="One vector a token, after the final layer norm.",
    )
    return Component(
        "text_encoder", TextEncoder(pipeline.text_encoder, length), (input_ids,), (hidden,)
    )


def _unet(pipeline: Any, height: int, width: int, batch: int) -> Component:
    config = pipeline.unet.config
    size = measure.latent_size(pipeline, height, width)
    pair = " Batch 2 is [negative or empty prompt, prompt]." if batch == 2 else ""
    sample = TensorSpec(
        name="sample",
        shape=(batch, config.in_channels, *size),
        dtype="float32",
        layout="NCHW",
        description="Noisy latents, scaled by the schedule row's input_scale." + pair,
    )
    timestep = TensorSpec(
        name="timestep",
        shape=(1,),
        dtype="float32",
        layout="N",
        range=(0, pipeline.scheduler.config.num_train_timesteps - 1),
        description="The schedule row's timestep, one for the whole batch."
        + (" Any other makes the output NaN." if isinstance(pipeline.unet, FoldedUNet) else ""),
    )
    hidden = TensorSpec(
        name="encoder_hidden_states",
        shape=(
            batch,
            pipeline.text_encoder.config.max_position_embeddings,
            config.cross_attention_dim,
        ),
        dtype="float32",
        layout="NLD",
        description="The text encoder's last_hidden_state." + pair,
    )
    out = TensorSpec(
        name="out_sample",
        shape=(batch, config.out_channels, *size),
        dtype="float32",
        layout="NCHW",
        description="The model's prediction, of the schedule's prediction type.",
    )
    return Component("unet", UNet(pipeline.unet), (sample, timestep, hidden), (out,))


def _vae_decoder(pipeline: Any, height: int, width: int, batch: int) -> Component:
    size = measure.latent_size(pipeline, height, width)
    latent = TensorSpec(
        name="latent_sample",
        shape=(1, pipeline.vae.config.latent_channels, *size),
        dtype="float32",
        layout="NCHW",
        description="Denoised latents, already divided by the scaling factor.",
    )
    sample = TensorSpec(
        name="sample",
        shape=(1, 3, height, width),
        dtype="float32",
        layout="NCHW",
        range=(-1, 1),
        description="The picture, RGB; clip to the range before showing it.",
    )
    return Component("vae_decoder", VaeDecoder(pipeline.vae), (latent,), (sample,))


def _vae_encoder(pipeline: Any, height: int, width: int, batch: int) -> Component:
    if not hasattr(pipeline.vae, "quant_conv"):
        raise UserError(
            f"{type(pipeline.vae).__name__} has no latent distribution to encode to; "
            "leave vae_encoder out, or use an AutoencoderKL"
        )
    size = measure.latent_size(pipeline, height, width)
    sample = TensorSpec(
        name="sample",
        shape=(1, 3, height, width),
        dtype="float32",
        layout="NCHW",
        range=(-1, 1),
        description="A picture, RGB.",
    )
    moments = TensorSpec(
        name="latent_parameters",
        shape=(1, 2 * pipeline.vae.config.latent_channels, *size),
        dtype="float32",
        layout="NCHW",
        description="Mean and log-variance of the latents, not multiplied by the scaling factor.",
    )
    return Component("vae_encoder", VaeEncoder(pipeline.vae), (sample,), (moments,))


BUILDERS: dict[str, Callable[[Any, int, int, int], Component]] = {
    "text_encoder": _text_encoder,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}
