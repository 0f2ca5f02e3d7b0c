"""torch, imported when first used: `from mobile_runtime.backends.mil import _torch as torch`.

The kernels are plain functions in modules that anyone may import; only running one needs torch.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    import torch

    return getattr(torch, name)
