"""Charts as SVG text: horizontal bars and lines. No library, no external resource.

Colours are CSS variables, so that one drawing serves a light and a dark page; `standalone` adds
them for a picture that lies in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
"""Width of a chart's coordinates: at this size its text is 12 pixels high, as a phone needs."""

_CHARACTER = 6.4  # average width of a 12-pixel letter
_ROW = 36
_COLOURS = 5

STYLE = """
:root { --page: #f5f6f8; --surface: #ffffff; --ink: #1b1f24; --muted: #5a6470; --grid: #dde2e8;
  --series-0: #2563c9; --series-1: #b9540a; --series-2: #17795a; --series-3: #7c4bd0;
  --series-4: #75808c; --peer: #a3adb8; --good: #17795a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1115; --surface: #171a1f; --ink: #e8eaed; --muted: #a3acb8; --grid: #2d333b;
    --series-0: #73a9ff; --series-1: #f0964a; --series-2: #4fc595; --series-3: #b89af5;
    --series-4: #98a2ae; --peer: #5f6a76; --good: #4fc595; --bad: #ff8a80; } }
"""
SVG_STYLE = """
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--ink); }
svg text.title { font-weight: 600; font-size: 13px; }
svg text.muted { fill: var(--muted); font-size: 11px; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; opacity: .75; }
svg .ours { fill: var(--series-0); }
svg .peer { fill: var(--peer); }
"""


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: above the bar.
        value: its length; 0 or more.
        low: lower end of the spread, or `None`.
        high: upper end of the spread, or `None`.
        ours: whether it is this library's.
        text: what is written behind it; the value to three digits when `None`.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False
    text: str | None = None


@dataclass(frozen=True)
class Line:
    """One line: `(x, y, low, high)` of each point, x and y above 0, in the order of x."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]


def digits(value: float) -> str:
    """A number to three digits, without exponent where one can read it so."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    if value == int(value):
        return f"{value:,.0f}"
    places = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{places}f}"


def _shorten(text: str, width: float) -> str:
    fitting = int(width / _CHARACTER)
    return text if len(text) <= fitting else text[: fitting - 1] + "…"


def _svg(title: str, description: str, body: list[str], width: int, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-label="{escape(title + ". " + description, quote=True)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def bar_chart(title: str, unit: str, bars: Sequence[Bar], width: int = WIDTH) -> str:
    """Horizontal bars from zero, with whiskers where a bar has a spread.

    Args:
        title: above the chart.
        unit: of the values, and what is better; below the title.
        bars: from top to bottom.
        width: of the coordinates.
    """
    texts = [digits(bar.value) if bar.text is None else bar.text for bar in bars]
    room = max((len(text) for text in texts), default=0) * _CHARACTER + 12
    largest = max((max(bar.value, bar.high or 0.0) for bar in bars), default=0.0) or 1.0
    scale = (width - room) / largest
    body = [
        f'<text class="title" x="0" y="13">{escape(_shorten(title, width - 8))}</text>',
        f'<text class="muted" x="0" y="29">{escape(unit)}</text>',
    ]
    y = 40
    for bar, text in zip(bars, texts, strict=True):
        length = max(bar.value * scale, 1.0)
        body.append(f'<text x="0" y="{y + 12}">{escape(_shorten(bar.label, width))}</text>')
        kind = "ours" if bar.ours else "peer"
        body.append(
            f'<rect class="{kind}" x="0" y="{y + 17}" width="{length:.1f}" height="12" rx="2"/>'
        )
        end = length
        if bar.low is not None and bar.high is not None:
            low, high = bar.low * scale, bar.high * scale
            end = max(end, high)
            body.append(
                f'<path class="whisker" fill="none" d="M{low:.1f} {y + 20}v6M{low:.1f} {y + 23}'
                f'H{high:.1f}M{high:.1f} {y + 20}v6"/>'
            )
        body.append(f'<text x="{end + 6:.1f}" y="{y + 27}">{escape(text)}</text>')
        y += _ROW
    described = "; ".join(f"{bar.label}: {text}" for bar, text in zip(bars, texts, strict=True))
    return _svg(title, f"{unit}: {described}", body, width, y + 2)


def _round(value: float, up: bool) -> float:
    """The next of 1, 2, 5, 10, 20, ... that is at most `value`, or at least when `up`."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [power * step for step in (1, 2, 5, 10)]
    return min(s for s in steps if s >= value) if up else max(s for s in steps if s <= value)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range; powers of ten where those are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    tens = [tick for tick in every if math.log10(tick) == round(math.log10(tick))]
    return every if len(every) <= 6 or len(tens) < 2 else tens


def line_chart(title: str, x_unit: str, y_unit: str, lines: Sequence[Line]) -> str:
    """Lines over logarithmic axes, with a legend above and a whisker at each point."""
    points = [point for line in lines for point in line.points]
    xs = sorted({point[0] for point in points})
    y_low = _round(min(min(point[1], point[2]) for point in points) / 1.05, up=False)
    y_high = _round(max(max(point[1], point[3]) for point in points) * 1.05, up=True)
    top, height, left, right = 52 + 17 * len(lines), 190, 44, WIDTH - 14

    def place_x(x: float) -> float:
        if xs[0] == xs[-1]:
            return (left + right) / 2
        share = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        return left + 12 + share * (right - left - 24)

    def place_y(y: float) -> float:
        return top + height * (1 - math.log(y / y_low) / math.log(y_high / y_low))

    body = [
        f'<text class="title" x="0" y="13">{escape(_shorten(title, WIDTH - 8))}</text>',
        f'<text class="muted" x="0" y="29">{escape(y_unit)}</text>',
    ]
    for tick in _ticks(y_low, y_high):
        y = place_y(tick)
        body.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        body.append(
            f'<text class="muted" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{digits(tick)}</text>"
        )
    bottom = top + height
    for x in xs:
        body.append(f'<path class="grid" d="M{place_x(x):.1f} {top}V{bottom}"/>')
        body.append(
            f'<text class="muted" x="{place_x(x):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{digits(x)}</text>"
        )
    body.append(
        f'<text class="muted" x="{right}" y="{bottom + 32}" text-anchor="end">'
        f"{escape(x_unit)}</text>"
    )
    for index, line in enumerate(lines):
        colour = f"var(--series-{index % _COLOURS})"
        dash = ' stroke-dasharray="6 4"' if index >= _COLOURS else ""
        y = 45 + 17 * index
        body.append(f'<path d="M0 {y}H18" stroke="{colour}" stroke-width="3"{dash}/>')
        label = escape(_shorten(line.label, WIDTH - 24))
        body.append(f'<text x="24" y="{y + 4}">{label}</text>')
        track = "L".join(f"{place_x(x):.1f} {place_y(y):.1f}" for x, y, _, _ in line.points)
        body.append(f'<path d="M{track}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for x, y, low, high in line.points:
            body.append(
                f'<path d="M{place_x(x):.1f} {place_y(low):.1f}V{place_y(high):.1f}" '
                f'stroke="{colour}" stroke-width="1.5"/>'
                f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5" fill="{colour}"/>'
            )
    described = "; ".join(
        f"{line.label}: " + ", ".join(f"{digits(y)} at {digits(x)}" for x, y, _, _ in line.points)
        for line in lines
    )
    return _svg(title, f"{y_unit} over {x_unit}: {described}", body, WIDTH, bottom + 38)


def standalone(charts: Sequence[str], columns: int = 2, footer: str = "") -> str:
    """Several charts side by side as one SVG file, with its colours and a background.

    Args:
        charts: of this module, at its `WIDTH`.
        columns: charts in a row.
        footer: a line below them.
    """
    gap, placed, x, y, row_height = 24.0, [], 24.0, 24.0, 0.0
    for index, chart in enumerate(charts):
        height = float(chart.split('viewBox="0 0 ')[1].split('"')[0].split()[1])
        if index and index % columns == 0:
            x, y, row_height = gap, y + row_height + gap, 0.0
        placed.append(
            chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{height}" ', 1)
        )
        x, row_height = x + WIDTH + gap, max(row_height, height)
    width = gap + min(columns, len(charts)) * (WIDTH + gap)
    height = y + row_height + gap
    if footer:
        placed.append(
            f'<text class="muted" x="{gap}" y="{height + 2}">'
            f"{escape(_shorten(footer, width - gap))}</text>"
        )
        height += 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">'
        f"<style>{STYLE}{SVG_STYLE}</style>"
        f'<rect width="100%" height="100%" rx="8" style="fill: var(--surface)"/>'
        f"{''.join(placed)}</svg>\n"
    )
