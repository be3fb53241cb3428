"""The report's page and pictures, from checked results and a cost ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from .charts import (
    STYLE,
    SVG_STYLE,
    Bar,
    Line,
    bar_chart,
    digits,
    line_chart,
    standalone,
)
from .results import KINDS, OURS, Results, Row

_KIND_TITLES = {
    "encoder": "Encoder",
    "early_exit": "Early exit",
    "features": "Features",
    "end_to_end": "Waveform to text",
    "training": "Training step",
}
_DTYPES = ("fp32", "bf16", "fp16", "int8")

_PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; padding: 16px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1200px; margin: 0 auto; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 1.2rem; margin: 36px 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
.muted { color: var(--muted); }
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card { background: var(--surface); border: 1px solid var(--grid); border-radius: 8px;
  padding: 12px; min-width: 0; }
.card svg { display: block; width: 100%; max-width: 440px; height: auto; }
.card:has(details[open]) { grid-column: 1 / -1; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: 4px 10px 4px 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; min-width: 11em; white-space: normal; }
td.text, th.text { text-align: left; min-width: 14em; white-space: normal; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.note { border-left: 3px solid var(--series-1); padding: 2px 0 2px 12px; }
"""


def _cell(value: str, tag: str = "td", kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{escape(value)}</{tag}>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = ()) -> str:
    """An HTML table; the columns `text` are left-aligned, as the first is."""
    kinds = ["text" if i in text else "" for i in range(len(header))]
    head = "".join(_cell(h, "th", kind) for h, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell(c, "td", kind) for c, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _card(chart: str, below: str, summary: str = "Table") -> str:
    details = f"<details><summary>{escape(summary)}</summary>{below}</details>"
    return f'<div class="card">{chart}{details}</div>'


def _charts(cards: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(cards)}</div>'


# --- measurements --------------------------------------------------------------------------------


def _dtype_order(dtype: str) -> tuple[int, str]:
    return (_DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES), dtype)


def groups(results: Results) -> list[tuple[str, str, str, list[Row]]]:
    """Rows by kind, workload and dtype, in the order of the file: what one picture shows."""
    order = {row.workload: i for i, row in reversed(list(enumerate(results.rows)))}

    def key(row: Row) -> tuple[Any, ...]:
        return (KINDS.index(row.kind), order[row.workload], *_dtype_order(row.dtype))

    rows = sorted(results.rows, key=key)
    return [
        (members[0].kind, members[0].workload, members[0].dtype, members)
        for members in (list(group) for _, group in groupby(rows, key))
    ]


def _rows_table(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        if row.seconds is None:
            body.append([row.name, "skipped", "", "", "", "", "", row.skipped or ""])
            continue
        median, low, high = row.seconds
        share = "" if row.share_of_gemm is None else f"{row.share_of_gemm:.0%}"
        error = "" if row.error is None else f"{row.error:.1e}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        times = [f"{median * 1e3:,.1f}", f"{low * 1e3:,.1f} to {high * 1e3:,.1f}"]
        note = f"error {row.error_kind}" if row.error is not None and row.error_kind else ""
        body.append([row.name, *times, digits(row.speed[0]), share, peak, error, note])
    header = [
        "",
        "median ms",
        "p20 to p80 ms",
        "audio s / s",
        "of GEMM rate",
        "peak MiB",
        "error",
        "",
    ]
    return table(header, body, text=(7,))


def speed_chart(workload: str, kind: str, dtype: str, rows: Sequence[Row]) -> str | None:
    """Bars of one group, fastest first; `None` when nothing ran."""
    measured = sorted((row for row in rows if row.seconds), key=lambda row: -row.speed[0])
    if not measured:
        return None
    bars = []
    for row in measured:
        speed, low, high = row.speed
        bars.append(Bar(row.name, speed, low, high, ours=row.implementation == OURS))
    title = f"{_KIND_TITLES[kind]}, {workload}, {dtype}"
    return bar_chart(title, "seconds of audio in a second: more is better", bars)


def _speed_cards(results: Results) -> list[str]:
    cards = []
    for kind, workload, dtype, rows in groups(results):
        chart = speed_chart(workload, kind, dtype, rows)
        if chart is None:
            title = f"{_KIND_TITLES[kind]}, {workload}, {dtype}"
            cards.append(f'<div class="card"><b>{escape(title)}</b>{_rows_table(rows)}</div>')
        else:
            cards.append(_card(chart, _rows_table(rows)))
    return cards


def scaling_lines(results: Results, dtype: str) -> list[Line]:
    """Each implementation's best configuration at each length of one utterance."""
    best: dict[str, dict[float, Row]] = {}
    for row in results.rows:
        if row.kind != "encoder" or row.dtype != dtype or row.length is None or not row.seconds:
            continue
        at = best.setdefault(row.implementation, {})
        if row.length not in at or _layer_speed(row)[0] > _layer_speed(at[row.length])[0]:
            at[row.length] = row
    names = sorted(best, key=lambda name: (name != OURS, name))
    return [
        Line(name, tuple((x, *_layer_speed(row)) for x, row in sorted(best[name].items())))
        for name in names
    ]


def _layer_speed(row: Row) -> tuple[float, float, float]:
    """Speed times layers: encoders of other depths can be compared by it."""
    middle, low, high = (speed * row.layers for speed in row.speed)
    return middle, low, high


def _scaling_cards(results: Results) -> list[str]:
    cards = []
    for dtype in sorted({row.dtype for row in results.rows}, key=_dtype_order):
        lines = scaling_lines(results, dtype)
        if not lines or all(len(line.points) < 2 for line in lines):
            continue
        unit = "seconds of audio in a second, times layers"
        chart = line_chart(f"One utterance, {dtype}", "seconds of the utterance", unit, lines)
        rows = [
            [line.label, digits(x), digits(y), f"{digits(low)} to {digits(high)}"]
            for line in lines
            for x, y, low, high in line.points
        ]
        header = ["best configuration", "length s", "median", "p20 to p80 of time"]
        cards.append(_card(chart, table(header, rows)))
    return cards


def _memory_cards(results: Results) -> list[str]:
    cards = []
    for kind, workload, dtype, rows in groups(results):
        measured = [row for row in rows if row.peak_bytes is not None]
        if not measured:
            continue
        measured.sort(key=lambda row: row.peak_bytes or 0)
        bars = [
            Bar(row.name, (row.peak_bytes or 0) / 2**20, ours=row.implementation == OURS)
            for row in measured
        ]
        title = f"{_KIND_TITLES[kind]}, {workload}, {dtype}"
        chart = bar_chart(title, "peak MiB above the weights: less is better", bars)
        body = [[bar.label, digits(bar.value)] for bar in bars]
        body += [
            [row.name, row.skipped or ""]
            for row in rows
            if row.peak_bytes is None and row.skipped is not None
        ]
        cards.append(_card(chart, table(["", "MiB"], body)))
    return cards


def _targets(results: Results) -> str:
    body = []
    for entry in results.targets:
        word, kind = "not measured", "muted"
        if entry.get("reached") is not None:
            word, kind = ("reached", "good") if entry["reached"] else ("missed", "bad")
        measured = entry.get("measured")
        shown = (
            digits(float(measured)) if isinstance(measured, int | float) else str(measured or "")
        )
        cells = [str(entry.get("row", "")), str(entry.get("target", "")), shown]
        body.append(
            "<tr>" + "".join(_cell(cell) for cell in cells) + _cell(word, "td", kind) + "</tr>"
        )
    head = "".join(_cell(h, "th") for h in ("work", "target", "measured", ""))
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _machine(results: Results) -> str:
    machine = results.machine
    flags = ", ".join(map(str, machine.get("flags") or []))
    parts = [
        f"{machine.get('gpu') or machine.get('cpu', 'unknown machine')}",
        f"{machine.get('cpu')}" if machine.get("gpu") else "",
        f"{machine.get('cores', '?')} cores, {results.threads} threads",
        f"{results.layers} layers where a row does not say otherwise",
        f"commit {results.commit}",
        results.date,
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    rates = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in results.gemm_rate.items()
    )
    lines = [" · ".join(part for part in parts if part), versions]
    lines += [f"Flags: {flags}"] if flags else []
    lines += [f"This machine's own best matrix product: {rates}"] if rates else []
    return "".join(f'<p class="muted">{escape(line)}</p>' for line in lines)


def _measurements(results: Results) -> str:
    rounds = sorted({row.rounds for row in results.rows if row.seconds})
    said = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else "".join(map(str, rounds)) or "no"
    parts = [
        _machine(results),
        "<p>Medians of interleaved runs on the same data with the same threads "
        f"({said} rounds); whiskers and ranges are the 20th and 80th percentile.</p>",
    ]
    if results.targets:
        parts += ["<h3>Targets</h3>", _targets(results)]
    for title, cards in (
        ("Speed", _speed_cards(results)),
        ("Scaling with length", _scaling_cards(results)),
        ("Memory", _memory_cards(results)),
    ):
        if cards:
            parts += [f"<h3>{title}</h3>", _charts(cards)]
    return "".join(parts)


# --- the ledger ----------------------------------------------------------------------------------


def ledger_charts(ledger: dict[str, Any]) -> list[str]:
    """Launches, bytes and FLOPs of a layer, and the encoder's activations, as bars."""
    measures = (
        ("Kernel launches a layer", "counted: fewer is better", "launches", 1.0),
        ("Memory traffic a layer", "GB through device memory: less is better", "bytes", 1e9),
        ("Arithmetic a layer", "TFLOP: less is better", "flops", 1e12),
    )
    charts = [
        bar_chart(
            title,
            unit,
            [
                Bar(path, counts["layer"][name] / scale, ours=path == OURS)
                for path, counts in ledger["paths"].items()
            ],
        )
        for title, unit, name, scale in measures
    ]
    bars = [
        Bar(path, counts["peak_activation_bytes"] / 1e9, ours=path == OURS)
        for path, counts in ledger["paths"].items()
    ]
    return [*charts, bar_chart("Peak of the activations", "GB: less is better", bars)]


def _shapes(ledger: dict[str, Any]) -> str:
    return (
        f"{ledger['batch']} utterances of {ledger['frames'] * 0.02:g} s, {ledger['dtype']}, "
        f"{ledger['layers']} layers"
    )


def _ledger(ledger: dict[str, Any]) -> str:
    paths = ledger["paths"]
    charts = ledger_charts(ledger)
    rows = [
        [
            path,
            digits(counts["layer"]["launches"]),
            digits(counts["layer"]["bytes"] / 1e9),
            digits(counts["layer"]["flops"] / 1e12),
            digits(counts["encoder"]["launches"]),
            digits(counts["encoder"]["bytes"] / 1e9),
            digits(counts["encoder"]["flops"] / 1e12),
            digits(counts["peak_activation_bytes"] / 1e9),
        ]
        for path, counts in paths.items()
    ]
    header = ["", "launches a layer", "GB", "TFLOP", "launches, encoder", "GB", "TFLOP", "peak GB"]
    versions = ", ".join(f"{name} {version}" for name, version in ledger["versions"].items())
    mask = "with" if ledger["mask"] else "without"
    parts = [
        "<h2>Cost ledger of the GPU path</h2>",
        '<p class="note"><b>A model, not a measurement.</b> Operations were counted on tensors '
        "without data; nothing ran on a GPU. "
        f"{escape(_shapes(ledger))}; the reference {mask} attention mask, its sdpa with the "
        f"{escape(ledger['sdpa'])} kernel; {escape(versions)}. "
        "What is counted: docs/inside/ledger.md.</p>",
        _charts([f'<div class="card">{chart}</div>' for chart in charts]),
        table(header, rows),
        "<h3>Roofline time of the encoder</h3>",
        "<p>Every operation at the peak rate of what bounds it, memory or arithmetic, and no time "
        "between launches: a lower bound that no implementation reaches.</p>",
    ]
    cards = []
    for gpu in ledger["gpus"]:
        terms = {path: counts["roofline"][gpu["name"]] for path, counts in paths.items()}
        bars = [Bar(path, term["seconds"] * 1e3, ours=path == OURS) for path, term in terms.items()]
        body = [
            [
                path,
                digits(term["seconds"] * 1e3),
                f"{term['share_bandwidth_bound']:.0%}",
                f"{term['largest_share']:.0%}, {term['largest_bound']}: {term['largest_term']}",
            ]
            for path, term in terms.items()
        ]
        below = table(["", "ms", "bandwidth-bound", "largest term"], body, text=(3,))
        chart = bar_chart(gpu["name"], "milliseconds: less is better (model)", bars)
        cards.append(_card(chart, f"{below}<p class='muted'>{escape(gpu['source'])}</p>"))
    parts.append(_charts(cards))
    for path, counts in paths.items():
        body = [
            [
                f"{row['operation']} {row['shape']}",
                digits(row["launches"]),
                digits(row["bytes"] / 1e6),
                digits(row["flops"] / 1e9),
            ]
            for row in counts["layer_operations"]
        ]
        listed = table(["operation", "launches", "MB", "GFLOP"], body)
        summary = f"Operations of a layer: {path}"
        parts.append(f"<details><summary>{escape(summary)}</summary>{listed}</details>")
    return "".join(parts)


def page(all_results: Sequence[Results], ledger: dict[str, Any] | None) -> str:
    """The report as one HTML page without external resources.

    Args:
        all_results: checked files of measurements, each of which becomes a section.
        ledger: what `bench.ledger.ledger` gives, or `None` to leave it out.
    """
    parts = ["<h1>w2vbert-fast: benchmark report</h1>"]
    for results in all_results:
        device = results.machine.get("gpu") or results.machine.get("cpu", "unknown machine")
        parts.append(f"<h2>Measured on {escape(str(device))}</h2>{_measurements(results)}")
    if not all_results:
        parts.append('<p class="muted">No measurements were given.</p>')
    if ledger is not None:
        parts.append(_ledger(ledger))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<title>w2vbert-fast: benchmark report</title>"
        f"<style>{STYLE}{SVG_STYLE}{_PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def speed_picture(results: Results) -> str | None:
    """The README's picture of CPU speed: one utterance of 30 s in each dtype, and the mixed batch.

    `None` when none of these workloads was measured.
    """
    wanted = [
        (kind, workload, dtype, rows)
        for kind, workload, dtype, rows in groups(results)
        if kind == "encoder" and "adapter" not in workload and _is_for_picture(workload, rows)
    ]
    charts = [
        speed_chart(workload, kind, dtype, _best_rows(rows))
        for kind, workload, dtype, rows in wanted
    ]
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        return None
    device = results.machine.get("gpu") or results.machine.get("cpu", "")
    depths = {workload: rows[0].layers for _, workload, _, rows in wanted}
    others = [f", {name}: {n}" for name, n in depths.items() if n != results.layers]
    layers = f"{results.layers} layers{''.join(others)}"
    footer = f"{device}, {results.threads} threads, {layers}; median, p20 to p80"
    return standalone(drawn[:4], columns=2, footer=footer)


def _is_for_picture(workload: str, rows: Sequence[Row]) -> bool:
    return any(row.length == 30.0 for row in rows) or workload.startswith("16")


def _best_rows(rows: Sequence[Row]) -> list[Row]:
    """The fastest configuration of each implementation."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.seconds is None:
            continue
        known = best.get(row.implementation)
        if known is None or row.speed[0] > known.speed[0]:
            best[row.implementation] = row
    return list(best.values())


def ledger_picture(ledger: dict[str, Any]) -> str:
    """The README's picture of the ledger: launches and bytes of a layer."""
    footer = f"A model, not a measurement: counted for {_shapes(ledger)}."
    return standalone(ledger_charts(ledger)[:2], columns=2, footer=footer)
