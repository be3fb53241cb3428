"""The page of a job: what it has done, how fast, what failed, and every row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import read_json
from w2vbert_fast.inference.jobs.journal import (
    JOB_FILE,
    JOURNAL_FILE,
    SUMMARY_FILE,
    Entry,
    JobError,
)
from w2vbert_fast.inference.jobs.progress import duration
from w2vbert_fast.inference.jobs.results import read_entries, read_results
from w2vbert_fast.recordings.which_files import PassedOver
from w2vbert_fast.report import Chart, Column, Fact, Findings, Page, Row, write_page

REPORT_FILE = "report.html"

_POINTS = 300
_COLUMNS = (
    Column("Recording"),
    Column("Length", "seconds"),
    Column("Confidence", "share"),
    Column("Result"),
    Column("Error", small=True),
    Column("Begins at", "seconds", small=True),
    Column("Salvaged", small=True),
    Column("Other columns", small=True),
    Column("Index", "number", small=True),
)
_LENGTH, _CONFIDENCE = 1, 2
# Shown in columns of their own, as words or not at all.
_OWN = frozenset(
    (
        *("index", "id", "audio_filepath", "offset", "seconds", "louder_channel", "text", "words"),
        *("channels", "error", "error_type", "salvaged", "expected_seconds", "embedding", "label"),
        *("scores", "segments", "shape", "extra"),
    )
)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into the folder of a job, of what it has done so far.

    Memory does not grow with the number of rows.

    Returns:
        The file.

    Raises:
        JobError: the folder holds no job, or its files are not what its journal says.
        OSError: a file cannot be read or written.
        ImportError: a table is Parquet and pyarrow is not installed.
    """
    path = Path(folder)
    for name in (JOB_FILE, JOURNAL_FILE):
        if not (path / name).is_file():
            raise JobError(f"{path} holds no rows of a job: there is no {name}")
    job = read_json(path / JOB_FILE)
    summary = read_json(path / SUMMARY_FILE) if (path / SUMMARY_FILE).is_file() else {}
    seen = _Seen(Path(job.get("working_folder", ".")))
    options = job["fingerprint"]["options"]
    page = Page(f"{options['task']}: {path.resolve().name}", _COLUMNS)

    def finish() -> None:
        entries = list(read_entries(path))
        page.facts = _facts(job, summary, seen)
        page.charts = [
            _speed(entries),
            Chart("Length of recordings", "seconds", column=_LENGTH),
            Chart("Confidence", "per cent", column=_CONFIDENCE),
        ]
        page.findings = [
            Findings(
                "What failed",
                [(name, count, seen.examples[name]) for name, count in seen.errors.most_common()],
                search=True,
            ),
            Findings("What was passed over", _passed_over(summary)),
        ]
        page.sort = _CONFIDENCE if seen.has_confidence else None

    write_page(path / REPORT_FILE, page, seen.rows(read_results(path, tensors=False)), finish)
    return path / REPORT_FILE


@dataclass
class _Seen:
    """Rows on their way to the page, and what is counted of them."""

    working_folder: Path
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    has_confidence: bool = False
    count: int = 0
    seconds: float = 0.0

    def rows(self, results: Iterator[dict[str, Any]]) -> Iterator[Row]:
        for result in results:
            kind = result.get("error_type")
            self.count += 1
            self.seconds += (result["seconds"] or 0.0) if kind is None else 0.0
            if kind is not None:
                self.errors[kind] += 1
                self.examples.setdefault(kind, f"{result['audio_filepath']}: {result['error']}")
            row = self._row(result)
            self.has_confidence = self.has_confidence or row.cells[_CONFIDENCE] is not None
            yield row

    def _row(self, result: Mapping[str, Any]) -> Row:
        failed = result.get("error_type") is not None
        offset = result["offset"] or 0.0
        words = result.get("words") or ()
        audio = self.working_folder / result["audio_filepath"]
        cells = (
            _printable(result["id"]),
            result["seconds"],
            _confidence(result),
            _printable(_what_came(result)),
            _printable(f"{result['error_type']}: {result['error']}") if failed else None,
            offset or None,
            result.get("salvaged"),
            _printable(
                "\n".join(
                    f"{name}: {value}"
                    for name, value in result.items()
                    if name not in _OWN and not name.endswith("_file") and value is not None
                )
            ),
            result["index"],
        )
        return Row(
            cells,
            failed,
            os.fspath(audio) if os.path.isfile(audio) else None,
            offset,
            result["seconds"],
            [(_printable(w["word"]), w["start"], w["end"], w["confidence"]) for w in words],
        )


def _printable(text: Any) -> str:
    """Text of which the bytes that are no UTF-8 are escapes."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _what_came(result: Mapping[str, Any]) -> str:
    if result.get("error_type") is not None:
        return str(result["error"])
    if result.get("text") is not None:
        return str(result["text"])
    if result.get("label") is not None:
        return str(result["label"])
    if result.get("segments") is not None:
        return ", ".join(
            f"{s['label']} {s['start']:.2f}-{s['end']:.2f}" for s in result["segments"]
        )
    return "" if result.get("shape") is None else f"embedding {list(result['shape'])}"


def _confidence(result: Mapping[str, Any]) -> float | None:
    """The mean of the words' confidences, or the probability of the class; from 0 to 1."""
    if result.get("words"):
        return float(sum(word["confidence"] for word in result["words"]) / len(result["words"]))
    scores = result.get("scores")
    if not scores:
        return None
    return float(max(dict(scores).values()))  # pairs in Parquet tables


def _facts(job: Mapping[str, Any], summary: Mapping[str, Any], seen: _Seen) -> list[Fact]:
    options = job["fingerprint"]["options"]
    failed = sum(seen.errors.values())
    facts = [
        Fact("Rows", f"{seen.count:,}"),
        Fact("Failed", f"{failed:,}"),
        Fact("Audio", duration(seen.seconds)),
        Fact("Model", job["fingerprint"]["model"]["name"]),
    ]
    run = summary.get("this_run", {})
    if run.get("rows"):
        facts += [
            Fact("Speed of the last run", f"{run['audio_hours_per_hour']:,.0f} h of audio an hour"),
            Fact("Time of the last run", duration(run["seconds"])),
        ]
        if run["peak_memory_bytes"]:
            facts.append(Fact("Peak memory", f"{run['peak_memory_bytes'] / 2**30:.2f} GiB"))
    if summary.get("device"):
        facts.append(Fact("Computed on", summary["device"]))
    if not summary:
        facts.append(Fact("State", "not at its end"))
    given = {
        name: value
        for name, value in sorted(options.items())
        if name not in ("task", "formats") and value not in (None, False, 0, "none")
    }
    facts += [
        Fact("Formats", ", ".join(options["formats"])),
        Fact("Options", ", ".join(f"{name} {_short(value)}" for name, value in given.items())),
        Fact("w2vbert_fast", job["versions"]["w2vbert_fast"]),
        Fact("PyTorch", job["versions"]["torch"]),
    ]
    return facts


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _passed_over(summary: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    found = PassedOver.from_json(summary.get("passed_over", {}))
    return [
        (reason, count, ", ".join(found.examples.get(reason, [])))
        for reason, count in found.counts.items()
    ]


def _speed(entries: list[Entry]) -> Chart:
    """Audio per second of work, shard after shard; shards of older versions have no times."""
    timed = [entry for entry in entries if entry.seconds is not None]
    group = max(1, len(timed) // _POINTS)
    points: list[tuple[float, float]] = []
    worked = 0.0
    for first in range(0, len(timed), group):
        some = timed[first : first + group]
        seconds = sum(entry.seconds or 0.0 for entry in some)
        worked += seconds
        audio = sum(entry.audio_seconds for entry in some)
        points.append((round(worked / 60, 4), round(audio / max(seconds, 1e-3), 3)))
    return Chart(
        "Speed",
        "minutes of work",
        "seconds of audio a second",
        {"speed": points},
    )
