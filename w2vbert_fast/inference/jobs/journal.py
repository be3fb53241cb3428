"""What a job remembers: its fingerprint, and a journal of the rows that are done.

The journal is the truth: a file of results counts when a line of the journal names it. A line is
written, and on the disk, after the files that it names have their final names.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import to_disk
from w2vbert_fast.inference.jobs.formats import ERRORS, KNOWN, PARTS

JOB_FILE = "job.json"
JOURNAL_FILE = "journal.jsonl"
SUMMARY_FILE = "summary.json"

ANNOUNCED = ".names"


class JobError(RuntimeError):
    """A job that cannot start, or cannot go on."""


class Ranges:
    """A set of row numbers, kept as disjoint ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __contains__(self, index: int) -> bool:
        place = bisect.bisect_right(self._starts, index) - 1
        return place >= 0 and index < self._stops[place]

    def __iter__(self) -> Any:
        return iter(zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self)

    def add(self, start: int, stop: int) -> None:
        """Add the numbers from start up to stop, without it."""
        first = bisect.bisect_left(self._stops, start)
        last = bisect.bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]


@dataclass
class Entry:
    """A line of the journal: rows that were finished together.

    Attributes:
        shard: number of the shard.
        files: its tables and their sizes in bytes.
        rows: ranges of row numbers.
        good: rows that went well.
        errors: rows that did not, by the type of the error.
        audio_seconds: of the rows that went well.
        supersedes: tables of which these rows replace the last.
        replaces: ranges of the row numbers that were done before; tables of earlier shards may
            still hold what came of them then.
        made: "formats" and "timestamps" that it has.
        seconds: between the first row's begin and the last one's end; None in older journals.
    """

    shard: int
    files: dict[str, int]
    rows: list[tuple[int, int]]
    good: int
    errors: dict[str, int]
    audio_seconds: float
    supersedes: list[str] = field(default_factory=list)
    seconds: float | None = None
    replaces: list[tuple[int, int]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)


class Journal:
    """The journal of a folder. What no line of it names is removed: a killed run has left it.

    Raises:
        JobError: a line in the middle is damaged, or a file that it names is not what it was.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL_FILE
        self.entries: list[Entry] = []
        self._read()
        self._check()
        self._clean()

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        good = 0
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise JobError(f"{self.path}, line {number}, is damaged: {error}") from error
                # The line that was being written when the machine or the process stopped.
                os.truncate(self.path, good)
                break
            good += len(line)
            self.entries.append(entry)

    def _check(self) -> None:
        for name, size in self.files().items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise JobError(
                    f"{path} {state}: results of this job were changed. --overwrite starts again"
                )

    def _clean(self) -> None:
        known = self.files()
        finished = {entry.shard for entry in self.entries}
        for path in self.folder.glob(f".{PARTS}*{ANNOUNCED}"):
            if int(path.name[len(PARTS) + 1 : -len(ANNOUNCED)]) not in finished:
                remove_announced(path)
        for path in self.folder.iterdir():
            name = path.name
            unfinished = name.startswith((f".{PARTS}", f".{ERRORS}", f".{KNOWN}"))
            if unfinished or (name.startswith((PARTS, ERRORS, KNOWN)) and name not in known):
                path.unlink()

    def files(self) -> dict[str, int]:
        """The tables that count, and their sizes."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found.update(entry.files)
        for entry in self.entries:
            for name in entry.supersedes:
                found.pop(name, None)
        return found

    def next_shard(self) -> int:
        """Number of the next shard."""
        return max((entry.shard for entry in self.entries), default=-1) + 1

    def write(self, entry: Entry) -> None:
        """Append an entry. When this returns, its rows are done."""
        line = json.dumps(asdict(entry)) + "\n"
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            if before == 0:
                to_disk(self.folder)
        except OSError:
            # A full disk takes a part of a line.
            if self.path.exists():
                os.truncate(self.path, before)
            raise
        self.entries.append(entry)
        for name in entry.supersedes:
            (self.folder / name).unlink(missing_ok=True)


def announce(folder: Path, shard: int, files: Iterable[str | Path]) -> Path:
    """Write down which files of single recordings a shard will have, before they have their names.

    The next start removes those of a shard that no line of the journal counts.

    Returns:
        The list, to be removed when the files count.
    """
    path = folder / f".{PARTS}{shard:06d}{ANNOUNCED}"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(os.path.abspath(folder / name)) + "\n" for name in files)
        file.flush()
        os.fsync(file.fileno())
    to_disk(folder)
    return path


def remove_announced(path: Path) -> None:
    """Remove the files of a list that `announce` has written, and the folders that are then empty.

    A list that is not complete is one of files that have no names yet.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, OSError):
            file = Path(json.loads(line))
            file.unlink()
            for folder in file.relative_to(path.parent.absolute()).parents:
                (path.parent / folder).rmdir()


def ranges_of(indices: Iterable[int]) -> list[tuple[int, int]]:
    """Disjoint ranges of row numbers in increasing order."""
    return list(Ranges((index, index + 1) for index in indices))


NO_TIMES = "none"
_TIMES = (NO_TIMES, "word", "character")


def is_more(before: Any, now: Any) -> bool:
    """Whether timestamps go further than those before."""
    known = before in _TIMES and now in _TIMES
    return known and _TIMES.index(now) > _TIMES.index(before)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two fingerprints, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in sorted({*before, *now}):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(before.get(key), now.get(key), inner)
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            text
            for i, (old, new) in enumerate(zip(before, now, strict=True))
            for text in differences(old, new, f"{name}[{i}]")
        ]
    if before == now:
        return []
    return [f"{name}: {_short(before)} before, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
