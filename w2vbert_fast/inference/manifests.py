"""Manifests, read row by row: JSON lines, CSV, TSV and Parquet.

Every reader is a `Part` of the input: it counts its rows and digests itself once, at the start of a
job, and then hands its rows out lazily. A row that cannot be used is a row with a problem.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from w2vbert_fast._extras import require
from w2vbert_fast.inference.rows import Row, number_of_seconds

AUDIO_COLUMNS = ("audio_filepath", "audio", "file")
"""Names of the column with the recording: NeMo's, ours, the demo's. The first one is taken."""

Wanted = Callable[[int], bool]
Rows = Generator[Row, None, int]
"""Rows, and at the end the index after the last one, wanted or not."""

_BLOCK = 1 << 20
_PARQUET_ROWS = 512


class Part(Protocol):
    """A part of the input."""

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        """How many rows there are (None: nobody knows yet), and what tells this part from others.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        ...

    def rows(self, start: int, wanted: Wanted) -> Rows:
        """The rows whose index is wanted, the first of all being `start`."""
        ...


def everything(index: int) -> bool:
    """Every row is wanted."""
    return True


class JsonLines:
    """A JSONL manifest. Lines of white space do not count."""

    def __init__(self, path: str) -> None:
        self.path = path

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digest = hashlib.sha256()
        count = 0
        with open(self.path, "rb") as file:
            for line in file:
                digest.update(line)
                count += not line.isspace()
        return count, _description(self.path, digest, count)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        folder = Path(self.path).parent
        index = start
        with open(self.path, "rb") as file:
            for line in file:
                if line.isspace():
                    continue
                if wanted(index):
                    yield self._row(index, line, folder)
                index += 1
        return index

    def _row(self, index: int, line: bytes, folder: Path) -> Row:
        try:
            entries = json.loads(line.decode("utf-8-sig", "surrogateescape"))
        except (json.JSONDecodeError, RecursionError) as error:
            return _bad(index, self.path, f"not JSON: {error}")
        if not isinstance(entries, dict):
            return _bad(index, self.path, f"not a JSON object but a {type(entries).__name__}")
        return manifest_row(index, entries, folder, self.path)


class Delimited:
    """A CSV or TSV manifest; the first line names the columns."""

    def __init__(self, path: str, delimiter: str) -> None:
        self.path = path
        self.delimiter = delimiter

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digest = digest_of(self.path)
        with self._open() as file:
            lines = self._lines(file)
            header = next(lines, None)
            if not isinstance(header, list) or not set(header) & set(AUDIO_COLUMNS):
                raise ValueError(
                    f"{self.path}: the first line must name the columns, one of them "
                    f"{', '.join(AUDIO_COLUMNS)}; got {header!r}"
                )
            count = sum(1 for _ in lines)
        return count, _description(self.path, digest, count)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        folder = Path(self.path).parent
        index = start
        with self._open() as file:
            lines = self._lines(file)
            header = next(lines)
            for cells in lines:
                if wanted(index):
                    yield self._row(index, header, cells, folder)
                index += 1
        return index

    def _open(self) -> Any:
        return open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _lines(self, file: Any) -> Iterator[Any]:
        """Cells of every line, or the error of one that is none."""
        reader = csv.reader(file, delimiter=self.delimiter, strict=True)
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield error
                continue
            if cells:
                yield cells

    def _row(self, index: int, header: list[str], cells: Any, folder: Path) -> Row:
        if isinstance(cells, csv.Error):
            return _bad(index, self.path, f"not CSV: {cells}")
        if len(cells) != len(header):
            return _bad(index, self.path, f"{len(cells)} cells in {len(header)} columns")
        entries = dict(zip(header, cells, strict=True))
        for name in ("offset", "duration"):
            if not entries.get(name, "-").strip():
                del entries[name]
        return manifest_row(index, entries, folder, self.path)


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
        digest = digest_of(self.path)
        with self._open() as file:
            names = file.schema_arrow.names
            if not set(names) & set(AUDIO_COLUMNS):
                raise ValueError(
                    f"{self.path} needs a column {' or '.join(AUDIO_COLUMNS)}; it has "
                    f"{', '.join(names)}"
                )
            count = file.metadata.num_rows
        return count, _description(self.path, digest, count)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        folder = Path(self.path).parent
        index = start
        with self._open() as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                here = [i for i in range(batch.num_rows) if wanted(index + i)]
                for i in here:
                    (entries,) = batch.slice(i, 1).to_pylist()
                    found = {name: value for name, value in entries.items() if value is not None}
                    yield manifest_row(index + i, found, folder, self.path)
                index += batch.num_rows
        return index

    def _open(self) -> Any:
        try:
            return self.parquet.ParquetFile(self.path)
        except self.arrow.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a Parquet file: {error}") from error


def manifest_row(index: int, entries: Mapping[str, Any], folder: Path, manifest: str) -> Row:
    """A row of the entries of a manifest; a row with a problem where they make none."""
    column = next((name for name in AUDIO_COLUMNS if name in entries), None)
    if column is None:
        return _bad(index, manifest, f"no column {', '.join(AUDIO_COLUMNS)}")
    others = {name: value for name, value in entries.items() if name not in (column, "id")}
    audio, name = entries[column], None
    if isinstance(audio, Mapping):
        # An audio column of the datasets library: the content, or a path.
        name = audio.get("path") or f"{os.path.basename(manifest)}:{index}"
        content = audio.get("bytes")
        audio = content if content is not None else audio.get("path")
    given = entries.get("id")
    identity = "" if given is None else str(given)
    if isinstance(audio, bytes) and name is not None:
        pass
    elif not isinstance(audio, str) or not audio:
        problem = f"{column} must be the name of a file, got {audio!r:.200}"
        return _bad(index, manifest, problem, identity, others)
    else:
        audio = name = os.path.join(folder, audio)
    try:
        offset = number_of_seconds(others.get("offset") or 0.0, "offset", above_zero=False)
        duration = others.get("duration")
        if duration is not None:
            duration = number_of_seconds(duration, "duration", above_zero=True)
    except ValueError as error:
        return Row(index, None, name, identity or name, columns=others, problem=str(error))
    others.pop("offset", None)
    # Without an offset, "duration" often is the recording's length, which need not be exact.
    part = duration if offset > 0 or "offset" in entries else None
    return Row(index, audio, name, identity or name, None, offset, part, others)


def _bad(
    index: int,
    manifest: str,
    problem: str,
    identity: str = "",
    columns: Mapping[str, Any] | None = None,
) -> Row:
    name = f"{manifest}, row {index}"
    return Row(index, None, name, identity or name, columns=columns or {}, problem=problem)


def _description(path: str, digest: Any, count: int) -> dict[str, Any]:
    return {"manifest": os.path.abspath(path), "sha256": digest.hexdigest(), "rows": count}


def digest_of(path: str | os.PathLike[str]) -> Any:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    file: BinaryIO
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest


def first_rows(rows: Iterator[Row], count: int) -> tuple[list[Row], Iterator[Row]]:
    """The first rows, and an iterator over all."""
    head = list(itertools.islice(rows, count))
    return head, itertools.chain(head, rows)
