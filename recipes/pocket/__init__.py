"""The embedded model: a small Stable Diffusion pipeline of captioned flat drawings.

`scenes` and `captions` say what it draws, `judge` reads a picture back, `train` makes the
weights that lie in `weights/`, and `evaluate` measures them.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped diffusers folder."""
