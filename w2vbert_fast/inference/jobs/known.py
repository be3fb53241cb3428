"""Which rows a job has done, and of what: so that the same command does what is new.

A shard writes a table beside its results, `known-000000.jsonl`, which counts when they do: the
index of each row, what it is called, and the size and time of its recording, or what it holds. At
the start those tables are read into one of SQLite in a temporary file, and the input is compared
with it row by row; so memory does not grow with the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import to_disk
from w2vbert_fast.inference.jobs.formats import ERRORS, KNOWN, Format, utf8
from w2vbert_fast.inference.jobs.journal import Entry
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.recordings.inputs import Inputs
from w2vbert_fast.recordings.remote import STANDARD_INPUT, is_remote
from w2vbert_fast.recordings.rows import Part, Row

_BLOCK = 1 << 20
_EXAMPLES = 3
_MISSING = "-"  # the state of a recording that is not there

Again = Callable[[str | None, int], bool]
"""Of the error of a row, None where it went well, and its shard."""

_COLUMNS = "idx, key, state, name, error, seconds, files"


@dataclass
class Told:
    """Rows that something is said of: how many, and names of a few."""

    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(name)

    def as_json(self) -> dict[str, Any]:
        """As the summary has it."""
        return {"rows": self.rows, "examples": self.examples}


class Known:
    """The rows that a job has done, and those that it is doing.

    Args:
        folder: the job's.
        by_content: recordings are known by what they hold, and not by path, size and time.
        whole: rows of the files that hold recordings and were read to their ends, by what tells
            such a file from others.
        depends_on: what more than its recording a row's result is made of, as the task has it.

    Attributes:
        whole: the same, with those that were read since.
        changed: recordings that are not what they were when they were done.
        vanished: rows that were done and are not in the input any more, or whose recordings are
            not there, after the last of it.
    """

    def __init__(
        self,
        folder: Path,
        by_content: bool,
        whole: Mapping[str, int],
        depends_on: Callable[[Row], str],
    ) -> None:
        self.folder = folder
        self.by_content = by_content
        self._depends_on = depends_on
        self.whole = dict(whole)
        self.changed = Told()
        self.vanished = Told()
        # Rows are looked up in the thread that reads them, and added in the one that commits.
        self._lock = threading.Lock()
        self._rows = sqlite3.connect("", check_same_thread=False)
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute(
            "CREATE TABLE rows (idx INTEGER PRIMARY KEY, key TEXT, state TEXT, name TEXT, "
            "error TEXT, seconds REAL, files TEXT, shard INTEGER, seen INTEGER)"
        )
        self._before = 0  # behind the last index of earlier runs
        self._next = 0
        self._in_work: dict[int, tuple[str, str, str]] = {}

    def load(self, entries: Iterable[Entry]) -> None:
        """Read what the shards of a journal have written, in its order."""
        for entry in entries:
            for name in entry.files:
                if name.startswith(KNOWN):
                    with (self.folder / name).open(encoding="utf-8") as file:
                        self._insert((json.loads(line) for line in file), entry.shard, False)
        self._before = self._next = self._one("SELECT coalesce(max(idx), -1) + 1 FROM rows")
        if self._before:
            self._rows.execute("CREATE INDEX by_key ON rows (key, state)")
            self._rows.execute("CREATE INDEX by_state ON rows (state)")
            self._rows.execute("CREATE INDEX by_shard ON rows (shard)")
            if self.by_content:
                self._rows.execute("CREATE INDEX by_name ON rows (name)")

    def _insert(self, lines: Iterable[Sequence[Any]], shard: int, seen: bool) -> None:
        with self._lock:
            self._rows.executemany(
                f"INSERT OR REPLACE INTO rows ({_COLUMNS}, shard, seen) "
                f"VALUES (?, ?, ?, ?, ?, ?, ?, {shard}, {int(seen)})",
                lines,
            )

    def _one(self, query: str, *values: Any) -> Any:
        with self._lock:
            found = self._rows.execute(query, values).fetchone()
        return None if found is None else found[0]

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM rows"))

    def good(self) -> int:
        """Rows that went well."""
        return int(self._one("SELECT count(*) FROM rows WHERE error IS NULL"))

    def audio_seconds(self) -> float:
        """Audio of those, in seconds."""
        return float(self._one("SELECT coalesce(sum(seconds), 0) FROM rows WHERE error IS NULL"))

    def errors(self) -> Counter[str]:
        """Rows that did not, by the type of the error."""
        with self._lock:
            found = self._rows.execute(
                "SELECT error, count(*) FROM rows WHERE error IS NOT NULL GROUP BY error "
                "ORDER BY min(idx)"
            ).fetchall()
        return Counter(dict(found))

    def files(self, index: int) -> dict[str, str]:
        """The files of its own that a row had; none if it is new."""
        found = self._one("SELECT files FROM rows WHERE idx = ?", index) if self._before else None
        return json.loads(found) if found else {}

    def is_done(self, index: int) -> bool:
        """Whether a row was done before."""
        return self.outcome(index) is not None

    def outcome(self, index: int) -> str | None:
        """What came of a row before: the type of its error, or "" where it went well.

        None: it is new.
        """
        query = "SELECT coalesce(error, '') FROM rows WHERE idx = ?"
        return self._one(query, index) if self._before else None

    def shards(self) -> set[int]:
        """Shards with rows that went well and count."""
        with self._lock:
            found = self._rows.execute("SELECT DISTINCT shard FROM rows WHERE error IS NULL")
            return {shard for (shard,) in found}

    def recall(self, index: int) -> None:
        """Take a row to work once more, whatever the input has of it."""
        with self._lock:
            key, state, name = self._rows.execute(
                "SELECT key, state, name FROM rows WHERE idx = ?", (index,)
            ).fetchone()
        self._in_work[index] = key, state, name

    def missing(self, inputs: Inputs, again: Again) -> Iterator[Row]:
        """The rows of an input that are to be done, with their indices.

        A row that is not known gets its place in the input as its index, or the next one that is
        free; one whose recording has changed keeps its own. One that went well and whose recording
        is not there any more has vanished, and is not done again.

        Args:
            inputs: the input.
            again: whether a row that is known is done once more.
        """
        is_new = self._before == 0
        with self._lock:
            self._rows.execute("UPDATE rows SET seen = 0")
        start = 0
        for part, description in zip(inputs.parts, inputs.fingerprint, strict=False):
            seal = _seal(part, description, self.by_content) if part.sealed else None
            begin = start
            if seal is None:
                rows = part.rows(start, lambda index: True)
            elif seal in self.whole and not self._again_in(seal, again):
                self._mark(seal)
                start += self.whole[seal]
                continue
            else:

                def wanted(index: int, seal: str = seal, begin: int = begin) -> bool:
                    found = None if is_new else self._of_state(f"{seal}:{index - begin}")
                    return found is None or again(*found[1:])

                rows = part.rows(start, wanted)
            start = yield from self._chosen(rows, seal, begin, is_new, again)
            if seal is not None:
                self.whole[seal] = start - begin
                self._mark(seal)
        with self._lock:
            found = self._rows.execute("SELECT name FROM rows WHERE seen = 0 ORDER BY idx")
            for (name,) in found:
                self.vanished.add(name)

    def _chosen(
        self,
        rows: Generator[Row, None, int],
        seal: str | None,
        begin: int,
        is_new: bool,
        again: Again,
    ) -> Generator[Row, None, int]:
        while True:
            try:
                row = next(rows)
            except StopIteration as end:
                return int(end.value)
            if isinstance(row.audio, str) and row.audio == STANDARD_INPUT:
                # What comes the next time is told apart by its content alone.
                row = replace(row, audio=sys.stdin.buffer.read())
            missing = False
            if seal is None:
                key, state = self._of_file(row)
                missing = state == _MISSING
                if more := self._depends_on(row):
                    state = f"{state}:{_digest(more)}"
            else:
                key, state = _digest(row.name), f"{seal}:{row.index - begin}"
            index = row.index
            if not is_new:
                found = self._find(key, state)
                if found is not None and not again(*found[1:]):
                    continue
                if found is None and missing and self._went_well(key, row.name):
                    continue
                if self.by_content and isinstance(row.audio, str):
                    key_before = _path_key(row)  # where it was missing
                else:
                    key_before = key
                index = self._index(row.index, key_before) if found is None else found[0]
            self._in_work[index] = (key, state, utf8(row.name))
            yield replace(row, index=index)

    def _find(self, key: str, state: str) -> Any:
        """Index, error and shard of the first row of that name and state that was not met yet."""
        with self._lock:
            found = self._rows.execute(
                "SELECT idx, error, shard FROM rows WHERE key = ? AND state = ? AND seen = 0 "
                "ORDER BY idx LIMIT 1",
                (key, state),
            ).fetchone()
            if found is not None:
                self._rows.execute("UPDATE rows SET seen = 1 WHERE idx = ?", (found[0],))
        return found

    def _went_well(self, key: str, name: str) -> bool:
        """Whether a row of that name that was not met yet did."""
        column, value = ("name", utf8(name)) if self.by_content else ("key", key)
        query = f"SELECT 1 FROM rows WHERE {column} = ? AND seen = 0 AND error IS NULL"
        return self._one(query, value) is not None

    def _index(self, place: int, key: str) -> int:
        """The index of a row that is not known in its state."""
        with self._lock:
            found = self._rows.execute(
                "SELECT idx, name FROM rows WHERE key = ? AND seen = 0 ORDER BY idx LIMIT 1", (key,)
            ).fetchone()
            if found is not None:
                self._rows.execute("UPDATE rows SET seen = 1 WHERE idx = ?", (found[0],))
                self.changed.add(found[1])
                return int(found[0])
        if place < self._before and not self.is_done(place):
            return place
        index = max(place, self._next)
        self._next = index + 1
        return index

    def _of_state(self, state: str) -> Any:
        with self._lock:
            return self._rows.execute(
                "SELECT idx, error, shard FROM rows WHERE state = ?", (state,)
            ).fetchone()

    def _again_in(self, seal: str, again: Again) -> bool:
        with self._lock:
            found = self._rows.execute(
                "SELECT DISTINCT error, shard FROM rows WHERE state GLOB ?", (f"{seal}:*",)
            ).fetchall()
        return any(again(*one) for one in found)

    def _mark(self, seal: str) -> None:
        """All rows of such a file were met."""
        with self._lock:
            self._rows.execute("UPDATE rows SET seen = 1 WHERE state GLOB ?", (f"{seal}:*",))

    def _of_file(self, row: Row) -> tuple[str, str]:
        """What a row is called, and the state of its recording."""
        part = (row.offset, row.duration)
        audio = row.audio
        if isinstance(audio, bytes):
            content = hashlib.sha256(audio).hexdigest()
            return (
                (_digest(content, *part), "") if self.by_content else (_digest(row.name), content)
            )
        if not isinstance(audio, str):
            return _digest(row.name), _digest(row.problem)
        if is_remote(audio):
            return _digest(audio, *part), ""
        name = _path_key(row)
        try:
            if self.by_content:
                return _digest(_content(audio), *part), ""
            status = os.stat(audio)
        except (OSError, ValueError):
            return name, _MISSING
        return name, f"{status.st_size}:{status.st_mtime_ns}"

    def line(self, result: Result, files: Mapping[str, str]) -> list[Any]:
        """What is written down of a row that was done."""
        key, state, name = self._in_work[result.index]
        named = json.dumps(dict(files)) if files else None
        return [result.index, key, state, name, result.error_type, result.seconds, named]

    def emptied(self, indices: Iterable[int], entries: Iterable[Entry]) -> list[str]:
        """The tables of earlier shards that hold nothing any more once these rows replace others.

        Args:
            indices: the rows, done before.
            entries: of the journal.
        """
        leaving: Counter[tuple[int, bool]] = Counter()
        for index in indices:
            with self._lock:
                shard, failed = self._rows.execute(
                    "SELECT shard, error IS NOT NULL FROM rows WHERE idx = ?", (index,)
                ).fetchone()
            leaving[shard, bool(failed)] += 1
        held = "SELECT count(*) FROM rows WHERE shard = ? AND (error IS NOT NULL) = ?"
        gone = {which for which, count in leaving.items() if count == self._one(held, *which)}
        return [
            name
            for entry in entries
            for name in entry.files
            if (entry.shard, name.startswith(ERRORS)) in gone and not name.startswith(KNOWN)
        ]

    def commit(self, lines: Sequence[Sequence[Any]], shard: int) -> None:
        """Rows count now."""
        for line in lines:
            del self._in_work[line[0]]
        self._insert(lines, shard, True)


class KnownTable(Format):
    """The table of a shard's rows.

    Args:
        folder: the job's.
        number: the shard's.
        known: what knows the rows.
    """

    name = "jsonl"

    def __init__(self, folder: Path, number: int, known: Known) -> None:
        super().__init__(folder, f"{KNOWN}{number:06d}")
        self.lines: list[list[Any]] = []
        self._known = known

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        self.lines += map(self._known.line, results, files)

    def close(self) -> list[Path]:
        with self.path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        to_disk(self.path)
        return [self.path]

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


def _digest(*what: Any) -> str:
    text = repr(what).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _path_key(row: Row) -> str:
    """What a row is called by the path of its recording."""
    return _digest(os.path.abspath(row.audio), row.offset, row.duration)


def _content(path: str) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _seal(part: Part, description: Mapping[str, Any], by_content: bool) -> str:
    """What tells a file that holds recordings from others."""
    path = getattr(part, "path", "")
    if not by_content:
        times = os.stat(path).st_mtime_ns if os.path.isfile(path) else None
        return _digest(json.dumps(description, sort_keys=True), times)
    if os.path.isfile(path):
        return _digest(_content(path))
    return _digest(json.dumps({k: v for k, v in description.items() if k != "dataset"}))
