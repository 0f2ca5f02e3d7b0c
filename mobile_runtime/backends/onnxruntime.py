"""ONNX Runtime: `.onnx` and `.ort` files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mobile_runtime.backends import Arrays, Runner
from mobile_runtime.errors import BundleError, choices, missing_backend

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle

# More than any machine has cores; beyond it the runtime starts threads until the system refuses.
MAX_THREADS = 1024


def load(
    bundle: "Bundle",
    component: str,
    *,
    exact: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0,
) -> Runner:
    """Load a component into a session.

    exact: ONNX Runtime turns an int8 DequantizeLinear in front of a MatMul into MatMulNBits, which
    by default also rounds the activations to int8 (43 dB where the weights alone give 120). True
    keeps float32 activations, so that parity measures the conversion; False runs what an app
    with default session options runs.
    With it, static int8 activations stay int8 on x86 too, and their layers in integer kernels.
    providers: execution providers, best first. threads: of one operator; 0 takes every core.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_backend("onnxruntime", "runtime", "the backend onnxruntime") from error
    available = onnxruntime.get_available_providers()
    for provider in providers:
        if provider not in available:
            raise choices("execution provider", provider, available)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors are raised; warnings about a graph's names are of no use to the caller.
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    path = bundle.file(bundle.component(component).path)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise BundleError(f"onnxruntime cannot load {path}: {error}") from error
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run
