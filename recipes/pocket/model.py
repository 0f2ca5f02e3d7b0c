"""The architecture: Stable Diffusion's own parts and arrangement, at a hundredth of the size."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.pocket.shapes import SIDE
from recipes.pocket.tokenizer import MAX_TOKENS

LATENT_SIDE = 16
LATENT_CHANNELS = 4
TEXT_WIDTH = 128
SCALING_FACTOR = 0.5
"""Latents times this have unit variance (see `train_vae.normalize_latents`)."""
TRAIN_TIMESTEPS = 1000


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids (B, MAX_TOKENS) -> hidden states (B, MAX_TOKENS, TEXT_WIDTH)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Four levels with cross attention, two residual blocks each, thin where latents are wide."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 80, 64),
        layers_per_block=2,
        attention_head_dim=(1, 2, 5, 4),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def build_vae() -> AutoencoderKL:
    """64x64 pictures <-> 16x16 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 80),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=SCALING_FACTOR,
    )


def build_scheduler() -> DDIMScheduler:
    """SD's schedule with a zero terminal SNR and v-prediction (Lin et al., arXiv:2305.08891)."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        steps_offset=1,
    )
