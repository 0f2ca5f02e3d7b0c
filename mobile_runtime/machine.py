"""What this machine tells of itself: its model, its memory, its heat."""

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to clear_refs, it sets the peak to the present use (man 5 proc)."""
MODEL_FILES = ("/proc/device-tree/model", "/sys/devices/virtual/dmi/id/product_name")


def model() -> str:
    """What people call the machine, where it says; else its system and processor."""
    for file in map(Path, MODEL_FILES):
        with suppress(OSError):
            told = file.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
            if told:
                return told
    return f"{platform.system()} {platform.machine()}"


def memory_bytes() -> int | None:
    """The machine's memory."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return 1024 * int(line.split()[1])
    return None


Thermal = Literal["nominal", "fair", "serious", "critical"]
THERMAL: tuple[Thermal, ...] = get_args(Thermal)
"""As iOS has them, the coolest first."""


def thermal_state() -> Thermal | None:
    """How hot this machine is; None where the system does not tell.

    A Linux machine tells the trip points of its zones: past a passive one it slows down.
    """
    zones = list(Path("/sys/class/thermal").glob("thermal_zone*"))
    states = [state for zone in zones if (state := _zone_state(zone)) is not None]
    return max(states, key=THERMAL.index, default=None)


def _zone_state(zone: Path) -> Thermal | None:
    try:
        now = int((zone / "temp").read_text())
        trips = [
            (point.with_name(point.name.replace("_type", "_temp")), point.read_text().strip())
            for point in zone.glob("trip_point_*_type")
        ]
        passed = {kind for file, kind in trips if 0 < int(file.read_text()) <= now}
    except (OSError, ValueError):
        return None
    if passed & {"critical", "hot"}:
        return "critical"
    if "passive" in passed:
        return "serious"
    return "fair" if "active" in passed else "nominal"


@contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """The most memory that this process held since the block began, in bytes; a function of it.

    Where the peak cannot be set back (not on Linux), it is the whole process's so far, and where
    nothing is told, None.
    """
    with suppress(OSError):
        CLEAR_REFS.write_text(RESET_PEAK)
    yield _peak


def _peak() -> int | None:
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    with suppress(ImportError):
        import resource

        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
