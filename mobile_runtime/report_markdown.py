"""A report as Markdown, for a pull request or a CI job's summary."""

from mobile_runtime.gates import told_gates
from mobile_runtime.report import (
    Report,
    component_rows,
    decibel,
    prompt_rows,
    row_status,
)
from mobile_runtime.report_plots import short

WORDS = {"pass": "pass", "fail": "**FAIL**", "not_run": "*not run*", "not_gated": "no gate"}


def render(report: Report) -> str:
    """The verdict, the components, the pictures, the times, and what failed or was not run."""
    lines = [f"### {_text(report.bundle)} for {report.target}: {WORDS[report.verdict]}", ""]
    lines += [_text(report.summary), ""]
    if report.asked_gates:
        lines += [f"Gates from the command line: {_text(told_gates(report.asked_gates))}", ""]
    lines += _table(
        ("component", "runtime", "same function", "source", "verdict"),
        [
            (
                first.component,
                first.runtime,
                decibel(row.get("same_function")),
                decibel(row.get("source")),
                WORDS[row_status(row)],
            )
            for row in component_rows(report)
            for first in [next(iter(row.values()))]
        ],
    )
    lines += _table(
        ("prompt", "runtime", "picture", "against the source", "verdict"),
        [
            (
                "-" if first.prompt is None else str(first.prompt),
                first.runtime,
                decibel(row.get("picture")),
                decibel(row.get("source_picture")),
                WORDS[row_status(row)],
            )
            for row in prompt_rows(report)
            for first in [next(iter(row.values()))]
        ],
    )
    lines += _table(
        ("part", "runtime", "median ms", "p90 ms", "first call ms", "peak MB"),
        [
            (
                row.component,
                row.runtime,
                short(row.median_ms),
                short(row.p90_ms),
                short(row.first_ms),
                short(row.peak_bytes / 1e6, 0) if row.peak_bytes else "-",
            )
            for row in report.latency
        ],
    )
    wrong = [
        f"- {WORDS[check.status]}: {check.component} in {check.runtime}: {_text(check.reason)}"
        for check in report.checks
        if check.status == "not_run" or (check.gated and check.status == "fail")
    ]
    lines += [*wrong, ""] if wrong else []
    here = report.environment
    lines.append(
        f"<sub>{_text(here.cpu)}, {report.created}, manifest {report.manifest_sha256[:12]}</sub>"
    )
    return "\n".join(lines) + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    cells = [heads, ("---",) * len(heads), *rows]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in cells] + [""]


def _cell(text: str) -> str:
    return text if text in WORDS.values() else _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Text that Markdown shows as it is."""
    for letter in ("\\", "`", "<", "*", "_", "["):
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())
