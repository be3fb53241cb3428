"""Data sets of fine-tuning: rows of `recordings.inputs`, and what is to be learnt from them."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.files import staged_file
from w2vbert_fast.recordings import rows as recordings
from w2vbert_fast.recordings.audio import AudioError, load_audio, stated_seconds
from w2vbert_fast.recordings.datasets.formats import open_dataset
from w2vbert_fast.recordings.inputs import Inputs, open_inputs
from w2vbert_fast.recordings.manifest import USUAL, ColumnNames, JsonLines
from w2vbert_fast.training.tasks import Task, utf8

logger = logging.getLogger(__name__)

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
        digest: SHA-256 of the file, in hexadecimal; of a data set of several, of their description.
    """

    rows: tuple[Row, ...]
    digest: str


def read_manifest(
    path: str | os.PathLike[str],
    task: Task,
    *,
    lower_case: bool = False,
    columns: ColumnNames = USUAL,
    unpack: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Read a data set and check all of it. What it was taken for is logged.

    Every recording must be there. Where a row has no `duration` the recording's header is read for
    it, and only where that does not say, the recording. Where it has an `offset` the header tells
    whether the part is there. One that is broken stays, with a length of 0: it is named and left
    out when it is loaded, as one is whose row states the length.

    Args:
        path: a data set as jobs read it, or a pattern of several; any other file is read as JSON
            lines.
        task: decides which columns a row needs.
        lower_case: lower the case of transcripts.
        columns: what columns mean.
        unpack: folder into which recordings are written that lie in the data set; None: those
            cannot be used.

    Returns:
        The rows.

    Raises:
        OSError: the file cannot be read.
        ManifestError: it is no manifest, holds no rows, or rows that cannot be used; all of those
            are named (the first 20, and the number of the rest).
        ImportError: soundfile is needed for a length and not installed, or pyarrow for Parquet.
    """
    name = os.fspath(path)
    try:
        several = os.path.isdir(name) or (glob.has_magic(name) and not os.path.exists(name))
        if not several and not open_dataset(name, columns):
            inputs = Inputs.of_parts([JsonLines(name, columns)], [name], columns)
        else:
            inputs = open_inputs([name], columns)
    except ValueError as error:
        raise ManifestError(str(error)) from error
    for line in inputs.described:
        logger.info("%s", line)
    if inputs.passed_over.counts:
        logger.info("passed over: %s", inputs.passed_over)
    lengths = _Lengths()
    rows: list[Row] = []
    problems: list[str] = []
    for row in inputs.rows():
        try:
            rows.append(_row(row, Path(path).name, task, lower_case, lengths, unpack))
        except ValueError as error:
            problems.append(f"{row.place or row.name}: {error}")
    if problems:
        shown = problems[:_LISTED_ERRORS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ManifestError(f"{path} has rows that cannot be used:\n  " + "\n  ".join(shown))
    return Manifest(tuple(rows), _digest(inputs))


def _digest(inputs: Inputs) -> str:
    digest = inputs.fingerprint[0].get("sha256")
    if len(inputs.fingerprint) == 1 and isinstance(digest, str):
        return digest
    return hashlib.sha256(json.dumps(inputs.fingerprint).encode()).hexdigest()


def _unpacked(row: recordings.Row, folder: str | os.PathLike[str] | None) -> str:
    """The file of a recording that lies in the data set, named by its content.

    Raises:
        ValueError: there is no folder for it.
    """
    if folder is None:
        raise ValueError("it holds the recording itself, and there is no folder to unpack it into")
    ending = os.path.splitext(row.name)[1]
    ending = ending if re.fullmatch(r"\.\w{1,8}", ending, re.ASCII) else ""
    digest = hashlib.sha256(row.audio).hexdigest()
    path = Path(folder, digest[:2], f"{digest}{ending}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staged:
            staged.path.write_bytes(row.audio)
            staged.commit()
    return str(path)


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
    row: recordings.Row,
    manifest: str,
    task: Task,
    lower_case: bool,
    lengths: _Lengths,
    unpack: str | os.PathLike[str] | None,
) -> Row:
    """What a task needs of a row.

    Raises:
        ValueError: it is not there.
    """
    if row.problem is not None:
        raise ValueError(row.problem)
    columns = row.columns
    audio = row.audio if isinstance(row.audio, str) else _unpacked(row, unpack)
    audio = utf8(audio, "the name of the recording")
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
    name = f"{manifest}:{number} ({audio})" if number else row.name
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
