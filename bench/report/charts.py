"""Charts as SVG text, drawn by matplotlib: horizontal bars from zero, and lines.

Colours become CSS variables, so that one drawing serves a light and a dark page. A drawing needs
nothing outside of itself but `STYLE`, which a picture in a file of its own brings along.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

WIDTH = 360
"""Pixels of a chart's width: at this size its text is 12 pixels high, as a phone needs."""

PALETTE = {
    "page": ("#f5f6f8", "#0f1115"),
    "surface": ("#fefefe", "#171a1f"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5a6470", "#a3acb8"),
    "grid": ("#dde2e8", "#2d333b"),
    "ours": ("#2563c9", "#73a9ff"),
    "peer": ("#a3adb8", "#5f6a76"),
    "line-1": ("#b9540a", "#f0964a"),
    "line-2": ("#17795a", "#4fc595"),
    "line-3": ("#7c4bd0", "#b89af5"),
    "line-4": ("#75808c", "#98a2ae"),
    "bad": ("#b3261e", "#ff8a80"),
}
"""On a light and on a dark page; no two are equal, since each finds its variable by its value."""

_LIGHT, _DARK = (
    " ".join(f"--{name}: {colours[i]};" for name, colours in PALETTE.items()) for i in (0, 1)
)
_FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
STYLE = (
    f":root {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    f"svg text {{ font-family: {_FONTS} !important; }}"
)

INK, MUTED, GRID, OURS, PEER = (
    PALETTE[name][0] for name in ("ink", "muted", "grid", "ours", "peer")
)
_LINES = [OURS, *(PALETTE[f"line-{i}"][0] for i in range(1, 5))]
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "w2vbert_fast",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.markersize": 6,
    "legend.handlelength": 1.5,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "legend.frameon": False,
}
_DPI = 72  # of an SVG file: a pixel is a point
_CHARACTER = 7.0  # average width of a 12-pixel letter
_HEAD, _ROW = 36, 36


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


def _shorten(text: str, width: float = WIDTH) -> str:
    fitting = int(width / _CHARACTER)
    return text if len(text) <= fitting else text[: fitting - 1] + "…"


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: above the bar.
        value: its length; 0 or more.
        spread: its lower and upper end, or `None`.
        ours: whether it is this library's.
    """

    label: str
    value: float
    spread: tuple[float, float] | None = None
    ours: bool = False


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars from zero, with whiskers where a bar has a spread.

    Attributes:
        title: above the chart.
        unit: of the values, and what is better; below the title.
        bars: from top to bottom.
    """

    title: str
    unit: str
    bars: Sequence[Bar]

    def __str__(self) -> str:
        values = "; ".join(f"{bar.label}: {digits(bar.value)}" for bar in self.bars)
        return f"{self.title}. {self.unit}: {values}"


@dataclass(frozen=True)
class Line:
    """One line: `(x, y, low, high)` of each point, x and y above 0, in the order of x."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]

    def __str__(self) -> str:
        points = (f"{digits(y)} at {digits(x)}" for x, y, _, _ in self.points)
        return f"{self.label}: {', '.join(points)}"


def _note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float],
          where: str = "data", **style: Any) -> None:  # fmt: skip
    """Text so many pixels right of and above a place."""
    text = _shorten(text)
    axes.annotate(text, place, offset, xycoords=where, textcoords="offset pixels", **style)


def _draw_bars(axes: Axes, chart: BarChart, rows: int) -> None:
    """On axes as high as so many rows."""
    texts = [digits(bar.value) for bar in chart.bars]
    largest, room = 0.0, max(map(len, texts), default=0) * _CHARACTER + 12
    for row, (bar, text) in enumerate(zip(chart.bars, texts, strict=True)):
        axes.barh(row, bar.value, 12 / _ROW, color=OURS if bar.ours else PEER)
        low, high = bar.spread or (bar.value, bar.value)
        if bar.spread:
            spread = [[bar.value - low], [high - bar.value]]
            axes.errorbar(bar.value, row, xerr=spread, fmt="none", ecolor=INK, capsize=3)
        _note(axes, bar.label, (0, row), (0, 10))
        _note(axes, text, (max(bar.value, high), row), (6, -4))
        largest = max(largest, bar.value, high)
    axes.set(xlim=(0, (largest or 1.0) * WIDTH / (WIDTH - room)), ylim=(rows - 0.75, -0.75))
    axes.set_axis_off()
    _note(axes, chart.title, (0, 1), (0, 19), "axes fraction", weight="bold", size=13)
    _note(axes, chart.unit, (0, 1), (0, 3), "axes fraction", color=MUTED, size=11)


def bar_charts(
    charts: Sequence[BarChart], columns: int = 1, gap: int = 0, footer: str = "", style: str = ""
) -> str:
    """Charts side by side as one SVG element, each `WIDTH` pixels wide.

    Args:
        charts: from left to right, then downwards.
        columns: charts in a row.
        gap: pixels between and around them.
        footer: a line below them.
        style: CSS that the element brings along; with it comes a background.
    """
    lines = [charts[i : i + columns] for i in range(0, len(charts), columns)]
    width = gap + min(columns, len(charts)) * (WIDTH + gap)
    counts = [max(len(chart.bars) for chart in line) for line in lines]
    height = gap + sum(_HEAD + _ROW * count + gap for count in counts) + (18 if footer else 0)
    with rc_context(_SETTINGS):
        figure = Figure((width / _DPI, height / _DPI), dpi=_DPI)
        y = height - gap
        for line, count in zip(lines, counts, strict=True):
            y -= _HEAD + _ROW * count
            for place, chart in enumerate(line):
                x, size = gap + place * (WIDTH + gap), (WIDTH / width, _ROW * count / height)
                _draw_bars(figure.add_axes((x / width, y / height, *size)), chart, count)
            y -= gap
        figure.text(gap / width, 18 / height, _shorten(footer, width), color=MUTED, size=11)
        return _svg(figure, "; ".join(map(str, charts)), style)


def picture(charts: Sequence[BarChart], footer: str = "") -> str:
    """The content of an SVG file: two charts in a row."""
    return bar_charts(charts, columns=2, gap=24, footer=footer, style=STYLE)


def line_chart(title: str, unit: str, x_unit: str, lines: Sequence[Line]) -> str:
    """Lines over logarithmic axes as an SVG element: a legend above, a whisker at each point."""
    above, below, left = _HEAD + 8 + 20 * len(lines), 40, 46
    height = above + 190 + below
    with rc_context(_SETTINGS):
        figure = Figure((WIDTH / _DPI, height / _DPI), dpi=_DPI)
        axes = figure.add_axes((left / WIDTH, below / height, 1 - left / WIDTH, 190 / height))
        for index, line in enumerate(lines):
            x, y, low, high = zip(*line.points, strict=True)
            spread = np.array([np.subtract(y, low), np.subtract(high, y)])
            colour, dash = _LINES[index % len(_LINES)], "-" if index < len(_LINES) else "--"
            axes.errorbar(x, y, spread, label=_shorten(line.label, WIDTH - 30), color=colour,
                          linestyle=dash, marker="o")  # fmt: skip
        xs = sorted({x for line in lines for x, *_ in line.points})
        axes.set(xscale="log", yscale="log", axisbelow=True)
        axes.set_xticks(xs, [digits(x) for x in xs])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: digits(y)))
        axes.minorticks_off()
        axes.set_xlabel(x_unit, loc="right", color=MUTED)
        axes.grid(True)
        axes.legend(loc="lower left", bbox_to_anchor=(-left / (WIDTH - left), 1), borderpad=0)
        up = above - _HEAD
        _note(axes, title, (0, 1), (-left, up + 19), "axes fraction", weight="bold", size=13)
        _note(axes, unit, (0, 1), (-left, up + 3), "axes fraction", color=MUTED, size=11)
        return _svg(figure, f"{title}. {unit} over {x_unit}: {'; '.join(map(str, lines))}")


def _svg(figure: Figure, label: str, style: str = "") -> str:
    for artist in figure.findobj():
        artist.set_clip_on(False)
    if style:
        figure.set_facecolor(PALETTE["surface"][0])
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=not style, metadata=nothing)
    # Neither prologue nor the names of groups, which a page would have once for every chart.
    text = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue().partition("<svg ")[2])
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    head, _, body = text.replace('pt"', '"').partition(">")
    style = f"<style>{style}</style>" if style else ""
    return f'<svg role="img" aria-label="{escape(label, quote=True)}" {head}>{style}{body}'.rstrip()
