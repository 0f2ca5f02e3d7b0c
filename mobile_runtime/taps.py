"""Where inside a component a runtime first leaves PyTorch: the first layer that diverges.

At conversion (converters/taps.py) the value of every operator on a component's first golden case
is kept in PyTorch as a sketch of 67 numbers, and the final file's own value of the same operator
is held against it. What lies in `golden/COMPONENT.taps.safetensors` is the sketches, and for each
of these taps the layer's module path, the operator, the value's name in the file, and the SNR that
it had. Here the file is run again, and the first tap that is clearly worse is the layer to look at.

Golden cases have a few of a schedule's timesteps. So what the UNet's resnets make of each timestep
is kept alike in `golden/timesteps.safetensors`: of these layers alone, at every timestep.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mobile_runtime import backends
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import BundleError, UserError
from mobile_runtime.goldens import golden_cases
from mobile_runtime.latency import Environment, environment
from mobile_runtime.manifest import ComponentName
from mobile_runtime.runs import NoRun, Runtime, brief
from mobile_runtime.sketches import SKETCH_SIZE, sketch, sketch_snr_db

# Attention scores at a large size would take long and tell nothing that their use does not.
MAX_ELEMENTS = 2**24
MOST_ELEMENTS = 2**40
"""More has no value."""
TIMESTEPS_PATH = "golden/timesteps.safetensors"
# A tap diverges where it is so far below what it had at conversion, and it is wrong, so that the
# component fails, where it is further below. Figures above the ceiling are rounding's last bits,
# which another processor turns otherwise; under quantized activations a turned bit is a whole step
# somewhere behind. The machine and runtime of the conversion have no such excuse.
CEILING_DB, QUANTIZED_CEILING_DB = 100.0, 45.0
DIVERGES_DB = 10.0
WRONG_DB, QUANTIZED_WRONG_DB = 30.0, 20.0
SAME_MACHINE_DB = 3.0


@dataclass(frozen=True)
class Tap:
    """One value inside a component.

    layer: the module's path. op: PyTorch's operator. value: its name in the target's file.
    elements: how many numbers it has. snr_db: at conversion, by the arithmetic that ran the file.
    """

    layer: str
    op: str
    value: str
    elements: int
    snr_db: dict[str, float]


@dataclass(frozen=True)
class Taps:
    """A component's taps in the order of execution.

    sketches: PyTorch's, (T, 67) float32. made_on: the machine and the runtime of the conversion.
    timesteps: where there are any, the taps are those of the first, then of the second, ...
    """

    taps: tuple[Tap, ...]
    sketches: np.ndarray
    made_on: str
    timesteps: tuple[float, ...] = ()


@dataclass(frozen=True)
class TapFigure:
    """What a tap has now. snr_db: NaN where the value is not finite, or not in the file any more.

    gone: the latter.
    """

    tap: Tap
    snr_db: float
    diverges: bool
    wrong: bool
    gone: bool = False


def path_of(component: str) -> str:
    """Where a component's taps lie in a bundle."""
    return f"golden/{component}.taps.safetensors"


def write(taps: Taps, path: Path, **more: str) -> None:
    """Keep taps; the sketches as a tensor, the rest, and more, in the file's metadata."""
    told = json.dumps([asdict(tap) for tap in taps.taps])
    metadata = {"taps": told, "made_on": taps.made_on, **more}
    tensors = {"sketches": np.ascontiguousarray(taps.sketches, np.float32)}
    if taps.timesteps:
        tensors["timesteps"] = np.array(taps.timesteps, np.float32)
    save_file(tensors, path, metadata)


def machine(backend: str, there: Environment | None = None) -> str:
    """What decides the bits that come out: the processor and the runtime's version.

    there: of another machine, or process, than this one.
    """
    there = there or environment()
    runtime = {"mil": "torch"}.get(backend, backend)
    version = there.libraries.get(runtime, "none")
    return f"{there.cpu} ({' '.join(there.cpu_flags)}), {runtime} {version}"


def as_made(made_on: str, runtime: Runtime, there: Environment | None = None) -> bool:
    """Whether a bundle was made on such a machine and runtime, computing as it does now."""
    usual = runtime.options.get("exact", True) and "providers" not in runtime.options
    return bool(usual) and made_on == machine(runtime.backend, there)


def read(bundle: Bundle, component: ComponentName) -> Taps | None:
    """A component's taps; None where its bundle has none. BundleError where they are damaged."""
    relative = bundle.manifest.golden.taps.get(component)
    if relative is None:
        return None
    taps = open_taps(bundle.file(relative))
    told: Any = bundle.component(component).details.get("taps")
    if isinstance(told, dict) and told.get("found") != len(taps.taps):
        raise BundleError(
            f"{bundle.file(relative)} has {len(taps.taps)} taps, not the {told.get('found')} that "
            "were found at conversion; make the bundle again"
        )
    return taps


def open_taps(path: Path) -> Taps:
    """What `write` wrote. BundleError where it is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            metadata, sketches = file.metadata() or {}, file.get_tensor("sketches")
            there = "timesteps" in file.keys()  # noqa: SIM118
            steps = file.get_tensor("timesteps") if there else np.empty(0, np.float32)
        taps = TypeAdapter(tuple[Tap, ...]).validate_json(metadata["taps"])
        made_on = metadata["made_on"]
    except (AttributeError, KeyError, OSError, SafetensorError, ValidationError) as error:
        raise BundleError(f"{path} holds no taps; make the bundle again") from error
    sound = all(
        0 < tap.elements <= MOST_ELEMENTS and all(map(math.isfinite, tap.snr_db.values()))
        for tap in taps
    )
    if not taps or not sound or steps.ndim != 1 or not np.isfinite(steps).all():
        raise BundleError(f"{path} holds no taps; make the bundle again")
    timesteps = tuple(steps.tolist())
    if sketches.shape != (len(taps), SKETCH_SIZE):
        raise BundleError(f"{path} has {len(taps)} taps and sketches of shape {sketches.shape}")
    if timesteps and len(taps) % len(timesteps):
        raise BundleError(f"{path} has {len(taps)} taps of {len(timesteps)} timesteps")
    return Taps(taps, sketches, made_on, timesteps)


def measure(
    bundle: Bundle, component: ComponentName, runtime: Runtime
) -> tuple[TapFigure, ...] | NoRun:
    """Run a component's first golden case, and hold every tap against PyTorch's sketch."""
    taps, entry = read(bundle, component), bundle.component(component)
    if entry.format not in backends.WATCHABLE.get(runtime.backend, ()):
        reason = f"values inside {entry.path} cannot be looked at in {runtime.backend}"
        return NoRun("not_run", reason)
    if taps is None:
        return NoRun("not_run", "the bundle was made without taps; convert it again")

    def look() -> list[np.ndarray | None]:
        seen = watch(
            bundle.file(entry.path),
            runtime.backend,
            golden_cases(bundle, component)[0].inputs,
            {tap.value: tap.elements for tap in taps.taps},
            [spec.name for spec in entry.outputs],
            runtime.options,
        )
        return [seen.get(tap.value) for tap in taps.taps]

    return held(runtime, taps, look, _bounds(bundle, component, as_made(taps.made_on, runtime)))


def measure_timesteps(bundle: Bundle, runtime: Runtime) -> list[tuple[float, TapFigure]] | NoRun:
    """What the UNet makes of every timestep, held against PyTorch's; with the timestep."""
    entry, relative = bundle.component("unet"), bundle.manifest.golden.timesteps
    assert relative is not None, "a bundle without timesteps"
    taps = open_taps(bundle.file(relative))
    asked = {row.timestep for table in bundle.manifest.schedules for row in table.rows}
    if {np.float32(t) for t in asked} != {np.float32(t) for t in taps.timesteps}:
        reason = f"{relative} is not of the schedules' timesteps; make the bundle again"
        return NoRun("fail", reason)
    first = golden_cases(bundle, "unet")[0].inputs
    cases = [first | {"timestep": np.full_like(first["timestep"], t)} for t in taps.timesteps]
    each = len(taps.taps) // len(cases)
    names = list(dict.fromkeys(tap.value for tap in taps.taps))

    def look() -> list[np.ndarray | None]:
        path = bundle.file(entry.path)
        rows = backends.some_values(path, runtime.backend, names, cases, **runtime.options)
        found = [{name: sketch(value) for name, value in row.items()} for row in rows]
        return [found[k // each][tap.value] for k, tap in enumerate(taps.taps)]

    bounds = _bounds(bundle, "unet", as_made(taps.made_on, runtime))
    figures = held(runtime, taps, look, bounds)
    if isinstance(figures, NoRun):
        return figures
    return [(taps.timesteps[k // each], figure) for k, figure in enumerate(figures)]


def held(
    runtime: Runtime,
    taps: Taps,
    look: Callable[[], Sequence[np.ndarray | None]],
    bounds: "Bounds",
) -> tuple[TapFigure, ...] | NoRun:
    """The figures of the sketches that `look` finds: each tap's, or None where there is none."""
    try:
        seen = look()
    except BundleError as error:  # a value that is not in the file, say
        return NoRun("fail", str(error))
    except UserError as error:
        return NoRun("not_run", str(error))
    except Exception as error:  # the runtimes' own errors share no class
        return NoRun("fail", f"the values inside cannot be looked at: {brief(error)}")
    return tuple(
        _figure(tap, reference, given, runtime.arithmetic, bounds)
        for tap, reference, given in zip(taps.taps, taps.sketches, seen, strict=True)
    )


@dataclass(frozen=True)
class Bounds:
    """How much a tap may lose since conversion, in dB, of no more than the ceiling."""

    ceiling: float
    diverges: float
    wrong: float


def _bounds(bundle: Bundle, component: str, same_machine: bool) -> Bounds:
    if same_machine:
        return Bounds(CEILING_DB, SAME_MACHINE_DB, SAME_MACHINE_DB)
    if bundle.quantized_layers(component):
        return Bounds(QUANTIZED_CEILING_DB, DIVERGES_DB, QUANTIZED_WRONG_DB)
    return Bounds(CEILING_DB, DIVERGES_DB, WRONG_DB)


def watch(
    path: Path,
    backend: str,
    feeds: Mapping[str, np.ndarray],
    wanted: Mapping[str, int],
    outputs: Collection[str],
    options: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The sketches of values inside a model and of its outputs, by name; of the floats."""
    seen: dict[str, np.ndarray] = {}

    def look(name: str, value: np.ndarray) -> None:
        # A layer that is computed twice is shown twice; the first counts.
        if value.dtype.kind == "f" and value.size <= MAX_ELEMENTS and name not in seen:
            seen[name] = sketch(value)

    backends.watch(path, backend, dict(feeds), wanted, outputs, look, **options)
    return seen


def _figure(
    tap: Tap, reference: np.ndarray, given: np.ndarray | None, arithmetic: str, bounds: Bounds
) -> TapFigure:
    snr_db = math.nan if given is None else sketch_snr_db(reference, given)
    lost = min(tap.snr_db.get(arithmetic, bounds.ceiling), bounds.ceiling) - snr_db
    # Asked so that a NaN diverges, and is wrong.
    diverges, wrong = not lost <= bounds.diverges, not lost <= bounds.wrong
    return TapFigure(tap, snr_db, diverges, wrong, gone=given is None)


def first_that_diverges(figures: Sequence[TapFigure]) -> TapFigure | None:
    """The first, in the order of execution."""
    return next((figure for figure in figures if figure.diverges), None)


def tell(figure: TapFigure, arithmetic: str) -> str:
    """A figure in words."""
    if figure.gone:
        return f"{figure.tap.layer} ({figure.tap.op}), whose value is not in the file any more"
    now = "not finite" if math.isnan(figure.snr_db) else f"{figure.snr_db:.1f} dB"
    before = figure.tap.snr_db.get(arithmetic)
    had = f"; it had {before:.1f} dB at conversion" if before is not None else ""
    return f"{figure.tap.layer} ({figure.tap.op}): {now} against PyTorch{had}"
