"""Where a pipeline comes from: a hub id, a diffusers folder, one file, `embedded`, `random:ARCH`.

Weights load from safetensors only, and nothing that a source holds is ever run.
"""

import importlib.resources
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobile_runtime.bundle import sha256
from mobile_runtime.errors import UserError, choices
from recipes.paths import user_path
from recipes.schema import RANDOM_ARCHITECTURES
from recipes.sources.architectures import (
    ARCHITECTURES,
    Architecture,
    empty_modules,
    random_modules,
    write_clip_tokenizer,
)
from recipes.sources.diffusers_folder import MODELS, assemble, no_safetensors, open_folder
from recipes.sources.hub import fetch
from recipes.sources.single_file import check_single_file, load_single_file

WAYS_OUT = (
    "download it on a machine with access (for a gated one after `hf auth login`) and "
    "pass the folder or .safetensors file as --model, or use --model embedded, "
    "or --model random:sd_turbo (real size, random weights)"
)
CONFIGS = ("model_index.json", "*/*.json", "tokenizer/merges.txt")


@dataclass(frozen=True)
class Source:
    """An opened pipeline (fp32, eval, no gradients) and what the manifest records about it."""

    pipeline: Any
    info: dict[str, Any]


def open_source(model: str, revision: str | None = None, *, weights: bool = True) -> Source:
    """Open a Stable Diffusion 1.x or 2.x pipeline.

    model: hub id, diffusers folder, single .safetensors file, `embedded`, or `random:ARCH`.
    weights: False gives the modules on the meta device, for their sizes; it downloads no weights,
    and of those that are here it reads the headers alone, so that a damaged file is told.
    Raises UserError with one sentence: what, where, and the ways out.
    """
    if model.startswith(("https://", "http://")):
        raise UserError(
            f"the source {model!r} is an address: for https://huggingface.co/OWNER/NAME drop the "
            "address and give OWNER/NAME alone; anything else download first, and give the folder "
            "or the .safetensors file"
        )
    path = user_path(model)
    # A hub id is two plain words; everything else that has a slash or exists is a path.
    looks_like_path = (
        path.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1
    )
    local = model == "embedded" or model.startswith("random:") or looks_like_path
    if local and revision is not None:
        raise UserError(f"--revision goes with a hub id, and {model} is none; remove it")
    if model == "embedded":
        return _open_embedded(weights)
    if model.startswith("random:"):
        return _open_random(model, weights)
    if path.is_file():
        return _open_file(path, weights)
    if path.is_dir():
        pipeline, hashes = open_folder(path, str(path), weights)
        info = {"kind": "folder", "id": path.resolve().name}
        return Source(pipeline, {**info, "weights_sha256": hashes})
    if looks_like_path or model.count("/") != 1:
        raise UserError(
            f"the source {model!r} is no folder or file, and no hub id (owner/name), embedded or "
            f"random:ARCH ({', '.join(RANDOM_ARCHITECTURES)})"
        )
    return _open_hub(model, revision, weights)


def check_resolution(pipeline: Any, height: int, width: int) -> None:
    """Refuse a picture size that the VAE, or this UNet's levels, cannot reduce evenly."""
    from recipes.measure import size_multiple, vae_factor

    multiple = size_multiple(pipeline)
    needed_by = "VAE needs" if multiple == vae_factor(pipeline.vae) else "VAE and UNet need"
    faults = []
    for side, name in ((height, "height"), (width, "width")):
        below = max(side, 0) // multiple * multiple
        above = below + multiple
        if side != below or not below:
            nearest = f"{below} or {above}" if below else f"{above}"
            faults.append(
                f"resolution: a {name} of {side} pixels is no multiple of {multiple}, which this "
                f"pipeline's {needed_by}; the nearest is {nearest}"
            )
    if faults:
        raise UserError("; ".join(faults))


def _open_embedded(weights: bool) -> Source:
    folder = Path(str(importlib.resources.files("recipes.pocket").joinpath("weights")))
    if not (folder / "model_index.json").is_file():
        raise UserError(
            "this installation holds no embedded model (recipes/pocket/weights); install the "
            "package again, or train it with: python -m recipes.pocket train"
        )
    pipeline, hashes = open_folder(folder, "the embedded model", weights)
    return Source(pipeline, {"kind": "embedded", "id": "embedded", "weights_sha256": hashes})


def _open_file(path: Path, weights: bool) -> Source:
    name = check_single_file(path)
    info = {"kind": "file", "id": path.name, "architecture": name}
    architecture = ARCHITECTURES[name]
    if not weights:
        return Source(_of_architecture(architecture, empty_modules(architecture)), info)
    pipeline = load_single_file(path, architecture)
    return Source(pipeline, {**info, "weights_sha256": {path.name: sha256(path)}})


def _open_random(model: str, weights: bool, seed: int = 0) -> Source:
    name = model.removeprefix("random:")
    if name not in RANDOM_ARCHITECTURES:
        raise choices("architecture", name, list(RANDOM_ARCHITECTURES))
    architecture = ARCHITECTURES[name]
    modules = random_modules(architecture, seed) if weights else empty_modules(architecture)
    info = {"kind": "random", "id": model, "seed": seed}
    return Source(_of_architecture(architecture, modules), info)


def _of_architecture(architecture: Architecture, modules: tuple[Any, Any, Any]) -> Any:
    """The pipeline of an architecture around its UNet, VAE and text encoder."""
    import diffusers
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), architecture.pad_token)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # from_pretrained remembers the folder, which is gone.
    tokenizer.name_or_path = ""
    scheduler = getattr(diffusers, architecture.scheduler_class)(**architecture.scheduler)
    unet, vae, text_encoder = modules
    return assemble(unet, vae, text_encoder, tokenizer, scheduler)


def _open_hub(model: str, revision: str | None, weights: bool) -> Source:
    """Download what is needed of a pipeline; configurations alone where no weights are."""
    at = f"{model}@{revision}" if revision else model

    def choose(files: list[str]) -> list[str]:
        needed = _hub_weights(files, model)
        return [*CONFIGS, *(needed if weights else ())]

    folder, commit = fetch(model, revision, choose, CONFIGS, WAYS_OUT)
    # Without weights the snapshot may hold the configurations alone.
    pipeline, hashes = open_folder(folder, at, weights, check_files=weights)
    info = {"kind": "hub", "id": model, "revision": commit}
    return Source(pipeline, {**info, "weights_sha256": hashes})


def _hub_weights(files: list[str], where: str) -> list[str]:
    """Of a repository's files, the safetensors of each component: full precision, else fp16."""
    chosen = []
    for component, (stem, _) in MODELS.items():
        in_folder = [file for file in files if file.startswith(f"{component}/")]
        for start in (f"{component}/{stem}", f"{component}/{stem}.fp16"):
            # model.safetensors, or model-00001-of-00002.safetensors with an index.
            names = [f for f in in_folder if f == f"{start}.safetensors"] or [
                f for f in in_folder if f.startswith(f"{start}-0") and f.endswith(".safetensors")
            ]
            if names:
                chosen += names
                break
        else:
            raise UserError(no_safetensors(component, in_folder, where))
    return chosen
