"""One component of a pipeline as a folder: a configuration and safetensors, as diffusers has it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mobile_runtime.bundle import open_to_others
from mobile_runtime.errors import UserError
from recipes import widths

MODELS = ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny")


def save(component: Any, folder: Path) -> None:
    """Write a module or a scheduler; weights in the precision that they have.

    A UNet whose inner widths were pruned gets the table that `load` needs (widths.py).
    """
    component.save_pretrained(folder)
    if type(component).__name__ == "UNet2DConditionModel":
        widths.write(component, folder)
    open_to_others(folder)


def attend_as_opened(unet: Any) -> None:
    """Give a UNet the attention that it has when it is opened from a folder.

    diffusers' own `set_default_attn_processor` gives it the older one, whose export is slower and
    holds a table of zeros for each attention.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor2_0())


def load(folder: Path) -> Any:
    """Open what `save` wrote: a module in float32, ready to compute, or a scheduler."""
    import diffusers

    config_file = folder / "scheduler_config.json"
    is_scheduler = config_file.is_file()
    config_file = config_file if is_scheduler else folder / "config.json"
    try:
        name = json.loads(config_file.read_text(encoding="utf-8"))["_class_name"]
        kind = getattr(diffusers, name, None)
        if is_scheduler and isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
            return kind.from_pretrained(folder, local_files_only=True)
        if kind is None or name not in MODELS:
            raise UserError(f"{folder} holds a {name}, which is none of: {', '.join(MODELS)}")
        if (folder / widths.FILE).is_file():
            loaded, lacking = widths.open_unet(folder, sorted(folder.glob("*.safetensors"))), []
        else:
            module: Any = kind
            loaded, report = module.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            lacking = sorted(report["missing_keys"])
        if lacking:
            raise ValueError(f"it lacks {len(lacking)} tensors, {lacking[0]} first")
        for key, tensor in loaded.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"{key} holds NaN or Inf")
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        SafetensorError,
        UserError,
    ) as error:
        raise UserError(
            f"{folder} cannot be read ({error}); if it is a kept result, delete it"
        ) from error
    # diffusers notes the folder, which is nobody else's business.
    loaded.register_to_config(_name_or_path="")
    return loaded.eval().requires_grad_(False)
