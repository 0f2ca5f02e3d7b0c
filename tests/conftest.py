"""Shared fixtures: tiny, seeded pipelines of the real classes, so that tests are quick."""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

# Read when torch is first imported. These models are so small that on a shared machine OpenMP's
# threads would spend most of their time spinning for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as cores: a thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def make_tiny_pipeline(seed: int = 0) -> Any:
    """A StableDiffusionPipeline of the real classes: four levels, 8x8 latents, 64x64 pictures."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=[2, 2, 4, 4],
        use_linear_projection=True,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.5,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=598,
            eos_token_id=599,
            pad_token_id=599,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tiny_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return pipeline


def make_tiny_tokenizer() -> Any:
    """A CLIPTokenizer of 600 tokens: the 512 byte tokens, 86 merges, and the two specials."""
    import json
    import tempfile
    from pathlib import Path

    from transformers import CLIPTokenizer
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    common = "etaoinshrd"
    merges = [(a, b + "</w>") for a in common for b in common][:86]
    vocabulary += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(
            json.dumps({token: index for index, token in enumerate(vocabulary)})
        )
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n")
        return CLIPTokenizer(
            vocab_file=f"{folder}/vocab.json",
            merges_file=f"{folder}/merges.txt",
            model_max_length=16,
        )


def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"


# marker -> why its tests cannot run here, or None
REASONS: dict[str, Callable[[], str | None]] = {
    "gpu": _no_cuda,
    "macos": lambda: None if sys.platform == "darwin" else "needs Core ML on a Mac",
    "device": lambda: "needs a phone or another computer; ask for it with -m device",
    "full_size": lambda: "takes minutes and 17 GB; ask for it with -m full_size",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with its reason, what this machine cannot run or what was not asked for."""
    asked = config.getoption("-m")
    for item in items:
        for marker, reason_of in REASONS.items():
            if item.get_closest_marker(marker) is None or (
                marker in ("device", "full_size") and marker in asked
            ):
                continue
            if reason := reason_of():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_pipeline() -> Any:
    """Shared by tests that only read it; a test that changes a module makes its own."""
    return make_tiny_pipeline()
