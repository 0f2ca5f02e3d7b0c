"""ExecuTorch: `.pte` files, through its Python runtime (which brings torch with it)."""

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from mobile_runtime.backends import Arrays, Runner, quiet_libraries
from mobile_runtime.errors import BundleError, missing_backend

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle


def load(bundle: "Bundle", component: str) -> Runner:
    """Load a component's `forward`; inputs go in the manifest's order."""
    entry = bundle.component(component)
    path = bundle.file(entry.path)
    # On import and on load it warns that its Python interface may change; the version is pinned.
    with quiet_libraries():
        try:
            import torch
            from executorch.runtime import Runtime, Verification
        except ImportError as error:
            missing = error.name or "executorch"
            raise missing_backend(missing, "executorch", "the backend executorch") from error
        # Registers the quantize and dequantize kernels that stay outside XNNPACK; builds without
        # them still run programs that need none.
        with contextlib.suppress(ImportError):
            import executorch.kernels.quantized  # noqa: F401
        try:
            program = Runtime.get().load_program(path, verification=Verification.Minimal)
            method = program.load_method("forward")
        except RuntimeError as error:
            raise BundleError(f"executorch cannot load {path}: {error}") from error
    input_names = [spec.name for spec in entry.inputs]
    output_names = [spec.name for spec in entry.outputs]

    def run(feeds: Arrays) -> Arrays:
        tensors = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in input_names]
        outputs = method.execute(tensors)
        # The runtime reuses its output memory at the next call.
        return {
            name: output.numpy().copy() for name, output in zip(output_names, outputs, strict=True)
        }

    return run
