"""A single-file .safetensors checkpoint in Stability's original format, read offline."""

import tempfile
from pathlib import Path
from typing import Any

from mobile_runtime.errors import UserError
from recipes.sources.architectures import Architecture, write_config_folder
from recipes.sources.diffusers_folder import assemble, check_finite, check_safetensors, told


def check_single_file(path: Path) -> str:
    """The architecture of a checkpoint, told from its header; UserError where it is none."""
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is no .safetensors file; a pickle (.ckpt, .bin, .pt) may run code when "
            "opened, so convert it first"
        )
    check_safetensors(path)
    return identify_checkpoint(path)


def identify_checkpoint(path: Path) -> str:
    """The architecture of an original-format checkpoint, from its tensors and its name."""
    from safetensors import safe_open

    prefix = "model.diffusion_model.input_blocks."
    with safe_open(path, framework="np") as file:
        keys = set(file.keys())
        shapes = {
            key: tuple(file.get_slice(key).get_shape())
            for key in (
                prefix + "0.0.weight",
                prefix + "1.1.transformer_blocks.0.attn2.to_k.weight",
            )
            if key in keys
        }
    width, context = ((*shapes.values(), (), ())[:2]) if len(shapes) == 2 else ((), ())
    is_known = len(width) == 4 and width[1] == 4 and len(context) >= 2
    if not is_known or any(key.startswith("conditioner.") for key in keys):
        raise UserError(
            f"{path} is no text-to-image checkpoint of Stable Diffusion 1.x, 2.x or Turbo in the "
            "original format; save it as a diffusers folder and pass that"
        )
    if context[1] == 768:
        return "sd15"
    # 2.1-base, 2.1 and Turbo are one network; only their samplers tell them apart.
    for word, name in (("turbo", "sd_turbo"), ("768", "sd21_v"), ("512", "sd21"), ("base", "sd21")):
        if word in path.name.lower():
            return name
    raise UserError(
        f"{path} holds a Stable Diffusion 2.x network, and nothing in it says whether it is Turbo, "
        "2.1 at 512 or 2.1 at 768; put 'turbo', '512' or '768' into its file name"
    )


def load_single_file(path: Path, architecture: Architecture) -> Any:
    """Read an original-format checkpoint into a pipeline of the given architecture.

    The configurations are our own, so that no network is asked.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    with tempfile.TemporaryDirectory() as folder:
        write_config_folder(architecture, Path(folder))
        with told(str(path)):
            try:
                loaded = StableDiffusionPipeline.from_single_file(
                    str(path), config=folder, local_files_only=True, torch_dtype=torch.float32
                )
            except SingleFileComponentError as error:
                raise ValueError(str(error)) from error
            except NotImplementedError as error:
                # What the file lacks stays on the meta device, from which nothing can be copied.
                raise ValueError("it lacks tensors that its network has") from error
    for name in ("unet", "vae", "text_encoder"):
        if any(tensor.is_meta for tensor in getattr(loaded, name).state_dict().values()):
            raise UserError(f"{path} cannot be loaded: it lacks tensors of the {name}")
        check_finite(getattr(loaded, name), name)
    loaded.tokenizer.name_or_path = ""
    return assemble(
        loaded.unet, loaded.vae, loaded.text_encoder, loaded.tokenizer, loaded.scheduler
    )
