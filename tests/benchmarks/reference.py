"""The desktop pipeline with each switch: every table of BENCHMARKS.md about it, in one command.

    python -m tests.benchmarks.reference --output reference            # on a GPU, all of it
    python -m tests.benchmarks.reference --output reference --cpu      # what a CPU has

Each table lies in a folder of its own, with a page; a table that is there already is left, so that
a killed run goes on with the next one. On a GPU the aims are told at the end, as ratios of rows of
one table. Downloads nothing: the real sizes have seeded weights.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from mobile_runtime.__main__ import main as mobile_runtime
from mobile_runtime.errors import run_cli


def _rows(*names: str) -> list[str]:
    return [word for name in names for word in ("--rows", name)]


TURBO = ["--recipe", "sd_turbo_int8", "--model", "random:sd_turbo"]
SD21 = ["--recipe", "sd21_int8", "--model", "random:sd21"]
STACK = _rows("yardstick", "cumulative", "alone")
SMALL = [
    *("exact", "diffusers float32", "diffusers half", "half", "channels_last", "fused_qkv"),
    *("attention", "tiny_decoder", "int8"),
]


TABLES: dict[str, dict[str, list[str]]] = {
    "cuda": {
        "embedded": ["--judged", "512", *_rows("yardstick", "cumulative", "alone", "batch")],
        "embedded-steps": ["--recipe", "pocket_fp32", "--judged", "512", *_rows("steps")],
        "sd_turbo": [*TURBO, "--tiny-decoder", "random"],
        "sd21-50": [*SD21, "--steps", "50", "--set", "schedule.scheduler=ddim", *STACK],
        "sd21-20": [*SD21, "--steps", "20", *STACK],
        "sd21-4": [*SD21, "--steps", "4", "--tiny-decoder", "random"],
    },
    "cpu": {
        "embedded": ["--judged", "128", *_rows("yardstick", "cumulative", "alone", "batch")],
        "embedded-steps": [
            *("--recipe", "pocket_fp32", "--judged", "64", "--rounds", "4", "--compared", "1"),
            *_rows("steps"),
        ],
        "sd_turbo-256-stack": [
            *(*TURBO, "--resolution", "256", "--compared", "1", "--rounds", "4"),
            *_rows("exact", "diffusers half", "diffusers half, compiled", "cumulative"),
        ],
        "sd_turbo-512": [
            *(*TURBO, "--compared", "1", "--rounds", "2"),
            *_rows("exact", "diffusers half", "half"),
        ],
        "sd_turbo-256": [
            *TURBO,
            *("--resolution", "256", "--tiny-decoder", "random", "--compared", "1"),
            *("--rounds", "2"),
            *_rows(*SMALL),
        ],
    },
}
# What a fast picture's time goes to: torch.profiler's table, and a trace in the table's folder.
PROFILED = {"sd_turbo": [*TURBO, "--fast"]}
# Of the table of SD-Turbo: what, of which row, over which row, and how much at least.
AIMS = (
    ("times as fast as diffusers half", "+ compile", "diffusers half", 4.0),
    ("times as fast as diffusers compiled", "+ compile", "diffusers half, compiled", 1.3),
)
PICTURES_A_SECOND = 150.0
FAST_DB = 40.0


def main() -> int:
    """Make the tables that are missing; 1 where an aim is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, also where a GPU is")
    parser.add_argument("--only", action="append", default=[], metavar="TABLE")
    args = parser.parse_args()
    device = "cpu" if args.cpu else "cuda"
    if unknown := [name for name in args.only if name not in TABLES[device]]:
        parser.error(f"--only {unknown[0]}: choose of {', '.join(TABLES[device])}")
    for name, options in TABLES[device].items():
        folder = args.output / name
        if (folder / "done").exists() or (args.only and name not in args.only):
            continue
        argv = ["reference", "bench", "--ablation", "--device", device, *options]
        print(f"python -m mobile_runtime {' '.join(argv)} -o {folder}", flush=True)
        if code := run_cli(mobile_runtime, [*argv, "-o", str(folder), "--force"]):
            return code
        profile = ["reference", "profile", "--device", device, *PROFILED.get(name, [])]
        if name in PROFILED and (
            code := run_cli(mobile_runtime, [*profile, "-o", str(folder / "trace.json"), "--force"])
        ):
            return code
        (folder / "done").touch()
    if args.only and "sd_turbo" not in args.only:
        return 0
    return _aims(args.output / "sd_turbo") if device == "cuda" else 0


def _aims(folder: Path) -> int:
    """Print each aim beside what was measured; 1 where one is missed."""
    rows: dict[str, dict[str, Any]] = {
        row["name"]: row for row in json.loads((folder / "ablation.json").read_text())["rows"]
    }
    found = []
    for what, fast, slow, least in AIMS:
        ratio = _times(rows, fast) / (_times(rows, slow) or math.inf)
        found.append((f"{ratio:.2f} {what}", ratio, least))
    most = max(r["pictures_per_second"] or 0 for r in rows.values() if "tiny" in r["name"])
    found.append((f"{most:.0f} pictures a second with the tiny decoder", most, PICTURES_A_SECOND))
    whole = rows.get("+ compile", {})
    near = math.inf if whole.get("equal") else whole.get("psnr_db") or 0.0
    found.append((f"{near:.1f} dB of fast against exact", near, FAST_DB))
    for told, value, least in found:
        print(f"{'met   ' if value >= least else 'MISSED'} {told} (aim {least:g})")
    return int(any(value < least for _, value, least in found))


def _times(rows: dict[str, dict[str, Any]], name: str) -> float:
    """How many times as fast as exact a row is; 0 where it did not run."""
    return float(rows.get(name, {}).get("times") or 0.0)


if __name__ == "__main__":
    raise SystemExit(main())
