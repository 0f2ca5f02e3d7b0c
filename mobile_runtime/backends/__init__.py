"""The runtimes that execute a bundle's components: named arrays in, named arrays out."""

import contextlib
import importlib
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mobile_runtime.errors import UserError, choices
from mobile_runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from mobile_runtime.bundle import Bundle

Arrays = dict[str, np.ndarray]
Runner = Callable[[Arrays], Arrays]
Observer = Callable[[str, np.ndarray], None]
"""Called with the name and the value of what is inside a model; to be copied if it is kept."""

# Each module has load(bundle, component, **options) -> Runner and imports its library inside.
BACKENDS = {
    "coreml": "mobile_runtime.backends.coreml",
    "executorch": "mobile_runtime.backends.executorch",
    "mil": "mobile_runtime.backends.mil",
    "onnxruntime": "mobile_runtime.backends.onnxruntime",
    "torch": "mobile_runtime.backends.torch",
}
# The formats that each backend reads; torch reads a diffusers folder beside the bundle.
FORMATS = {
    "coreml": ("mlpackage",),
    "executorch": ("pte",),
    "mil": ("mlpackage",),
    "onnxruntime": ("onnx", "ort"),
}

Profiled = tuple[
    Sequence[float], Sequence[float], Sequence[tuple[str, str, tuple[float, ...]]], Path
]
"""What `profile` gives: whole calls by the runtime's clock and by ours, in milliseconds; each
operator's name, kind and times; the trace's file."""
# Those that can tell where the time goes, by a function `profile`.
PROFILABLE = ("executorch", "onnxruntime")
# Those that can show the values inside a model, by a function `watch`, and of which formats.
WATCHABLE = {"mil": ("mlpackage",), "onnxruntime": ("onnx",)}


def default_backend(target: str) -> str:
    """A target's own runtime; Core ML's off the Mac is the interpreter of ML programs."""
    if target == "coreml":
        return "coreml" if sys.platform == "darwin" else "mil"
    return {"onnx": "onnxruntime", "executorch": "executorch"}[target]


def load(bundle: "Bundle", component: str, *, backend: str | None = None, **options: Any) -> Runner:
    """Load one component of a bundle; the result checks its inputs against the manifest.

    backend: a name of BACKENDS; None takes the target's own. options go to the backend.
    Raises UserError for an unknown backend or option, an option's wrong value, a format that the
    backend does not read, or a missing library.
    """
    entry = bundle.component(component)
    name = default_backend(bundle.manifest.target) if backend is None else backend
    check_options(name, options)
    if name in FORMATS and entry.format not in FORMATS[name]:
        readers = [reader for reader, formats in FORMATS.items() if entry.format in formats]
        raise UserError(
            f"the backend {name} does not read {entry.path}; choose one of: {', '.join(readers)}"
        )
    module = importlib.import_module(BACKENDS[name])
    runner = module.load(bundle, component, **options)
    inputs = entry.inputs

    def checked(feeds: Arrays) -> Arrays:
        check_inputs(component, inputs, feeds)
        return runner(feeds)

    return checked


def watch(
    path: Path,
    backend: str,
    feeds: Arrays,
    wanted: Mapping[str, int],
    outputs: Collection[str],
    observe: Observer,
    **options: Any,
) -> None:
    """Run a model of a WATCHABLE format and show the values inside it that are asked for.

    wanted: their names and how many elements each has. outputs: the names of the model's own
    outputs. options: as of `load`.
    """
    module = importlib.import_module(BACKENDS[backend])
    module.watch(path, feeds, wanted, outputs, observe, **options)


def some_values(
    path: Path, backend: str, names: Sequence[str], cases: Iterable[Arrays], **options: Any
) -> Iterator[Arrays]:
    """Some values inside a model of a WATCHABLE format, for each of the cases that it is fed.

    Only what the values need is computed. options: as of `load`.
    """
    module = importlib.import_module(BACKENDS[backend])
    found: Iterator[Arrays] = module.some_values(path, names, cases, **options)
    return found


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON if it can be, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--option {pair} has no value; write --option {pair}=VALUE")
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):  # also numbers of thousands of digits
            options[key] = value
    return options


def check_options(backend: str, options: dict[str, Any]) -> None:
    """Raise UserError for an unknown backend or option, or a value of another type than it takes.

    The options and their types are those of the backend module's `load`.
    """
    if backend not in BACKENDS:
        raise choices("backend", backend, list(BACKENDS))
    module = importlib.import_module(BACKENDS[backend])
    known = dict(list(inspect.signature(module.load).parameters.items())[2:])
    for option, value in options.items():
        if option not in known:
            if not known:
                raise UserError(f"the backend {backend} has no options; leave out {option!r}")
            raise choices(f"option of the backend {backend}", option, list(known))
        try:
            TypeAdapter(known[option].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(
                f"the option {option} of the backend {backend} cannot be {value!r}: "
                f"{error.errors()[0]['msg']}"
            ) from error


def check_inputs(component: str, specs: Sequence[TensorSpec], feeds: Arrays) -> None:
    """Raise UserError, telling every fault, unless the arrays are what the specs describe."""
    wanted = {spec.name: spec for spec in specs}
    faults = [f"{name} is missing" for name in wanted if name not in feeds]
    faults += [f"{name} is unknown" for name in feeds if name not in wanted]
    for name, spec in wanted.items():
        if name not in feeds:
            continue
        array = feeds[name]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            faults.append(f"{name} is {array.dtype} {array.shape}, not {spec.dtype} {spec.shape}")
    if faults:
        raise UserError(f"wrong inputs for {component}: {'; '.join(faults)}")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hold back the libraries' warnings: they are about parts of theirs that nobody uses here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
