"""The report as one HTML page: no script, no network, light and dark, narrow and wide."""

import base64
import io
import math
import re
import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from mobile_runtime.gates import told_gates
from mobile_runtime.latency import Environment, Latency
from mobile_runtime.manifest import LayerPlan
from mobile_runtime.report import (
    PIPELINE,
    Check,
    Pictures,
    Report,
    component_rows,
    decibel,
    prompt_rows,
    row_status,
)
from mobile_runtime.report_plots import HIGHEST_DB, STYLE, Bar, bars, parity_bar, short, step_lines

# One level of 255 shows as 32, which an eye can find on black.
AMPLIFIED = 32
# The page stays small enough to be sent around.
PICTURE_BYTES = 2_000_000
EXACT_PIXELS = 256
_WORDS = {"pass": "Pass", "fail": "Fail", "not_run": "Not run", "not_gated": "Not gated"}

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --soft: #5b6472;
  --line: #dfe3e9; --pass: #12703c; --fail: #b3201d; --not_run: #8a5a00; --not_gated: #5b6472; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1b1f26; --ink: #e8ebf0;
  --soft: #98a2b3; --line: #303743; --pass: #55c98a; --fail: #ff8680; --not_run: #e3b052;
  --not_gated: #98a2b3; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2rem 0 .6rem; font-size: 1.1rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .875rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1rem; overflow-wrap: break-word; }
code, dd { overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
.verdict { border-left: .4rem solid var(--tone); }
.tone { color: var(--tone); font-weight: 600; white-space: nowrap; }
.pass { --tone: var(--pass); } .fail { --tone: var(--fail); }
.not_run { --tone: var(--not_run); } .not_gated { --tone: var(--not_gated); }
.pictures { display: grid; gap: .75rem; grid-template-columns: repeat(4, minmax(0, 1fr)); }
@media (max-width: 36rem) { .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; } figcaption { font-size: .8125rem; color: var(--soft); margin-top: .25rem; }
figure img { display: block; width: 100%; aspect-ratio: var(--ratio); border-radius: .4rem;
  background: #000; } .small img { image-rendering: pixelated; }
.prompt + .prompt { margin-top: .75rem; } .prompt > p { margin: 0 0 .6rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .75rem .45rem 0;
  border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; } th { font-weight: 600; color: var(--soft);
  font-size: .8125rem; }
td { font-variant-numeric: tabular-nums; } td:last-child, th:last-child { padding-right: 0; }
td small { display: block; color: var(--soft); font-size: .8125rem; }
td:first-child, td:last-child small { overflow-wrap: anywhere; } td:first-child { min-width: 6rem; }
@media (max-width: 30rem) { .wide { display: none; } main { padding: .75rem .75rem 2rem; }
  .card { padding: .75rem; } table { font-size: .8125rem; } th, td { padding-right: .5rem; }
  th, td small { font-size: .75rem; }
  details tr { display: block; border-top: 1px solid var(--line); padding: .4rem 0; }
  details tr:first-child { display: none; } details td { display: block; border: 0; padding: 0; } }
details td { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(5.5rem, max-content) minmax(0, 1fr);
  gap: .3rem 1rem; margin: 0; font-size: .9rem; } dt { color: var(--soft); } dd { margin: 0; }
summary { cursor: pointer; } details .scroll { margin-top: .5rem; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .875em; }
"""


def render(report: Report) -> str:
    """The whole page, its pictures inside."""
    title = f"{report.bundle} for {report.target}"
    sections = [_head(report, title), _inside(report), _pictures(report)]
    sections += [_components(report), _prompts(report), _desktop(report)]
    sections += [_steps(report), _latency(report), _sizes(report), _plan(report)]
    sections += [_all_checks(report), _environment(report), _again(report)]
    return page(f"{title}: {_WORDS[report.verdict]}", "".join(sections))


def page(title: str, content: str) -> str:
    """A whole page in the report's style. title: plain text. content: HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        f"<style>{_STYLE}{STYLE}</style></head>"
        f"<body><main>{content}</main></body></html>\n"
    )


def _head(report: Report, title: str) -> str:
    told = escape(told_gates(report.asked_gates))
    asked = f"<p>Gates from the command line: {told}.</p>" if told else ""
    return (
        f'<header class="card verdict {report.verdict}"><h1>{escape(title)}: '
        f'<span class="tone">{_WORDS[report.verdict]}</span></h1>'
        f"<p>{escape(report.summary)}.</p>{asked}"
        f'<p class="soft">{escape(report.created)} · manifest SHA-256 '
        f"<code>{escape(report.manifest_sha256[:16])}…</code></p></header>"
    )


def _inside(report: Report) -> str:
    """Where a component that failed first leaves PyTorch, and the values on the way there."""
    cards = []
    for check in report.checks:
        if check.kind != "inside" or check.status != "fail":
            continue
        plot = ""
        if now := check.details.get("snr_db"):
            series = [("now", now), ("at conversion", check.details["snr_db_at_conversion"])]
            note = (
                f'<p class="soft">SNR in dB against PyTorch of {len(now)} values inside, in the '
                "order of execution; dashed: at conversion.</p>"
            )
            plot = step_lines(series, "of the values inside", dashed="at conversion") + note
        cards.append(
            f'<div class="card prompt"><p><b>{escape(check.component)}</b> in '
            f"{escape(check.runtime)}: {escape(check.reason)}</p>{plot}</div>"
        )
    return f"<h2>Where it goes wrong</h2>{''.join(cards)}" if cards else ""


def _pictures(report: Report) -> str:
    if not report.pictures:
        return ""
    prompts: dict[tuple[str, int], list[Pictures]] = {}
    for pictures in report.pictures:
        prompts.setdefault((pictures.prompt, pictures.seed), []).append(pictures)
    cards, letters = list[str](), 0
    for runs in prompts.values():
        card = _prompt_card(runs)
        letters += len(card)
        if letters > PICTURE_BYTES:
            break
        cards.append(card)
    left = len(prompts) - len(cards)
    more = f'<p class="soft">{left} more are in the table below, without pictures.</p>'
    return "<h2>Golden pictures</h2>" + "".join(cards) + (more if left else "")


def _prompt_card(runs: list[Pictures]) -> str:
    """One prompt: its two references, then what each runtime made and how far that is."""
    first = runs[0]
    height, width = first.reference.shape[:2]
    small = " small" if max(height, width) < 256 else ""
    shown = [
        (first.source, "Source, fp32", "the pipeline before the stages"),
        (first.reference, "Reference", "PyTorch after the stages, same function"),
    ]
    for name, picture in first.desktop:
        shown.append((picture, escape(name), "the desktop pipeline"))
    for pictures in runs:
        shown.append((pictures.output, escape(pictures.runtime), "this bundle's files"))
        if pictures.output.shape != pictures.reference.shape:
            continue
        error = np.abs(pictures.output.astype(np.int16) - pictures.reference.astype(np.int16))
        difference = np.minimum(error * AMPLIFIED, 255).astype(np.uint8)
        caption = f"at most {error.max()} of 255 apart" if error.any() else "equal in every pixel"
        shown.append((difference, f"Difference × {AMPLIFIED}", caption))
    figures = "".join(
        f'<figure><img src="{_data_uri(array)}" alt="{name}">'
        f"<figcaption><b>{name}</b><br>{caption}</figcaption></figure>"
        for array, name, caption in shown
    )
    return (
        f'<section class="card prompt{small}" style="--ratio: {width} / {height}">'
        f'<p>“{escape(first.prompt)}” <span class="soft">seed {first.seed}</span></p>'
        f'<div class="pictures">{figures}</div></section>'
    )


def _data_uri(picture: np.ndarray) -> str:
    """A picture as part of the page: as it is if it is small, else as a JPEG."""
    stream = io.BytesIO()
    if max(picture.shape) <= EXACT_PIXELS:
        kind, options = "png", {}
    else:
        kind, options = "jpeg", {"quality": 85}
    Image.fromarray(picture).save(stream, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()


def _named(name: str, runtime: str) -> str:
    """A component and what ran it; a phone may break the name at an underscore."""
    return f"{escape(name).replace('_', '_<wbr>')}<small>{escape(runtime)}</small>"


def verdict_mark(status: str) -> str:
    """A verdict or a check's status, in its colour."""
    return f'<span class="tone {status}">{_WORDS[status]}</span>'


def _figure(check: Check | None) -> str:
    """A figure, and under it what it is held against."""
    if check is None:
        return "–"
    if check.status == "not_run":
        return "not run"
    gate = f"gate {check.gate:g} dB" if check.gate is not None else "not gated"
    return f"{decibel(check).replace('-', '–')}<small>{gate}</small>"


def table(header: list[str], rows: list[list[str]], wide: tuple[int, ...] = ()) -> str:
    """A table of HTML cells. wide: the columns that a phone leaves out."""
    css = [' class="wide"' if i in wide else "" for i in range(len(header))]
    head = "".join(f"<th{c}>{cell}</th>" for c, cell in zip(css, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(css, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _components(report: Report) -> str:
    rows = []
    for row in component_rows(report):
        first = next(iter(row.values()))
        same, repeat = row.get("same_function"), row.get("repeat")
        largest = f"{same.max_abs:.1e}" if same and same.max_abs is not None else "–"
        again = {"pass": "equal", "fail": "differs"}.get(repeat.status, "–") if repeat else "–"
        rows.append(
            [
                _named(first.component, first.runtime),
                _figure(same),
                _figure(row.get("source")),
                largest,
                again,
                verdict_mark(row_status(row)),
            ]
        )
    header = ["Component", "Same function", "Source", "Max abs error", "Run twice", "Verdict"]
    legend = '<p class="soft">Same function, in dB; the mark is the gate.</p>'
    note = (
        '<p class="soft">The worst golden case, SNR with the power of the reference. Same function '
        "is the PyTorch module after the stages: it judges the conversion. Source is the fp32 "
        "pipeline before them: it judges the recipe.</p>"
    )
    parity = [
        parity_bar(check.component, check.runtime, check.value, check.equal, check.gate)
        for check in report.checks
        if check.kind == "same_function"
    ]
    plot = f"{bars(parity, HIGHEST_DB)}{legend}" if parity else ""
    shown = table(header, rows, wide=(3, 4))
    return f'<h2>Components</h2><div class="card">{plot}{shown}{note}</div>'


def _prompts(report: Report) -> str:
    rows = []
    for row in prompt_rows(report):
        first = next(iter(row.values()))
        prompt = "–" if first.prompt is None else str(first.prompt)
        rows.append(
            [
                _named(f"prompt {prompt}", first.runtime),
                _figure(row.get("picture")),
                _figure(row.get("source_picture")),
                decibel(row.get("trajectory")).replace("-", "–"),
                verdict_mark(row_status(row)),
            ]
        )
    if not rows:
        return ""
    header = ["Pipeline", "Picture PSNR", "Source", "Latents, worst step", "Verdict"]
    return f'<h2>Whole pipeline</h2><div class="card">{table(header, rows, wide=(3,))}</div>'


def _desktop(report: Report) -> str:
    """How far the pictures are from the desktop pipeline's, and its own two from each other."""
    checks = [check for check in report.checks if check.kind == "reference"]
    if not checks:
        return ""
    heads = list(dict.fromkeys(check.details["against"] for check in checks))
    rows: dict[tuple[int | None, str], dict[str, Check]] = {}
    for check in checks:
        rows.setdefault((check.prompt, check.runtime), {})[check.details["against"]] = check
    cells = [
        [_named(f"prompt {prompt}", runtime), *(decibel(row.get(head)) for head in heads)]
        for (prompt, runtime), row in rows.items()
    ]
    shown = table(["Picture", *(f"PSNR to {escape(head)}" for head in heads)], cells)
    note = '<p class="soft">The same prompts and noise on the desktop. Measured, not gated.</p>'
    return f'<h2>Beside the desktop pipeline</h2><div class="card">{shown}{note}</div>'


def _steps(report: Report) -> str:
    """How the latents drift from the reference's, step by step, where there are steps."""
    series = [
        (f"prompt {check.prompt} in {check.runtime}", check.details["snr_db_by_step"])
        for check in report.checks
        if check.kind == "trajectory" and check.details.get("snr_db_by_step")
    ]
    if not series or max(len(own) for _, own in series) < 2:
        return ""
    note = (
        '<p class="soft">SNR of the latents in dB against the reference, after each step; a line '
        "for each prompt and runtime.</p>"
    )
    return f'<h2>Step by step</h2><div class="card">{step_lines(series)}{note}</div>'


def _latency(report: Report) -> str:
    if not report.latency:
        return ""
    rows = [
        [
            _named(row.component, row.runtime) + _parts(row),
            f"{short(row.median_ms)} ms",
            f"{short(row.p90_ms)} ms",
            f"{short(row.min_ms)} ms",
            f"{short(row.first_ms)} ms",
            f"{short(row.load_ms, 0)} ms",
            f"{row.repeats} after {row.warm_up}",
        ]
        for row in report.latency
    ]
    shown = table(
        ["Component", "Median", "p90", "Min", "First call", "Load", "Repeats after warm-up"],
        rows,
        wide=(3, 4, 6),
    )
    note = (
        '<p class="soft">One call on the machine named below; pipeline: a whole picture. The bar '
        "is the median, the line from the least to nine tenths. Measured, not gated.</p>"
    )
    times = [
        Bar(
            row.component,
            row.runtime,
            row.median_ms,
            row.min_ms,
            row.p90_ms,
            f"{short(row.median_ms)} ms",
        )
        for row in report.latency
    ]
    chart = bars(times)
    return f'<h2>Latency</h2><div class="card">{chart}{shown}{note}</div>'


def _parts(row: Latency) -> str:
    """What a whole picture is made of: each model's calls, the UNet's being the steps; memory."""
    told = []
    for name, times in row.parts_ms.items():
        calls = f"{len(times)} calls, {short(min(times))} to {short(max(times))} ms each"
        told.append(f"{name} {short(times[0])} ms" if len(times) == 1 else f"{name} {calls}")
    if row.component == PIPELINE and row.peak_bytes is not None:
        told.append(f"{short(row.peak_bytes / 1e6, 0)} MB at most")
    return f"<small>{escape('; '.join(told))}</small>" if told else ""


def _sizes(report: Report) -> str:
    if not report.sizes:
        return ""
    peaks = {
        (row.component, row.runtime): row.peak_bytes for row in report.latency if row.peak_bytes
    }
    rows = [
        [
            escape(size.component).replace("_", "_<wbr>"),
            f"{short(size.parameters / 1e6, 2)} M",
            f"{short(size.bytes / 1e6)} MB",
            short(size.macs / 1e9, 2),
            escape(size.scheme),
            "<br>".join(
                f"{short(peak / 1e6, 0)} MB<small>{escape(runtime)}</small>"
                for (component, runtime), peak in peaks.items()
                if component == size.component
            )
            or "–",
        ]
        for size in report.sizes
    ]
    header = ["Component", "Parameters", "Model", "GMACs a call", "Scheme", "Peak memory"]
    return f'<h2>Size and memory</h2><div class="card">{table(header, rows, wide=(3, 4))}</div>'


def _plan(report: Report) -> str:
    """The quantization by layer; those of which a sensitivity is told first, the worst on top."""
    if not report.quantization:
        return ""

    def rank(plan: LayerPlan) -> float:
        found = re.search(r"sensitivity (-?[\d.]+) dB", plan.reason)
        return float(found[1]) if found else math.inf

    rows = [
        [
            f"<code>{escape(plan.layer)}</code>",
            escape(plan.weights),
            escape(plan.activations.replace("_", " ")),
            escape(plan.reason),
        ]
        for plan in sorted(report.quantization, key=rank)
    ]
    shown = table(["Layer", "Weights", "Activations", "Why"], rows)
    label = f"{len(rows)} layers, the most sensitive first"
    return (
        f'<h2>Quantization plan</h2><details class="card"><summary>{label}</summary>{shown}'
        "</details>"
    )


def _again(report: Report) -> str:
    command = " ".join(
        ["python -m mobile_runtime validate BUNDLE", *map(shlex.quote, report.asked)]
    )
    return (
        f'<h2>How to run it again</h2><div class="card"><code>{escape(command)}</code>'
        f'<p class="soft">BUNDLE: the folder whose manifest.json has the SHA-256 '
        f"<code>{escape(report.manifest_sha256)}</code>.</p></div>"
    )


def _all_checks(report: Report) -> str:
    rows = [
        [
            _named(check.component, check.runtime),
            escape(check.kind.replace("_", " ")),
            verdict_mark(check.status) + ("" if check.gated else "<small>no gate</small>"),
            escape(check.reason),
        ]
        for check in report.checks
    ]
    shown = table(["Where", "Check", "Verdict", "Why"], rows)
    label = f"All {len(rows)} checks"
    return f'<h2>Details</h2><details class="card"><summary>{label}</summary>{shown}</details>'


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "its own defaults"


def _threads(there: Environment) -> str:
    """What was asked of all libraries; a runtime's own `threads` is among its options."""
    return ", ".join(f"{k}={v}" for k, v in there.threads.items()) or "each library's own"


def _environment(report: Report) -> str:
    here = report.environment
    facts = {
        "CPU": f"{here.cpu}, {here.cores} cores ({here.machine})",
        "CPU features": ", ".join(here.cpu_flags) or "none of those that matter",
        "System": here.system,
        "Runtime's options": _options(report.options),
        "Threads": _threads(here),
        "Libraries": ", ".join(f"{k} {v}" for k, v in here.libraries.items()),
        "Python": here.python,
        "Manifest": report.manifest_sha256,
    }
    cards = [("Where this was " + ("judged" if report.devices else "measured"), facts)]
    for device in report.devices:
        there = device.environment
        memory = f", {short(device.memory_bytes / 1e9)} GB" if device.memory_bytes else ""
        cards.append(
            (
                f"Where it ran: {device.name}",
                {
                    "Device": device.model + (", emulated" if device.emulated else ""),
                    "CPU": f"{there.cpu}, {there.cores} cores ({there.machine}){memory}",
                    "CPU features": ", ".join(there.cpu_flags) or "none of those that matter",
                    "System": there.system,
                    "Runtime's options": _options(device.options),
                    "Threads": _threads(there),
                    "Heat": device.thermal or "not told",
                    "Libraries": ", ".join(f"{k} {v}" for k, v in there.libraries.items()),
                },
            )
        )
    return "".join(
        f'<h2>{escape(title)}</h2><div class="card"><dl>'
        + "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in told.items())
        + "</dl></div>"
        for title, told in cards
    )
