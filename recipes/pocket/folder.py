"""The model as an ordinary diffusers folder: written whole or not at all, and opened again."""

from __future__ import annotations

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from recipes.pocket.sampling import Parts


def as_pipeline(parts: Parts) -> Any:
    """The parts as diffusers' own pipeline, with no safety checker."""
    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_folder(parts: Parts, folder: Path) -> None:
    """Save fp16 safetensors in place of what lies in `folder`; other files there stay."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
        copies = Parts(
            parts.tokenizer,
            deepcopy(parts.text_encoder).half(),
            deepcopy(parts.unet).half(),
            deepcopy(parts.vae).half(),
            parts.scheduler,
        )
        as_pipeline(copies).save_pretrained(fresh)
        for path in fresh.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes them for their owner alone
        if folder.exists():
            for extra in folder.iterdir():
                if extra.is_file() and not (fresh / extra.name).exists():
                    shutil.copy2(extra, fresh / extra.name)
            folder.rename(old)
        fresh.rename(folder)


def open_parts(folder: Path, device: str | torch.device = "cpu") -> Parts:
    """Open a diffusers folder in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).to(device)
    return Parts(
        pipeline.tokenizer,
        pipeline.text_encoder.eval(),
        pipeline.unet.eval(),
        pipeline.vae.eval(),
        pipeline.scheduler,
    )
