"""The harness's times of an ExecuTorch bundle beside the runtime's bare call.

    python -m converters.executorch --recipe pocket_turbo_int8 -o build/et
    python -m tests.benchmarks.executorch_clock build/et

ExecuTorch's own clock, the event tracer, is not in the builds on PyPI. This stands in its place as
far as it can: the harness's call (arrays in, arrays out) and `Method.execute` alone on tensors that
are ready take turns in one run; the ratio tells what the harness adds.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mobile_runtime.bench import Call, alternate, ratio_of
from mobile_runtime.bundle import Bundle
from mobile_runtime.goldens import golden_cases
from mobile_runtime.latency import Clock
from tests.benchmarks.machine import describe


class Bare:
    """`Method.execute` of a component, loaded by ExecuTorch's Python runtime and nothing else."""

    def __init__(self, bundle: Bundle, name: Any) -> None:
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime, Verification

        entry = bundle.component(name)
        path = bundle.file(entry.path)
        self._program = Runtime.get().load_program(path, verification=Verification.Minimal)
        self._method = self._program.load_method("forward")
        inputs = golden_cases(bundle, entry.name)[0].inputs
        self._tensors = [torch.from_numpy(inputs[spec.name].copy()) for spec in entry.inputs]
        self.load_ms = 0.0

    def milliseconds(self, clock: Clock = time.perf_counter) -> float:
        """Of one call."""
        began = clock()
        self._method.execute(self._tensors)
        return 1000 * (clock() - began)


def main() -> None:
    """Print one line a component."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    print(describe())
    for entry in bundle.manifest.components:
        calls: list[Any] = [Call(bundle, entry.name, "executorch", {}), Bare(bundle, entry.name)]
        harness, bare = (
            each.times_ms for each in alternate(calls, args.rounds, pause=lambda seconds: None)
        )
        ratio = ratio_of([(bare, harness)])
        print(
            f"{entry.name:14} {statistics.median(bare):7.3f} ms; harness over it: "
            f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}, 95 %), {args.rounds} rounds",
            flush=True,
        )


if __name__ == "__main__":
    main()
