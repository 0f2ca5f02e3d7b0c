"""An ordinary diffusers folder: checked, then loaded component by component.

Weights load from safetensors only: a pickle may run code when it is opened. Each component's class
is named here, so nothing that a folder says is ever imported or run.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobile_runtime.bundle import sha256
from mobile_runtime.errors import UserError

# Folder of the pipeline: the stem of its weights, and the classes that it may be.
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_encoder": ("model", ("CLIPTextModel",)),
    "unet": ("diffusion_pytorch_model", ("UNet2DConditionModel",)),
    "vae": ("diffusion_pytorch_model", ("AutoencoderKL", "AutoencoderTiny")),
}

# What config.json gives as a number above 0, or as a list of them.
SIZES: dict[str, tuple[str, ...]] = {
    "text_encoder": (
        "hidden_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ),
    "unet": (
        "attention_head_dim",
        "block_out_channels",
        "cross_attention_dim",
        "in_channels",
        "layers_per_block",
        "norm_num_groups",
        "out_channels",
    ),
    "vae": (
        "block_out_channels",
        "decoder_block_out_channels",
        "encoder_block_out_channels",
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
    ),
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
    folder: Path, where: str, weights: bool = True, check_files: bool = True
) -> tuple[Any, dict[str, str]]:
    """Open a diffusers folder; every check that needs no weights comes first.

    where: what messages call the folder. weights: False leaves the modules on the meta device.
    check_files: False where the folder need not hold its weights. Returns the fp32 pipeline, and
    each weight file's SHA-256 by relative path (none without weights).
    """
    index = _read_json(folder / "model_index.json", where)
    _check_index(index, where)
    configs = {
        component: _read_json(folder / component / "config.json", where) for component in MODELS
    }
    _check_configs(configs, where)
    classes = {component: index[component][1] for component in MODELS}
    if classes["vae"] == "AutoencoderTiny":
        check_tiny(configs["vae"], f"{where}: vae")
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{where}: {name} is missing; download the whole pipeline again")
    hashes: dict[str, str] = {}
    modules: dict[str, Any] = {}
    variants: dict[str, str | None] = {}
    for component in MODELS if check_files else ():
        files, variants[component] = weight_files(folder / component, component, where)
        for file in files:
            check_safetensors(file)
            if weights:
                hashes[file.relative_to(folder).as_posix()] = sha256(file)
    for component in MODELS:
        if weights:
            modules[component] = load_module(
                folder / component, component, classes[component], variants[component], where
            )
            check_finite(modules[component], component)
        else:
            modules[component] = empty_module(
                component, classes[component], configs[component], where
            )
            if component == "unet":
                modules[component] = _narrowed(modules[component], folder / component)
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
    except (ValueError, RecursionError) as error:
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
        component: names for component, (_, names) in MODELS.items()
    }
    wanted["tokenizer"] = ("CLIPTokenizer", "CLIPTokenizerFast")
    for component, names in wanted.items():
        entry = index.get(component)
        given = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if given not in names:
            raise UserError(
                f"{where}: {component} is {given or 'missing'} in model_index.json, and only "
                f"{' or '.join(names)} is supported"
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
    for component, config in configs.items():
        check_sizes(component, config, f"{where}: {component}")
    latent, takes, gives = (
        vae.get("latent_channels"),
        unet.get("in_channels"),
        unet.get("out_channels"),
    )
    if None in (latent, takes, gives):
        raise UserError(
            f"{where}: unet/config.json needs in_channels and out_channels, and vae/config.json "
            "latent_channels; at least one is missing"
        )
    if not latent == takes == gives:
        raise UserError(
            f"{where}: the UNet takes {takes} and gives {gives} channels and the VAE has {latent}; "
            "only text-to-image pipelines are supported (no inpainting or depth)"
        )


def check_sizes(component: str, config: dict[str, Any], where: str) -> None:
    """Refuse what cannot be a size in a component's configuration; `where` names the component."""
    for key in SIZES[component]:
        value = config.get(key)
        sizes = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise UserError(
                f"{where}/config.json has {key} {value!r}; it should be a whole number above 0, or "
                "a list of them"
            )
    factor = config.get("scaling_factor", 1.0)
    if component == "vae" and (type(factor) not in (int, float) or not 0 < factor < math.inf):
        raise UserError(
            f"{where}/config.json has scaling_factor {factor!r}; it should be a number above 0 "
            "(0.18215 for Stable Diffusion)"
        )


def check_tiny(config: dict[str, Any], where: str) -> None:
    """Refuse the configuration of an AutoencoderTiny whose decoder cannot compute a picture."""
    widths = config.get("decoder_block_out_channels")
    if not isinstance(widths, list) or len(set(widths)) != 1:
        raise UserError(
            f"{where}/config.json has decoder_block_out_channels {widths!r}; an AutoencoderTiny "
            "needs a list of equal widths, one a size"
        )
    for key, wanted in (("upsampling_scaling_factor", 2), ("out_channels", 3)):
        if config.get(key, wanted) != wanted:
            raise UserError(
                f"{where}/config.json has {key} {config[key]!r}; only {wanted} is supported"
            )


def weight_files(folder: Path, component: str, where: str) -> tuple[list[Path], str | None]:
    """The safetensors files in a component's folder, and diffusers' name for their variant.

    The variant is None or fp16.
    """
    stem, _ = MODELS[component]
    for variant in (None, "fp16"):
        suffix = f".{variant}" if variant else ""
        single = folder / f"{stem}{suffix}.safetensors"
        if single.is_file():
            return [single], variant
        index = folder / f"{stem}.safetensors.index{suffix}.json"
        if index.is_file():
            weight_map = _read_json(index, where).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map; download the whole pipeline again")
            names = sorted({str(name) for name in weight_map.values()})
            files = [folder / Path(name).name for name in names]
            missing = [file.name for file in files if not file.is_file()]
            if missing or not files:
                raise UserError(
                    f"{where}: {component} lacks {', '.join(missing) or 'its weights'}; "
                    "download the whole pipeline again"
                )
            return files, variant
    present = [path.name for path in folder.iterdir()]
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


def check_finite(module: Any, component: str) -> None:
    """Refuse loaded weights that hold NaN or Inf: every figure of theirs would be NaN."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"the source's weights are not finite: {component}.{name} holds NaN or Inf; "
                "download or save them again"
            )


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what a library says about a bad file into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} cannot be loaded: {lines[0][:300]}") from error


def load_module(folder: Path, component: str, name: str, variant: str | None, where: str) -> Any:
    """The module in a component's folder, in float32. name: its class, one of MODELS."""
    import diffusers
    import torch
    import transformers

    from recipes import widths

    if component == "unet" and (folder / widths.FILE).is_file():
        return widths.open_unet(folder, weight_files(folder, component, where)[0])
    options: dict[str, Any] = {
        "use_safetensors": True,
        "variant": variant,
        "local_files_only": True,
        "output_loading_info": True,
    }
    with told(f"{where}: {component}"):
        if component == "text_encoder":
            loaded = transformers.CLIPTextModel.from_pretrained(
                folder, dtype=torch.float32, **options
            )
        else:
            loaded = getattr(diffusers, name).from_pretrained(
                folder, torch_dtype=torch.float32, **options
            )
    module, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{where}: the weights of {component} lack {len(missing)} of the tensors that its "
            f"config.json asks for, e.g. {missing[0]}; download the whole pipeline again"
        )
    return module


def empty_module(component: str, name: str, config: dict[str, Any], where: str) -> Any:
    """The module of a component on the meta device. name: its class, one of MODELS."""
    import diffusers
    import torch
    import transformers

    with told(f"{where}: {component}/config.json"), torch.device("meta"):
        if component == "text_encoder":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
        return getattr(diffusers, name).from_config(config)


def _narrowed(unet: Any, folder: Path) -> Any:
    from recipes import widths

    return widths.read(unet, folder)


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
