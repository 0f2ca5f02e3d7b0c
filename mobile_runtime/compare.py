"""`python -m mobile_runtime compare REPORT…`: reports of several devices or recipes on one page."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mobile_runtime.arguments import check_new_file
from mobile_runtime.bundle import MANIFEST, Bundle
from mobile_runtime.errors import UserError
from mobile_runtime.gates import told_gates
from mobile_runtime.parity import Status
from mobile_runtime.report import (
    PIPELINE,
    REPORT_JSON,
    Check,
    Report,
    load_report,
    read_report,
    write_atomically,
)
from mobile_runtime.report_html import page, table, verdict_mark
from mobile_runtime.report_plots import Bar, bars, short

OUTPUT = "compare.html"


@dataclass(frozen=True)
class Line:
    """One runtime of one report: what the comparison tells of it."""

    bundle: str
    runtime: str
    verdict: str
    model_bytes: int
    worst: dict[str, Check]
    picture: Check | None
    gates: str
    times_ms: dict[str, tuple[float, float, float]]

    @property
    def name(self) -> str:
        """Of the line, in tables and plots."""
        return f"{self.bundle}: {self.runtime}"


def lines_of(reports: Sequence[Report]) -> list[Line]:
    """A line for each runtime of each report, in order."""
    return [line for report in reports for line in _lines(report)]


def _lines(report: Report) -> list[Line]:
    found = []
    runtimes = dict.fromkeys(check.runtime for check in report.checks if check.kind == "outputs")
    for runtime in runtimes:
        # What belongs to no runtime, a baseline say, counts for each.
        checks = [c for c in report.checks if c.runtime == runtime or c.runtime not in runtimes]
        gated = {check.status for check in checks if check.gated}
        order: tuple[Status, ...] = ("fail", "not_run", "pass")
        same = [check for check in checks if check.kind == "same_function"]
        pictures = [check for check in checks if check.kind == "picture"]
        found.append(
            Line(
                bundle=f"{report.bundle} for {report.target}",
                runtime=", ".join(filter(None, [runtime, _processor(report, runtime)])),
                verdict=next((status for status in order if status in gated), "not_run"),
                model_bytes=sum(size.bytes for size in report.sizes),
                worst={check.component: check for check in same if check.runtime == runtime},
                picture=min(pictures, key=_decibels, default=None),
                gates=told_gates(report.asked_gates),
                times_ms={
                    row.component: (row.median_ms, row.min_ms, row.p90_ms)
                    for row in report.latency
                    if row.runtime == runtime
                },
            )
        )
    return found


def _worst(line: Line) -> Check | None:
    """The component that is furthest from its reference."""
    return min(line.worst.values(), key=_decibels, default=None)


def _decibels(check: Check) -> float:
    return float("inf") if check.equal else check.value if check.value is not None else 0.0


def _processor(report: Report, runtime: str) -> str:
    """Of the device that the runtime's name ends in, if it told; without one, of this machine."""
    for device in report.devices:
        if runtime.endswith(f" on {device.name}"):
            return device.model + (", emulated" if device.emulated else "")
    return "" if " on " in runtime else report.environment.cpu


def render(lines: Sequence[Line]) -> str:
    """The whole page."""
    components = list(dict.fromkeys(name for line in lines for name in line.worst))
    timed = list(dict.fromkeys(name for line in lines for name in line.times_ms))
    header = ["Bundle and runtime", "worst", *map(escape, components), "picture", "models"]
    header.append("Verdict")
    rows = [
        [
            f"{_breakable(line.bundle)}<small>{escape(line.runtime)}</small>",
            _told(_worst(line)),
            *(_told(line.worst.get(name)) for name in components),
            _told(line.picture),
            _megabytes(line),
            verdict_mark(line.verdict)
            + (f"<small>gates asked: {_breakable(line.gates)}</small>" if line.gates else ""),
        ]
        for line in lines
    ]
    wide = tuple(range(2, 2 + len(components)))
    sections = [
        "<h1>Bundles and devices beside each other</h1>",
        f'<h2>Parity</h2><div class="card">{table(header, rows, wide=wide)}'
        '<p class="soft">SNR of each component against PyTorch after the stages, and PSNR of the '
        "worst golden picture, in dB.</p></div>",
    ]
    for name in timed:
        shown = [
            Bar(
                line.bundle,
                line.runtime,
                *line.times_ms[name],
                f"{short(line.times_ms[name][0])} ms",
            )
            for line in lines
            if name in line.times_ms
        ]
        title = "Latency of a picture" if name == PIPELINE else f"Latency of {escape(name)}"
        sections.append(f'<h2>{title}</h2><div class="card">{bars(shown)}</div>')
    sizes = [
        Bar(line.bundle, line.runtime, line.model_bytes, label=_megabytes(line)) for line in lines
    ]
    sections.append(f'<h2>Size of the models</h2><div class="card">{bars(sizes)}</div>')
    note = (
        '<p class="soft">Each report was measured by itself: times of different machines, or of '
        "different moments of one, say which is faster only roughly. For a ratio, take "
        "<code>python -m mobile_runtime bench ONE OTHER</code> on one machine.</p>"
    )
    return page("Bundles and devices", "".join(sections) + note)


def _breakable(name: str) -> str:
    """A name as HTML that may be broken at its underscores."""
    return escape(name).replace("_", "_<wbr>")


def _megabytes(line: Line) -> str:
    return f"{short(line.model_bytes / 1e6)} MB"


def _told(check: Check | None) -> str:
    if check is None:
        return "–"
    if check.equal:
        return "equal"
    return "–" if check.value is None else short(check.value)


def format_lines(lines: Sequence[Line]) -> str:
    """The comparison as a short table for a terminal."""
    rows = [("bundle and runtime", "worst component", "picture", "a picture", "models", "verdict")]
    for line in lines:
        worst = _worst(line)
        whole = line.times_ms.get(PIPELINE)
        rows.append(
            (
                line.name,
                f"{worst.component} {_told(worst)}".replace("–", "-") if worst else "-",
                _told(line.picture).replace("–", "-"),
                f"{short(whole[0])} ms" if whole else "-",
                _megabytes(line),
                line.verdict + (f" (gates asked: {line.gates})" if line.gates else ""),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m mobile_runtime compare`."""
    parser.add_argument(
        "reports", metavar="REPORT", nargs="+", type=Path, help="a report.json, or its folder"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(OUTPUT),
        metavar="FILE",
        help=f"the page to write (default: {OUTPUT})",
    )
    parser.add_argument("--force", action="store_true", help="replace a page that exists")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")


def run(args: argparse.Namespace) -> int:
    """Write the page, print the table. Returns 0; a verdict is the reports' own."""
    reports = [load_report(_file(path)) for path in args.reports]
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {args.output} is no .html file; name one, say {OUTPUT}")
    check_new_file(args.output, "--output", args.force)
    for path, report in zip(args.reports, reports, strict=True):
        if not _lines(report):
            raise UserError(f"{path} tells of no model that was run; validate the bundle again")
    lines = lines_of(reports)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, render(lines))
    if args.json:
        print(json.dumps([_as_json(line) for line in lines], indent=1))
    else:
        print(f"{format_lines(lines)}\npage: {args.output}")
    return 0


def _file(path: Path) -> Path:
    """The report that a path means."""
    if path.is_dir():
        if (path / REPORT_JSON).is_file():
            if (path / MANIFEST).is_file():  # of another bundle it says nothing of this one
                read_report(Bundle.open(path, verify=False))
            return path / REPORT_JSON
        if (path / MANIFEST).is_file():
            raise UserError(
                f"{path} has not been validated; run: python -m mobile_runtime validate {path}"
            )
        raise UserError(f"{path} holds no {REPORT_JSON}; name the folder of a report")
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a report.json, or the folder of one")
    return path


def _as_json(line: Line) -> dict[str, object]:
    return {
        "bundle": line.bundle,
        "runtime": line.runtime,
        "verdict": line.verdict,
        "gates_asked": line.gates,
        "model_bytes": line.model_bytes,
        "same_function": {
            name: {"snr_db": check.value, "equal": check.equal}
            for name, check in line.worst.items()
        },
        "picture_psnr_db": line.picture.value if line.picture else None,
        "median_ms": {name: times[0] for name, times in line.times_ms.items()},
    }
