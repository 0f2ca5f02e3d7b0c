"""The report's plots: HTML and SVG that need no script, and follow the page's colours."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 28
TICKS = 4
HIGHEST_DB = 150.0
"""Where equal values are drawn."""
FEW_POINTS = 60
"""More of them are a line without dots."""

STYLE = """
.bars { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr) max-content;
  gap: .35rem .75rem; align-items: center; font-size: .875rem; }
.bars .label { overflow-wrap: anywhere; }
.bars small { display: block; color: var(--soft); font-size: .75rem; }
.track { position: relative; height: 1rem; }
.fill { position: absolute; inset: .15rem auto .15rem 0; background: var(--bar);
  border-radius: 0 .2rem .2rem 0; }
.gate { position: absolute; top: 0; bottom: 0; width: .15rem; background: var(--ink); }
.spread { position: absolute; top: .45rem; height: .1rem; background: var(--ink); }
.bars b { font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap; }
:root { --bar: #4c7bd9; } .plot { width: 100%; height: auto; display: block; }
.plot text { fill: var(--soft); font-size: 13px; } .plot .grid { stroke: var(--line); }
.plot polyline { fill: none; stroke: var(--bar); stroke-width: 2; }
.plot .dashed { stroke: var(--soft); stroke-dasharray: 4 4; }
.plot circle { fill: var(--bar); }
@media (max-width: 30rem) { .plot text { font-size: 22px; } .bars { font-size: .8125rem;
  grid-template-columns: minmax(0, 1fr) max-content; } .bars .label { grid-column: 1 / -1; }
  .bars .label:not(:first-child) { margin-top: .35rem; } }
"""


def short(value: float, decimals: int = 1) -> str:
    """A figure in few letters, whatever a device has told: with an exponent from ten million."""
    return f"{value:.{decimals}f}" if abs(value) < 1e7 else f"{value:.1e}"


@dataclass(frozen=True)
class Bar:
    """One bar. low, high: what the line over it spans. mark: where a gate lies."""

    name: str
    runtime: str
    value: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    mark: float | None = None


def bars(rows: Sequence[Bar], longest: float | None = None) -> str:
    """Bars with their labels. longest: the value that fills the width; None takes the largest."""
    longest = longest or max((max(row.value, row.high or 0.0) for row in rows), default=0) or 1.0

    def percent(value: float) -> str:
        return f"{max(0.0, min(100 * value / longest, 100.0)):.2f}%"

    cells = []
    for row in rows:
        parts = [f'<span class="fill" style="width: {percent(row.value)}"></span>']
        if row.low is not None and row.high is not None:
            width = percent(max(0.002 * longest, row.high - row.low))
            place = f"left: {percent(row.low)}; width: {width}"
            parts.append(f'<span class="spread" style="{place}"></span>')
        if row.mark is not None:
            parts.append(f'<span class="gate" style="left: {percent(row.mark)}"></span>')
        name = escape(row.name).replace("_", "_<wbr>")
        cells.append(
            f'<span class="label">{name}<small>{escape(row.runtime)}</small></span>'
            f'<span class="track">{"".join(parts)}</span><b>{escape(row.label)}</b>'
        )
    return f'<div class="bars">{"".join(cells)}</div>'


def parity_bar(
    name: str, runtime: str, snr_db: float | None, equal: bool, gate_db: float | None
) -> Bar:
    """The bar of an SNR in dB (None: not told), of at most HIGHEST_DB."""
    value = HIGHEST_DB if equal else snr_db or 0.0
    label = "equal" if equal else "–" if snr_db is None else f"{short(snr_db)} dB"
    return Bar(name, runtime, value, label=label, mark=gate_db)


def step_lines(
    series: Sequence[tuple[str, Sequence[float | None]]],
    label: str = "after each step",
    dashed: str | None = None,
) -> str:
    """SNR in dB at each step, a line for each named series; None is drawn at the top.

    label: what the steps are, for those who cannot see the plot. dashed: the series to draw so.
    """
    values = [
        [HIGHEST_DB if v is None else min(max(v, 0.0), HIGHEST_DB) for v in own]
        for _, own in series
    ]
    highest = 10 * (int(max(max(own) for own in values) / 10) + 1)
    steps = max(len(own) for own in values)

    def x(step: int) -> float:
        span = WIDTH - LEFT - RIGHT
        return LEFT + span * (0.5 if steps == 1 else step / (steps - 1))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / highest)

    parts = []
    for tick in range(TICKS + 1):
        value = highest * tick / TICKS
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    for step in sorted({0, (steps - 1) // 2, steps - 1}):
        # The last one would reach over the edge.
        anchor = "end" if step == steps - 1 > 0 else "middle"
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step + 1}</text>'
        )
    for (name, _), own in zip(series, values, strict=True):
        points = [(x(step), y(value)) for step, value in enumerate(own)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        form = ' class="dashed"' if name == dashed else ""
        parts.append(f'<polyline{form} points="{path}"><title>{escape(name)}</title></polyline>')
        if len(points) > FEW_POINTS:
            continue
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{escape(name)}, step {step + 1}: '
            f"{value:.1f} dB</title></circle>"
            for step, ((a, b), value) in enumerate(zip(points, own, strict=True))
        ]
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="SNR in dB {escape(label)}">{"".join(parts)}</svg>'
    )
