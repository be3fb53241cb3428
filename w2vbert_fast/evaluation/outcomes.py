"""What is compared: the transcripts of data, and what models or finished jobs make of its rows."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vbert_fast.inference.jobs.journal import JOURNAL_FILE
from w2vbert_fast.inference.jobs.results import read_results
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.recordings.inputs import Inputs
from w2vbert_fast.recordings.manifest import transcript
from w2vbert_fast.recordings.rows import Row

logger = logging.getLogger(__name__)

Watch = Callable[[int], None]
"""Is told how many rows are done."""


@dataclass(frozen=True)
class Reference:
    """What was said in a row of the data.

    Attributes:
        id: of the row, or the recording's name.
        audio: name of the recording.
        offset: where the row begins in it, in seconds.
        text: its transcript; None where it has none that can be used.
        problem: why not.
        group: its value in the column that the scores are told apart by; "" without one.
    """

    id: str
    audio: str
    offset: float
    text: str | None
    problem: str | None
    group: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a system made of a row.

    Attributes:
        text: what it recognised; None after an error.
        seconds: length of the recording; None where nobody knows.
        error: what went wrong; None: nothing.
        words: what was recognised, word by word, where times are known: text, start and end in
            seconds of the recording, confidence from 0 to 1.
    """

    text: str | None = None
    seconds: float | None = None
    error: str | None = None
    words: tuple[tuple[str, float, float, float], ...] = ()


def references(inputs: Inputs, by: str | None = None) -> list[Reference]:
    """The transcripts of all rows, in their order.

    Args:
        inputs: the data.
        by: a column to tell rows apart by.

    Raises:
        OSError: a part of the data cannot be read.
        ValueError: it is damaged as a whole, no row has a transcript, or none has the column.
    """
    found: list[Reference] = []
    columns: dict[str, None] = {}
    for row in inputs.rows():
        columns |= dict.fromkeys(row.columns)
        text = problem = None
        try:
            text = transcript(row.columns)
        except ValueError as error:
            problem = row.problem or (f"{row.place}: {error}" if row.place else str(error))
        group = "" if by is None else _group(row, by)
        found.append(Reference(row.id, row.name, row.offset, text, problem, group))
    if inputs.passed_over.counts:
        logger.warning("passed over: %s", inputs.passed_over)
    if all(reference.text is None for reference in found):
        first = f"{found[0].id}: {found[0].problem}"
        raise ValueError(f"no row of the data has a transcript: {first}")
    if by is not None and by not in columns:
        raise ValueError(f"no row of the data has a column {by!r}, but {', '.join(columns)}")
    return found


def _group(row: Row, by: str) -> str:
    value = row.columns.get(by)
    if value is None:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def of_runner(
    runner: Runner[Any], inputs: Inputs, count: int, watch: Watch | None = None
) -> list[Outcome]:
    """What a model makes of each row, in their order.

    Args:
        runner: `Transcriber` or another runner of `Transcribe`.
        inputs: the data.
        count: its rows.
        watch: see `Watch`.
    """
    runner.batcher.prepare()
    found = [Outcome(error="was not computed")] * count
    for done, result in enumerate(runner(inputs.rows(), ordered=False), start=1):
        found[result.index] = Outcome(result.text, result.seconds, result.error)
        if watch is not None:
            watch(done)
    return found


def is_results(name: str | os.PathLike[str]) -> bool:
    """Whether it is the folder of a job, and no model."""
    return (Path(name) / JOURNAL_FILE).is_file()


def of_results(folder: str | os.PathLike[str], wanted: Sequence[Reference]) -> list[Outcome]:
    """What a job made of each row.

    A row of the results is the one of the same recording, or else of the same id, and of the same
    offset. Where several are, none is.

    Args:
        folder: of a job of `transcribe`.
        wanted: the rows of the data.

    Raises:
        OSError, JobError: the folder is not to be read, or damaged.
        ValueError: it holds no texts, or none of the rows.
    """
    found: dict[tuple[str, str, float], Outcome | None] = {}
    texts = False
    for row in read_results(folder):
        texts |= "text" in row
        words = tuple(
            (word["word"], word["start"], word["end"], word["confidence"])
            for word in row.get("words") or ()
        )
        outcome = Outcome(row.get("text"), row.get("seconds"), row.get("error"), words)
        for key in _keys(str(row["id"]), str(row["audio_filepath"]), row.get("offset") or 0.0):
            found[key] = None if key in found else outcome
    if not texts:
        raise ValueError(f"{os.fspath(folder)} holds no texts; evaluate takes jobs of transcribe")
    missing = Outcome(error=f"{os.fspath(folder)} has no row of it, or several")
    outcomes = [
        _first(found.get(key) for key in _keys(row.id, row.audio, row.offset)) or missing
        for row in wanted
    ]
    if all(outcome is missing for outcome in outcomes):
        raise ValueError(f"{os.fspath(folder)} holds none of the rows of the data")
    return outcomes


def _keys(identity: str, audio: str, offset: float) -> list[tuple[str, str, float]]:
    place = audio if "://" in audio else os.path.abspath(audio)
    keys = [("recording", place, round(offset, 3))]
    # Rows without an id have the recording's name in its place.
    return keys if identity == audio else [*keys, ("id", identity, round(offset, 3))]


def _first(outcomes: Iterable[Outcome | None]) -> Outcome | None:
    return next((outcome for outcome in outcomes if outcome is not None), None)
