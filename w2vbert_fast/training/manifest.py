"""Manifests of fine-tuning: rows of `recordings.manifest`, and what is to be learnt from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.recordings import rows as recordings
from w2vbert_fast.recordings.audio import AudioError, load_audio, stated_seconds
from w2vbert_fast.recordings.manifest import JsonLines, open_manifest
from w2vbert_fast.training.tasks import Task, utf8

_LISTED_ERRORS = 20
# A part may end so much behind the end of its recording: `load_audio` gives what there is.
_TOLERANCE_SECONDS = 0.5
_LONGEST_GUESS_SECONDS = 7 * 24 * 3600.0


class ManifestError(ValueError):
    """A manifest that cannot be used, or rows of one; each line of the message names a line."""


@dataclass(frozen=True)
class Row:
    """A usable row of a manifest.

    Attributes:
        name: what messages call it: the manifest's name, the line and the recording.
        audio: path of the recording.
        seconds: length of what is trained on; 0 where the recording is broken.
        offset: where that begins, in seconds.
        duration: how much it is, in seconds; None: to the end.
        stated: how long the manifest says that the whole recording is; None where it does not say.
        target: what is learnt: a transcript, the name of a class, or segments (`tasks`).
    """

    name: str
    audio: str
    seconds: float
    offset: float = 0.0
    duration: float | None = None
    stated: float | None = None
    target: Any = None


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        rows: its rows, in the file's order.
        digest: SHA-256 of the file, in hexadecimal.
    """

    rows: tuple[Row, ...]
    digest: str


def read_manifest(
    path: str | os.PathLike[str], task: Task, *, lower_case: bool = False
) -> Manifest:
    """Read a manifest and check all of it.

    Every recording must be there. Where a row has no `duration` the recording's header is read for
    it, and only where that does not say, the recording. Where it has an `offset` the header tells
    whether the part is there. One that is broken stays, with a length of 0: it is named and left
    out when it is loaded, as one is whose row states the length.

    Args:
        path: the file; what does not end as CSV, TSV or Parquet is read as JSON lines. Relative
            names in it start from its folder.
        task: decides which columns a row needs.
        lower_case: lower the case of transcripts.

    Returns:
        The rows.

    Raises:
        OSError: the file cannot be read.
        ManifestError: it is no manifest, holds no rows, or rows that cannot be used; all of those
            are named (the first 20, and the number of the rest).
        ImportError: soundfile is needed for a length and not installed, or pyarrow for Parquet.
    """
    reader = open_manifest(path) or JsonLines(os.fspath(path))
    try:
        _, description = reader.survey()
    except ValueError as error:
        raise ManifestError(str(error)) from error
    lengths = _Lengths()
    rows: list[Row] = []
    problems: list[str] = []
    for row in reader.rows(0, recordings.everything):
        try:
            rows.append(_row(row, Path(path).name, task, lower_case, lengths))
        except ValueError as error:
            problems.append(row.problem or f"{row.place}: {error}")
    if problems:
        shown = problems[:_LISTED_ERRORS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ManifestError(f"{path} has rows that cannot be used:\n  " + "\n  ".join(shown))
    return Manifest(tuple(rows), description["sha256"])


class _Lengths:
    """Lengths of recordings in seconds, each found once."""

    def __init__(self) -> None:
        self._stated: dict[str, float | None] = {}
        self._found: dict[str, float | None] = {}

    def stated(self, audio: str) -> float | None:
        """What a header says; None where it does not say, or only guesses.

        Raises:
            ValueError: the file cannot be read.
        """
        if audio not in self._stated:
            try:
                self._stated[audio] = stated_seconds(audio)
            except OSError as error:
                raise ValueError(f"{audio}: {error.strerror or error}") from None
        return self._stated[audio]

    def __call__(self, audio: str) -> float | None:
        """The length, of some formats about; None of a broken recording.

        Raises:
            ValueError: the file cannot be read.
        """
        stated = self.stated(audio)
        if stated is not None:
            return stated
        if audio not in self._found:
            self._found[audio] = _guessed_seconds(audio) or _decoded_seconds(audio)
        return self._found[audio]


def _guessed_seconds(audio: str) -> float:
    """What the first frames of an MP3 promise, which is near enough for batches; 0 of others."""
    soundfile = require("soundfile", "audio")
    try:
        info = soundfile.info(audio)
    except soundfile.LibsndfileError:
        return 0.0
    is_guess = info.subtype.startswith("MPEG") and info.duration < _LONGEST_GUESS_SECONDS
    return float(info.duration) if is_guess else 0.0


def _decoded_seconds(audio: str) -> float | None:
    try:
        return load_audio(audio).seconds
    except AudioError:
        return None


def _row(
    row: recordings.Row, manifest: str, task: Task, lower_case: bool, lengths: _Lengths
) -> Row:
    """What a task needs of a row.

    Raises:
        ValueError: it is not there.
    """
    if row.problem is not None:
        raise ValueError(row.problem)
    columns = row.columns
    if not isinstance(row.audio, str):
        raise ValueError("it holds the recording itself; fine-tuning needs the name of a file")
    audio = utf8(row.audio, "the name of the recording")
    try:
        found = os.path.isfile(audio)
    except ValueError:  # a null character
        found = False
    if not found:
        raise ValueError(f"there is no file {audio}")
    stated = columns.get("duration")
    if row.offset > 0 or row.duration is not None:
        seconds, stated = _part_seconds(row, audio, lengths), None
    elif stated is not None:
        seconds = stated = float(stated)
    else:
        seconds = lengths(audio) or 0.0
    target = task.target(columns, row.offset, row.offset + seconds, lower_case)
    number = row.place.rpartition(" ")[2]
    name = f"{manifest}:{number} ({audio})"
    return Row(name, audio, seconds, row.offset, row.duration, stated, target)


def _part_seconds(row: recordings.Row, audio: str, lengths: _Lengths) -> float:
    """Length of a part, which must be there."""
    if row.duration is not None:
        length = lengths.stated(audio)
        if length is None:
            # It is found out when the part is read, without all that lies before and behind it.
            return row.duration
        seconds = min(row.duration, length - row.offset)
        if seconds <= 0 or seconds < row.duration - _TOLERANCE_SECONDS:
            raise ValueError(
                f"the part from {row.offset:g} to {row.offset + row.duration:g} s is not there: "
                f"{audio} ends after {length:.2f} s"
            )
        return seconds
    length = lengths(audio)
    if length is None:
        return 0.0
    if length <= row.offset:
        raise ValueError(f"offset is {row.offset:g} s, and {audio} ends after {length:.2f} s")
    return length - row.offset
