"""The optimizations of the desktop pipeline: each on its own, and what each needs.

A switch that a machine lacks is told in one line and left out; it never fails a run.
"""

import importlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

from mobile_runtime.backends import quiet_libraries
from mobile_runtime.errors import UserError, choices

Precision = Literal["float32", "float16", "bfloat16"]
Attention = Literal["math", "auto", "xformers"]
MOST_MERGED = 0.75
"""One token of every 2x2 square stays."""


@dataclass(frozen=True)
class Settings:
    """How the pipeline computes. The defaults are `exact`: float32, deterministic, no switch on.

    attention: `math` writes the scores out; `auto` lets PyTorch choose (flash, memory-efficient).
    float_norms: group and layer norms in float32 inside a half-precision model. deep_cache: the
    UNet's deep features are computed anew every so many steps. merged_tokens: the share of the
    tokens that self-attention at the highest resolution leaves out.
    """

    precision: Precision = "float32"
    float_norms: bool = False
    tf32: bool = False
    channels_last: bool = False
    fused_qkv: bool = False
    attention: Attention = "math"
    compile: bool = False
    tensorrt: bool = False
    int8: bool = False
    tiny_decoder: str | None = None
    deep_cache: int = 1
    merged_tokens: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no pipeline can be set to."""
        if self.precision not in get_args(Precision):
            raise choices("precision", self.precision, list(get_args(Precision)))
        if self.attention not in get_args(Attention):
            raise choices("attention", self.attention, list(get_args(Attention)))
        if not isinstance(self.deep_cache, int) or self.deep_cache < 1:
            raise UserError(f"deep_cache {self.deep_cache!r} should be a whole number, 1 or more")
        if not 0 <= self.merged_tokens <= MOST_MERGED:
            raise UserError(f"merged_tokens {self.merged_tokens} should be from 0 to {MOST_MERGED}")

    @property
    def arithmetic(self) -> str:
        """What products are computed in: the precision, or tf32."""
        return "tf32" if self.tf32 and self.precision == "float32" else self.precision

    @property
    def exact(self) -> bool:
        """Whether nothing is on: the yardstick itself."""
        return self == EXACT


EXACT = Settings()


@dataclass(frozen=True)
class Machine:
    """A device of PyTorch, and what it can do."""

    device: str
    name: str
    capability: tuple[int, int] | None = None

    @property
    def cuda(self) -> bool:
        """Whether it is an NVIDIA (or ROCm) GPU."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Switch:
    """One optimization. missing: why this machine cannot take it, with what to do; None: it can.

    asked: it is on only when it is named, for it changes the picture or takes another's place.
    """

    about: str
    apply: Callable[[Settings, Machine], Settings]
    missing: Callable[[Machine], str | None] = lambda machine: None
    asked: bool = False


@cache
def _installed(module: str) -> bool:
    """Whether it can be imported: one that is there and broken is not."""
    try:
        with quiet_libraries():
            importlib.import_module(module)
    except Exception:  # whatever a broken library raises
        return False
    return True


def _needs_cuda(machine: Machine) -> str | None:
    return None if machine.cuda else "needs a CUDA device; there is none here"


def _half(settings: Settings, machine: Machine) -> Settings:
    return replace(settings, precision="float16" if machine.cuda else "bfloat16")


def _no_bfloat16(machine: Machine) -> str | None:
    if not machine.cuda or (machine.capability or (0, 0)) >= (8, 0):
        return None
    return f"{machine.name} has no bfloat16; take half, which is float16 there"


def _no_compiler(machine: Machine) -> str | None:
    if machine.cuda:
        if not _installed("triton"):
            return "needs Triton, which is not installed; install it with: pip install triton"
        if (machine.capability or (0, 0)) < (7, 0):
            return f"Triton needs compute capability 7.0, and {machine.name} has less"
        if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc", "cl"))):
            return "Triton needs a C compiler (gcc or clang) on the path; install one"
        return None
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        return "needs a C++ compiler (g++ or clang++) on the path; install one"
    return None


def _no_tensorrt(machine: Machine) -> str | None:
    if told := _needs_cuda(machine):
        return told
    if _installed("torch_tensorrt"):
        return None
    return "Torch-TensorRT is not installed; install it with: pip install torch-tensorrt"


def _no_xformers(machine: Machine) -> str | None:
    if told := _needs_cuda(machine):
        return told
    if _installed("xformers"):
        return None
    return "xFormers is not installed; install it with: pip install xformers"


def _no_torchao(machine: Machine) -> str | None:
    if _installed("torchao"):
        return None
    return "torchao is not installed; install it with: pip install torchao"


DEEP_CACHE_INTERVAL = 3
MERGED_TOKENS = 0.5

SWITCHES: dict[str, Switch] = {
    "tf32": Switch(
        "float32 products on tensor cores, with 10 bits of mantissa",
        lambda s, m: replace(s, tf32=True),
        _needs_cuda,
    ),
    "half": Switch(
        "float16 on a GPU, bfloat16 on a CPU",
        _half,
    ),
    "bfloat16": Switch(
        "bfloat16, also on a GPU",
        lambda s, m: replace(s, precision="bfloat16"),
        _no_bfloat16,
        asked=True,
    ),
    "float_norms": Switch(
        "norms in float32 inside a half-precision model",
        lambda s, m: replace(s, float_norms=True),
        asked=True,
    ),
    "channels_last": Switch(
        "convolutions on NHWC memory",
        lambda s, m: replace(s, channels_last=True),
    ),
    "fused_qkv": Switch(
        "one product for the query, key and value of an attention",
        lambda s, m: replace(s, fused_qkv=True),
    ),
    "attention": Switch(
        "scaled-dot-product attention: flash or memory-efficient, whichever fits",
        lambda s, m: replace(s, attention="auto"),
    ),
    "xformers": Switch(
        "xFormers' attention in its place",
        lambda s, m: replace(s, attention="xformers"),
        _no_xformers,
        asked=True,
    ),
    "compile": Switch(
        "torch.compile: max-autotune with CUDA graphs on a GPU, C++ kernels on a CPU",
        lambda s, m: replace(s, compile=True),
        _no_compiler,
    ),
    "tensorrt": Switch(
        "TensorRT through Torch-TensorRT in its place",
        lambda s, m: replace(s, tensorrt=True, compile=False),
        _no_tensorrt,
        asked=True,
    ),
    "int8": Switch(
        "linear layers in INT8 by torchao, with dynamic activations (on a GPU it takes float32 for "
        "those that see 16 rows or fewer, as the embedded model's deepest do)",
        lambda s, m: replace(s, int8=True),
        _no_torchao,
        asked=True,
    ),
    "tiny_decoder": Switch(
        "an AutoencoderTiny (TAESD) as the decoder: name it with --tiny-decoder",
        lambda s, m: s,  # which one is the caller's to say
        asked=True,
    ),
    "deep_cache": Switch(
        f"DeepCache: deep features anew every {DEEP_CACHE_INTERVAL} steps (arXiv:2312.00858)",
        lambda s, m: replace(s, deep_cache=DEEP_CACHE_INTERVAL),
        asked=True,
    ),
    "merged_tokens": Switch(
        f"token merging of {100 * MERGED_TOKENS:g} % in the largest self-attentions "
        "(arXiv:2303.17604)",
        lambda s, m: replace(s, merged_tokens=MERGED_TOKENS),
        asked=True,
    ),
}


def machine_of(device: str | None = None) -> Machine:
    """The machine behind a PyTorch device's name; None takes the first GPU, else the CPU."""
    import torch

    from mobile_runtime.latency import environment

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", device):
        raise choices("device", device, ["cpu", "cuda", "cuda:1"])
    if kind == "cuda":
        place = torch.device(device).index or 0
        if place >= torch.cuda.device_count():
            raise UserError(
                f"the device {device} is not here ({torch.cuda.device_count()} CUDA devices); "
                "leave out --device to take what there is"
            )
        name = torch.cuda.get_device_name(place)
        return Machine(device, name, torch.cuda.get_device_capability(place))
    return Machine("cpu", environment().cpu)


def missing(names: Iterable[str], machine: Machine) -> dict[str, str]:
    """Those of the switches that the machine cannot take, and why."""
    told = {name: named(name).missing(machine) for name in names}
    return {name: why for name, why in told.items() if why is not None}


def named(name: str) -> Switch:
    """A switch by its name; UserError with the choices for an unknown one."""
    if name not in SWITCHES:
        raise choices("switch", name, list(SWITCHES))
    return SWITCHES[name]


def fast_names(machine: Machine) -> tuple[str, ...]:
    """The switches that keep the picture, for a machine of this kind; it may lack some."""
    return tuple(
        name
        for name, switch in SWITCHES.items()
        if not switch.asked and (machine.cuda or switch.missing is not _needs_cuda)
    )


def asked_of(settings: Settings) -> tuple[str, ...]:
    """The switches that settings have on, of those that a machine may lack."""
    on = {
        "tf32": settings.tf32,
        "bfloat16": settings.precision == "bfloat16",
        "xformers": settings.attention == "xformers",
        "compile": settings.compile,
        "tensorrt": settings.tensorrt,
        "int8": settings.int8,
    }
    return tuple(name for name, there in on.items() if there)


def settings_of(
    names: Sequence[str], machine: Machine, tiny_decoder: str | None = None
) -> Settings:
    """Settings with these switches on, each of which the machine can take."""
    settings: Any = EXACT
    for name in SWITCHES:  # in the table's order, whatever the caller's
        if name in names:
            settings = SWITCHES[name].apply(settings, machine)
    if "tiny_decoder" in names:
        settings = replace(settings, tiny_decoder=tiny_decoder)
    return settings
