"""Manifests: files that name recordings, one a row, as JSON lines, CSV or TSV; and what the columns
of any data set mean.

Every format of data sets is a `Part` of an input: it counts its rows and digests itself once, and
then hands its rows out lazily. A row that cannot be used is a row with a problem that names its
line; none is left out, and none is read into another.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from w2vbert_fast.recordings.compressed import is_damage, name_inside, open_uncompressed
from w2vbert_fast.recordings.remote import join
from w2vbert_fast.recordings.rows import Part, Row, Rows, Wanted

AUDIO_COLUMNS = ("audio_filepath", "audio", "file")
"""Names of the column with the recording: NeMo's, the datasets library's, the demo's."""

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "txt")
"""Names of the column with the transcript: NeMo's, Common Voice's, two that the hub has, and that
of `key.txt` in a WebDataset."""

# A quotation mark that nobody closes is not looked for any further than this.
_LONGEST_CELL_LINES = 1_000
_FILE_NAME = re.compile(r"\.\d?[A-Za-z]\w{1,4}[\s\"]*$")
_SAME_MEANING = {"audio": AUDIO_COLUMNS, "text": TEXT_COLUMNS}


@dataclass(frozen=True)
class ColumnNames:
    """Which columns have which meaning, where their names do not say so.

    Attributes:
        by_meaning: columns by what they mean: "audio", "text", "id", "offset", "duration", or the
            name that any other one is to have. Other columns of the same meaning are not read.
    """

    by_meaning: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> ColumnNames:
        """Of a text such as "audio=path,text=sentence".

        Raises:
            ValueError: it is none such.
        """
        found: dict[str, str] = {}
        for pair in (text or "").split(",") if text is not None else ():
            meaning, _, column = (part.strip() for part in pair.partition("="))
            if not meaning or not column or meaning in found:
                raise ValueError(
                    f"columns must be MEANING=COLUMN,..., as in audio=path,text=sentence, each "
                    f"meaning once; got {text!r}"
                )
            found[meaning] = column
        return cls(found)

    def of_audio(self, column: str) -> ColumnNames:
        """The same, with a column of recordings where none is named."""
        return ColumnNames({"audio": column, **self.by_meaning})

    def has_audio(self, columns: Iterable[str]) -> bool:
        """Whether one of the columns is that of the recordings."""
        wanted = self.by_meaning.get("audio")
        return bool(set(columns) & set(AUDIO_COLUMNS if wanted is None else (wanted,)))

    def apply(self, entries: dict[str, Any]) -> dict[str, Any]:
        """The columns of a row under the names that say what they mean.

        Raises:
            ValueError: one that is named is not there.
        """
        if not self.by_meaning:
            return entries
        missing = [column for column in self.by_meaning.values() if column not in entries]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        replaced = {*self.by_meaning.values()}
        for meaning in self.by_meaning:
            replaced.update(_SAME_MEANING.get(meaning, (meaning,)))
        kept = {name: value for name, value in entries.items() if name not in replaced}
        return {**kept, **{meaning: entries[name] for meaning, name in self.by_meaning.items()}}


USUAL = ColumnNames()
"""The columns' own names say what they mean."""


class _Text(ABC):
    """A manifest of lines in UTF-8, with or without a byte order mark, compressed or not.

    Bytes that are no UTF-8 come through as surrogates (PEP 383), as in the names of files.

    Args:
        path: the file.
        names: what its columns mean.
        folder: where relative names of recordings start; None: the file's.
        kind: what messages call such a file; None: by its format.
    """

    sealed = False
    kind: str
    endings: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        path: str,
        names: ColumnNames = USUAL,
        folder: str | None = None,
        kind: str | None = None,
    ) -> None:
        self.path = path
        self.names = names
        self.folder = Path(path).parent if folder is None else Path(folder)
        self.kind = kind or self.kind

    @classmethod
    def open(cls, path: str, names: ColumnNames) -> list[Part]:
        return [cls(path, names)] if name_inside(path.lower()).endswith(cls.endings) else []

    @abstractmethod
    def columns(self) -> list[str]:
        """The columns, as its first line has them; none where that is no line of such a file."""

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digest = hashlib.sha256()
        count = sum(1 for _ in self._records(digest))
        return description(self.path, digest, count)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        index = start
        for number, record in self._records():
            if wanted(index):
                place = f"line {number}"
                entries = self._entries(record)
                if isinstance(entries, str):
                    yield bad_row(index, self.path, place, entries)
                else:
                    yield manifest_row(index, entries, self.folder, self.path, place, self.names)
            index += 1
        return index

    def _lines(self, digest: Any = None) -> Iterator[tuple[int, bytes]]:
        """Lines and their numbers, from 1; what is read goes into the digest."""
        try:
            with open_uncompressed(self.path) as file:
                for number, line in enumerate(file, start=1):
                    if digest is not None:
                        digest.update(line)
                    if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise ValueError(f"{self.path} is UTF-16; a manifest must be UTF-8")
                    # Of every line, since files that begin with a mark may have been joined.
                    yield number, line.removeprefix(codecs.BOM_UTF8)
        except Exception as error:
            if not is_damage(error):
                raise
            raise ValueError(f"{self.path} is damaged: {error}") from error

    @abstractmethod
    def _records(self, digest: Any = None) -> Iterator[tuple[int, Any]]:
        """What each row is made of, and the number of its line."""

    @abstractmethod
    def _entries(self, record: Any) -> dict[str, Any] | str:
        """The columns of a record, or what is wrong with it."""


class JsonLines(_Text):
    """One JSON object a line. Lines of white space do not count."""

    kind = "JSON lines"
    endings = (".jsonl", ".ndjson", ".json")

    def columns(self) -> list[str]:
        for _, record in self._records():
            entries = self._entries(record)
            return [] if isinstance(entries, str) else [*entries]
        return []

    def _records(self, digest: Any = None) -> Iterator[tuple[int, bytes]]:
        lines = (item for item in self._lines(digest) if not item[1].isspace())
        for place, (number, line) in enumerate(lines):
            if place == 0 and line.lstrip().startswith(b"["):
                raise ValueError(f"{self.path} is a JSON array; needed is one JSON object a line")
            yield number, line

    def _entries(self, record: bytes) -> dict[str, Any] | str:
        line = record.decode("utf-8", "surrogateescape")
        try:
            entries = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            kind = "JSON" if _is_utf8(line) else "UTF-8"
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at character {error.pos + 1}"
            return f"not {kind}: {reason}"
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

    delimiters: ClassVar[tuple[str, ...]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.header: list[str] = []
        self.delimiter = self.delimiters[0]

    def columns(self) -> list[str]:
        for _, line in self._decoded(None):
            if line.strip(" "):
                return self._split_header(line)
        return []

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
        names = self._split_header(line)
        if not names:
            cells = self._cells(line, _Returnable(iter(())))
            raise ValueError(f"{self.path}: the first line must name the columns: {cells}")
        check_columns(self.path, names, "the first line must name the columns", self.names)
        return names

    def _split_header(self, line: str) -> list[str]:
        """The names of the columns, by the first delimiter that makes one of recordings, else by
        that which makes the most; none where the usual one cannot split the line."""
        found: dict[str, list[str]] = {}
        for delimiter in self.delimiters:
            self.delimiter = delimiter
            cells = self._cells(line, _Returnable(iter(())))
            names = [] if isinstance(cells, str) else [cell.strip() for cell in cells]
            if self.names.has_audio(names):
                return names
            found[delimiter] = names
        usual = self.delimiters[0]
        self.delimiter = max(found, key=lambda one: len(found[one])) if found[usual] else usual
        return found[self.delimiter]

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

    kind = "TSV"
    endings = (".tsv",)
    delimiters = ("\t",)


class Csv(_Delimited):
    """Values between commas, semicolons or tabs, as the first line has them, quoted as RFC 4180 has
    it.

    A quoted cell may go on over the next lines where it is closed there, the row then has as many
    cells as there are columns, and no row can be within: the cell names no file, or where the row's
    own recording is not named as files are, no line has as many delimiters as a row. Else the
    quotation mark was not meant to open a cell: its line is a row with a problem, and the next line
    is a row of its own.
    """

    kind = "CSV"
    endings = (".csv",)
    delimiters = (",", ";", "\t")

    def _cells(self, line: str, following: _Returnable) -> list[str] | str:
        if '"' not in line:
            return line.split(self.delimiter)
        taken: list[tuple[int, str]] = []
        row: int | None = None  # the line of one within

        def record() -> Iterator[str]:
            nonlocal row
            yield f"{line}\n"
            for number, text in following:
                taken.append((number, text))
                if '"' not in text and self._is_long(text) and self._names_file(text):
                    row = number
                    return
                yield f"{text}\n"
                if len(taken) == _LONGEST_CELL_LINES:
                    return

        problem = ""
        try:
            cells = next(csv.reader(record(), delimiter=self.delimiter, strict=True))
            if taken and len(cells) != len(self.header):
                problem = f"{len(cells)} cells in {len(self.header)} columns"
            elif taken:
                row = self._row_within(cells, taken)
            if not problem and row is None:
                return cells
        except csv.Error as error:
            if "end of data" not in str(error):
                problem = f"not CSV: {error}"
        following.give_back(taken)
        before = "" if row is None else f" before line {row}, which could be a row"
        return problem or f"a quotation mark is not closed{before}"

    def _row_within(self, cells: list[str], taken: list[tuple[int, str]]) -> int | None:
        """The first line that could be a row by itself of those that were taken into cells."""
        is_audio = [self.names.has_audio((name,)) for name in self.header]
        if self._names_file(cells[is_audio.index(True)]):
            within = any("\n" in cell and self._names_file(cell) for cell in cells)
            return taken[0][0] if within else None
        return next((number for number, text in taken if self._is_long(text)), None)

    def _is_long(self, line: str) -> bool:
        return line.count(self.delimiter) >= len(self.header) - 1

    def _names_file(self, text: str) -> bool:
        """Whether something between delimiters or line ends is like the name of a file."""
        pieces = (piece for line in text.split("\n") for piece in line.split(self.delimiter))
        return any(_FILE_NAME.search(piece) for piece in pieces)


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


def manifest_row(
    index: int,
    entries: dict[str, Any],
    folder: str | os.PathLike[str],
    manifest: str,
    place: str,
    names: ColumnNames = USUAL,
) -> Row:
    """A row of the entries of a manifest; a row with a problem where they make none.

    Args:
        index: of the row.
        entries: its columns.
        folder: where relative names of recordings start.
        manifest: its name, for messages.
        place: of the row in it, such as "line 7".
        names: what the columns mean.
    """
    try:
        entries = names.apply(entries)
        column = _audio_column(entries)
    except ValueError as error:
        return bad_row(index, manifest, place, str(error), columns=entries)
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
            return bad_row(index, manifest, place, problem, identity, others)
        audio = name = join(folder, audio)
    try:
        offset = _seconds(others, "offset", above_zero=False)
        duration = _seconds(others, "duration", above_zero=True)
    except ValueError as error:
        return bad_row(index, manifest, place, str(error), identity, others)
    others.pop("offset", None)
    # Without an offset, "duration" often is the recording's length, which need not be exact.
    part = None if offset is None else duration
    return Row(index, audio, name, identity or name, None, offset or 0.0, part, others, place=place)


def transcript(columns: Mapping[str, Any]) -> str:
    """The transcript among the columns of a row; an empty one is one, too.

    Raises:
        ValueError: there is none, it is no text or not UTF-8, or there are two that differ.
    """
    names = [name for name in TEXT_COLUMNS if columns.get(name) is not None]
    if not names:
        raise ValueError(f"no column {_one_of('text')}")
    filled = [name for name in names if columns[name] != ""]
    for name in filled:
        if not isinstance(columns[name], str):
            raise ValueError(f"{name} must be a text, got {columns[name]!r:.200}")
        if not _is_utf8(columns[name]):
            raise ValueError(f"the transcript is not UTF-8: {columns[name]!r:.200}")
        if columns[name].split() != columns[filled[0]].split():
            raise ValueError(
                f"{filled[0]} and {name} are two transcripts that differ; keep one, or name it: "
                f"--columns text={name}"
            )
    return str(columns[filled[0]]) if filled else ""


def _audio_column(entries: Mapping[str, Any]) -> str:
    """The column with the recording.

    Raises:
        ValueError: there is none, or there are two with different recordings.
    """
    names = [name for name in AUDIO_COLUMNS if name in entries]
    if not names:
        raise ValueError(f"no column {_one_of('audio')}")
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


def bad_row(
    index: int,
    manifest: str,
    place: str,
    problem: str,
    identity: str = "",
    columns: Mapping[str, Any] | None = None,
) -> Row:
    """A row that cannot be used, and why; its name says where it stands."""
    name = f"{manifest}, {place}"
    identity = identity or name
    return Row(index, None, name, identity, columns=columns or {}, problem=problem, place=place)


def check_columns(path: str, names: Sequence[str], rule: str, meant: ColumnNames) -> None:
    """Refuse a manifest without a column that is needed, and one with two columns of one name."""
    missing = [column for column in meant.by_meaning.values() if column not in names]
    if missing or not meant.has_audio(names):
        one_of = f"one of them {_one_of('audio')}"
        wanted = f"{', '.join(missing)} among them" if missing else one_of
        raise ValueError(f"{path}: {rule}, {wanted}; got {', '.join(names)!r:.500}")
    repeated = _repeated([name for name in names if name])
    if repeated:
        raise ValueError(f"{path}: the column {repeated} is there twice")


def _one_of(meaning: str) -> str:
    """The columns of a meaning, and how to name another, for a message."""
    return f"{', '.join(_SAME_MEANING[meaning])} (--columns {meaning}=NAME: another)"


def _repeated(names: Sequence[str]) -> str:
    """The names that are there more than once, for a message."""
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


def description(path: str, digest: Any, count: int) -> tuple[int, dict[str, Any]]:
    """What a survey of a manifest gives."""
    if count == 0:
        raise ValueError(f"{path} holds no rows")
    return count, {"manifest": os.path.abspath(path), "sha256": digest.hexdigest(), "rows": count}
