"""`python -m mobile_runtime profile`: where the time goes, by the runtime's own clock.

ONNX Runtime's profiler and ExecuTorch's event tracer time each operator and each whole call. The
whole calls are timed by this harness as well, in the same run, so that the two clocks can be
compared. A trace for Perfetto (or chrome://tracing) is kept.
"""

import argparse
import contextlib
import importlib
import json
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobile_runtime import backends, progress, taps
from mobile_runtime.arguments import positive
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError, choices
from mobile_runtime.goldens import golden_cases
from mobile_runtime.latency import WARM_UP
from mobile_runtime.manifest import ComponentName
from mobile_runtime.report import check_writable

REPEATS = 20
SLOWEST = 12


@dataclass(frozen=True)
class Operator:
    """One operator of a model. kind: its type. times_ms: of each timed call."""

    name: str
    kind: str
    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle of its times."""
        return statistics.median(self.times_ms)


@dataclass(frozen=True)
class Profile:
    """What a runtime told of one component's timed calls.

    own_ms: whole calls by the runtime's clock. harness_ms: the same calls by this harness's.
    """

    component: str
    runtime: str
    operators: tuple[Operator, ...]
    own_ms: tuple[float, ...]
    harness_ms: tuple[float, ...]
    trace: Path

    @property
    def clocks(self) -> float:
        """The harness's median over the runtime's."""
        return statistics.median(self.harness_ms) / statistics.median(self.own_ms)


def profile(
    bundle: Bundle,
    component: ComponentName,
    folder: Path,
    *,
    backend: str | None = None,
    repeats: int = REPEATS,
    **options: Any,
) -> Profile:
    """Profile a component on its first golden case; the trace goes into a folder.

    Raises UserError for a backend that has no profiler, or a build of it that has none.
    """
    name = backend or backends.default_backend(bundle.manifest.target)
    backends.check_options(name, options)
    if backend is None and name not in backends.PROFILABLE:
        raise UserError(
            f"{name} has no profiler here; for {bundle.path}, take Instruments on a Mac, or "
            "profile the ONNX bundle of the same recipe"
        )
    if name not in backends.PROFILABLE:
        raise choices("backend with a profiler", name, list(backends.PROFILABLE))
    if bundle.component(component).format not in backends.FORMATS[name]:
        raise UserError(f"the backend {name} does not read {bundle.component(component).path}")
    cases = golden_cases(bundle, component)
    if not cases:
        raise UserError(f"{bundle.path} holds no golden cases of {component} to run")
    module = importlib.import_module(backends.BACKENDS[name])
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        own_ms, harness_ms, operators, trace = module.profile(
            bundle, component, cases[0].inputs, folder, WARM_UP, repeats, **options
        )
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # it holds what another component gave
                folder.rmdir()
        raise
    return Profile(
        component=component,
        runtime=name,
        operators=tuple(Operator(*one) for one in operators),
        own_ms=tuple(own_ms),
        harness_ms=tuple(harness_ms),
        trace=trace,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m mobile_runtime profile`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "--component", metavar="NAME", help="only this one (default: every component)"
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help=f"one of {', '.join(backends.PROFILABLE)} (default: the target's own)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for the backend, as in threads=2",
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=REPEATS,
        metavar="N",
        help=f"timed calls (default: {REPEATS})",
    )
    parser.add_argument(
        "--slowest",
        type=positive,
        default=SLOWEST,
        metavar="N",
        help=f"operators to show (default: {SLOWEST})",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="where the traces go (default: profile-BUNDLE)",
    )
    parser.add_argument("--force", action="store_true", help="replace traces that exist")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Profile, print the tables, keep the traces."""
    bundle = Bundle.open(args.bundle)
    names: list[ComponentName] = [entry.name for entry in bundle.manifest.components]
    if args.component:
        if args.component not in names:
            raise choices("component", args.component, list(names))
        names = [args.component]
    folder = args.output or Path(f"profile-{bundle.path.resolve().name}")
    check_writable(folder)
    for name in names:
        for taken in sorted(folder.glob(f"{name}.*")):
            if not args.force:
                raise UserError(f"{taken} already exists; choose another --output, or add --force")
    options = backends.parse_options(args.option)
    profiles = []
    with progress.told() as tell:
        for name in names:
            tell(f"profile {name}")
            profiles.append(
                profile(bundle, name, folder, backend=args.backend, repeats=args.repeats, **options)
            )
    if args.json:
        print(json.dumps([asdict(one) for one in profiles], indent=1, default=str))
    else:
        for one in profiles:
            print(format_profile(one, args.slowest, _layers(bundle, one.component)))
    return 0


def _layers(bundle: Bundle, component: str) -> dict[str, str]:
    """The layer of each value inside, by the value's name, as far as the bundle tells."""
    known = taps.read(bundle, bundle.component(component).name)
    return {tap.value: tap.layer for tap in known.taps} if known else {}


def format_profile(told: Profile, slowest: int, layers: dict[str, str]) -> str:
    """The slowest operators and the kinds, with their shares of a call; and the two clocks."""
    call_ms = statistics.median(told.own_ms)
    lines = [f"{told.component} in {told.runtime}: {call_ms:.2f} ms a call", ""]
    lines.append(f"{'ms':>9}{'share':>8}  operator")
    ordered = sorted(told.operators, key=lambda one: -one.median_ms)
    for one in ordered[:slowest]:
        layer = layers.get(one.name, "")
        place = f"{one.name}  {layer}" if layer else one.name
        lines.append(f"{one.median_ms:>9.3f}{one.median_ms / call_ms:>8.1%}  {one.kind}  {place}")
    kinds: dict[str, list[float]] = defaultdict(list)
    for one in told.operators:
        kinds[one.kind].append(one.median_ms)
    lines += ["", f"{'ms':>9}{'share':>8}{'number':>8}  kind"]
    rows = sorted(kinds.items(), key=lambda row: -sum(row[1]))
    for kind, times in rows[:slowest]:
        lines.append(f"{sum(times):>9.3f}{sum(times) / call_ms:>8.1%}{len(times):>8}  {kind}")
    rest = call_ms - sum(one.median_ms for one in told.operators)
    lines += [
        f"{rest:>9.3f}{rest / call_ms:>8.1%}{'':>8}  between operators",
        "",
        f"whole calls by this harness's clock, in the same run: {told.clocks:.3f} of the runtime's",
        f"trace, for ui.perfetto.dev: {told.trace}",
        "",
    ]
    return "\n".join(lines)
