"""A pipeline's three models as functions on a device, with the switches of `Settings` on."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mobile_runtime.backends import quiet_libraries
from mobile_runtime.cache import cache_root
from mobile_runtime.errors import UserError
from mobile_runtime.reference.deep_cache import DeepCache
from mobile_runtime.reference.merged_tokens import merge_tokens
from mobile_runtime.reference.parts import Parts
from mobile_runtime.reference.switches import Machine, Settings

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
SHAPES = 64


@dataclass(frozen=True)
class Models:
    """Functions of tensors on the device, in the settings' precision.

    encode: ids (N, L) to states (N, L, D). denoise: x (N, C, h, w), timestep (1,), states to the
    output. decode: latents over the scaling factor to pictures (N, 3, H, W). encode_picture: the
    other way, the mean; None where the VAE has no encoder. full, shallow: of DeepCache, where on.
    modules: what holds the weights.
    """

    encode: Callable[[Any], Any]
    denoise: Callable[[Any, Any, Any], Any]
    decode: Callable[[Any], Any]
    encode_picture: Callable[[Any], Any] | None
    scaling_factor: float
    full: Callable[..., Any] | None
    shallow: Callable[..., Any] | None
    modules: dict[str, Any]


def prepare(parts: Parts, settings: Settings, machine: Machine) -> Models:
    """Copy the parts to the device and switch on what the settings say; the parts stay alone.

    Raises UserError for a switch that these modules do not have.
    """
    import torch

    vae = parts.vae if settings.tiny_decoder is None else parts.open_tiny(settings.tiny_decoder)
    with quiet_libraries():
        modules = {
            name: copy.deepcopy(module)
            for name, module in (
                ("text_encoder", parts.text_encoder),
                ("unet", parts.unet),
                ("vae", vae),
            )
        }
        unet = modules["unet"]
        if settings.fused_qkv:
            unet.fuse_qkv_projections()
            _drop_unfused(unet)
        if settings.attention == "xformers":
            unet.enable_xformers_memory_efficient_attention()
        if settings.deep_cache > 1 and (told := DeepCache.missing(unet)):
            raise UserError(f"{told}; leave out the switch deep_cache")
        if settings.tiny_decoder is not None and hasattr(parts.vae, "quant_conv"):
            # A tiny decoder's own encoder is nobody's: pictures go in by the pipeline's.
            modules["vae_encoder"] = copy.deepcopy(parts.vae)
            modules["vae_encoder"].decoder = None
        dtype = getattr(torch, settings.precision)
        for module in modules.values():
            module.to(machine.device, dtype)
        if settings.merged_tokens:
            size = parts.generation.latent_height, parts.generation.latent_width
            if min(size) < 2 or not merge_tokens(unet, size, settings.merged_tokens):
                raise UserError(
                    f"the UNet of {parts.name} has no self-attention at the latents' own size; "
                    "leave out the switch merged_tokens"
                )
        if settings.float_norms and settings.precision != "float32":
            for module in modules.values():
                _float_norms(module)
        if settings.channels_last:
            for name in ("unet", "vae"):
                modules[name].to(memory_format=torch.channels_last)
        if settings.int8:
            _quantize(modules["unet"])
    return _as_functions(modules, settings, machine)


def _drop_unfused(unet: Any) -> None:
    """diffusers keeps the separate projections beside the fused one: they are never read again."""
    for module in unet.modules():
        if getattr(module, "fused_projections", False):
            unused = ("to_k", "to_v") if hasattr(module, "to_kv") else ("to_q", "to_k", "to_v")
            for name in unused:
                setattr(module, name, None)


def _float_norms(module: Any) -> None:
    """Give each norm its weights in float32, and its input in float32."""
    import torch
    from torch import nn

    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
            norm.float()
            inner = norm.forward

            def forward(x: Any, inner: Callable[..., Any] = inner) -> Any:
                return inner(x.to(torch.float32)).to(x.dtype)

            setattr(norm, "forward", forward)  # noqa: B010  # of this one, not of its class


def _quantize(unet: Any) -> None:
    """Linear layers to INT8 weights with dynamic INT8 activations, by torchao.

    But for those of the time, which see one row a picture: CUDA's INT8 product needs more than 16
    rows, and torchao computes others in float32 (the embedded model has some; SD at 512 none).
    """
    from torch import nn
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def fits(module: Any, name: str) -> bool:
        return isinstance(module, nn.Linear) and "time_emb" not in name

    # By default it sets Inductor's options for the whole process, and so for every later row.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(unet, config, filter_fn=fits)


def _as_functions(modules: dict[str, Any], settings: Settings, machine: Machine) -> Models:
    text_encoder, unet, vae = modules["text_encoder"], modules["unet"], modules["vae"]

    def encode(ids: Any) -> Any:
        return text_encoder(ids, return_dict=False)[0]

    def denoise(x: Any, timestep: Any, states: Any) -> Any:
        return unet(x, timestep, states, return_dict=False)[0]

    def decode(latents: Any) -> Any:
        return vae.decode(latents, return_dict=False)[0]

    encoder = modules.get("vae_encoder", vae)

    def encode_picture(picture: Any) -> Any:
        return encoder.encode(picture).latent_dist.mode()

    wrap = _compiler(settings, machine)
    cached = DeepCache(unet) if settings.deep_cache > 1 else None
    return Models(
        encode=wrap(encode),
        denoise=wrap(denoise),
        decode=wrap(decode),
        encode_picture=encode_picture if hasattr(encoder, "quant_conv") else None,
        scaling_factor=vae.config.scaling_factor,
        full=wrap(cached.full) if cached else None,
        shallow=wrap(cached.shallow) if cached else None,
        modules=modules,
    )


def keep_kernels() -> None:
    """Have the next process find what this one compiles. To be called before it compiles anything:
    Inductor then settles on a folder."""
    os.environ.setdefault(INDUCTOR_CACHE, str(cache_root() / "inductor"))


def _compiler(settings: Settings, machine: Machine) -> Callable[[Any], Any]:
    """What makes a function quicker: nothing, torch.compile, or Torch-TensorRT."""
    if not (settings.compile or settings.tensorrt):
        return lambda function: function
    keep_kernels()
    import torch

    if settings.tensorrt:
        import torch_tensorrt  # noqa: F401

        # Engines are kept without their weights, and found again by the next process. By default a
        # failed build would run PyTorch's own kernels in the engine's place, and say nothing.
        kept = cache_root() / "tensorrt"
        options: dict[str, Any] = {
            "pass_through_build_failures": True,
            "disable_tf32": not settings.tf32,
            "immutable_weights": False,
            "cache_built_engines": True,
            "reuse_cached_engines": True,
            "engine_cache_dir": str(kept),
            "timing_cache_path": str(kept / "timings.bin"),
        }
        return lambda function: torch.compile(
            function, backend="tensorrt", dynamic=False, fullgraph=True, options=options
        )
    # Each batch size is a shape of its own, and PyTorch gives up after eight.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, SHAPES)
    mode = "max-autotune" if machine.cuda else "default"

    def compiled(function: Any) -> Any:
        # fullgraph: a part that falls back to Python would hide as mere slowness.
        inner = torch.compile(function, mode=mode, dynamic=False, fullgraph=True)

        def call(*tensors: Any) -> Any:
            # With CUDA graphs the outputs lie in memory that the next call writes again.
            torch.compiler.cudagraph_mark_step_begin()
            made = inner(*tensors)
            if not machine.cuda:
                return made
            return tuple(t.clone() for t in made) if isinstance(made, tuple) else made.clone()

        return call

    return compiled


def graphs_compiled() -> int:
    """Graphs that torch.compile has compiled in this process; not those it found in its cache."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return int(found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"])


@contextlib.contextmanager
def arithmetic(settings: Settings, machine: Machine) -> Iterator[None]:
    """PyTorch's global choices while the models run, set back afterwards.

    Exact: deterministic kernels, no TF32, attention written out. CUDA's cuBLAS needs its workspace
    fixed before its first use in the process to be deterministic.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    math_only = sdpa_kernel([SDPBackend.MATH]) if settings.attention == "math" else None
    torch.use_deterministic_algorithms(settings.exact)
    cudnn.benchmark = not settings.exact
    try:
        kernels = math_only or contextlib.nullcontext()
        with _float32_products(settings.tf32), kernels, torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark = before[1]


@contextlib.contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    """float32 products in TF32 or not, set back afterwards.

    PyTorch has an older and a newer name for each choice, and whoever reads one of them, as
    Inductor does, gets an error where the two do not agree. So both are set, the older first.
    """
    import torch

    backends: Any = torch.backends
    newer = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [one.fp32_precision for one in newer]
    matmul = convolution = None
    with contextlib.suppress(RuntimeError):  # the caller's own do not agree
        matmul = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolution = backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    backends.cudnn.allow_tf32 = tf32
    for one in newer:
        one.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            backends.cudnn.allow_tf32 = convolution
        for one, precision in zip(newer, before, strict=True):
            one.fp32_precision = precision
