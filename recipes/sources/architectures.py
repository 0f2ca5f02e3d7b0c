"""The real Stable Diffusion architectures: their configurations, and pipelines of seeded weights.

Configurations as on the hub for stabilityai/sd-turbo, stabilityai/stable-diffusion-2-1(-base) and
stable-diffusion-v1-5. No weights and no network: `random:ARCH` shows true sizes and speed, and a
single-file checkpoint is read with these configurations.
"""

import gzip
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Architecture:
    """The configurations of one pipeline, as keyword arguments of the diffusers classes."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler_class: str
    scheduler: dict[str, Any]
    pad_token: str


_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_UNET_V1 = {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8}
_UNET_V2 = {
    **_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_CLIP_L: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "pad_token_id": 49407,
}
_CLIP_H: dict[str, Any] = {
    **_CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "pad_token_id": 0,
}
_BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
# The hub's 1.5 and 2.1 come with PNDM, whose steps need four past outputs and so fit no schedule
# table; DDIM has the same noise levels.
_DDIM: dict[str, Any] = {
    **_BETAS,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

ARCHITECTURES: dict[str, Architecture] = {
    "sd_turbo": Architecture(
        unet=_UNET_V2,
        vae=_VAE,
        text_encoder=_CLIP_H,
        scheduler_class="EulerDiscreteScheduler",
        scheduler={**_BETAS, "timestep_spacing": "trailing", "steps_offset": 1},
        pad_token="!",
    ),
    "sd21": Architecture(
        unet=_UNET_V2,
        vae=_VAE,
        text_encoder=_CLIP_H,
        scheduler_class="DDIMScheduler",
        scheduler=_DDIM,
        pad_token="!",
    ),
    # 2.1 at 768 pixels: the same network, trained to predict v.
    "sd21_v": Architecture(
        unet={**_UNET_V2, "sample_size": 96},
        vae={**_VAE, "sample_size": 768},
        text_encoder=_CLIP_H,
        scheduler_class="DDIMScheduler",
        scheduler={**_DDIM, "prediction_type": "v_prediction"},
        pad_token="!",
    ),
    "sd15": Architecture(
        unet=_UNET_V1,
        vae=_VAE,
        text_encoder=_CLIP_L,
        scheduler_class="DDIMScheduler",
        scheduler=_DDIM,
        pad_token=EOS,
    ),
}


def clip_merges() -> list[str]:
    """CLIP's byte-pair merges, best first, each as two tokens with a space between."""
    packed = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
    return gzip.decompress(packed.read_bytes()).decode("utf-8").strip("\n").split("\n")[1:]


def write_clip_tokenizer(folder: Path, pad_token: str) -> None:
    """Write CLIP's tokenizer as the files that transformers and the hub use."""
    merges = clip_merges()
    # The bytes that print as themselves come first, then the others, as OpenAI numbered them.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(256 - len(printable))
    ]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [merge.replace(" ", "") for merge in merges] + [BOS, EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": pad_token,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def write_config_folder(architecture: Architecture, folder: Path) -> None:
    """Write a diffusers folder without weights: every configuration, and the tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig

    scheduler = getattr(diffusers, architecture.scheduler_class)(**architecture.scheduler)
    scheduler.save_pretrained(folder / "scheduler")
    unet, vae, _ = empty_modules(architecture)
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    CLIPTextConfig(**architecture.text_encoder, architectures=["CLIPTextModel"]).save_pretrained(
        folder / "text_encoder"
    )
    write_clip_tokenizer(folder / "tokenizer", architecture.pad_token)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", architecture.scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), "utf-8")


def empty_modules(architecture: Architecture) -> tuple[Any, Any, Any]:
    """The UNet, VAE and text encoder on the meta device: shapes without memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.unet)
        vae = AutoencoderKL(**architecture.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
    return unet, vae, text_encoder


def random_modules(architecture: Architecture, seed: int = 0) -> tuple[Any, Any, Any]:
    """The UNet, VAE and text encoder with seeded weights that keep activations near unit scale."""
    modules = empty_modules(architecture)
    for index, module in enumerate(modules):
        fill(module, seed=seed + index)
        module.eval().requires_grad_(False)
    return modules


def fill(module: Any, seed: int) -> None:
    """Give a module that lies on the meta device seeded weights, in place.

    Weights are normal with variance 1 / fan_in (LeCun), so that a layer keeps the variance of its
    input and the prompt still counts at the output; norms are the identity; biases are small and
    not zero, so that a lost one shows.
    """
    import torch
    from torch import nn

    tape = _NormalTape(seed)
    for name, layer in module.named_modules():
        for key, parameter in list(layer.named_parameters(recurse=False)):
            if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
                value = torch.full(parameter.shape, 1.0 if key == "weight" else 0.0)
            elif key == "bias":
                value = tape.draw(parameter.shape, std=0.02)
            else:
                fan_in = 1 if isinstance(layer, nn.Embedding) else parameter[0].numel()
                value = tape.draw(parameter.shape, std=1 / math.sqrt(fan_in))
            setattr(layer, key, nn.Parameter(value, requires_grad=False))
        for key, buffer in list(layer.named_buffers(recurse=False)):
            if key != "position_ids":
                raise NotImplementedError(f"{name}.{key}: a buffer that has no rule here")
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape).clone()
            layer.register_buffer(key, positions, persistent=False)


class _NormalTape:
    """Normal numbers read from one seeded block, round and round: a copy is 20 times a draw.

    The block's length is prime, so the rows of a weight never line up with it and differ.
    """

    LENGTH = 8_388_593

    def __init__(self, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn(self.LENGTH, generator=generator)
        self.position = 0

    def draw(self, shape: Any, std: float) -> Any:
        import torch

        value = torch.empty(shape)
        flat = value.view(-1)
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, self.LENGTH - self.position)
            part = self.block[self.position : self.position + count]
            torch.mul(part, std, out=flat[done : done + count])
            done += count
            self.position = (self.position + count) % self.LENGTH
        return value
