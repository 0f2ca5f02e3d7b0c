"""A pipeline that exports quickly, for the tests of the lowerings."""

import tempfile
from pathlib import Path
from typing import Any

from converters import cli, components
from converters.components import Component
from recipes import quantize, schema
from tests.conftest import make_tiny_pipeline

QUANTIZED = """
name: small
source: {{model: {folder}/model}}
resolution: 16
schedule: {{steps: 2, guidance_scale: 3.0}}
stages:
  - quantize:
      activations: int8_static
      calibration: {{prompts: {folder}/prompts.txt, samples: 2, observer: minmax}}
golden_prompts: [a red tent]
golden_seeds: 3
"""
NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def convert_quantized(folder: Path) -> Path:
    """The small pipeline with INT8 activations, converted for ONNX into a bundle in a folder."""
    make_small_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("a red tent\na hat\n")
    (folder / "small.yaml").write_text(QUANTIZED.format(folder=folder))
    argv = ["--recipe", str(folder / "small.yaml"), "--output", str(folder / "bundle")]
    assert cli.main("onnx", [*argv, "--no-validate"]) == 0
    return folder / "bundle"


def make_small_pipeline(seed: int = 0) -> Any:
    """The tiny pipeline with a UNet and an autoencoder of two levels: 16x16 pictures."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipeline = make_tiny_pipeline(seed)
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


def make_small_tiny_pipeline() -> Any:
    """The small pipeline with a tiny decoder (AutoencoderTiny) in place of its own."""
    from diffusers import AutoencoderTiny

    pipeline = make_small_pipeline()
    vae: Any = AutoencoderTiny(
        encoder_block_out_channels=(1, 1),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 0),
        num_decoder_blocks=(2, 1),
    )
    pipeline.vae = vae.eval().requires_grad_(False)
    return pipeline


def build(pipeline: Any, name: str, batch: int = 2) -> Component:
    """A component of the small pipeline."""
    return components.build(pipeline, name, height=16, width=16, batch=batch)


def make_static_pipeline() -> Any:
    """The small pipeline with INT8 weights and static activations, calibrated on two pictures."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("a red tent\na hat\n")
        settings = {
            "activations": "int8_static",
            "calibration": {"prompts": str(prompts), "samples": 2, "observer": "minmax"},
        }
        recipe = schema.parse(
            {
                "name": "static",
                "source": {"model": "embedded"},
                "resolution": 16,
                "schedule": {"steps": 2, "guidance_scale": 3.0},
                "stages": [{"quantize": settings}],
            }
        )
        pipeline, _ = quantize.quantize(make_small_pipeline(), recipe.stages[0].settings, recipe)
    return pipeline
