"""How long a bundle's models and pictures take here, alone or beside another bundle's.

Two bundles take turns call by call, in an order that changes at random, so that a machine that
gets hotter or busier hits both alike. After half of the rounds both are loaded anew, the other one
first: where its weights come to lie makes a model up to a twentieth slower or faster. Each round
gives one ratio; their middle is told with an interval in which it lies with 95 % (a bootstrap over
the rounds: Efron, 1979).
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mobile_runtime import backends, progress
from mobile_runtime.arguments import check_new_file, write_json
from mobile_runtime.bundle import Bundle
from mobile_runtime.errors import UserError
from mobile_runtime.goldens import golden_cases, prompt_case
from mobile_runtime.latency import WARM_UP, Clock, Timing, environment, summary
from mobile_runtime.pipeline import Pipeline
from mobile_runtime.report import PIPELINE

BOOTSTRAPS = 2000
ROUNDS = 20
PAUSE_S = 0.05
"""Before each call, where there are several: a runtime's threads go on spinning for a while after
its last one (ONNX Runtime's do), and would take the other's cores."""


class Call:
    """One thing to be timed, loaded: a component on its first golden case, or a whole picture."""

    def __init__(self, bundle: Bundle, name: str, backend: str, options: dict[str, Any]) -> None:
        """name: a component's, or `pipeline`."""
        began = time.perf_counter()
        if name == PIPELINE:
            self._pipeline = Pipeline.from_bundle(bundle, backend, **options)
            self._case = prompt_case(bundle, 0)
            self._run = self._picture
        else:
            run = backends.load(bundle, name, backend=backend, **options)
            inputs = golden_cases(bundle, bundle.component(name).name)[0].inputs
            self._run = lambda: run(inputs)
        self.load_ms = 1000 * (time.perf_counter() - began)

    def _picture(self) -> Any:
        golden = self._case.golden
        return self._pipeline(
            golden.prompt,
            **golden.call,
            noise=self._case.noise,
            fresh_noise=self._case.fresh_noise,
        )

    def milliseconds(self, clock: Clock = time.perf_counter) -> float:
        """Of one call."""
        began = clock()
        self._run()
        return 1000 * (clock() - began)


@dataclass(frozen=True)
class Ratio:
    """How many times as long the second takes: the median over rounds, and where it lies."""

    median: float
    low: float
    high: float


def ratio_of(blocks: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Ratio:
    """The ratio of paired times, second over first: the geometric mean of the blocks' medians."""
    rng = np.random.default_rng(seed)
    logs, drawn = [], []
    for first, second in blocks:
        ratios = np.log(np.asarray(second, float) / np.asarray(first, float))
        logs.append(float(np.median(ratios)))
        drawn.append(np.median(rng.choice(ratios, (BOOTSTRAPS, len(ratios))), axis=1))
    low, high = np.percentile(np.mean(drawn, axis=0), (2.5, 97.5))
    return Ratio(*(math.exp(value) for value in (float(np.mean(logs)), float(low), float(high))))


def alternate(
    calls: Sequence[Call],
    rounds: int,
    clock: Clock = time.perf_counter,
    seed: int = 0,
    pause: Callable[[float], None] = time.sleep,
    done: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Time each of the calls once a round, in an order of its own, after two that warm up.

    done: is told after each call.
    """

    def milliseconds(call: Call) -> float:
        taken = call.milliseconds(clock)
        done()
        return taken

    first = [milliseconds(call) for call in calls]
    for _ in range(WARM_UP):
        for call in calls:
            milliseconds(call)
    times: list[list[float]] = [[] for _ in calls]
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        for index in rng.permutation(len(calls)):
            if len(calls) > 1:
                pause(PAUSE_S)
            times[index].append(milliseconds(calls[index]))
    return [
        Timing(load_ms=call.load_ms, first_ms=one, warm_up=WARM_UP, times_ms=tuple(own))
        for call, one, own in zip(calls, first, times, strict=True)
    ]


def _block(
    bundles: Sequence[Bundle],
    names: Sequence[str],
    part: str,
    options: dict[str, Any],
    turn: int,
    rounds: int,
    done: Callable[[], object],
) -> list[Timing]:
    """Half of the rounds; at turn 1 the last bundle is loaded first. In the bundles' order."""
    order = list(range(len(bundles)))[:: -1 if turn else 1]
    loaded = {k: Call(bundles[k], part, names[k], options) for k in order}
    calls = [loaded[k] for k in range(len(bundles))]
    return alternate(calls, (rounds + 1 - turn) // 2, seed=turn, done=done)


def _joined(timings: Sequence[Timing]) -> Timing:
    """The times of several blocks as one; loading and first call are the first block's."""
    times = tuple(ms for timing in timings for ms in timing.times_ms)
    return timings[0].model_copy(update={"times_ms": times})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m mobile_runtime bench`."""
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="one, or two")
    parser.add_argument("--backend", metavar="NAME", help="default: each target's own")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="as in threads=2"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, metavar="N", help=f"timed calls ({ROUNDS})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every time, too")
    parser.add_argument("--force", action="store_true", help="replace a --json that exists")


def run(args: argparse.Namespace) -> int:
    """Time one bundle, or two in turns, and print the table."""
    if len(args.bundles) > 2:
        raise UserError("bench takes one bundle, or two that take turns")
    if args.rounds < 2:
        raise UserError(f"--rounds {args.rounds} should be 2 or more")
    if args.json:
        check_new_file(args.json, "--json", args.force)
    bundles = [Bundle.open(path) for path in args.bundles]
    options = backends.parse_options(args.option)
    names = [args.backend or backends.default_backend(b.manifest.target) for b in bundles]
    for name in names:
        backends.check_options(name, options)
        if name == "mil":
            raise UserError("the interpreter of ML programs says nothing about speed; use a Mac")
    parts = [entry.name for entry in bundles[0].manifest.components]
    shared: list[str] = [
        part
        for part in parts
        if all(b.manifest.component(part) and b.manifest.golden.cases.get(part) for b in bundles)
    ]
    if all(b.manifest.golden.prompts for b in bundles):
        shared.append(PIPELINE)
    if not shared:
        raise UserError("the bundles hold no golden inputs to be timed on; convert them again")
    measured = {}
    count = len(shared) * len(bundles) * (args.rounds + 2 * (1 + WARM_UP))
    # disable=None: no bar where the output is not a terminal.
    with tqdm(
        total=count, unit="call", disable=None, delay=progress.AFTER_S, leave=False, miniters=1
    ) as bar:
        for part in shared:
            bar.set_description(part, refresh=False)
            measured[part] = [
                _block(bundles, names, part, options, turn, args.rounds, bar.update)
                for turn in (0, 1)
            ]
    rows, told = [], []
    for part, blocks in measured.items():
        timings = [_joined([block[k] for block in blocks]) for k in range(len(bundles))]
        found = [summary(part, name, t) for name, t in zip(names, timings, strict=True)]
        for path, latency in zip(args.bundles, found, strict=True):
            assert latency is not None
            rows.append(
                f"{part:14}{latency.median_ms:10.2f}{latency.p90_ms:10.2f}{latency.min_ms:10.2f}"
                f"{latency.spread_ms:10.2f}{latency.first_ms:10.2f}{latency.load_ms:10.0f}  {path}"
            )
        entry: dict[str, Any] = {"part": part, "timings": [t.model_dump() for t in timings]}
        if len(timings) == 2:
            ratio = ratio_of([(first.times_ms, second.times_ms) for first, second in blocks])
            entry["ratio"] = ratio.__dict__
            rows.append(
                f"{'':14}the second takes {ratio.median:.3f} times as long "
                f"({ratio.low:.3f} to {ratio.high:.3f})"
            )
        told.append(entry)
    heads = ("median", "p90", "min", "spread", "first", "load")
    here = environment()
    print(f"{here.cpu}, {here.cores} cores; {options or 'default options'}; milliseconds")
    print(f"{'':14}{''.join(f'{head:>10}' for head in heads)}")
    print("\n".join(rows))
    if args.json:
        data = {"environment": here.model_dump(), "options": options, "parts": told}
        write_json(args.json, data)
    return 0
