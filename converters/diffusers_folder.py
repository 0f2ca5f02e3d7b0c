"""An ordinary diffusers folder: checked, then loaded component by component.

Weights load from safetensors only: a pickle may run code when it is opened. Each component's class
is named here, so nothing that a folder says is ever imported or run.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobile_runtime.bundle import sha256
from mobile_runtime.errors import UserError

# Folder of the pipeline: the stem of its weights, and its class.
MODELS: dict[str, tuple[str, str]] = {
    "text_encoder": ("model", "CLIPTextModel"),
    "unet": ("diffusion_pytorch_model", "UNet2DConditionModel"),
    "vae": ("diffusion_pytorch_model", "AutoencoderKL"),
}


def assemble(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any) -> Any:
    """A StableDiffusionPipeline without safety checker, in eval mode and without gradients."""
    from diffusers import StableDiffusionPipeline

    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def check_resolution_of(unet_config: Any, vae_config: Any, height: int, width: int) -> None:
    """The same from the two configurations (mappings), before any weight is loaded."""
    halvings = (
        len(vae_config["block_out_channels"]) - 1 + len(unet_config["block_out_channels"]) - 1
    )
    multiple = 2**halvings
    for side, name in ((height, "height"), (width, "width")):
        if side % multiple or side < multiple:
            below, above = side // multiple * multiple, (side // multiple + 1) * multiple
            nearest = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"resolution: a {name} of {side} pixels is no multiple of {multiple}, which this "
                f"pipeline's VAE and UNet need; the nearest is {nearest}"
            )


def no_safetensors(component: str, files: list[str], where: str) -> str:
    if any(file.endswith((".bin", ".ckpt", ".pt")) for file in files):
        return (
            f"{where}: {component} has only pickled weights (.bin), which may run code when "
            'opened; if you trust them, convert them with: python -c "from diffusers import '
            f"DiffusionPipeline as P; P.from_pretrained('{where}').save_pretrained('converted')\" "
            "and pass --model converted"
        )
    return f"{where}: {component} has no safetensors weights; download the whole pipeline again"


def open_folder(
    folder: Path, where: str, resolution: tuple[int, int] | None = None, weights: bool = True
) -> tuple[Any, dict[str, str]]:
    """Open a diffusers folder; every check that needs no weights comes first.

    where: what messages call the folder. resolution: (height, width) to check against the
    configurations. weights: False leaves the modules on the meta device. Returns the fp32
    pipeline, and each weight file's SHA-256 by relative path.
    """
    index = _read_json(folder / "model_index.json", where)
    _check_index(index, where)
    configs = {
        component: _read_json(folder / component / "config.json", where) for component in MODELS
    }
    _check_configs(configs, where)
    if resolution:
        check_resolution_of(configs["unet"], configs["vae"], *resolution)
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{where}: {name} is missing; download the whole pipeline again")
    hashes: dict[str, str] = {}
    modules: dict[str, Any] = {}
    if weights:
        variants: dict[str, str | None] = {}
        for component in MODELS:
            files, variants[component] = _weight_files(folder, component, where)
            for file in files:
                check_safetensors(file)
                hashes[file.relative_to(folder).as_posix()] = sha256(file)
        for component in MODELS:
            modules[component] = _load_module(folder, component, variants[component], where)
    else:
        for component in MODELS:
            modules[component] = _empty_module(component, configs[component], where)
    pipeline = assemble(
        **modules,
        tokenizer=_load_tokenizer(folder, where),
        scheduler=_load_scheduler(folder, index["scheduler"][1], where),
    )
    return pipeline, hashes


def _read_json(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{where}: {path.parent.name}/{path.name} is missing; a source is a whole diffusers "
            "folder (model_index.json, unet, vae, text_encoder, tokenizer, scheduler)"
        )
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object")
    return data


def _check_index(index: dict[str, Any], where: str) -> None:
    """The classes that a folder names must be the ones of Stable Diffusion 1.x and 2.x."""
    pipeline_class = index.get("_class_name")
    if pipeline_class != "StableDiffusionPipeline":
        raise UserError(
            f"{where} is a {pipeline_class}, which is not supported; give a "
            "StableDiffusionPipeline (Stable Diffusion 1.x, 2.x or Turbo)"
        )
    wanted: dict[str, tuple[str, ...]] = {
        component: (name,) for component, (_, name) in MODELS.items()
    }
    wanted["tokenizer"] = ("CLIPTokenizer", "CLIPTokenizerFast")
    for component, names in wanted.items():
        entry = index.get(component)
        given = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if given not in names:
            raise UserError(
                f"{where}: {component} is {given or 'missing'} in model_index.json, and only "
                f"{names[0]} is supported"
            )
    scheduler = index.get("scheduler")
    if not (isinstance(scheduler, list) and len(scheduler) == 2):
        raise UserError(f"{where}: scheduler is missing in model_index.json")


def _check_configs(configs: dict[str, dict[str, Any]], where: str) -> None:
    unet, vae = configs["unet"], configs["vae"]
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            raise UserError(
                f"{where}: the UNet has {key} {unet[key]!r}, so it takes inputs beside the prompt, "
                "which are not supported; give a Stable Diffusion 1.x, 2.x or Turbo pipeline"
            )
    for component, key in (("unet", "block_out_channels"), ("vae", "block_out_channels")):
        if not isinstance(configs[component].get(key), list):
            raise UserError(f"{where}: {component}/config.json has no {key}")
    latent, takes, gives = vae.get("latent_channels"), unet.get("in_channels"), unet["out_channels"]
    if not latent == takes == gives:
        raise UserError(
            f"{where}: the UNet takes {takes} and gives {gives} channels and the VAE has {latent}; "
            "only text-to-image pipelines are supported (no inpainting or depth)"
        )


def _weight_files(folder: Path, component: str, where: str) -> tuple[list[Path], str | None]:
    """A component's safetensors files and diffusers' name for their variant (None or fp16)."""
    stem, _ = MODELS[component]
    for variant in (None, "fp16"):
        suffix = f".{variant}" if variant else ""
        single = folder / component / f"{stem}{suffix}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / component / f"{stem}.safetensors.index{suffix}.json"
        if index.is_file():
            names = sorted(set(_read_json(index, where).get("weight_map", {}).values()))
            files = [folder / component / Path(name).name for name in names]
            missing = [file.name for file in files if not file.is_file()]
            if missing or not files:
                raise UserError(
                    f"{where}: {component} lacks {', '.join(missing) or 'its weights'}; "
                    "download the whole pipeline again"
                )
            return files, variant
    present = [path.name for path in (folder / component).iterdir()]
    raise UserError(no_safetensors(component, present, where))


def check_safetensors(path: Path) -> None:
    """Read the header, which tells a truncated file without reading its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or cut short ({error}); download or save it again"
        ) from None


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what a library says about a bad file into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} cannot be loaded: {lines[0][:300]}") from error


def _load_module(folder: Path, component: str, variant: str | None, where: str) -> Any:
    import diffusers
    import torch
    import transformers

    name = MODELS[component][1]
    options: dict[str, Any] = {
        "use_safetensors": True,
        "variant": variant,
        "local_files_only": True,
        "output_loading_info": True,
    }
    with told(f"{where}: {component}"):
        if component == "text_encoder":
            loaded = transformers.CLIPTextModel.from_pretrained(
                folder / component, dtype=torch.float32, **options
            )
        else:
            loaded = getattr(diffusers, name).from_pretrained(
                folder / component, torch_dtype=torch.float32, **options
            )
    module, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{where}: the weights of {component} lack {len(missing)} of the tensors that its "
            f"config.json asks for, e.g. {missing[0]}; download the whole pipeline again"
        )
    return module


def _empty_module(component: str, config: dict[str, Any], where: str) -> Any:
    import diffusers
    import torch
    import transformers

    with told(f"{where}: {component}/config.json"), torch.device("meta"):
        if component == "text_encoder":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
        return getattr(diffusers, MODELS[component][1]).from_config(config)


def _load_tokenizer(folder: Path, where: str) -> Any:
    from transformers import CLIPTokenizer

    with told(f"{where}: tokenizer"):
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def _load_scheduler(folder: Path, name: Any, where: str) -> Any:
    import diffusers

    scheduler_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (
        isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)
    ):
        raise UserError(f"{where}: diffusers has no scheduler {name!r}")
    with told(f"{where}: scheduler"):
        return scheduler_class.from_pretrained(folder / "scheduler", local_files_only=True)
