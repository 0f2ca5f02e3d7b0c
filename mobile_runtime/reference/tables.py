"""The ablation for people: a Markdown table, and a page of bars that needs no script."""

from collections.abc import Sequence
from html import escape
from typing import Any

from mobile_runtime.report_plots import STYLE, Bar, bars

TITLES = {
    "yardstick": "Yardsticks",
    "cumulative": "One switch more each",
    "alone": "Each switch alone",
    "batch": "Several pictures at a time",
    "steps": "Fewer steps, with all that keeps the picture on",
}
HEADS = (
    *(
        "row",
        "steps",
        "s a picture",
        "p90",
        "s by GPU events",
        "times as fast as exact",
        "pictures a second",
    ),
    *("peak MB", "first call, s", "PSNR dB", "SSIM", "judged", "floor, s"),
)
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1c1c1e; --soft: #5c5c66; --paper: #fff; --line: #ddd; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #f2f2f4; --soft: #a9a9b3; --paper: #17171a;
  --line: #3a3a40; }} }}
body {{ font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 64rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .875rem; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} p, li {{ color: var(--soft); }}
{style}</style></head><body>{body}</body></html>
"""


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str, scale: float = 1.0) -> str:
        value = row[key]
        return "" if value is None else format(scale * value, form)

    if row["status"] != "done":
        return [row["name"], str(row["steps"]), row["status"], *[""] * (len(HEADS) - 3)]
    times = number("times", ".2f")
    if row["times_low"] is not None:
        times += f" ({row['times_low']:.2f}-{row['times_high']:.2f})"
    judged = number("judged", ".1f", 100)
    first = number("first_s", ".3g")
    if row["compiled"]:
        first += f", {row['compiled']} compiled"
    elif "compile" in row["switches"]:
        first += ", kernels kept"
    return [
        row["name"],
        str(row["steps"]),
        number("seconds", ".4g"),
        number("seconds_p90", ".4g"),
        number("device_seconds", ".4g"),
        times,
        number("pictures_per_second", ".3g"),
        number("peak_bytes", ".0f", 1e-6),
        first,
        "equal" if row["equal"] else number("psnr_db", ".1f"),
        number("ssim", ".4f"),
        f"{judged} % of {row['judged_pictures']}" if judged else "",
        number("floor_s", ".3g"),
    ]


def _groups(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    kinds = dict.fromkeys(row["kind"] for row in data["rows"])
    return [(TITLES[k], [row for row in data["rows"] if row["kind"] == k]) for k in kinds]


def title(data: dict[str, Any]) -> str:
    """What was measured, and where."""
    return (
        f"{data['name']}, {data['width']}x{data['height']}, {data['scheduler']} "
        f"{data['steps']} steps, on {data['machine']}"
    )


def _notes(data: dict[str, Any]) -> list[str]:
    speed = data["rates"]
    rates = ", ".join(f"{1e-12 * v:.3g} in {k}" for k, v in speed["macs"].items())
    notes = [
        f"made by: {data['command']}",
        f"versions: {', '.join(f'{k} {v}' for k, v in data['libraries'].items())}; "
        f"{data['threads']} threads",
        f"measured rates: {rates} tera multiply-adds a second; {1e-9 * speed['bytes']:.3g} GB/s",
        "PSNR and SSIM are against exact with the same schedule; times: each row in turns with "
        "exact, with its 95 % interval; floor: multiply-adds and bytes at the measured rates; "
        "first call: with the graphs that were compiled in it, or with kernels that were kept",
    ]
    return notes + [f"left out: {name}: {why}" for name, why in data["left_out"].items()]


def markdown(data: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [f"### {title(data)}", ""]
    for heading, rows in _groups(data):
        lines += [f"**{heading}**", "", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"- {note}" for note in _notes(data))]) + "\n"


def page(data: dict[str, Any]) -> str:
    """The tables and bars of seconds and of decibels, as HTML."""
    body = [f"<h1>{escape(title(data))}</h1>"]
    for heading, rows in _groups(data):
        done = [row for row in rows if row["seconds"] is not None]
        body.append(f"<h2>{escape(heading)}</h2>")
        body.append(_bars("Seconds a picture", done, "seconds", ".4g", "s"))
        body.append(_bars("PSNR against exact", done, "psnr_db", ".1f", "dB"))
        heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
        cells = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(row))}</tr>"
            for row in rows
        )
        body.append(f'<div class="wide"><table><tr>{heads}</tr>{cells}</table></div>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(data))
    body.append(f"<h2>How</h2><ul>{notes}</ul>")
    return PAGE.format(title=escape(title(data)), style=STYLE, body="".join(body))


def _bars(about: str, rows: Sequence[dict[str, Any]], key: str, form: str, unit: str) -> str:
    drawn = [
        Bar(row["name"], f"{row['steps']} steps", row[key], label=f"{row[key]:{form}} {unit}")
        for row in rows
        if row[key] is not None
    ]
    return f"<p>{escape(about)}</p>{bars(drawn)}" if drawn else ""
