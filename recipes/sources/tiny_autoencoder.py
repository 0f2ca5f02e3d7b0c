"""A tiny autoencoder (TAESD, diffusers' `AutoencoderTiny`) by folder or hub id."""

import json
from pathlib import Path
from typing import Any

from mobile_runtime.errors import UserError
from recipes.paths import user_path
from recipes.sources.diffusers_folder import (
    check_finite,
    check_safetensors,
    check_sizes,
    check_tiny,
    empty_module,
    load_module,
    weight_files,
)
from recipes.sources.hub import fetch

NAME = "AutoencoderTiny"
STEM = "diffusion_pytorch_model"
WAYS_OUT = (
    "download it on a machine with access (`hf download OWNER/NAME --local-dir FOLDER`) and name "
    "the folder as the model, or name no model, to distil one"
)


def open_tiny(model: str, revision: str | None = None, *, weights: bool = True) -> Any:
    """Open an AutoencoderTiny, in float32, eval mode and without gradients.

    model: the folder that holds its config.json and safetensors, or a hub id. weights: False gives
    it on the meta device and downloads no weights. Raises UserError with one sentence.
    """
    path = user_path(model)
    if path.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") != 1:
        if revision is not None:
            raise UserError(f"revision goes with a hub id, and {model} is none; remove it")
        if not path.is_dir():
            raise UserError(
                f"model: {model!r} is no folder and no hub id (owner/name) of an {NAME}"
            )
        return _open_folder(path, model, weights, check_files=True)
    at = f"{model}@{revision}" if revision else model

    def choose(files: list[str]) -> list[str]:
        if f"{STEM}.safetensors" not in files:
            raise _no_weights(at)
        return ["config.json", *([f"{STEM}.safetensors"] if weights else [])]

    folder, _ = fetch(model, revision, choose, ["config.json", f"{STEM}.safetensors"], WAYS_OUT)
    return _open_folder(folder, at, weights, check_files=weights)


def _open_folder(folder: Path, where: str, weights: bool, check_files: bool) -> Any:
    """check_files: False where the folder need not hold its weights."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        name = config["_class_name"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise UserError(
            f"model: {where} has no config.json that tells its class ({error}); give the folder or "
            f"hub id of an {NAME}, as diffusers saves it"
        ) from None
    if name != NAME:
        raise UserError(
            f"model: {where} is a {name}; give the folder or hub id of an {NAME} (for a whole "
            "pipeline, its vae folder)"
        )
    check_sizes("vae", config, where)
    check_tiny(config, where)
    variant = None
    if check_files:
        if not list(folder.glob("*.safetensors")):
            raise _no_weights(where)
        files, variant = weight_files(folder, "vae", where)
        for file in files:
            check_safetensors(file)
    if weights:
        tiny = load_module(folder, "vae", NAME, variant, where)
        check_finite(tiny, "decoder")
    else:
        tiny = empty_module("vae", NAME, config, where)
    return tiny.eval().requires_grad_(False)


def _no_weights(where: str) -> UserError:
    return UserError(
        f"model: {where} holds no {STEM}.safetensors, and pickled weights (.bin, .pth) may run "
        "code when opened; open those yourself with diffusers and save them again"
    )
