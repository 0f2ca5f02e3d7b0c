"""Convert and validate SD-Turbo's real architecture for every target; print times, peaks, sizes.

    python -m tests.benchmarks.full_size                 # all three targets, about half an hour
    python -m tests.benchmarks.full_size onnx --keep     # one target; keep the bundle

Each conversion runs in a process of its own, one after the other, so that its peak memory is its
own. The peak is the operating system's (ru_maxrss of the waited-for process, validation included).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mobile_runtime.bundle import Bundle
from tests.benchmarks.machine import describe

TARGETS = ("onnx", "coreml", "executorch")
LIMIT_S, LIMIT_PEAK_BYTES, LIMIT_SHARE = 15 * 60, 14e9, 0.27


def measure(target: str, recipe: str, model: str, output: Path) -> dict[str, object]:
    """Run one conversion; its exit code, seconds, peak bytes, and the bundle's sizes."""
    command = [sys.executable, "-m", f"converters.{target}", "--recipe", recipe]
    command += ["--model", model, "--output", str(output), "--force"]
    print("$", " ".join(["python", *command[1:]]), file=sys.stderr)
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    result: dict[str, object] = {
        "target": target,
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    if output.exists():
        bundle = Bundle.open(output, verify=False)
        entries = bundle.manifest.components
        fp32_bytes = 4 * sum(entry.parameters for entry in entries)
        model_bytes = sum(entry.bytes for entry in entries)
        report = json.loads((output / "report.json").read_text())
        result |= {
            "model_bytes": model_bytes,
            "bundle_bytes": sum(entry.bytes for entry in bundle.manifest.files),
            "share_of_fp32": round(model_bytes / fp32_bytes, 4),
            "verdict": report["verdict"],
        }
    return result


def main() -> int:
    """Measure, print the table, and fail when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", default=[], metavar="TARGET", help=f"of {TARGETS}")
    parser.add_argument("--recipe", default="sd_turbo_int8")
    parser.add_argument("--model", default="random:sd_turbo")
    parser.add_argument("--folder", type=Path, default=Path("bundles/full_size"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--keep", action="store_true", help="keep the bundles")
    arguments = parser.parse_args()
    results = []
    for target in arguments.targets or TARGETS:
        output = arguments.folder / f"{arguments.recipe}-{target}"
        results.append(measure(target, arguments.recipe, arguments.model, output))
        if not arguments.keep:
            shutil.rmtree(output, ignore_errors=True)
    print(f"{describe()}\n")
    print("| target | verdict | minutes | peak GB | models MB | of fp32 |")
    print("|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['target']} | {row.get('verdict', 'none')} | {row['seconds'] / 60:.1f} "
            f"| {row['peak_bytes'] / 1e9:.1f} | {row.get('model_bytes', 0) / 1e6:.0f} "
            f"| {100 * row.get('share_of_fp32', 0):.1f} % |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe(), "rows": results}, indent=1))
    return 0 if all(_within(row) for row in results) else 1


def _within(row: dict) -> bool:
    return (
        row["exit_code"] == 0
        and row.get("verdict") == "pass"
        and row["seconds"] <= LIMIT_S
        and row["peak_bytes"] <= LIMIT_PEAK_BYTES
        and row["share_of_fp32"] <= LIMIT_SHARE
    )


if __name__ == "__main__":
    sys.exit(main())
