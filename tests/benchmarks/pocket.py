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


def convert(recipe: str, target: str, folder: Path) -> tuple[Bundle, float]:
    """The bundle, made and validated by the command, and the seconds that took."""
    output = folder / f"{recipe}-{target}"
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
    parser.add_argument("--folder", type=Path, default=Path("bundles/benchmark"))
    arguments = parser.parse_args()
    bundles = {row: convert(*row, arguments.folder) for row in ROWS}
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
    print("\n| judged right, ONNX Runtime | one object | 95 % interval | pairs | 95 % interval |")
    print("|---|---|---|---|---|")
    for recipe in ("pocket_fp32", "pocket_int8"):
        bundle, _ = bundles[recipe, "onnx"]
        cells = []
        for pairs in (False, True):
            by = judged(bundle, arguments.captions, pairs)["by"]
            print(recipe, evaluate.shares({"by": by}), file=sys.stderr)
            low, high = by["together"]["interval_95"]
            cells += [f"{100 * by['together']['share']:.1f} %", f"{100 * low:.1f}-{100 * high:.1f}"]
        print(f"| {recipe} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
