"""Where things lie that can be made again: trained stages, unfinished jobs, the emulated Arm."""

import os
from pathlib import Path

VARIABLE = "POCKET_DIFFUSION_CACHE"


def cache_root() -> Path:
    """`$POCKET_DIFFUSION_CACHE`, else a folder in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocket_diffusion"
