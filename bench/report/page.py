"""The report's page and pictures, from checked results and a cost ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from bench.ledger.counts import described, kinds_table
from bench.ledger.forward import counts_table, roofline_table
from bench.measure import OURS
from bench.report.charts import STYLE, Bar, BarChart, Line, bar_charts, digits, line_chart, picture
from bench.rows import Results, Row
from bench.table import Table
from bench.workloads import KINDS

_DTYPES = ("fp32", "bf16", "fp16", "int8")
_REACHED = {True: "reached", False: "missed", None: "not measured"}


class Card(NamedTuple):
    """A chart as SVG, if there is one, and its table.

    Attributes:
        chart: an SVG element, or "".
        table: folded away below the chart.
        source: a line below the table.
    """

    chart: str
    table: Table | None = None
    source: str = ""


class Group(NamedTuple):
    """What one picture shows: the rows of a workload in one dtype."""

    title: str
    workload: str
    dtype: str
    rows: list[Row]


def _dtype_order(dtype: str) -> tuple[int, str]:
    return (_DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES), dtype)


def groups(results: Results) -> list[Group]:
    """Rows by kind, workload and dtype, in the order of the file."""
    order = {row.workload: i for i, row in reversed(list(enumerate(results.rows)))}

    def key(row: Row) -> tuple[Any, ...]:
        return (list(KINDS).index(row.kind), order[row.workload], *_dtype_order(row.dtype))

    found = []
    for _, members in groupby(sorted(results.rows, key=key), key):
        rows = list(members)
        first = rows[0]
        title = f"{KINDS[first.kind]}, {first.workload}, {first.dtype}"
        found.append(Group(title, first.workload, first.dtype, rows))
    return found


def _rows_table(group: Group) -> Table:
    cells = []
    for row in group.rows:
        if row.seconds is None:
            cells.append([row.name, "skipped", "", "", "", "", "", row.skipped or ""])
            continue
        median, low, high = (seconds * 1e3 for seconds in row.times)
        cells.append(
            [
                row.name,
                f"{median:,.1f}",
                f"{low:,.1f} to {high:,.1f}",
                digits(row.speed[0]),
                "" if row.share_of_gemm is None else f"{row.share_of_gemm:.0%}",
                "" if row.peak_mebibytes is None else f"{row.peak_mebibytes:,.0f}",
                "" if row.error is None else f"{row.error:.1e}",
                "" if row.error is None or not row.error_kind else f"error {row.error_kind}",
            ]
        )
    header = ["", "median ms", "p20 to p80 ms", "audio s / s", "of GEMM rate", "peak MiB", "error"]
    return Table([*header, ""], cells, text=(7,), title=group.title)


def speed_chart(title: str, rows: Iterable[Row]) -> BarChart | None:
    """Bars of one group, fastest first; `None` when nothing ran."""
    measured = sorted((row for row in rows if row.seconds), key=lambda row: -row.speed[0])
    bars = [Bar(row.name, row.speed[0], row.speed[1:], row.implementation == OURS)
            for row in measured]  # fmt: skip
    return BarChart(title, "seconds of audio in a second: more is better", bars) if bars else None


def _speed_cards(results: Results) -> list[Card]:
    cards = []
    for group in groups(results):
        chart = speed_chart(group.title, group.rows)
        cards.append(Card(bar_charts([chart]) if chart else "", _rows_table(group)))
    return cards


def scaling_lines(results: Results, dtype: str) -> list[Line]:
    """Each implementation's best configuration at each length of one utterance.

    In audio seconds a second times layers, by which encoders of other depths can be compared.
    """
    best: dict[str, dict[float, tuple[float, ...]]] = {}
    for row in results.rows:
        if row.kind == "encoder" and row.dtype == dtype and row.length and row.seconds:
            at = best.setdefault(row.implementation, {})
            speed = tuple(value * row.layers for value in row.speed)
            at[row.length] = max(at.get(row.length, speed), speed)
    names = sorted(best, key=lambda name: (name != OURS, name))
    return [Line(name, tuple((x, *best[name][x]) for x in sorted(best[name]))) for name in names]


def _scaling_cards(results: Results) -> list[Card]:
    cards = []
    for dtype in sorted({row.dtype for row in results.rows}, key=_dtype_order):
        lines = scaling_lines(results, dtype)
        if all(len(line.points) < 2 for line in lines):
            continue
        unit = "seconds of audio in a second, times layers"
        chart = line_chart(f"One utterance, {dtype}", unit, "seconds of the utterance", lines)
        cells = [
            [line.label, digits(x), digits(y), f"{digits(low)} to {digits(high)}"]
            for line in lines
            for x, y, low, high in line.points
        ]
        header = ["best configuration", "length s", "median", "p20 to p80 of time"]
        cards.append(Card(chart, Table(header, cells)))
    return cards


def _memory_cards(results: Results) -> list[Card]:
    cards = []
    for group in groups(results):
        sizes = [(row.peak_mebibytes, row.name, row.implementation == OURS)
                 for row in group.rows if row.peak_mebibytes is not None]  # fmt: skip
        bars = [Bar(name, size, ours=ours) for size, name, ours in sorted(sizes)]
        cells = [[bar.label, digits(bar.value)] for bar in bars]
        cells += [[row.name, row.skipped] for row in group.rows
                  if row.peak_mebibytes is None and row.skipped]  # fmt: skip
        if bars:
            chart = BarChart(group.title, "peak MiB above the weights: less is better", bars)
            cards.append(Card(bar_charts([chart]), Table(["", "MiB"], cells)))
    return cards


def _targets(results: Results) -> Table:
    cells = []
    for entry in results.targets:
        measured = entry.get("measured")
        shown = digits(measured) if isinstance(measured, int | float) else str(measured or "")
        row = [str(entry.get("row", "")), str(entry.get("target", "")), shown]
        cells.append([*row, _REACHED[entry.get("reached")]])
    return Table(["work", "target", "measured", ""], cells)


def _machine(results: Results) -> list[str]:
    machine = results.machine
    parts = [
        results.device,
        str(machine.get("cpu")) if machine.get("gpu") else "",
        f"{machine.get('cores', '?')} cores, {results.threads} threads",
        f"{results.layers} layers where a row does not say otherwise",
        f"commit {results.commit}",
        results.date,
    ]
    flags = ", ".join(map(str, machine.get("flags") or []))
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s"
                      for name, rate in results.gemm_rate.items())  # fmt: skip
    lines = [
        " · ".join(part for part in parts if part),
        ", ".join(f"{name} {version}" for name, version in results.versions.items()),
        f"Flags: {flags}" if flags else "",
        f"This machine's own best matrix product: {rates}" if rates else "",
    ]
    return [line for line in lines if line]


def _measured(results: Results) -> dict[str, Any]:
    rounds = sorted({row.seconds.get("rounds", 0) for row in results.rows if row.seconds}) or [0]
    return {
        "results": results,
        "machine": _machine(results),
        "rounds": " to ".join(f"{n}" for n in dict.fromkeys((rounds[0], rounds[-1]))) + " rounds",
        "targets": _targets(results),
        "cards": {
            "Speed": _speed_cards(results),
            "Scaling with length": _scaling_cards(results),
            "Memory": _memory_cards(results),
        },
    }


def ledger_charts(ledger: dict[str, Any]) -> list[BarChart]:
    """Launches, bytes and FLOPs of a layer, and the encoder's activations, as bars."""

    def chart(title: str, unit: str, value: Callable[[dict[str, Any]], float]) -> BarChart:
        paths = ledger["paths"].items()
        return BarChart(title, unit, [Bar(p, value(found), ours=p == OURS) for p, found in paths])

    traffic = "GB through device memory: less is better"
    return [
        chart("Kernel launches a layer", "counted: fewer is better",
              lambda found: found["layer"]["launches"]),
        chart("Memory traffic a layer", traffic, lambda found: found["layer"]["bytes"] / 1e9),
        chart("Arithmetic a layer", "TFLOP: less is better",
              lambda found: found["layer"]["flops"] / 1e12),
        chart("Peak of the activations", "GB: less is better",
              lambda found: found["peak_activation_bytes"] / 1e9),
    ]  # fmt: skip


def _ledger(ledger: dict[str, Any]) -> dict[str, Any]:
    rooflines = []
    for gpu in ledger["gpus"]:
        bars = [
            Bar(path, found["roofline"][gpu["name"]]["seconds"] * 1e3, ours=path == OURS)
            for path, found in ledger["paths"].items()
        ]
        chart = BarChart(gpu["name"], "milliseconds: less is better (model)", bars)
        table = roofline_table(ledger, [gpu["name"]])
        rooflines.append(Card(bar_charts([chart]), table, gpu["source"]))
    return {
        "described": described(ledger),
        "cards": [Card(bar_charts([chart])) for chart in ledger_charts(ledger)],
        "counts": counts_table(ledger),
        "roofline": rooflines,
        "operations": [
            kinds_table(path, found["layer_operations"]) for path, found in ledger["paths"].items()
        ],
    }


def page(all_results: Sequence[Results], ledger: dict[str, Any] | None) -> str:
    """The report as one HTML page without external resources.

    Args:
        all_results: checked files of measurements, each of which becomes a section.
        ledger: what `bench.ledger.forward.ledger` gives, or `None` to leave it out.
    """
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, **options)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    return template.render(
        style=STYLE,
        measured=[_measured(results) for results in all_results],
        ledger=None if ledger is None else _ledger(ledger),
        marks={"reached": "good", "missed": "bad", "not measured": "muted"},
    ).lstrip()


def speed_picture(results: Results) -> str | None:
    """The README's picture of CPU speed: one utterance of 30 s in each dtype, and the mixed batch.

    `None` when none of these workloads was measured.
    """
    wanted = [
        group
        for group in groups(results)
        if group.rows[0].kind == "encoder"
        and "adapter" not in group.workload
        and (group.workload.startswith("16") or any(row.length == 30.0 for row in group.rows))
    ]
    drawn = [speed_chart(group.title, _best_rows(group.rows)) for group in wanted]
    charts = [chart for chart in drawn if chart is not None]
    if not charts:
        return None
    depths = {group.workload: group.rows[0].layers for group in wanted}
    others = [f", {name}: {n}" for name, n in depths.items() if n != results.layers]
    layers = f"{results.layers} layers{''.join(others)}"
    footer = f"{results.device}, {results.threads} threads, {layers}; median, p20 to p80"
    return picture(charts[:4], footer)


def _best_rows(rows: Iterable[Row]) -> Iterable[Row]:
    """The fastest configuration of each implementation."""
    measured = sorted((row for row in rows if row.seconds), key=lambda row: row.speed)
    return {row.implementation: row for row in measured}.values()


def ledger_picture(ledger: dict[str, Any]) -> str:
    """The README's picture of the ledger: launches and bytes of a layer."""
    footer = (
        f"A model, not a measurement: counted for {ledger['batch']} utterances of "
        f"{ledger['frames'] * 0.02:g} s, {ledger['dtype']}, {ledger['layers']} layers."
    )
    return picture(ledger_charts(ledger)[:2], footer)
