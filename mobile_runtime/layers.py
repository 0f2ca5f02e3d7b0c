"""`python -m mobile_runtime layers`: what is inside a bundle's models, value by value.

Beside PyTorch's own values (taps.py); or, with --device, each quantized layer alone there and here
(layers_alone.py).
"""

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

from mobile_runtime import devices, progress, taps
from mobile_runtime.arguments import positive
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, choices
from mobile_runtime.layers_alone import compare_on
from mobile_runtime.manifest import ComponentName
from mobile_runtime.runs import NoRun, Runtime
from mobile_runtime.taps import TapFigure
from mobile_runtime.validate import runtimes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m mobile_runtime layers`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "--component", metavar="NAME", help="only this one (default: every component)"
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="one of mobile_runtime's (default: the target's own)"
    )
    parser.add_argument(
        "--worst",
        type=positive,
        metavar="N",
        help="only the N that have lost most since conversion",
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME",
        help="compare each quantized layer alone there and here instead, on the same inputs "
        "(see devices)",
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 0 where nothing diverges, else 1.

    Raises UserError where nothing can be looked at.
    """
    bundle = Bundle.open(args.bundle)
    if args.device:
        if args.component or args.backend:
            raise UserError("--device compares every component in ONNX Runtime; leave out the rest")
        return _alone(bundle, args)
    names: list[ComponentName] = [entry.name for entry in bundle.manifest.components]
    if args.component:
        if args.component not in names:
            raise choices("component", args.component, list(names))
        names = [args.component]
    told, diverged = [], False
    for runtime in runtimes(bundle, args.backend):
        for name in names:
            with progress.told(f"look into {name} in {runtime.label}"):
                figures = taps.measure(bundle, name, runtime)
            if isinstance(figures, NoRun):
                raise UserError(f"{name} of {bundle.path}: {figures.reason}")
            first = taps.first_that_diverges(figures)
            diverged |= first is not None
            if args.json:
                shown = _worst(figures, runtime, args.worst)
                told += [_row(figure, name, runtime) for figure in shown]
            else:
                print(_table(figures, name, runtime, args.worst))
    if args.json:
        print(json.dumps(told, indent=1))
    return int(diverged)


def _alone(bundle: Bundle, args: argparse.Namespace) -> int:
    """Each quantized layer alone, here and on devices. Returns 0 where all reach the gate."""
    chosen = [devices.find(name) for name in args.device]
    with tempfile.TemporaryDirectory() as folder, progress.told() as tell:
        layers = compare_on(bundle, chosen, Path(folder) / "layers", tell=tell)
    gate_db = bundle.manifest.gates.layer_snr_db or 0.0
    low = [one for one in layers if not one.snr_db >= gate_db]
    if args.json:
        print(json.dumps([asdict(one) for one in layers], indent=1))
        return int(bool(low))
    for device in chosen:
        mine = [one for one in layers if one.device == device.name]
        differing = sorted((one for one in mine if not one.equal), key=lambda one: one.snr_db)
        print(
            f"{device.name}: {len(mine) - len(differing)} of {len(mine)} quantized layers are "
            "equal in every bit to those here, on the same inputs"
        )
        if differing:
            print(f"{'dB':>8}{'values that differ':>20}  layer")
        for one in differing[: args.worst]:
            print(f"{one.snr_db:>8.1f}{one.differing:>20.2%}  {one.layer}")
    return int(bool(low))


def _row(figure: TapFigure, component: str, runtime: Runtime) -> dict[str, object]:
    return {
        "component": component,
        "runtime": runtime.label,
        "layer": figure.tap.layer,
        "op": figure.tap.op,
        "snr_db": None if math.isnan(figure.snr_db) else round(figure.snr_db, 1),
        "snr_db_at_conversion": figure.tap.snr_db.get(runtime.arithmetic),
        "diverges": figure.diverges,
    }


def _table(
    figures: tuple[TapFigure, ...], component: str, runtime: Runtime, worst: int | None
) -> str:
    """Decibels now and at conversion, a line a value."""
    rows = _worst(figures, runtime, worst)
    lines = [f"{component} in {runtime.label}: {len(figures)} values inside, dB against PyTorch"]
    lines.append(f"{'now':>8}{'at conversion':>15}  layer (operator)")
    for figure in rows:
        now = "no number" if math.isnan(figure.snr_db) else f"{figure.snr_db:.1f}"
        before = figure.tap.snr_db.get(runtime.arithmetic)
        had = "-" if before is None else f"{before:.1f}"
        mark = "  DIVERGES" if figure.diverges else ""
        lines.append(f"{now:>8}{had:>15}  {figure.tap.layer} ({figure.tap.op}){mark}")
    first = taps.first_that_diverges(figures)
    told = taps.tell(first, runtime.arithmetic) if first else "none"
    return "\n".join([*lines, f"first that diverges: {told}", ""])


def _worst(figures: tuple[TapFigure, ...], runtime: Runtime, worst: int | None) -> list[TapFigure]:
    """Those that have lost most, first; None: all, in the order of execution."""
    if worst is None:
        return list(figures)
    return sorted(figures, key=lambda figure: _lost(figure, runtime))[-worst:][::-1]


def _lost(figure: TapFigure, runtime: Runtime) -> float:
    """Decibels lost since conversion; all of them where the value is no number."""
    if math.isnan(figure.snr_db):
        return math.inf
    return figure.tap.snr_db.get(runtime.arithmetic, taps.CEILING_DB) - figure.snr_db
