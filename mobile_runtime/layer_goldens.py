"""Quantized layers alone, held against what they gave at conversion.

Where activations are quantized, the rounding of all the layers before it hides a small error of
one: a bias that is gone, a doubled scale. So of each such layer of an ONNX file the bundle keeps a
sketch (`golden/COMPONENT.layers.safetensors`) of what the layer alone makes of seeded noise: half
of it as large as what it reads in the first golden case, where a small error shows, half over twice
the range of that, where it saturates at either end. It is computed with every QuantizeLinear and
DequantizeLinear by itself; integer kernels give the same on any processor. (That layers compute
what PyTorch's do is measured at conversion: converters/layer_check.py.)
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from mobile_runtime import backends, layer_cuts, taps
from mobile_runtime.backends import onnxruntime
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError
from mobile_runtime.goldens import Arrays
from mobile_runtime.layer_cuts import Cut
from mobile_runtime.manifest import ComponentName
from mobile_runtime.runs import NoRun, Runtime
from mobile_runtime.sketches import sketch, sketch_snr_db

HELD_BYTES = 2**27
"""Of what layers read at a time."""
OTHER_MACHINE_DB = 45.0
"""Integers are the same everywhere; a layer that a processor computes in floats is close."""


@dataclass(frozen=True)
class Read:
    """A value that layers read: its name in the file, and the noise that stands for it."""

    name: str
    seed: int
    shape: tuple[int, ...]
    low: float
    high: float
    mean: float
    deviation: float


def path_of(component: str) -> str:
    """Where a component's layers lie in a bundle."""
    return f"golden/{component}.layers.safetensors"


def record(
    path: Path,
    known: taps.Taps,
    layers: Collection[str],
    feeds: Arrays,
    outputs: Collection[str],
    kept: Path,
) -> None:
    """Keep what a final ONNX file's quantized layers give alone, in the file `kept`.

    known: the component's taps; a layer without one, whose value is too large, is left out. feeds:
    its first golden case. outputs: the file's own. Nothing is written where no layer is left.
    """
    model, cuts = layer_cuts.cut(path, known, layers)
    if not cuts:
        return
    reads = _reads(path, known, cuts, feeds, outputs)
    references = list(_each(model, cuts, reads, layer_cuts.unoptimized))
    given = _each(model, cuts, reads, _as_validated)
    found = tuple(
        taps.Tap(
            cut.layer,
            "quantized layer",
            cut.output,
            reference.size,
            {"float32": sketch_snr_db(reference.sketch, value.sketch)},
        )
        for cut, reference, value in zip(cuts, references, given, strict=True)
    )
    sketches = np.stack([reference.sketch for reference in references])
    own = taps.Taps(found, sketches, taps.machine("onnxruntime"))
    write(own, reads, kept)


def write(own: taps.Taps, reads: Mapping[str, Read], kept: Path) -> None:
    """Keep the layers, and what they read."""
    taps.write(own, kept, reads=json.dumps([asdict(read) for read in reads.values()]))


def measure(
    bundle: Bundle, component: ComponentName, runtime: Runtime
) -> tuple[taps.TapFigure, ...] | NoRun:
    """Run each quantized layer of a component alone, and hold it against the conversion's."""
    entry, path = bundle.component(component), bundle.file(bundle.manifest.golden.layers[component])
    kept, reads = taps.open_taps(path), open_reads(path)
    known = taps.read(bundle, component)

    def look() -> list[np.ndarray | None]:
        assert known is not None, "layers without taps"
        layers = [tap.layer for tap in kept.taps]
        model, cuts = layer_cuts.cut(bundle.file(entry.path), known, layers)
        if [cut.layer for cut in cuts] != layers:
            raise BundleError(f"{path} is not of the layers of {entry.path}")
        options = runtime.options

        def run(portion: Any, fed: Arrays) -> Arrays:
            return _as_validated(portion, fed, **options)

        return [value.sketch for value in _each(model, cuts, reads, run)]

    tapped = {tap.layer for tap in known.taps} if known else set()
    quantized = set(bundle.quantized_layers(component)) & tapped
    if missing := quantized - {tap.layer for tap in kept.taps}:
        reason = f"{path} lacks {len(missing)} of the quantized layers, {min(missing)} for one"
        return NoRun("fail", reason)
    usual = taps.Bounds(taps.CEILING_DB, taps.SAME_MACHINE_DB, taps.SAME_MACHINE_DB)
    other = taps.Bounds(OTHER_MACHINE_DB, taps.SAME_MACHINE_DB, taps.SAME_MACHINE_DB)
    bounds = usual if taps.as_made(kept.made_on, runtime) else other
    return taps.held(runtime, kept, look, bounds)


def _reads(
    path: Path,
    known: taps.Taps,
    cuts: Sequence[Cut],
    feeds: Arrays,
    outputs: Collection[str],
) -> dict[str, Read]:
    """What the layers read, by name, from a run of the file."""
    names = list(dict.fromkeys(name for cut in cuts for name in cut.inputs))
    found: dict[str, Read] = {}

    def look(name: str, value: np.ndarray) -> None:
        mean, deviation = float(value.mean(dtype=np.float64)), float(value.std(dtype=np.float64))
        low, high = float(value.min()), float(value.max())
        found[name] = Read(name, names.index(name), value.shape, low, high, mean, deviation)

    for name in set(names) & feeds.keys():
        look(name, feeds[name])
    wanted = layer_cuts.sizes(known, (name for name in names if name not in feeds))
    backends.watch(path, "onnxruntime", feeds, wanted, outputs, look)
    return found


def open_reads(path: Path) -> dict[str, Read]:
    """What the layers read, by name, as `write` kept it. BundleError where it is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            told = (file.metadata() or {})["reads"]
        reads = TypeAdapter(list[Read]).validate_json(told)
    except (KeyError, OSError, SafetensorError, ValidationError) as error:
        raise BundleError(f"{path} holds no layers; make the bundle again") from error
    return {read.name: read for read in reads}


@dataclass(frozen=True)
class _Value:
    """What a layer gave."""

    sketch: np.ndarray
    size: int


def _each(
    model: Any,
    cuts: Sequence[Cut],
    reads: Mapping[str, Read],
    run: Callable[[Any, Arrays], Arrays],
) -> Iterator[_Value]:
    """What each layer alone makes of its noise, in order; some layers at a time."""
    for portion in _portions(cuts, reads):
        seen = {name: noise(reads[name]) for cut in portion for name in cut.inputs}
        values = run(*layer_cuts.beside(model, portion, seen))
        for number in range(len(portion)):
            value = values[f"y{number}"]
            yield _Value(sketch(value), value.size)


def _portions(cuts: Sequence[Cut], reads: Mapping[str, Read]) -> Iterator[list[Cut]]:
    portion, held = list[Cut](), 0
    for cut in cuts:
        if unknown := [name for name in cut.inputs if name not in reads]:
            raise BundleError(f"{cut.layer} reads {unknown[0]}, and did not at conversion")
        size = sum(4 * int(np.prod(reads[name].shape)) for name in cut.inputs)
        if portion and held + size > HELD_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(cut)
        held += size
    if portion:
        yield portion


def noise(read: Read) -> np.ndarray:
    """Uniform noise in the place of a value; Philox's stream is the same everywhere.

    The first half of the rows (tokens, or lines of a picture) as the value usually is, the others
    over twice its range.
    """
    count = int(np.prod(read.shape))
    words = np.random.Philox(key=read.seed).random_raw(-(-count // 4)).astype("<u8").view("<u2")
    made = words[:count].reshape(read.shape).astype(np.float32)
    made *= np.float32(2**-15)
    made -= np.float32(1)
    rows = read.shape[-2] if len(read.shape) > 1 else 1
    wide = np.arange(rows)[:, None] >= (rows + 1) // 2
    width = (read.high - read.low) or 1.0
    reach = np.where(wide, width, math.sqrt(3) * read.deviation).astype(np.float32)
    middle = np.where(wide, (read.low + read.high) / 2, read.mean).astype(np.float32)
    both: np.ndarray = (made * reach + middle).reshape(read.shape)
    return both


def _as_validated(model: Any, fed: Arrays, **options: Any) -> Arrays:
    """What the layers give as the backend runs the whole file."""
    run = onnxruntime.load_file(Path("layers"), model=model.SerializeToString(), **options)
    return run(fed)
