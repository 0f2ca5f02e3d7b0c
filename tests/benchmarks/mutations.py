"""The harness itself: what it says of damaged bundles, and of fifty undamaged ones.

    python -m tests.benchmarks.mutations
    python -m tests.benchmarks.mutations --seeds 10

Prints a table of the damages (what was named as the first layer to diverge), and what undamaged
bundles of pipelines with other weights got. Exits with 1 where a damage was missed or misplaced, or
an undamaged bundle rejected.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from tqdm import tqdm

from converters import cli
from mobile_runtime.report import Report
from tests.benchmarks.machine import describe
from tests.converters.small import make_small_pipeline
from tests.damages import damaged
from tests.test_mutations import DAMAGES, PACKAGE_DAMAGES, RECIPE, checked


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50, metavar="N", help="undamaged bundles")
    args = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        missed = _damages(folder)
        rejected = _undamaged(folder, args.seeds)
    return int(bool(missed or rejected))


def _converted(folder: Path, target: str, seed: int) -> Path:
    """The bundle of a small pipeline with weights of that seed."""
    folder.mkdir()
    make_small_pipeline(seed).save_pretrained(folder / "model")
    (folder / "small.yaml").write_text(RECIPE.format(model=folder / "model"))
    argv = ["--recipe", str(folder / "small.yaml"), "--output", str(folder / "bundle")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(target, [*argv, "--no-validate"])
    assert code == 0
    return folder / "bundle"


def _named(report: Report) -> str:
    """The layer that a report names first."""
    named = [check for check in report.checks if check.kind == "inside" and check.status == "fail"]
    return named[0].details["layer"] if named else "-"


def _damages(folder: Path) -> int:
    """Damage bundles in every way; returns how many were missed or misplaced."""
    missed = 0
    print("\n| target | damage | verdict | first layer that diverges |\n|---|---|---|---|")
    for target, damages in (("onnx", DAMAGES), ("coreml", PACKAGE_DAMAGES)):
        bundle = _converted(folder / target, target, seed=0)
        for k, damage in enumerate(tqdm(damages, desc=target, leave=False)):
            report = checked(damaged(bundle, damage, folder / f"{target}-{k}"))
            right = report.verdict == "fail" and _named(report) == (damage.layer or "-")
            missed += not right
            told = _named(report) if right else f"{_named(report)}: WRONG, {damage.layer}"
            tqdm.write(f"| {target} | {damage.name} | {report.verdict} | {told} |")
    return missed


def _undamaged(folder: Path, seeds: int) -> int:
    """Convert pipelines of many weights; returns how many were rejected."""
    figures: dict[str, list[float]] = {}
    rejected = 0
    for seed in tqdm(range(1, seeds + 1), desc="undamaged", leave=False):
        report = checked(_converted(folder / f"seed-{seed}", "onnx", seed))
        if report.verdict != "pass":
            rejected += 1
            tqdm.write(f"seed {seed}: {report.summary}")
        for check in report.checks:
            if check.kind == "same_function" and check.value is not None:
                figures.setdefault(check.component, []).append(check.value)
    print(f"\nundamaged: {seeds - rejected} of {seeds} passed; same function, lowest and highest:")
    for component, values in figures.items():
        print(f"  {component}: {min(values):.1f} to {max(values):.1f} dB")
    return rejected


if __name__ == "__main__":
    raise SystemExit(main())
