"""ExecuTorch: `.pte` files, through its Python runtime (which brings torch with it)."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_runtime.backends import Arrays, Profiled, Runner, quiet_libraries
from mobile_runtime.errors import BundleError, UserError, missing_backend
from mobile_runtime.latency import repeated

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle

WHOLE_CALL = "Method::execute"
"""The event tracer's name of a whole call."""


def load(bundle: "Bundle", component: str) -> Runner:
    """Load a component's `forward`; inputs go in the manifest's order."""
    entry = bundle.component(component)
    input_names = [spec.name for spec in entry.inputs]
    return load_file(bundle.file(entry.path), input_names, [spec.name for spec in entry.outputs])


def load_file(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> Runner:
    """Load a `.pte` file's `forward`, whose inputs and outputs have these names, in this order."""
    _, method = _open(path)
    import torch

    def run(feeds: Arrays) -> Arrays:
        tensors = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in inputs]
        given = method.execute(tensors)
        # The runtime reuses its output memory at the next call.
        return {name: one.numpy().copy() for name, one in zip(outputs, given, strict=True)}

    return run


def _open(path: Path, traced: bool = False) -> tuple[Any, Any]:
    """A program and its method `forward`. traced: with the event tracer, if the build has one."""
    # On import and on load it warns that its Python interface may change; the version is pinned.
    with quiet_libraries():
        try:
            import torch  # noqa: F401
            from executorch.runtime import Runtime, Verification
        except ImportError as error:
            missing = error.name or "executorch"
            raise missing_backend(missing, "executorch", "the backend executorch") from error
        # Registers the quantize and dequantize kernels that stay outside XNNPACK; builds without
        # them still run programs that need none.
        with contextlib.suppress(ImportError):
            import executorch.kernels.quantized  # noqa: F401
        try:
            program = Runtime.get().load_program(
                path, verification=Verification.Minimal, enable_etdump=traced
            )
            return program, program.load_method("forward")
        except RuntimeError as error:
            raise BundleError(f"executorch cannot load {path}: {error}") from error


def profile(
    bundle: "Bundle", component: str, feeds: Arrays, folder: Path, warm_up: int, repeats: int
) -> Profiled:
    """Time calls by ExecuTorch's event tracer and from outside; see profiling.py.

    Raises UserError for a build without the tracer, as those on PyPI are.
    """
    entry = bundle.component(component)
    program, method = _open(bundle.file(entry.path), traced=True)
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(feeds[s.name])) for s in entry.inputs]
    times = repeated(lambda: method.execute(tensors), warm_up, repeats)
    dump = folder / f"{component}.etdump"
    dump.unlink(missing_ok=True)
    program.write_etdump_result_to_file(str(dump), str(folder / f"{component}.debug"))
    if not dump.is_file():
        raise UserError(
            "this build of executorch has no event tracer, and so no profile; build it with "
            "EXECUTORCH_ENABLE_EVENT_TRACER=ON, or profile the ONNX bundle"
        )
    return _read_dump(dump, times)


def _read_dump(dump: Path, times: Sequence[float]) -> Profiled:
    """What ExecuTorch's Inspector finds in a dump; the trace is written from it."""
    with quiet_libraries():
        from executorch.devtools import Inspector

        blocks = Inspector(str(dump)).event_blocks
    # A dump has other blocks too: of loading the program.
    block = next(one for one in blocks if WHOLE_CALL in {event.name for event in one.events})
    count = len(times)
    whole, operators, events = [0.0] * count, [], []
    for event in block.events:
        own = tuple(event.perf_data.raw[-count:]) if event.perf_data else ()
        if event.name == WHOLE_CALL:
            whole = list(own)
        elif own and event.name != "OPERATOR_CALL":
            kind = event.delegate_backend_name or ", ".join(event.op_types) or event.name
            operators.append((event.name, kind, own))
    began = 0.0
    for name, kind, own in operators:
        times_us = {"ts": began, "dur": 1000 * own[-1]}
        events.append({"name": name, "cat": kind, "ph": "X", "pid": 1, "tid": 1, **times_us})
        began += 1000 * own[-1]
    trace = dump.with_suffix(".trace.json")
    trace.write_text(json.dumps(events), encoding="utf-8")
    return whole, times, operators, trace
