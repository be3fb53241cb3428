"""Manifests: JSON lines that name recordings and what is to be learnt from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from w2vbert_fast._extras import require
from w2vbert_fast.inference.audio import AudioError, load_audio
from w2vbert_fast.training.config import Task

AUDIO_FIELDS = ("audio", "file", "audio_filepath")
"""Names of the field with the recording: ours, the demo's, NeMo's."""

_LISTED_ERRORS = 20


class ManifestError(ValueError):
    """Rows of a manifest that cannot be used; each line of the message names a line and a field."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording that belongs to a class.

    Attributes:
        start: where it begins, in seconds.
        end: where it ends, in seconds.
        label: name of the class.
    """

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Row:
    """A usable row of a manifest.

    Attributes:
        name: what messages call it: the manifest's name, the line and the recording.
        audio: path of the recording.
        seconds: its length.
        text: transcript, for "ctc".
        label: name of the class or speaker, for "classification" and "xvector".
        segments: for "frames".
    """

    name: str
    audio: str
    seconds: float
    text: str = ""
    label: str = ""
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A checked manifest.

    Attributes:
        rows: its rows, in the file's order.
        digest: SHA-256 of the file, in hexadecimal.
    """

    rows: tuple[Row, ...]
    digest: str


def normalise_transcript(text: str, lower_case: bool = False) -> str:
    """NFC, runs of white space as one space, none at the ends; lower case on request."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.lower() if lower_case else text


def read_manifest(
    path: str | os.PathLike[str], task: Task, *, lower_case: bool = False
) -> Manifest:
    """Read a manifest and check all of it.

    Every recording must be there. Where a row has no `duration` the recording's header is read for
    it, and only where that does not say, the recording.

    Args:
        path: the file. Relative names in it start from its folder.
        task: decides which fields a row needs.
        lower_case: lower the case of transcripts.

    Returns:
        The rows.

    Raises:
        OSError: the file cannot be read.
        ManifestError: it holds no rows, or rows that cannot be used; all of those are named (the
            first 20, and the number of the rest).
        ImportError: soundfile is needed for a length and not installed.
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        bad = content[: error.start].count(b"\n") + 1
        raise ManifestError(f"{path}, line {bad}: not UTF-8") from error
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(line, number, path, task, lower_case))
        except _BadRow as error:
            problems.append(f"line {number}, {error}")
    if problems:
        shown = problems[:_LISTED_ERRORS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ManifestError(f"{path} has rows that cannot be used:\n  " + "\n  ".join(shown))
    if not rows:
        raise ManifestError(f"{path} holds no rows")
    return Manifest(tuple(rows), hashlib.sha256(content).hexdigest())


class _BadRow(Exception):
    """`field "...": what is wrong`, on its way to the error that names file and line."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(reason if field is None else f"field {json.dumps(field)}: {reason}")


def _parse(line: str, number: int, path: Path, task: Task, lower_case: bool) -> Row:
    try:
        entries = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadRow(None, f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entries, dict):
        raise _BadRow(None, f"must be a JSON object, got a {type(entries).__name__}")
    audio = _audio(entries, path.parent)
    seconds = _seconds(entries, audio)
    name = f"{path.name}:{number} ({audio})"
    if task == "ctc":
        return Row(name, audio, seconds, text=normalise_transcript(_text(entries), lower_case))
    if task == "frames":
        return Row(name, audio, seconds, segments=_segments(entries))
    return Row(name, audio, seconds, label=_label(entries, "label"))


def _audio(entries: Mapping[str, Any], folder: Path) -> str:
    field = next((field for field in AUDIO_FIELDS if field in entries), None)
    if field is None:
        raise _BadRow("audio", "missing")
    value = entries[field]
    if not isinstance(value, str) or not value:
        raise _BadRow(field, f"must be the name of a file, got {value!r}")
    audio = folder / value
    try:
        found = audio.is_file()
    except ValueError:  # a null character
        found = False
    if not found:
        raise _BadRow(field, f"there is no file {audio}")
    return str(audio)


def _seconds(entries: Mapping[str, Any], audio: str) -> float:
    value = entries.get("duration")
    if value is not None:
        if not _is_number(value) or value <= 0:
            raise _BadRow("duration", f"must be seconds above 0, got {value!r}")
        return float(value)
    soundfile = require("soundfile", "audio")
    try:
        return float(soundfile.info(audio).duration)
    except soundfile.LibsndfileError:
        pass
    try:
        return load_audio(audio).seconds
    except AudioError as error:
        raise _BadRow("audio", str(error)) from None


def _text(entries: Mapping[str, Any]) -> str:
    value = entries.get("text")
    if value is None:
        raise _BadRow("text", "missing")
    if not isinstance(value, str):
        raise _BadRow("text", f"must be a string, got {value!r}")
    return value


def _label(entries: Mapping[str, Any], field: str) -> str:
    value = entries.get("label")
    if value is None:
        raise _BadRow(field, "missing")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _BadRow(field, f"must be the name of a class, got {value!r}")
    return str(value)


def _segments(entries: Mapping[str, Any]) -> tuple[Segment, ...]:
    value = entries.get("segments")
    if value is None:
        raise _BadRow("segments", "missing")
    if not isinstance(value, list):
        raise _BadRow("segments", f"must be a list, got a {type(value).__name__}")
    segments: list[Segment] = []
    for index, entry in enumerate(value):
        field = f"segments[{index}]"
        if not isinstance(entry, dict):
            raise _BadRow(field, f"must be an object, got a {type(entry).__name__}")
        start, end = entry.get("start"), entry.get("end")
        if not (_is_number(start) and _is_number(end) and 0 <= start < end):
            given = f"start {start!r} and end {end!r}"
            raise _BadRow(field, f"start and end must be seconds, 0 <= start < end, got {given}")
        segments.append(Segment(float(start), float(end), _label(entry, field)))
    ordered = sorted(segments, key=lambda segment: segment.start)
    for first, second in itertools.pairwise(ordered):
        if second.start < first.end:
            raise _BadRow(
                "segments", f"those from {first.start} s and from {second.start} s overlap"
            )
    return tuple(ordered)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
