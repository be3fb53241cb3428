"""What a result file holds: `python -m bench` writes it, the targets and the report read it.

Times are seconds, sizes bytes, rates FLOP/s.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench.measure import joined
from bench.workloads import KINDS

SCHEMA = "w2vbert-bench/v1"

_SINGLE = re.compile(r"1\s*x\s*([\d.]+)\s*(s|min)")


@dataclass(frozen=True)
class Row:
    """One measurement; see `bench/results` for examples.

    Attributes:
        audio_seconds: of all utterances, unpadded.
        seconds: "median", "p20" and "p80" of one pass over the workload, and how many "rounds" they
            come from; `None` where it was not run.
        share_of_gemm: the FLOP/s as a share of those of the machine's fastest GEMM.
        error_kind: what `error` is relative to.
        skipped: why it was not run, or why its times do not count.
        batch: utterances.
        longest_seconds: of audio.
        layers: of the encoder, where one ran.
        preparation_seconds_of_all: of all candidates of the workload together.
    """

    workload: str
    kind: str
    implementation: str
    configuration: str
    dtype: str
    audio_seconds: float
    seconds: dict[str, Any] | None
    flops: float | None
    share_of_gemm: float | None
    peak_bytes_above_weights: int | None
    error: float | None
    error_kind: str | None
    skipped: str | None
    batch: int | None = None
    longest_seconds: float | None = None
    layers: int | None = None
    audio_seconds_per_second: float | None = None
    gemm_rate: float | None = None
    preparation_seconds_of_all: float | None = None

    @property
    def name(self) -> str:
        return joined(self.implementation, self.configuration)

    @property
    def length(self) -> float | None:
        """Seconds of audio of the only utterance; `None` when there are several."""
        single = _SINGLE.fullmatch(self.workload.strip())
        return float(single[1]) * (60 if single[2] == "min" else 1) if single else None

    @property
    def peak_mebibytes(self) -> float | None:
        peak = self.peak_bytes_above_weights
        return None if peak is None else peak / 2**20

    @property
    def times(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile."""
        if self.seconds is None:
            raise ValueError(f"{self.name} was skipped: {self.skipped}")
        return self.seconds["median"], self.seconds["p20"], self.seconds["p80"]

    @property
    def speed(self) -> tuple[float, float, float]:
        """Seconds of audio in a second: at the median time, and at its 80th and 20th percentile."""
        median, low, high = self.times
        return self.audio_seconds / median, self.audio_seconds / high, self.audio_seconds / low


@dataclass(frozen=True)
class Results:
    """One file of measurements; a row that says nothing of layers has those of the file."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    threads: int
    layers: int
    gemm_rate: dict[str, float]
    rows: tuple[Row, ...]
    targets: tuple[dict[str, Any], ...] = ()

    @property
    def device(self) -> str:
        """The GPU, or the CPU where there is none."""
        return str(self.machine.get("gpu") or self.machine.get("cpu", "unknown machine"))


def _need(condition: bool, place: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{place}: {message}")


def _fields_of(kind: type, raw: Any, place: str) -> dict[str, Any]:
    """The fields of a dataclass that an object holds; all but those with a default must be."""
    _need(isinstance(raw, dict), place, f"is {type(raw).__name__}; it must be a JSON object")
    wanted = fields(kind)
    missing = [f.name for f in wanted if f.default is MISSING and f.name not in raw]
    _need(not missing, place, f"lacks {', '.join(missing)}")
    return {f.name: raw[f.name] for f in wanted if f.name in raw}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _row(raw: Any, place: str) -> Row:
    row = Row(**_fields_of(Row, raw, place))
    _need(row.kind in KINDS, place, f"kind is {row.kind!r}; it must be one of {tuple(KINDS)}")
    one = (row.seconds is None) == isinstance(row.skipped, str)
    _need(one, place, "must have either seconds or the reason why it was skipped")
    audio = row.audio_seconds
    _need(_is_number(audio) and audio > 0, place, f"audio_seconds is {audio!r}; it must be above 0")
    if row.seconds is not None:
        complete = isinstance(row.seconds, dict) and all(
            _is_number(row.seconds.get(key)) for key in ("median", "p20", "p80")
        )
        _need(complete, place, "seconds must have the numbers median, p20 and p80")
        median, low, high = row.times
        message = f"p20 {low}, median {median}, p80 {high} must be above 0 and rise"
        _need(0 < low <= median <= high, place, message)
    return row


def parse(raw: Any, place: str) -> Results:
    """Check the content of a results file.

    Args:
        raw: what `json` read.
        place: the file's name, for messages.

    Raises:
        ValueError: it is not of this schema; the message says where and why.
    """
    _need(isinstance(raw, dict), place, f"is {type(raw).__name__}; it must be a JSON object")
    schema = raw.get("schema")
    _need(schema == SCHEMA, place, f"schema is {schema!r}; it must be {SCHEMA!r}")
    given = _fields_of(Results, raw, place)
    rows = [_row(row, f"{place}: rows[{i}]") for i, row in enumerate(raw["rows"])]
    filled = tuple(replace(row, layers=row.layers or raw["layers"]) for row in rows)
    return Results(**{**given, "rows": filled, "targets": tuple(given.get("targets") or ())})


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
