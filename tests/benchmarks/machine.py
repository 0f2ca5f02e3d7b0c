"""What a figure has to have beside it: the machine and the versions."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "diffusers", "onnxruntime", "coremltools", "executorch", "numpy")
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def describe() -> str:
    """One line: processor, cores, memory, CPU flags that matter to INT8, versions."""
    model, flags = platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
        found = {
            word
            for line in lines
            if line.startswith(("flags", "Features"))
            for word in line.split()
        }
        flags = " ".join(flag for flag in _TELLING_FLAGS if flag in found)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{os.cpu_count()} cores of {model} ({flags}), {memory:.0f} GiB, "
        f"{platform.system()}, Python {platform.python_version()}; {versions}"
    )
