"""Writes a diffusers pipeline as Stability's original single-file checkpoint, for tests.

The names follow the published checkpoints (v1-5-pruned-emaonly.safetensors), and were worked out
from diffusers' conversion script for them; the project's own code has no part in it.
"""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def save_original(pipeline: Any, path: Path) -> None:
    """Write the pipeline's weights to one .safetensors file in the original format."""
    tensors = {}
    layers = pipeline.unet.config.layers_per_block
    for name, tensor in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + _unet_name(name, layers)] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        # Attention projections are 1x1 convolutions there.
        linear = ".attentions." in name and tensor.dim() == 2
        tensors["first_stage_model." + _vae_name(name)] = (
            tensor[:, :, None, None] if linear else tensor
        )
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer." + name] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _unet_name(name: str, layers: int) -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem in UNET_TOP:
        return f"{UNET_TOP[stem]}.{leaf}"
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, block, kind, index, rest = found.groups()
        place = (layers + 1) * int(block) + int(index)
        head = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
        return f"{head}.{_inner(kind, rest)}"
    if found := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(layers + 1) * (int(found[1]) + 1)}.0.op.{found[2]}"
    if found := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.*)", name):
        last = 1 if found[1] == "0" else 2  # the first up block has no attention
        return f"output_blocks.{(layers + 1) * int(found[1]) + layers}.{last}.{found[2]}"
    found = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    assert found is not None, name
    place = 2 * int(found[2]) if found[1] == "resnets" else 1
    inner = _inner(found[1], found[3]).split(".", 1)[1]
    return f"middle_block.{place}.{inner}"


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    layer, leaf = rest.split(".")
    return f"0.{RESNET[layer]}.{leaf}"


def _vae_name(name: str) -> str:
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name
    )
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out")):
            name = name.replace(ours, theirs)
        name = re.sub(r"\.to_([qkv])\.", r".\1.", name)
    return name
