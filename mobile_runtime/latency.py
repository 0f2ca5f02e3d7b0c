"""How long one call takes here, and what "here" is. Shown in the report, never gated."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field, NonNegativeInt

from mobile_runtime.manifest import Strict

Clock = Callable[[], float]
"""Seconds; a test gives its own."""

LONGEST_MS = 1e9
"""Eleven days: more is no measurement."""
Milliseconds = Annotated[float, Field(ge=0, le=LONGEST_MS)]

WARM_UP = 2
# A slow component is timed fewer times rather than for minutes.
BUDGET_S = 10.0

# The CPU features that decide how fast int8 and half precision run, as /proc/cpuinfo and sysctl
# write them.
_FLAGS = (
    *("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sme"),
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_LIBRARIES = ("numpy", "onnxruntime", "executorch", "coremltools", "torch", "pocket-diffusion")


def plain(text: object, longest: int = 200) -> object:
    """What a device says, as far as a page has room for it, without control characters."""
    if not isinstance(text, str):
        return text
    shown = "".join(char if char.isprintable() else " " for char in text[: 2 * longest])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


MANY = 100
"""More flags, or libraries, than a page has room for."""
Word = Annotated[str, BeforeValidator(plain)]


class Timing(Strict):
    """Milliseconds of one component, or of whole pictures. Loading and the first call are apart."""

    load_ms: Milliseconds
    first_ms: Milliseconds = Field(description="the first call, which may compile or allocate")
    warm_up: int = Field(ge=0, description="calls right before those that are timed")
    times_ms: tuple[Annotated[float, Field(gt=0, le=LONGEST_MS)], ...] = Field(
        description="of every timed call"
    )
    parts_ms: dict[str, Annotated[tuple[Milliseconds, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="of each call in the last picture, by component; the UNet's are its steps",
    )


class Latency(Strict):
    """One component's times in milliseconds; p90 by linear interpolation between repeats."""

    component: str
    runtime: str
    load_ms: Milliseconds
    first_ms: Milliseconds
    warm_up: NonNegativeInt
    repeats: NonNegativeInt
    median_ms: Milliseconds
    p90_ms: Milliseconds
    min_ms: Milliseconds
    spread_ms: Milliseconds = Field(description="between the quartiles")
    peak_bytes: NonNegativeInt | None = Field(
        default=None, description="of the process, while it ran"
    )
    parts_ms: dict[str, tuple[Milliseconds, ...]] = Field(default_factory=dict)


def summary(
    component: str, runtime: str, timing: Timing, peak_bytes: int | None = None
) -> Latency | None:
    """What times amount to; None where nothing was timed."""
    times = timing.times_ms
    if not times:
        return None
    low, median, high, p90 = (float(np.percentile(times, q)) for q in (25, 50, 75, 90))
    return Latency(
        component=component,
        runtime=runtime,
        load_ms=timing.load_ms,
        first_ms=timing.first_ms,
        warm_up=timing.warm_up,
        repeats=len(times),
        median_ms=median,
        p90_ms=p90,
        min_ms=min(times),
        spread_ms=high - low,
        peak_bytes=peak_bytes,
        parts_ms=timing.parts_ms,
    )


def repeated(
    call: Callable[[], object], warm_up: int, repeats: int, clock: Clock = time.perf_counter
) -> tuple[float, ...]:
    """Milliseconds of each of `repeats` calls, after `warm_up` calls that are not counted.

    It stops earlier, after at least one, when 10 s are spent.
    """
    for _ in range(warm_up):
        call()
    times_ms: list[float] = []
    began = clock()
    while len(times_ms) < repeats and (not times_ms or clock() - began < BUDGET_S):
        start = clock()
        call()
        times_ms.append((clock() - start) * 1000)
    return tuple(times_ms)


class Environment(Strict):
    """The machine and the libraries that a report's figures belong to."""

    system: Word
    machine: Word
    cpu: Word
    cpu_flags: tuple[Word, ...] = Field(max_length=MANY)
    cores: int = Field(ge=0, lt=2**31)
    threads: Annotated[Mapping[Word, Word], Field(max_length=MANY)]
    python: Word
    libraries: Annotated[Mapping[Word, Word], Field(max_length=MANY)]


def environment() -> Environment:
    """Describe this machine. threads: the variables that were set; unset ones are the default."""
    cpu, flags = _cpu()
    return Environment(
        system=platform.platform(),
        machine=platform.machine(),
        cpu=cpu,
        cpu_flags=tuple(flag for flag in _FLAGS if flag in flags),
        cores=_cores(),
        threads={name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        python=platform.python_version(),
        libraries={name: version for name in _LIBRARIES if (version := _version(name))},
    )


def _cpu() -> tuple[str, set[str]]:
    """The CPU's model and all its flags, from what Linux tells; elsewhere what Python knows."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return model, flags


def _cores() -> int:
    """The cores that this process may use, where the system tells them apart."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
