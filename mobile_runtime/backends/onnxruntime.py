"""ONNX Runtime: `.onnx` and `.ort` files."""

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mobile_runtime.backends import Arrays, Observer, Profiled, Runner, onnx_bytes
from mobile_runtime.errors import BundleError, choices, missing_backend
from mobile_runtime.latency import repeated

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle
    from mobile_runtime.manifest import ComponentEntry

# onnxruntime rounds activations to INT8 where it fuses an INT8 weight into MatMulNBits (43 dB where
# the weights alone give 120). Accuracy level 1 keeps them in float32.
# On x86 it makes uint8 of some static activations and then leaves their layers in float; with the
# other they stay int8, as on Arm, so that every layer of the plan is computed by an integer kernel.
EXACT_SESSION = {
    "session.qdq_matmulnbits_accuracy_level": "1",
    "session.qdqisint8allowed": "1",
}
"""What was validated; the manifest tells apps the same."""
# More than any machine has cores; beyond it the runtime starts threads until the system refuses.
MAX_THREADS = 1024
# How many bytes of values inside a model are held at a time.
WATCHED_BYTES = 2**30


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
    entry = bundle.component(component)
    told = entry.details.get("session_options", EXACT_SESSION)
    if told != EXACT_SESSION:
        raise BundleError(
            f"{bundle.path} tells apps the session options {told} for {component}, and it computes "
            f"what was validated with {EXACT_SESSION}; make it again"
        )
    path = bundle.file(entry.path)
    if entry.format == "onnx":
        _check_declared(path, entry)
    return load_file(path, exact=exact, providers=providers, threads=threads)


def _check_declared(path: Path, entry: "ComponentEntry") -> None:
    """Raise BundleError unless the file says of itself what the manifest does."""
    try:
        told = onnx_bytes.declared(path.read_bytes())
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path} is no ONNX model: {error}") from error
    for kind, specs, given in (
        ("inputs", entry.inputs, told.inputs),
        ("outputs", entry.outputs, told.outputs),
    ):
        wanted = {spec.name: (spec.dtype, spec.shape) for spec in specs}
        if given != wanted:
            raise BundleError(
                f"{path} declares its {kind} as {given}, and the manifest as {wanted}; make the "
                "bundle again"
            )
    weights = entry.details.get("int8_weights", told.int8_weights)
    if weights != told.int8_weights:
        raise BundleError(
            f"{path} has {told.int8_weights} INT8 weights, and the manifest says {weights}; make "
            "the bundle again"
        )


def load_file(
    path: Path,
    *,
    exact: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
    model: bytes | None = None,
) -> Runner:
    """Load an `.onnx` or `.ort` file, or what it would hold (model); options as of `load`."""
    session = _session(path, _session_options(exact, threads), providers, model)
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def watch(
    path: Path,
    feeds: Arrays,
    wanted: Mapping[str, int],
    outputs: Collection[str],
    observe: Observer,
    *,
    exact: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
) -> None:
    """Run an `.onnx` file and show values inside it; they are taken out as outputs, some at a time.

    wanted: names of values and how many elements each has; those that the file has not are not
    shown. outputs: the model's own. An operator whose value is taken out is not fused with the next
    one, so a last bit may differ from a run without.
    """
    model = path.read_bytes()
    there = onnx_bytes.computed(model)
    for names in _portions({name: size for name, size in wanted.items() if name in there}):
        options = _session_options(exact, threads)
        _weights_beside(options, path)
        inside = [name for name in names if name not in outputs]
        session = _session(path, options, providers, model + onnx_bytes.more_outputs(inside))
        for name, value in zip(names, session.run(names, feeds), strict=True):
            observe(name, value)


def some_values(
    path: Path,
    names: Sequence[str],
    cases: Iterable[Arrays],
    *,
    exact: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
) -> Iterator[Arrays]:
    """Values inside an `.onnx` file for each case; only what they need is computed."""
    options = _session_options(exact, threads)
    _weights_beside(options, path)
    session = _session(path, options, providers, onnx_bytes.cut(path.read_bytes(), names))
    for feeds in cases:
        yield dict(zip(names, session.run(list(names), feeds), strict=True))


def profile(
    bundle: "Bundle",
    component: str,
    feeds: Arrays,
    folder: Path,
    warm_up: int,
    repeats: int,
    *,
    exact: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
) -> Profiled:
    """Time calls by ONNX Runtime's own profiler and from outside; see profiling.py."""
    path = bundle.file(bundle.component(component).path)
    options = _session_options(exact, threads)
    options.enable_profiling = True
    # It writes while it runs, under a name of its own; what is whole is moved to its place.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".profile-") as unfinished:
        options.profile_file_prefix = str(Path(unfinished) / "trace")
        session = _session(path, options, providers)
        times = repeated(lambda: session.run(None, feeds), warm_up, repeats)
        trace = Path(session.end_profiling()).replace(folder / f"{component}.trace.json")
    events = json.loads(trace.read_text(encoding="utf-8"))
    calls = [event["dur"] / 1000 for event in events if event["name"] == "model_run"]
    kinds: dict[str, str] = {}
    spent: dict[str, list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time").removeprefix("node_")
            kinds[name] = event["args"]["op_name"]
            spent.setdefault(name, []).append(event["dur"] / 1000)
    operators = [(name, kinds[name], tuple(own[-len(times) :])) for name, own in spent.items()]
    return calls[-len(times) :], times, operators, trace


def _session(path: Path, options: Any, providers: Sequence[str], model: bytes | None = None) -> Any:
    """A session of a file, or of its changed content. UserError for a provider that is not there,
    BundleError for a model that cannot be loaded."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for provider in providers or [""]:
        if provider not in available:
            raise choices("execution provider", provider, available)
    try:
        return onnxruntime.InferenceSession(model or str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise BundleError(f"onnxruntime cannot load {path}: {error}") from error


def _session_options(exact: bool, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_backend("onnxruntime", "runtime", "the backend onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors are raised; warnings about a graph's names are of no use to the caller.
    options.log_severity_level = 3
    if exact:
        for key, value in EXACT_SESSION.items():
            options.add_session_config_entry(key, value)
    return options


def _weights_beside(options: Any, path: Path) -> None:
    """Look for weights beside a model that is given as bytes, not in the working directory."""
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(path.parent))


def _portions(wanted: Mapping[str, int]) -> Iterator[list[str]]:
    """The names, so many at a time that their float32 values fit into WATCHED_BYTES."""
    portion: list[str] = []
    held = 0
    for name, elements in wanted.items():
        if portion and held + 4 * elements > WATCHED_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(name)
        held += 4 * elements
    if portion:
        yield portion
