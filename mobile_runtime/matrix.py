"""Runtimes against each other: the same golden inputs through each, and every pair compared.

The reference of a pair is the one that comes first. Equal bits are told as such.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from mobile_runtime import devices, progress
from mobile_runtime.arguments import check_new_file, write_json
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError
from mobile_runtime.goldens import Arrays, golden_cases
from mobile_runtime.manifest import ComponentName
from mobile_runtime.on_devices import Asked, run_on
from mobile_runtime.parity import measure
from mobile_runtime.runs import ComponentRun, Runtime
from mobile_runtime.validate import run_here, runtimes


@dataclass(frozen=True)
class Column:
    """One runtime: its name, and what each component gave (or why it gave nothing)."""

    name: str
    outputs: dict[str, Sequence[Arrays] | str]


@dataclass(frozen=True)
class Pair:
    """Two runtimes' outputs of one component, the worst of all cases and outputs."""

    component: str
    first: str
    second: str
    snr_db: float | None
    equal: bool
    reason: str = ""


def columns_of(
    bundles: Sequence[Bundle], names: Sequence[str], backend: str | None = None
) -> list[Column]:
    """What each bundle gives here in its runtimes, or on each of the named devices."""
    columns = []
    for bundle in bundles:
        for runtime in runtimes(bundle, backend) if not names else ():
            columns.append(_here(bundle, runtime, len(bundles) > 1))
        for name in names:
            columns.append(_there(bundle, name, backend, len(bundles) > 1))
    return _apart(columns)


def _apart(columns: Sequence[Column]) -> list[Column]:
    """The columns, numbered where several have one name: two bundles of a target, say."""
    names = [column.name for column in columns]
    return [
        replace(column, name=f"{column.name} #{names[: k + 1].count(column.name)}")
        if names.count(column.name) > 1
        else column
        for k, column in enumerate(columns)
    ]


def _label(bundle: Bundle, runtime: Runtime, several: bool) -> str:
    return f"{bundle.manifest.target}: {runtime.label}" if several else runtime.label


def _here(bundle: Bundle, runtime: Runtime, several: bool) -> Column:
    outputs: dict[str, Sequence[Arrays] | str] = {}
    with progress.told() as tell:
        for entry in bundle.manifest.components:
            run = run_here(bundle, entry.name, runtime, repeats=0, step=tell)
            outputs[entry.name] = run.outputs if isinstance(run, ComponentRun) else run.reason
    return Column(_label(bundle, runtime, several), outputs)


def _there(bundle: Bundle, name: str, backend: str | None, several: bool) -> Column:
    asked = Asked(backend=backend, prompts=0, repeats=0)
    with progress.told(f"{bundle.manifest.name} on {name}"):
        runtime, runs = run_on(bundle, devices.find(name), asked)
    outputs: dict[str, Sequence[Arrays] | str] = {
        str(component): run.outputs if isinstance(run, ComponentRun) else run.reason
        for component, run in runs.items()
    }
    return Column(_label(bundle, runtime, several), outputs)


def pairs_of(columns: Sequence[Column]) -> list[Pair]:
    """Every pair of columns, component by component."""
    components = dict.fromkeys(name for column in columns for name in column.outputs)
    return [
        _pair(component, first, second)
        for component in components
        for first, second in combinations(columns, 2)
    ]


def _pair(component: str, first: Column, second: Column) -> Pair:
    def told(reason: str) -> Pair:
        return Pair(component, first.name, second.name, None, False, reason)

    given = [column.outputs.get(component, "it has none") for column in (first, second)]
    for column, outputs in zip((first, second), given, strict=True):
        if isinstance(outputs, str):
            return told(f"{column.name}: {outputs}")
    worst, equal = math.inf, True
    for mine, theirs in zip(*given, strict=True):
        if mine.keys() != theirs.keys():
            return told("their outputs have other names")
        for name in mine:
            a, b = mine[name], theirs[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                return told(f"{name} is {a.dtype} {a.shape} and {b.dtype} {b.shape}")
            if not (np.isfinite(a).all() and np.isfinite(b).all() and a.any()):
                return told(f"{name} is not finite, or all zero")
            equal &= a.tobytes() == b.tobytes()
            worst = min(worst, measure(a, b).snr_db)
    return Pair(component, first.name, second.name, worst if math.isfinite(worst) else None, equal)


def as_markdown(pairs: Sequence[Pair]) -> str:
    """A table a component: the first runtime of a pair in the row, the second in the column."""
    lines = []
    for component in dict.fromkeys(pair.component for pair in pairs):
        mine = [pair for pair in pairs if pair.component == component]
        rows = list(dict.fromkeys(pair.first for pair in mine))
        heads = list(dict.fromkeys(pair.second for pair in mine))
        cells = {(pair.first, pair.second): _said(pair) for pair in mine}
        lines += [f"| {component} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += [
            f"| {row} | " + " | ".join(cells.get((row, head), "") for head in heads) + " |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def _said(pair: Pair) -> str:
    if pair.equal:
        return "equal bits"
    return f"{pair.snr_db:.1f} dB" if pair.snr_db is not None else f"not run: {pair.reason}"


def check_same_inputs(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles whose golden inputs differ, which have nothing to be compared by."""
    first = bundles[0]
    for entry in first.manifest.components:
        wanted = _inputs(first, entry.name)
        for other in bundles[1:]:
            if other.manifest.component(entry.name) and _inputs(other, entry.name) != wanted:
                raise UserError(
                    f"{other.path} has other golden inputs of {entry.name} than {first.path}; "
                    "convert the same recipe for each target"
                )


def _inputs(bundle: Bundle, component: ComponentName) -> list[dict[str, bytes]]:
    return [
        {name: array.tobytes() for name, array in case.inputs.items()}
        for case in golden_cases(bundle, component)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m mobile_runtime matrix`."""
    parser.add_argument(
        "bundles", nargs="+", type=Path, metavar="BUNDLE", help="of one recipe, a target each"
    )
    parser.add_argument(
        "--device", action="append", default=[], metavar="NAME", help="compare these (see devices)"
    )
    parser.add_argument("--backend", metavar="NAME", help="default: each target's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures")
    parser.add_argument("--force", action="store_true", help="replace a --json that exists")


def run(args: argparse.Namespace) -> int:
    """Compare, print the tables; 1 where a runtime gave nothing."""
    if args.json:
        check_new_file(args.json, "--json", args.force)
    bundles = [Bundle.open(path) for path in args.bundles]
    check_same_inputs(bundles)
    columns = columns_of(bundles, args.device, args.backend)
    if len(columns) < 2:
        raise UserError("there is one runtime to compare; name another bundle, or two --device")
    pairs = pairs_of(columns)
    print(as_markdown(pairs), end="")
    if args.json:
        write_json(args.json, [asdict(pair) for pair in pairs])
    return int(any(pair.reason for pair in pairs))
