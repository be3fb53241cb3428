"""Benchmark results as the report reads them: schema "w2vbert-bench/v1", checked.

Times are seconds, sizes bytes, rates FLOP/s. A row that was not run says why in `skipped` and has
no `seconds`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.workloads import KINDS

SCHEMA = "w2vbert-bench/v1"

_TOP = ("machine", "versions", "commit", "date", "threads", "layers", "gemm_rate", "rows")
_ROW = (
    *("workload", "kind", "implementation", "configuration", "dtype", "audio_seconds", "seconds"),
    *("flops", "share_of_gemm", "peak_bytes_above_weights", "error", "error_kind", "skipped"),
)
_SINGLE = re.compile(r"1\s*x\s*([\d.]+)\s*(s|min)")


@dataclass(frozen=True)
class Row:
    """One measurement; see `bench/results` for examples.

    Attributes:
        seconds: median, 20th and 80th percentile of one pass over the workload, or `None`.
        rounds: how many passes they come from.
        length: seconds of audio of the only utterance, or `None` when there are several.
        layers: of the encoder that ran.
    """

    workload: str
    kind: str
    implementation: str
    configuration: str
    dtype: str
    audio_seconds: float
    seconds: tuple[float, float, float] | None
    rounds: int
    share_of_gemm: float | None
    peak_bytes: int | None
    error: float | None
    error_kind: str | None
    skipped: str | None
    length: float | None
    layers: int

    @property
    def name(self) -> str:
        return f"{self.implementation}, {self.configuration}".rstrip(", ")

    @property
    def speed(self) -> tuple[float, float, float]:
        """Seconds of audio in a second: at the median time, and at its 80th and 20th percentile."""
        if self.seconds is None:
            raise ValueError(f"{self.name} was skipped: {self.skipped}")
        median, low, high = self.seconds
        return self.audio_seconds / median, self.audio_seconds / high, self.audio_seconds / low


@dataclass(frozen=True)
class Results:
    """One file of measurements."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    threads: int
    layers: int
    gemm_rate: dict[str, float]
    rows: tuple[Row, ...]
    targets: tuple[dict[str, Any], ...]

    @property
    def device(self) -> str:
        """The GPU, or the CPU where there is none."""
        return str(self.machine.get("gpu") or self.machine.get("cpu", "unknown machine"))


def _need(condition: bool, place: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{place}: {message}")


def _has(raw: Any, keys: tuple[str, ...], place: str) -> None:
    _need(isinstance(raw, dict), place, f"is {type(raw).__name__}; it must be a JSON object")
    missing = [key for key in keys if key not in raw]
    _need(not missing, place, f"lacks {', '.join(missing)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _times(raw: Any, place: str) -> tuple[float, float, float]:
    keys = ("median", "p20", "p80")
    complete = isinstance(raw, dict) and all(_is_number(raw.get(key)) for key in keys)
    _need(complete, place, "seconds must have the numbers median, p20 and p80")
    median, low, high = (raw[key] for key in keys)
    message = f"p20 {low}, median {median}, p80 {high} must be above 0 and rise"
    _need(0 < low <= median <= high, place, message)
    return median, low, high


def _row(raw: Any, place: str, layers: int) -> Row:
    _has(raw, _ROW, place)
    kind, skipped, seconds, audio = (
        raw[key] for key in ("kind", "skipped", "seconds", "audio_seconds")
    )
    _need(kind in KINDS, place, f"kind is {kind!r}; it must be one of {tuple(KINDS)}")
    one = (seconds is None) == isinstance(skipped, str)
    _need(one, place, "must have either seconds or the reason why it was skipped")
    _need(_is_number(audio) and audio > 0, place, f"audio_seconds is {audio!r}; it must be above 0")
    single = _SINGLE.fullmatch(str(raw["workload"]).strip())
    return Row(
        workload=str(raw["workload"]),
        kind=kind,
        implementation=str(raw["implementation"]),
        configuration=str(raw["configuration"] or ""),
        dtype=str(raw["dtype"]),
        audio_seconds=float(audio),
        seconds=None if seconds is None else _times(seconds, place),
        rounds=int(seconds.get("rounds", 0)) if seconds else 0,
        share_of_gemm=raw["share_of_gemm"],
        peak_bytes=raw["peak_bytes_above_weights"],
        error=raw["error"],
        error_kind=raw["error_kind"],
        skipped=skipped,
        length=float(single[1]) * (60 if single[2] == "min" else 1) if single else None,
        layers=raw.get("layers") or layers,
    )


def parse(raw: Any, place: str) -> Results:
    """Check the content of a results file.

    Args:
        raw: what `json` read.
        place: the file's name, for messages.

    Raises:
        ValueError: it is not of this schema; the message says where and why.
    """
    _has(raw, (), place)
    schema = raw.get("schema")
    _need(schema == SCHEMA, place, f"schema is {schema!r}; it must be {SCHEMA!r}")
    _has(raw, _TOP, place)
    layers = int(raw["layers"])
    rows = [_row(row, f"{place}: rows[{i}]", layers) for i, row in enumerate(raw["rows"])]
    return Results(
        machine=dict(raw["machine"]),
        versions=dict(raw["versions"]),
        commit=str(raw["commit"]),
        date=str(raw["date"]),
        threads=int(raw["threads"]),
        layers=layers,
        gemm_rate=dict(raw["gemm_rate"]),
        rows=tuple(rows),
        targets=tuple(raw.get("targets") or ()),
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
