"""The embedded model as bundles: sizes, parity, latency, and judged accuracy on ONNX Runtime.

    python -m tests.benchmarks.pocket                    # 512 captions; about ten minutes
    python -m tests.benchmarks.pocket --captions 64

float32 and INT8 draw the same captions from the same noise, in one run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from converters import cli
from mobile_runtime.bundle import Bundle
from mobile_runtime.pipeline import Pipeline
from recipes.pocket import evaluate
from tests.benchmarks.machine import describe

ROWS = (
    ("pocket_fp32", "onnx"),
    ("pocket_int8", "onnx"),
    ("pocket_int8", "coreml"),
    ("pocket_int8", "executorch"),
)


def convert(recipe: str, target: str, folder: Path, keep: bool) -> tuple[Bundle, float]:
    """The bundle, made and validated by the command, and the seconds that took (0 if kept)."""
    output = folder / f"{recipe}-{target}"
    if keep and output.exists():
        return Bundle.open(output), 0.0
    started = time.monotonic()
    code = cli.main(target, ["--recipe", recipe, "--output", str(output), "--force"])
    if code:
        print(f"{output} missed a gate", file=sys.stderr)
    return Bundle.open(output), time.monotonic() - started


def worst(report: dict, kind: str) -> str:
    """The lowest figure of a kind of check, over components, cases and prompts."""
    values = [c["value"] for c in report["checks"] if c["kind"] == kind and c["value"] is not None]
    return f"{min(values):.1f}" if values else "equal"


def judged(bundle: Bundle, captions: int, pairs: bool) -> dict:
    """Draw held-out captions with a bundle (caption k from seed k) and judge them."""
    cases = evaluate.held_out_scenes(captions, pairs=pairs)
    pipeline = Pipeline.from_bundle(bundle)
    bar = tqdm(cases, desc=f"{bundle.manifest.name} {'pairs' if pairs else 'one object'}")
    pictures = [pipeline(text, seed=seed).picture for seed, (text, _) in enumerate(bar)]
    return evaluate.score(np.stack(pictures), [scene for _, scene in cases])


def main() -> int:
    """Convert, judge, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--pairs", action="store_true", help="judge pairs in place of one object")
    parser.add_argument("--keep", action="store_true", help="take the bundles that are there")
    parser.add_argument("--folder", type=Path, default=Path("bundles/benchmark"))
    arguments = parser.parse_args()
    bundles = {row: convert(*row, arguments.folder, arguments.keep) for row in ROWS}
    print(f"{describe()}\n")
    print(
        "| recipe | target | seconds | models MB | component SNR dB | picture PSNR dB | verdict |"
    )
    print("|---|---|---|---|---|---|---|")
    for (recipe, target), (bundle, seconds) in bundles.items():
        report = json.loads((bundle.path / "report.json").read_text())
        size = sum(entry.bytes for entry in bundle.manifest.components) / 1e6
        print(
            f"| {recipe} | {target} | {seconds:.0f} | {size:.1f} | "
            f"{worst(report, 'same_function')} | {worst(report, 'picture')} | {report['verdict']} |"
        )
    what = "pairs" if arguments.pairs else "one object"
    print(f"\n| ONNX Runtime | {what}, judged right of {arguments.captions} | 95 % interval |")
    print("|---|---|---|")
    for recipe in ("pocket_fp32", "pocket_int8"):
        bundle, _ = bundles[recipe, "onnx"]
        by = judged(bundle, arguments.captions, arguments.pairs)["by"]
        print(recipe, evaluate.shares({"by": by}), file=sys.stderr)
        share, interval = by["together"]["share"], by["together"]["interval_95"]
        low, high = (f"{100 * bound:.1f}" for bound in interval)
        print(f"| {recipe} | {100 * share:.1f} % | {low}-{high} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
