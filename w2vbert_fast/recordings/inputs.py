"""What is named as input: recordings, folders of them, patterns and data sets, one after another.

Nothing is held but names of the command line: rows are read as they are needed.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from w2vbert_fast.recordings.datasets.formats import open_dataset
from w2vbert_fast.recordings.manifest import USUAL, ColumnNames
from w2vbert_fast.recordings.remote import find, is_remote
from w2vbert_fast.recordings.rows import Part, Row, Rows, Wanted, everything, how_many
from w2vbert_fast.recordings.which_files import (
    MANIFEST,
    TAR,
    TWICE,
    UNKNOWN,
    PassedOver,
    is_hidden,
    why_not,
    why_not_by_name,
)


class Files:
    """Recordings named one by one."""

    kind = "recordings"
    sealed = False

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    @property
    def root(self) -> str:
        """The folder that all of them are in or below, or the beginning of their URLs."""
        folders = [path.split("/")[:-1] for path in self.paths]
        shared = takewhile(lambda parts: len({*parts}) == 1, zip(*folders, strict=False))
        return "/".join(parts[0] for parts in shared)

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        return len(self.paths), _names(self.paths)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        for index, path in enumerate(self.paths, start):
            if wanted(index):
                yield Row(index, path, path, path)
        return start + len(self.paths)


class Transcribed(Files):
    """A recording with its transcript.

    Args:
        path: of the recording.
        transcript: path of the transcript.
        text: what that says.
    """

    def __init__(self, path: str, transcript: str, text: str) -> None:
        super().__init__([path])
        self.transcript = transcript
        self.text = text

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        count, found = super().survey()
        return count, {**found, "text": hashlib.sha256(self.text.encode()).hexdigest()}

    def rows(self, start: int, wanted: Wanted) -> Rows:
        if wanted(start):
            (path,) = self.paths
            yield Row(start, path, path, path, columns={"text": self.text})
        return start + 1


class Elsewhere(Files):
    """Recordings that a URL names, or those of a folder or a pattern there.

    Args:
        url: as `remote.find` takes it.

    Attributes:
        passed_over: what else is in the folder.

    Raises:
        ValueError: it is a data set, which is read here only.
    """

    def __init__(self, url: str) -> None:
        if why_not_by_name(url.partition("?")[0]) in (MANIFEST, TAR):
            raise ValueError(
                f"{url} is a data set elsewhere; copy it to this machine, where its rows may name "
                "URLs, or name recordings, or a folder of them with / at its end"
            )
        self.passed_over = PassedOver()
        found = []
        for path in find(url):
            reason = why_not_by_name(os.path.basename(path)) if path != url else ""
            if reason == "":
                found.append(path)
            else:
                self.passed_over.add(reason or UNKNOWN, path)
        super().__init__(found)


class Folder:
    """The recordings in a folder and those below it, in alphabetical order.

    Hidden files are left out. Linked folders are followed; no file is read twice by that.

    Attributes:
        path: the folder.
        passed_over: what else is there, once it was surveyed.
    """

    kind = "folder of recordings"
    sealed = False

    def __init__(self, path: str) -> None:
        self.path = path
        self.passed_over = PassedOver()
        self._looked_at: dict[str, str] = {}

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        with os.scandir(self.path):
            pass
        digest = hashlib.sha256()
        count = 0
        self.passed_over, self._looked_at = PassedOver(), {}
        for path, _ in self._recordings(self.passed_over):
            digest.update(os.fsencode(path) + b"\0")
            count += 1
        return count, {"folder": self.path, "names": digest.hexdigest(), "rows": count}

    def rows(self, start: int, wanted: Wanted) -> Rows:
        index = start
        for path, problem in self._recordings(PassedOver()):
            if wanted(index):
                yield Row(index, None if problem else path, path, path, problem=problem)
            index += 1
        return index

    def _recordings(self, passed_over: PassedOver) -> Iterator[tuple[str, str | None]]:
        """Recordings, and folders with the reason why nobody knows what is in them."""
        for path, problem in _files(self.path, passed_over):
            reason = "" if problem else why_not_by_name(os.path.basename(path))
            if reason is None:
                # What was seen first counts, as long as the folder is being read.
                reason = self._looked_at.get(path)
                if reason is None:
                    reason = self._looked_at[path] = why_not(path)
            if reason:
                passed_over.add(reason, path)
            else:
                yield path, problem


@dataclass(frozen=True)
class Inputs:
    """Parts that follow each other, surveyed.

    Attributes:
        parts: in order.
        names: as what each was named.
        counts: rows of each part; None where nobody knows yet.
        fingerprint: what tells this input from others.
    """

    parts: tuple[Part, ...]
    names: tuple[str, ...]
    counts: tuple[int | None, ...]
    fingerprint: list[dict[str, Any]]

    @classmethod
    def of_parts(
        cls, parts: Sequence[Part], names: Sequence[str], columns: ColumnNames = USUAL
    ) -> Inputs:
        """Survey the parts.

        Args:
            parts: in order.
            names: as what each was named.
            columns: what the columns of data sets mean.

        Raises:
            OSError: one of them cannot be read.
            ValueError: one of them is damaged, or holds no recordings.
        """
        surveys = []
        for part, name in zip(parts, names, strict=True):
            surveys.append(part.survey())
            if surveys[-1][0] == 0:
                where = getattr(part, "path", name)
                passed_over = str(getattr(part, "passed_over", ""))
                raise ValueError(
                    f"{where} holds no recordings" + (f": {passed_over}" if passed_over else "")
                )
        fingerprint = [description for _, description in surveys]
        if columns.by_meaning:
            fingerprint.append({"columns": dict(columns.by_meaning)})
        counts = tuple(count for count, _ in surveys)
        return cls(tuple(parts), tuple(names), counts, fingerprint)

    @property
    def total(self) -> int | None:
        """Rows of all parts; None where nobody knows yet."""
        known = [count for count in self.counts if count is not None]
        return sum(known) if len(known) == len(self.counts) else None

    @property
    def described(self) -> list[str]:
        """What each name but those of recordings was taken for, and how many rows that are."""
        found: dict[tuple[str, str], list[int | None]] = {}
        for part, name, count in zip(self.parts, self.names, self.counts, strict=True):
            if not isinstance(part, Files):
                found.setdefault((name, part.kind), []).append(count)
        lines = []
        for (name, kind), counts in found.items():
            known = [count for count in counts if count is not None]
            rows = how_many(sum(known)) if len(known) == len(counts) else "rows are not counted"
            several = f" ({len(counts)} files)" if len(counts) > 1 else ""
            lines.append(f"{name}: {kind}{several}, {rows}")
        return lines

    @property
    def named(self) -> dict[str, Any]:
        """What the command names: folders, patterns and data sets, which may grow, and what their
        columns mean. Recordings that are named one by one are not told."""
        names = {
            name if is_remote(name) else os.path.abspath(name)
            for part, name in zip(self.parts, self.names, strict=True)
            if not (isinstance(part, Files) and (type(part) is Files or part.paths == [name]))
        }
        columns = self.fingerprint[len(self.parts) :]
        return {"names": sorted(names), **(columns[0] if columns else {})}

    @property
    def passed_over(self) -> PassedOver:
        """What of folders, and of tar files that were read to their ends, is in no row."""
        found = PassedOver()
        for part in self.parts:
            found.update(getattr(part, "passed_over", PassedOver()))
        return found

    @property
    def roots(self) -> tuple[str, ...]:
        """The folder of each part, from which on names of recordings are the input's own tree."""
        return tuple(map(_root, self.parts))

    def rows(self, wanted: Wanted = everything) -> Iterator[Row]:
        """The rows whose index is wanted, in order.

        Raises:
            OSError: a manifest, a folder or a tar file cannot be read any more.
            ValueError: a manifest is damaged as a whole.
        """
        start = 0
        for part in self.parts:
            start = yield from part.rows(start, wanted)


def open_inputs(names: Sequence[str], columns: ColumnNames = USUAL) -> Inputs:
    """Find out what the names of a command line are, and survey it.

    A name is a data set (`datasets.formats`), a folder, a recording, or a pattern such as
    `calls/**/*.wav` of any of these. What exists under a name comes before
    what it means as a pattern. "-" is a recording on standard input; a URL is a recording, and with
    a "/" at its end or with "*" in it all that are there.

    Args:
        names: at least one.
        columns: what the columns of data sets mean.

    Raises:
        OSError: a manifest or a folder cannot be read.
        ValueError: there are no names, a pattern finds nothing, a folder, tar file or manifest
            holds no recordings, or a manifest is damaged.
        ImportError: a Parquet manifest needs pyarrow, which is not installed.
    """
    if not names:
        raise ValueError("the input is empty: name files, folders, patterns or manifests")
    parts: list[Part] = []
    sources: list[str] = []
    for name in names:
        for part in _parts(name, columns):
            if type(part) is Files and parts and type(parts[-1]) is Files:
                parts[-1].paths += part.paths
                continue
            parts.append(part)
            sources.append(name)
    return Inputs.of_parts(parts, sources, columns)


def open_transcribed(audio: str, transcript: str) -> Inputs:
    """A recording, and a UTF-8 text file with its transcript.

    Raises:
        OSError: the transcript cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        with open(transcript, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{transcript} is not UTF-8: {error}") from error
    return Inputs.of_parts([Transcribed(audio, transcript, text)], [audio])


def _parts(name: str, columns: ColumnNames) -> list[Part]:
    if is_remote(name):
        return [Elsewhere(name)]
    if os.path.lexists(name) or not glob.has_magic(name):
        return _parts_of(name, columns)
    parts: list[Part] = []
    # The last folder that was found, and whether all that is in it is read: `calls/**` finds
    # `calls`, and what is in it once more.
    folder, whole = "", True
    for path in sorted(glob.iglob(name, recursive=True)):
        if _is_hidden_in(path, name):
            continue
        if folder and path.startswith(folder):
            if not (whole or os.path.isdir(path)):
                parts += open_dataset(path, columns)
            continue
        found = _parts_of(path, columns)
        if os.path.isdir(path):
            folder, whole = os.path.join(path, ""), not isinstance(found[0], Folder)
        parts += found
    if not parts:
        raise ValueError(f"the pattern {name!r} finds no files")
    return parts


def _is_hidden_in(path: str, pattern: str) -> bool:
    """Whether a pattern finds what is none of the user's, and does not ask for it."""
    asked = pattern.split(os.sep)
    return any(is_hidden(one) and one not in asked for one in path.split(os.sep)[:-1])


def _parts_of(path: str, columns: ColumnNames) -> list[Part]:
    """What a path is: a data set, a folder of recordings, or a recording."""
    found = open_dataset(path, columns)
    return found or [Folder(path) if os.path.isdir(path) else Files([path])]


def _root(part: Part) -> str:
    if isinstance(part, Files):
        return part.root
    path = str(getattr(part, "path", ""))
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


def _names(paths: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, paths)))
    return {"files": len(paths), "names": digest.hexdigest()}


def _files(root: str, passed_over: PassedOver) -> Iterator[tuple[str, str | None]]:
    """Files in a folder and below it: of each folder its files in order, then its folders. One that
    cannot be opened comes as a file with the reason."""
    top = os.path.realpath(root)
    linked: set[str] = set()  # what was reached through links, without any
    pending = [(root, False)]
    while pending:
        folder, through_link = pending.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"the folder cannot be opened: {error.strerror}"
            continue
        below: list[tuple[str, bool]] = []
        for entry in entries:
            if is_hidden(entry.name):
                continue
            is_link = through_link or entry.is_symlink()
            if is_link:
                real = os.path.realpath(entry.path)
                if real in linked or _is_read_itself(real, top):
                    passed_over.add(TWICE, entry.path)
                    continue
                linked.add(real)
            if _is_folder(entry):
                below.append((entry.path, is_link))
            else:
                yield entry.path, None
        pending += reversed(below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _is_read_itself(real: str, top: str) -> bool:
    """Whether what a link leads to is in the folder, and not hidden there."""
    if real == top:
        return True
    below = os.path.relpath(real, top)
    inside = real.startswith(os.path.join(top, ""))
    return inside and os.path.exists(real) and not any(map(is_hidden, below.split(os.sep)))
