"""PyTorch: the components of a diffusers folder, as the reference beside a bundle.

The folder is opened from local safetensors files only: no network, and no pickled code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobile_runtime.backends import Arrays, Runner, quiet_libraries
from mobile_runtime.errors import UserError, missing_backend

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle


def load(bundle: "Bundle", component: str, *, folder: str | Path | None = None) -> Runner:
    """Load a component of the diffusers pipeline in `folder` in float32; the bundle names it."""
    if folder is None:
        raise UserError("the backend torch needs the option folder: a diffusers pipeline's folder")
    entry = bundle.component(component)
    run = _open(Path(folder), component)
    names = [spec.name for spec in entry.inputs]
    output = entry.outputs[0].name

    def runner(feeds: Arrays) -> Arrays:
        import torch

        with torch.inference_mode():
            result = run(*(torch.from_numpy(feeds[name]) for name in names))
        return {output: result.numpy()}

    return runner


def _open(folder: Path, component: str) -> Callable[..., Any]:
    """The component as a function of tensors, in the order of the manifest's inputs."""
    subfolder = component.replace("_decoder", "").replace("_encoder", "")
    subfolder = "text_encoder" if component == "text_encoder" else subfolder
    if not (folder / subfolder / "config.json").is_file():
        raise UserError(f"{folder} is not a diffusers pipeline: it has no {subfolder}/config.json")
    if (folder / subfolder / "widths.json").is_file():
        raise UserError(
            f"the UNet in {folder} has pruned channels, which diffusers alone cannot open; compare "
            "with the pipeline that it was pruned from"
        )
    with quiet_libraries():
        try:
            import torch
            from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
            from transformers import CLIPTextModel
        except ImportError as error:
            raise missing_backend("torch and diffusers", "torch", "the backend torch") from error
        classes: dict[str, Any] = {
            "text_encoder": CLIPTextModel,
            "unet": UNet2DConditionModel,
            "vae": AutoencoderTiny if _is_tiny(folder / subfolder) else AutoencoderKL,
        }
        try:
            module = classes[subfolder].from_pretrained(
                folder / subfolder, local_files_only=True, use_safetensors=True
            )
        except OSError as error:
            raise UserError(
                f"{folder / subfolder} cannot be opened from safetensors: {error}"
            ) from error
        module.to(torch.float32).eval()
    if component == "vae_decoder":
        return lambda latents: module.decode(latents, return_dict=False)[0]
    if component == "vae_encoder":
        if not hasattr(module, "quant_conv"):
            raise UserError(
                f"{folder / subfolder} holds an AutoencoderTiny, which has no vae_encoder; give a "
                "folder whose vae is an AutoencoderKL"
            )
        return lambda pixels: module.encode(pixels).latent_dist.parameters
    if component == "text_encoder":
        return lambda ids: module(ids, return_dict=False)[0]
    return lambda x, timestep, text: module(x, timestep, text, return_dict=False)[0]


def _is_tiny(folder: Path) -> bool:
    """Whether a VAE's folder holds diffusers' AutoencoderTiny."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("_class_name") == "AutoencoderTiny")
