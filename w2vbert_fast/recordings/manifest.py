"""Manifests: files that name recordings, one a row. JSON lines, CSV, TSV and Parquet.

The one reader of jobs and of fine-tuning. Every format is a `Part` of an input: it counts its rows
and digests itself once, and then hands its rows out lazily. A row that cannot be used is a row with
a problem that names its line; none is left out, and none is read into another.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.recordings.remote import join
from w2vbert_fast.recordings.rows import Part, Row, Rows, Wanted

AUDIO_COLUMNS = ("audio_filepath", "audio", "file")
"""Names of the column with the recording: NeMo's, the datasets library's, the demo's."""

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript")
"""Names of the column with the transcript: NeMo's, Common Voice's, and two that the hub has."""

_BLOCK = 1 << 20
_PARQUET_ROWS = 512
# A quotation mark that nobody closes is not looked for any further than this.
_LONGEST_CELL_LINES = 1_000


def open_manifest(path: str | os.PathLike[str]) -> Part | None:
    """The reader of a manifest, by the ending of its name; None where that is no manifest's.

    Raises:
        ImportError: it is a Parquet file, and pyarrow is not installed.
    """
    name = os.fspath(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return JsonLines(name)
    if suffix == ".csv":
        return Csv(name)
    if suffix == ".tsv":
        return Tsv(name)
    if suffix == ".parquet":
        return Parquet(name)
    return None


class _Text(ABC):
    """A manifest of lines in UTF-8, with or without a byte order mark.

    Bytes that are no UTF-8 come through as surrogates (PEP 383), as in the names of files.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digest = hashlib.sha256()
        count = sum(1 for _ in self._records(digest))
        return _description(self.path, digest, count)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        folder = Path(self.path).parent
        index = start
        for number, record in self._records():
            if wanted(index):
                place = f"line {number}"
                entries = self._entries(record)
                if isinstance(entries, str):
                    yield _bad(index, self.path, place, entries)
                else:
                    yield manifest_row(index, entries, folder, self.path, place)
            index += 1
        return index

    def _lines(self, digest: Any = None) -> Iterator[tuple[int, bytes]]:
        """Lines and their numbers, from 1; what is read goes into the digest."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if digest is not None:
                    digest.update(line)
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{self.path} is UTF-16; a manifest must be UTF-8")
                # Of every line, since files that begin with a mark may have been joined.
                yield number, line.removeprefix(codecs.BOM_UTF8)

    @abstractmethod
    def _records(self, digest: Any = None) -> Iterator[tuple[int, Any]]:
        """What each row is made of, and the number of its line."""

    @abstractmethod
    def _entries(self, record: Any) -> dict[str, Any] | str:
        """The columns of a record, or what is wrong with it."""


class JsonLines(_Text):
    """One JSON object a line. Lines of white space do not count."""

    def _records(self, digest: Any = None) -> Iterator[tuple[int, bytes]]:
        return (item for item in self._lines(digest) if not item[1].isspace())

    def _entries(self, record: bytes) -> dict[str, Any] | str:
        line = record.decode("utf-8", "surrogateescape")
        try:
            entries = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            kind = "JSON" if _is_utf8(line) else "UTF-8"
            return f"not {kind}: {error}"
        if not isinstance(entries, dict):
            return f"not a JSON object but a {type(entries).__name__}"
        return entries


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError(f"{_repeated([name for name, _ in pairs])} is there twice")
    return entries


def _is_utf8(text: str) -> bool:
    """Whether a text holds none of the surrogates that stand for other bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class _Delimited(_Text):
    """The first line names the columns. Empty lines do not count."""

    delimiter: str

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.header: list[str] = []

    def _records(self, digest: Any = None) -> Iterator[tuple[int, list[str] | str]]:
        """Cells of each row, or what is wrong with it."""
        lines = _Returnable(self._decoded(digest))
        for _, line in lines:
            if line.strip(" "):
                self.header = self._read_header(line)
                break
        for number, line in lines:
            if not line.strip(" "):
                continue
            if "\0" in line:
                yield number, "holds a null character"
                continue
            yield number, self._cells(line, lines)

    def _decoded(self, digest: Any) -> Iterator[tuple[int, str]]:
        for number, line in self._lines(digest):
            text = line.decode("utf-8", "surrogateescape")
            yield number, text.removesuffix("\n").removesuffix("\r")

    def _read_header(self, line: str) -> list[str]:
        if "\r" in line:
            raise ValueError(
                f"{self.path}: its lines must end with a line feed, or with a carriage return and "
                "a line feed; they end with a carriage return alone"
            )
        cells = self._cells(line, _Returnable(iter(())))
        if isinstance(cells, str):
            raise ValueError(f"{self.path}: the first line must name the columns: {cells}")
        names = [cell.strip() for cell in cells]
        _check_columns(self.path, names, "the first line must name the columns")
        return names

    def _cells(self, line: str, following: _Returnable) -> list[str] | str:
        return line.split(self.delimiter)

    def _entries(self, record: list[str] | str) -> dict[str, Any] | str:
        if isinstance(record, str):
            return record
        if len(record) != len(self.header):
            return f"{len(record)} cells in {len(self.header)} columns"
        entries: dict[str, Any] = {}
        for name, cell in zip(self.header, record, strict=True):
            if name in entries and cell:
                return f"{cell!r:.200} and another cell have no column name"
            if name or cell:
                entries[name] = cell
        return entries


class Tsv(_Delimited):
    """Values between tabs. Quotation marks are text; a line is a row."""

    delimiter = "\t"


class Csv(_Delimited):
    """Values between commas, quoted as RFC 4180 has it.

    A quoted cell may go on over the next lines where it is closed there, the row then has as many
    cells as there are columns, and none of those lines could be a row by itself. Else the quotation
    mark was not meant to open a cell: its line is a row with a problem, and the next line is a row
    of its own.
    """

    delimiter = ","

    def _cells(self, line: str, following: _Returnable) -> list[str] | str:
        if '"' not in line:
            return line.split(self.delimiter)
        taken: list[tuple[int, str]] = []
        stop = ""

        def record() -> Iterator[str]:
            nonlocal stop
            yield f"{line}\n"
            for number, text in following:
                taken.append((number, text))
                if text.count(self.delimiter) >= len(self.header) - 1:
                    stop = f" before line {number}, which could be a row"
                    return
                yield f"{text}\n"
                if len(taken) == _LONGEST_CELL_LINES:
                    return

        try:
            cells = next(csv.reader(record(), delimiter=self.delimiter, strict=True))
            if not taken or len(cells) == len(self.header):
                return cells
            problem = f"{len(cells)} cells in {len(self.header)} columns"
        except csv.Error as error:
            unclosed = "end of data" in str(error)
            problem = f"a quotation mark is not closed{stop}" if unclosed else f"not CSV: {error}"
        following.give_back(taken)
        return problem


class _Returnable(Iterator[tuple[int, str]]):
    """Lines and their numbers, of which some can be given back."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._returned: list[tuple[int, str]] = []

    def __next__(self) -> tuple[int, str]:
        return self._returned.pop() if self._returned else next(self._lines)

    def give_back(self, lines: Sequence[tuple[int, str]]) -> None:
        """Hand these lines out next."""
        self._returned += reversed(lines)


class Parquet:
    """A Parquet manifest: names of recordings, or `{bytes, path}` as the datasets library has them.

    Raises:
        ImportError: pyarrow is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.parquet = require("pyarrow.parquet", "offline")
        self.arrow = require("pyarrow", "offline")

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digest = _digest_of(self.path)
        with self._open() as file:
            _check_columns(self.path, file.schema_arrow.names, "it must have a column")
            count = file.metadata.num_rows
        return _description(self.path, digest, count)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        folder = Path(self.path).parent
        index = start
        with self._open() as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                here = [i for i in range(batch.num_rows) if wanted(index + i)]
                for i in here:
                    (entries,) = batch.slice(i, 1).to_pylist()
                    found = {name: value for name, value in entries.items() if value is not None}
                    place = f"row {index + i - start + 1}"
                    yield manifest_row(index + i, found, folder, self.path, place)
                index += batch.num_rows
        return index

    def _open(self) -> Any:
        try:
            return self.parquet.ParquetFile(self.path)
        except self.arrow.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a Parquet file: {error}") from error


def manifest_row(
    index: int, entries: Mapping[str, Any], folder: Path, manifest: str, place: str
) -> Row:
    """A row of the entries of a manifest; a row with a problem where they make none.

    Args:
        index: of the row.
        entries: its columns.
        folder: where relative names of recordings start.
        manifest: its name, for messages.
        place: of the row in it, such as "line 7".
    """
    try:
        column = _audio_column(entries)
    except ValueError as error:
        return _bad(index, manifest, place, str(error), columns=entries)
    others = {name: value for name, value in entries.items() if name not in (column, "id")}
    audio, name = entries[column], None
    if isinstance(audio, bytes):
        audio = {"bytes": audio}
    if isinstance(audio, Mapping):
        # An audio column of the datasets library: the content, or a path.
        name = audio.get("path") or f"{os.path.basename(manifest)}:{index}"
        content = audio.get("bytes")
        audio = content if content is not None else audio.get("path")
    given = entries.get("id")
    identity = "" if given is None else str(given)
    if not (isinstance(audio, bytes) and name is not None):
        if not isinstance(audio, str) or not audio:
            problem = f"{column} must be the name of a file, got {audio!r:.200}"
            return _bad(index, manifest, place, problem, identity, others)
        audio = name = join(folder, audio)
    try:
        offset = _seconds(others, "offset", above_zero=False)
        duration = _seconds(others, "duration", above_zero=True)
    except ValueError as error:
        problem = f"{place}: {error}"
        return Row(
            index, None, name, identity or name, columns=others, problem=problem, place=place
        )
    others.pop("offset", None)
    # Without an offset, "duration" often is the recording's length, which need not be exact.
    part = None if offset is None else duration
    return Row(index, audio, name, identity or name, None, offset or 0.0, part, others, place=place)


def transcript(columns: Mapping[str, Any]) -> str:
    """The transcript among the columns of a row; an empty one is one, too.

    Raises:
        ValueError: there is none, it is no text, or there are two that differ.
    """
    names = [name for name in TEXT_COLUMNS if columns.get(name) is not None]
    if not names:
        raise ValueError(f"no column {', '.join(TEXT_COLUMNS)}")
    filled = [name for name in names if columns[name] != ""]
    for name in filled:
        if not isinstance(columns[name], str):
            raise ValueError(f"{name} must be a text, got {columns[name]!r:.200}")
        if columns[name] != columns[filled[0]]:
            raise ValueError(f"{filled[0]} and {name} are two transcripts that differ; keep one")
    return str(columns[filled[0]]) if filled else ""


def _audio_column(entries: Mapping[str, Any]) -> str:
    """The column with the recording.

    Raises:
        ValueError: there is none, or there are two with different recordings.
    """
    names = [name for name in AUDIO_COLUMNS if name in entries]
    if not names:
        raise ValueError(f"no column {', '.join(AUDIO_COLUMNS)}")
    filled = [name for name in names if entries[name] not in (None, "")]
    # The recording itself, where one column has it and another one the name that it had.
    filled.sort(key=lambda name: not isinstance(entries[name], Mapping))
    for name in filled[1:]:
        if not _agree(entries[filled[0]], entries[name]):
            first, second = sorted((filled[0], name), key=AUDIO_COLUMNS.index)
            raise ValueError(f"{first} and {second} are two recordings; keep one column")
    return filled[0] if filled else names[0]


def _agree(one: Any, other: Any) -> bool:
    """Whether two cells are one recording: equal, or its content and a name that ends as its own.

    So are `audio` and `file` of the datasets library's LibriSpeech.
    """
    if isinstance(one, Mapping) and isinstance(other, str) and one.get("bytes") is not None:
        return os.path.basename(one.get("path") or "") == os.path.basename(other)
    return bool(one == other)


def _seconds(columns: dict[str, Any], name: str, *, above_zero: bool) -> float | None:
    """A number of seconds among the columns, as a number or as text; None where it is not given.

    Raises:
        ValueError: it is no such number.
    """
    value = columns.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        columns.pop(name, None)
        return None
    lowest = "above 0" if above_zero else "of at least 0"
    wanted = f"{name} must be seconds {lowest}, got {value!r:.200}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(wanted)
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        raise ValueError(wanted) from None
    if not math.isfinite(seconds) or seconds < 0 or (above_zero and seconds == 0):
        raise ValueError(wanted)
    return seconds


def _bad(
    index: int,
    manifest: str,
    place: str,
    problem: str,
    identity: str = "",
    columns: Mapping[str, Any] | None = None,
) -> Row:
    name = f"{manifest}, {place}"
    return Row(
        index,
        None,
        name,
        identity or name,
        columns=columns or {},
        problem=f"{place}: {problem}",
        place=place,
    )


def _check_columns(path: str, names: Sequence[str], rule: str) -> None:
    """Refuse a manifest without a column of recordings, and one with two columns of one name."""
    if not set(names) & set(AUDIO_COLUMNS):
        raise ValueError(
            f"{path}: {rule}, one of them {', '.join(AUDIO_COLUMNS)}; got {', '.join(names)!r:.500}"
        )
    repeated = _repeated([name for name in names if name])
    if repeated:
        raise ValueError(f"{path}: the column {repeated} is there twice")


def _repeated(names: Sequence[str]) -> str:
    """The names that are there more than once, for a message."""
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


def _description(path: str, digest: Any, count: int) -> tuple[int, dict[str, Any]]:
    if count == 0:
        raise ValueError(f"{path} holds no rows")
    return count, {"manifest": os.path.abspath(path), "sha256": digest.hexdigest(), "rows": count}


def _digest_of(path: str) -> Any:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest
