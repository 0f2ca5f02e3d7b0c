"""Run every stage on SD-Turbo's real architecture; print seconds, peaks and what it gave.

    python -m tests.benchmarks.full_size_stages --list              # the rows, and their minutes
    python -m tests.benchmarks.full_size_stages                     # all of them
    python -m tests.benchmarks.full_size_stages --rows prune fold   # some
    python -m tests.benchmarks.full_size_stages --keep              # those that are not there yet

Each row (stage_rows.py) runs in a process of its own, one after the other, so that its peak memory
is its own: the operating system's ru_maxrss. Its figures are kept in a file beside the others, so a
run that was stopped goes on with `--keep`.

The trainings have a batch of one picture and twenty optimizer steps, at the size that the table
tells. Their students are pruned (or a LoRA): for all 866 M parameters float32 weights, gradients,
two moments, the average and the teacher are 20.8 GB, and 22.5 GB with text encoder and decoder,
before any activation.
"""

if __name__ == "__main__":
    # Before the imports below, which would chatter.
    from recipes.quiet import import_torch

    import_torch("torch", "measuring")

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import describe
from tests.benchmarks.stage_rows import REAL, ROWS

LIMIT_PEAK_BYTES = 22e9


def measure(
    name: str, folder: Path, model: str = REAL, resolution: int | None = None, iterations: int = 20
) -> dict[str, Any]:
    """Run one row; its figures, faults, seconds and peak bytes, also as `folder/NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = resolution or ROWS[name].resolution
    asked = {"model": model, "resolution": size, "iterations": iterations}
    told = folder / f"{name}.told.json"
    told.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.stage_rows", name]
    command += [part for key, value in asked.items() for part in (f"--{key}", str(value))]
    command += ["--folder", str(folder / "work"), "--json", str(told)]
    print("$", " ".join(["python", *command[1:]]), file=sys.stderr, flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    row = {
        "row": name,
        **asked,
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "figures": {},
        "faults": [f"ended with exit code {process.returncode}"],
    }
    if told.exists():
        row |= json.loads(told.read_text())
        told.unlink()
    if row["peak_bytes"] > LIMIT_PEAK_BYTES:
        row["faults"].append(f"took more than {LIMIT_PEAK_BYTES / 1e9:.0f} GB")
    (folder / f"{name}.json").write_text(json.dumps({**row, "machine": describe()}, indent=1))
    return row


def kept(name: str, folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The row of an earlier run that was asked for the same, and has no faults."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    asked = {**asked, "resolution": asked["resolution"] or ROWS[name].resolution}
    same = all(row.get(key) == value for key, value in asked.items())
    return row if same and not row["faults"] else None


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| row | what | pixels | minutes | peak GB | s a step | figures | as it should |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = dict(row["figures"])
        step = figures.pop("seconds_a_step", "")
        shown = ", ".join(
            f"{key.replace('_', ' ')} {_said(value)}" for key, value in figures.items()
        )
        verdict = "; ".join(row["faults"]) or "yes"
        lines.append(
            f"| {row['row']} | {ROWS[row['row']].what} | {row['resolution']} "
            f"| {row['seconds'] / 60:.1f} | {row['peak_bytes'] / 1e9:.1f} | {step} | {shown} "
            f"| {verdict} |"
        )
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{key} {_said(part)}" for key, part in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def main() -> int:
    """Measure, print the table, and fail when a figure is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--list", action="store_true", help="tell the rows, and run none")
    parser.add_argument("--model", default=REAL, help="another source, to see it run")
    parser.add_argument("--resolution", type=int, help="pixels; default: each row's own")
    parser.add_argument("--iterations", type=int, default=20, help="optimizer steps of a training")
    parser.add_argument("--folder", type=Path, default=Path("bundles/full_size_stages"))
    parser.add_argument("--keep", action="store_true", help="take the rows that are there")
    arguments = parser.parse_args()
    if arguments.list:
        for name in arguments.rows:
            row = ROWS[name]
            print(f"{name:12} {row.minutes:3.0f} min  {row.resolution} px  {row.what}")
        return 0
    asked = {key: getattr(arguments, key) for key in ("model", "resolution", "iterations")}
    rows = []
    for name in arguments.rows:
        found = kept(name, arguments.folder, asked) if arguments.keep else None
        rows.append(found or measure(name, arguments.folder, **asked))
    print(f"{describe()}; source {arguments.model}\n\n{as_table(rows)}")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
