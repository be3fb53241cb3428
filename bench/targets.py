"""The speeds that this library sets itself, as data, and how far a result file reaches them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure import OURS, joined
from bench.rows import Row

Rows = Sequence[Row]
Measure = Callable[[Rows], float | None]
ENCODER_SHARES = ("1x10s", "1x30s", "16x1-20s")


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        row: what is measured, against what.
        at_least: the value to reach (`at_most` when `below`).
        unit: "x" for a ratio of times, "" for a share, "GB".
        measure: rows of a result file -> the value; None where a row it needs was not measured.
        below: small is good.
        counted: needs no measurement, but takes half a minute to count.
    """

    row: str
    at_least: float
    unit: str
    measure: Measure
    below: bool = False
    counted: bool = False


def _values(
    rows: Rows, value: Callable[[Row], float | None], containing: str, **wanted: str
) -> list[float]:
    """A value of the rows that were measured and whose configuration holds `containing`."""
    found = [
        value(row)
        for row in rows
        if row.skipped is None
        and containing in row.configuration
        and all(getattr(row, name) == want for name, want in wanted.items())
    ]
    return [number for number in found if number is not None]


def _peaks(rows: Rows, containing: str, **wanted: str) -> list[float]:
    return _values(rows, lambda row: row.peak_bytes_above_weights, containing, **wanted)


def _times(rows: Rows, containing: str, **wanted: str) -> list[float]:
    return _values(rows, lambda row: row.times[0], containing, **wanted)


def share(workload: str, dtype: str) -> Measure:
    """Our share of the machine's GEMM rate."""
    ours = {"workload": workload, "dtype": dtype, "implementation": OURS}
    return lambda rows: max(_values(rows, lambda row: row.share_of_gemm, "", **ours), default=None)


def speedup(
    workload: str,
    dtype: str,
    over: str,
    containing: str = "",
    over_dtype: str | None = None,
    ours_containing: str = "",
) -> Measure:
    """The fastest configuration of `over` (whose name holds `containing`) over our time (in the
    fastest configuration whose name holds `ours_containing`)."""

    def measure(rows: Rows) -> float | None:
        at = {"workload": workload, "dtype": dtype}
        ours = _times(rows, ours_containing, **at, implementation=OURS)
        at["dtype"] = over_dtype or dtype
        theirs = _times(rows, containing, **at, implementation=over)
        return min(theirs) / min(ours) if ours and theirs else None

    return measure


def peak_ratio(workload: str, dtype: str, over: str, containing: str = "") -> Measure:
    """Our peak memory over the smallest among configurations of `over`; of ours the largest. Of
    both those whose name holds `containing`."""

    def measure(rows: Rows) -> float | None:
        at = {"workload": workload, "dtype": dtype}
        ours = _peaks(rows, containing, **at, implementation=OURS)
        theirs = _peaks(rows, containing, **at, implementation=over)
        return max(ours) / min(theirs) if ours and theirs else None

    return measure


def peak_gigabytes(workload: str, dtype: str) -> Measure:
    """Our peak memory above the weights."""
    ours = {"workload": workload, "dtype": dtype, "implementation": OURS}
    return lambda rows: max((peak / 1e9 for peak in _peaks(rows, "", **ours)), default=None)


def ledger_ratio(key: str) -> Measure:
    """A ratio that `bench.ledger` counts (no measurement: no GPU is needed)."""

    def measure(rows: Rows) -> float | None:
        del rows
        try:
            return _ledger_ratios()[key]
        except ImportError:  # transformers, whose operations are counted, is not installed
            return None

    return measure


@functools.cache
def _ledger_ratios() -> dict[str, float]:
    from bench.ledger.forward import ledger, ratios
    from bench.ledger.workload import Workload

    # The ratios are those of one layer, which do not depend on how many there are.
    return ratios(ledger(Workload(layers=2)))


def _training(workload: str, dtype: str, least: float, mode: str = "") -> Target:
    row = f"{joined(workload, dtype, mode)}, against transformers' best"
    measure = speedup(workload, dtype, "transformers", mode, ours_containing=mode)
    return Target(row, least, "x", measure)


def _training_peak(dtype: str, mode: str = "") -> Target:
    row = f"{joined('train 1x30s', dtype, mode)}: peak memory over transformers' least"
    return Target(row, 0.333, "", peak_ratio("train 1x30s", dtype, "transformers", mode), True)


def _speed(workload: str, dtype: str, least: float) -> Target:
    row = f"encoder {workload}, {dtype}, against transformers's best"
    return Target(row, least, "x", speedup(workload, dtype, "transformers"))


TARGETS: tuple[Target, ...] = (
    *(
        Target(f"encoder {workload}, {dtype}: share of the GEMM rate", least, "",
               share(workload, dtype))
        for dtype, least in (("fp32", 0.85), ("bf16", 0.80))
        for workload in ENCODER_SHARES
    ),
    _speed("1x30s", "fp32", 1.7),
    _speed("1x30s", "bf16", 2.0),
    _speed("1x60s", "fp32", 2.5),
    _speed("1x60s", "bf16", 3.0),
    *(
        Target(f"encoder 16x1-20s, {dtype}, against transformers, {name}", least, "x",
               speedup("16x1-20s", dtype, "transformers", containing))
        for dtype in ("fp32", "bf16")
        for name, containing, least in (
            ("one padded batch", "padded batch", 1.5), ("best of all", "", 1.15))
    ),
    Target("encoder 1x30s with adapter, int8, against CTranslate2 int8", 3.5, "x",
           speedup("1x30s, adapter", "int8", "ctranslate2")),
    Target("encoder 1x30s, int8, against our bf16", 1.25, "x",
           speedup("1x30s", "int8", "w2vbert_fast", over_dtype="bf16")),
    Target("features 8x30s, against transformers", 5.0, "x",
           speedup("8x30s", "fp32", "transformers")),
    Target("features 8x30s, against kaldi-native-fbank", 2.5, "x",
           speedup("8x30s", "fp32", "kaldi-native-fbank")),
    Target("encode(layer=17), 1x30s, fp32, against transformers with output_hidden_states", 2.4,
           "x", speedup("1x30s, layer 17", "fp32", "transformers")),
    Target("peak memory above the weights, 1x300s, fp32", 2.0, "GB",
           peak_gigabytes("1x300s", "fp32"), below=True),
    _training("train 1x30s", "fp32", 1.8),
    _training("train 1x30s", "bf16", 1.8),
    _training("train 1x30s", "bf16", 1.8, "autocast"),
    _training("train 8x1-20s", "fp32", 1.3),
    _training("train 8x1-20s", "bf16", 1.3),
    _training("train 8x1-20s", "bf16", 1.3, "autocast"),
    _training_peak("fp32"),
    _training_peak("bf16", "bf16 weights"),
    _training_peak("bf16", "autocast"),
    Target("ledger: launches a layer, transformers sdpa over ours", 3.0, "x",
           ledger_ratio("launches"), counted=True),
    Target("ledger: bytes a layer, transformers sdpa over ours", 5.0, "x", 
           ledger_ratio("bytes"), counted=True),
)  # fmt: skip


def evaluate(
    rows: Rows, targets: Sequence[Target] = TARGETS, counted: bool = True
) -> list[dict[str, Any]]:
    """The `targets` of a result file; `measured` and `reached` are None without the rows needed.

    Args:
        rows: of result files.
        targets: the table.
        counted: also the rows of the cost ledger.
    """
    result = []
    for target in targets:
        value = target.measure(rows) if counted or not target.counted else None
        sign = "<=" if target.below else ">="
        reached = None
        if value is not None:
            reached = value <= target.at_least if target.below else value >= target.at_least
        result.append(
            {
                "row": target.row,
                "target": f"{sign} {target.at_least:g} {target.unit}".strip(),
                "measured": None if value is None else round(value, 3),
                "reached": reached,
            }
        )
    return result


def render(evaluated: Sequence[dict[str, Any]]) -> str:
    """The table as text."""
    names = {True: "reached", False: "NOT REACHED", None: "not measured"}
    width = max(len(entry["row"]) for entry in evaluated)
    lines = [f"{'row':<{width}}  {'target':>10}  {'measured':>8}"]
    for entry in evaluated:
        measured = "-" if entry["measured"] is None else f"{entry['measured']:.2f}"
        line = f"{entry['row']:<{width}}  {entry['target']:>10}  {measured:>8}"
        lines.append(f"{line}  {names[entry['reached']]}")
    return "\n".join(lines)
