"""The report's plots: HTML and SVG that need no script, and follow the page's colours."""

from collections.abc import Sequence
from html import escape

from mobile_runtime.latency import Latency

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 28
TICKS = 4
HIGHEST_DB = 150.0
"""Where equal latents are drawn."""

STYLE = """
.bars { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr) max-content;
  gap: .35rem .75rem; align-items: center; font-size: .875rem; }
.bars small { display: block; color: var(--soft); font-size: .75rem; }
.track { position: relative; height: 1rem; }
.fill { position: absolute; inset: .15rem auto .15rem 0; background: var(--bar);
  border-radius: 0 .2rem .2rem 0; }
.spread { position: absolute; top: .45rem; height: .1rem; background: var(--ink); }
.bars b { font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap; }
:root { --bar: #4c7bd9; } .plot { width: 100%; height: auto; display: block; }
.plot text { fill: var(--soft); font-size: 13px; } .plot .grid { stroke: var(--line); }
.plot polyline { fill: none; stroke: var(--bar); stroke-width: 2; }
.plot circle { fill: var(--bar); }
@media (max-width: 30rem) { .plot text { font-size: 22px; } .bars { font-size: .8125rem;
  grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr) max-content; } }
"""


def latency_bars(rows: Sequence[Latency]) -> str:
    """A bar for each median, with a line from the least to nine tenths of the times."""
    longest = max(max(row.p90_ms, row.median_ms) for row in rows) or 1.0

    def percent(value: float) -> float:
        return round(100 * value / longest, 2)

    cells = []
    for row in rows:
        low, high = percent(row.min_ms), percent(row.p90_ms)
        name = escape(row.component).replace("_", "_<wbr>")
        cells.append(
            f"<span>{name}<small>{escape(row.runtime)}</small></span>"
            f'<span class="track"><span class="fill" style="width: {percent(row.median_ms)}%">'
            f'</span><span class="spread" style="left: {low}%; width: {max(0.2, high - low):.2f}%">'
            f"</span></span><b>{row.median_ms:.1f} ms</b>"
        )
    return f'<div class="bars">{"".join(cells)}</div>'


def step_lines(series: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """SNR in dB after each step, a line for each named series; None is drawn at the top."""
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
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step + 1}</text>'
        )
    for (name, _), own in zip(series, values, strict=True):
        points = [(x(step), y(value)) for step, value in enumerate(own)]
        parts.append(
            f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}">'
            f"<title>{escape(name)}</title></polyline>"
        )
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{escape(name)}, step {step + 1}: '
            f"{value:.1f} dB</title></circle>"
            for step, ((a, b), value) in enumerate(zip(points, own, strict=True))
        ]
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="SNR of the latents after each step">{"".join(parts)}</svg>'
    )
