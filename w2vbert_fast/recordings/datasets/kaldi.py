"""Kaldi's data folders: `wav.scp`, and `segments`, `text` and `utt2spk` where they are there.

What an utterance is called joins the files. They are joined by a table of SQLite in a temporary
file, so that they may be in any order and take no memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

from w2vbert_fast.recordings.manifest import USUAL, ColumnNames, bad_row, manifest_row
from w2vbert_fast.recordings.remote import is_remote
from w2vbert_fast.recordings.rows import Part, Rows, Wanted

_WAV, _SEGMENTS = "wav.scp", "segments"
_COLUMNS = {"text": "text", "utt2spk": "speaker"}
_FILES = (_WAV, _SEGMENTS, *_COLUMNS)
_BOM = b"\xef\xbb\xbf"
_IN_ARCHIVE = re.compile(r".*\.ark:\d+(\[.*\])?")


class _Unusable(ValueError):
    """What is wrong with the row of an utterance."""


class Kaldi:
    """A data folder. Rows are the utterances of `segments`, or else of `wav.scp`, in its order.

    A command of `wav.scp`, such as `sox a.mp3 -t wav - |`, is never run: its rows say so.

    Args:
        path: the folder.
        names: what its columns mean: audio, id, offset, duration, text, speaker.
    """

    kind = "Kaldi data folder"
    sealed = False

    def __init__(self, path: str, names: ColumnNames = USUAL) -> None:
        self.path = path
        self.names = names
        self._there = [name for name in _FILES if os.path.isfile(os.path.join(path, name))]
        self._rows_of = _SEGMENTS if _SEGMENTS in self._there else _WAV
        self._index: sqlite3.Connection | None = None

    @classmethod
    def open(cls, path: str, names: ColumnNames) -> list[Part]:
        """Such a folder, or its `wav.scp`."""
        folder, name = os.path.split(path)
        folder = folder if name == _WAV else path
        return [cls(folder, names)] if os.path.isfile(os.path.join(folder, _WAV)) else []

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digests = {name: hashlib.sha256() for name in self._there}
        self._index = self._build(digests)
        count = sum(1 for _ in self._lines(self._rows_of))
        if count == 0:
            raise ValueError(f"{os.path.join(self.path, self._rows_of)} holds no rows")
        return count, {
            "kaldi": os.path.abspath(self.path),
            "sha256": {name: digest.hexdigest() for name, digest in digests.items()},
            "rows": count,
        }

    def rows(self, start: int, wanted: Wanted) -> Rows:
        if self._index is None:
            self._index = self._build({})
        index = start
        for number, key, value in self._lines(self._rows_of):
            if wanted(index):
                place = f"{self._rows_of}, line {number}"
                try:
                    entries = self._entries(number, key, value)
                except _Unusable as error:
                    yield bad_row(index, self.path, place, str(error), _text(key))
                else:
                    yield manifest_row(index, entries, "", self.path, place, self.names)
            index += 1
        return index

    def _lines(self, name: str, digest: Any = None) -> Iterator[tuple[int, bytes, bytes]]:
        """Lines of a file: their numbers, what each begins with, and the rest. Empty ones do not
        count."""
        with open(os.path.join(self.path, name), "rb") as file:
            for number, line in enumerate(file, start=1):
                if digest is not None:
                    digest.update(line)
                key, *rest = line.removeprefix(_BOM).split(None, 1) or (b"",)
                if key:
                    yield number, key, rest[0].strip() if rest else b""

    def _build(self, digests: dict[str, Any]) -> sqlite3.Connection:
        """All lines by what they begin with, in a file that goes with the connection."""
        index = sqlite3.connect("", check_same_thread=False)
        index.execute("PRAGMA journal_mode = OFF")
        for name in self._there:
            index.execute(
                f'CREATE TABLE "{name}" (key BLOB PRIMARY KEY, line INTEGER, value BLOB, '
                "again INTEGER) WITHOUT ROWID"
            )
            index.executemany(
                f'INSERT INTO "{name}" (line, key, value) VALUES (?, ?, ?) '
                "ON CONFLICT (key) DO UPDATE SET again = coalesce(again, excluded.line)",
                self._lines(name, digests.get(name)),
            )
        index.commit()
        return index

    def _entries(self, number: int, key: bytes, value: bytes) -> dict[str, Any]:
        """The columns of an utterance.

        Raises:
            _Unusable: it makes no row.
        """
        entries: dict[str, Any] = {"id": _text(key)}
        first, _, _ = self._found(self._rows_of, key)
        if first != number:
            raise _Unusable(f"{_text(key)} is there twice, first in line {first}")
        if self._rows_of == _SEGMENTS:
            recording, times = _segment(value)
            entries.update(times)
            value = self._only(_WAV, recording, "a recording")
            if value is None:
                raise _Unusable(f"{_WAV} has no recording {_text(recording)}")
        entries["audio"] = self._audio(value)
        for name, column in _COLUMNS.items():
            if name in self._there:
                value = self._only(name, key, "an utterance")
                if value is not None:
                    entries[column] = _text(value)
        return entries

    def _found(self, name: str, key: bytes) -> Any:
        assert self._index is not None
        found = self._index.execute(
            f'SELECT line, value, again FROM "{name}" WHERE key = ?', (key,)
        )
        return found.fetchone() or (None, None, None)

    def _only(self, name: str, key: bytes, what: str) -> Any:
        """What a file says of an utterance or a recording; None: nothing."""
        line, value, again = self._found(name, key)
        if again is not None:
            raise _Unusable(f"{name} has {what} {_text(key)} twice, in lines {line} and {again}")
        return value

    def _audio(self, value: bytes) -> str:
        """The file that an entry of `wav.scp` names: relative to the folder, or else, as Kaldi has
        it, to the working directory."""
        name = _text(value)
        if not name:
            raise _Unusable(f"{_WAV} must name a file behind the id, and there is none")
        if name.endswith("|"):
            raise _Unusable(
                f"{_WAV} has a command, {name!r:.200}, and commands are never run; write its "
                "output to a file and name that"
            )
        if _IN_ARCHIVE.fullmatch(name):
            raise _Unusable(f"{_WAV} must name a file of audio, got a place in an archive, {name}")
        here = name if is_remote(name) else os.path.join(self.path, name)
        if here != name and not os.path.exists(here) and os.path.exists(name):
            return os.path.abspath(name)
        return here


def _segment(value: bytes) -> tuple[bytes, dict[str, str]]:
    """The recording of a line of `segments`, and offset and duration; -1 is the recording's end."""
    parts = value.split()
    try:
        recording, begin, end = parts
        start, stop = float(begin), float(end)
    except ValueError:
        raise _Unusable(
            "a segment must be an id, a recording, its start and its end in seconds, got "
            f"{_text(value)!r:.200} behind the id"
        ) from None
    if stop == -1:
        return recording, {"offset": repr(start)}
    if not 0 <= start < stop < float("inf"):
        raise _Unusable(f"a segment must end behind its start, got {start:g} to {stop:g} s")
    return recording, {"offset": repr(start), "duration": repr(stop - start)}


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
