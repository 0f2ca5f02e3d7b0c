"""A pipeline that exports quickly, for the tests of the lowerings."""

from typing import Any

from converters import components
from converters.components import Component
from tests.conftest import make_tiny_pipeline

NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def make_small_pipeline() -> Any:
    """The tiny pipeline with a UNet and an autoencoder of two levels: 16x16 pictures."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipeline = make_tiny_pipeline()
    pipeline.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipeline.vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.5,
    )
    pipeline.vae_scale_factor = 2
    for module in (pipeline.unet, pipeline.vae):
        module.eval().requires_grad_(False)
    return pipeline


def build(pipeline: Any, name: str, batch: int = 2) -> Component:
    """A component of the small pipeline."""
    return components.build(pipeline, name, height=16, width=16, batch=batch)
