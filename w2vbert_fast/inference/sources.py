"""The input of a job: files, folders, patterns, tar shards and manifests, one after another.

Nothing is held but names of the command line: rows are read as they are needed.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from w2vbert_fast.inference.tar_shards import AUDIO_SUFFIXES, TarShard
from w2vbert_fast.recordings.manifest import open_manifest
from w2vbert_fast.recordings.rows import Part, Row, Rows, Wanted, everything

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class Files:
    """Recordings named one by one."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        return len(self.paths), _names(self.paths)

    def rows(self, start: int, wanted: Wanted) -> Rows:
        for index, path in enumerate(self.paths, start):
            if wanted(index):
                yield Row(index, path, path, path)
        return start + len(self.paths)


class Folder:
    """The recordings in a folder and those below it, by the endings of their names, in order."""

    def __init__(self, path: str) -> None:
        self.path = path

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        with os.scandir(self.path):
            pass
        digest = hashlib.sha256()
        count = 0
        for path in self._paths():
            digest.update(os.fsencode(path) + b"\0")
            count += 1
        return count, {"folder": self.path, "names": digest.hexdigest(), "rows": count}

    def rows(self, start: int, wanted: Wanted) -> Rows:
        index = start
        for path in self._paths():
            if wanted(index):
                yield Row(index, path, path, path)
            index += 1
        return index

    def _paths(self) -> Iterator[str]:
        for folder, below, names in os.walk(self.path):
            below.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1][1:].lower() in AUDIO_SUFFIXES:
                    yield os.path.join(folder, name)


@dataclass(frozen=True)
class Inputs:
    """Parts that follow each other, surveyed.

    Attributes:
        parts: in order.
        counts: rows of each part; None where nobody knows yet.
        fingerprint: what tells this input from others.
    """

    parts: tuple[Part, ...]
    counts: tuple[int | None, ...]
    fingerprint: list[dict[str, Any]]

    @property
    def total(self) -> int | None:
        """Rows of all parts; None where nobody knows yet."""
        known = [count for count in self.counts if count is not None]
        return sum(known) if len(known) == len(self.counts) else None

    def rows(self, wanted: Wanted = everything) -> Iterator[Row]:
        """The rows whose index is wanted, in order.

        Raises:
            OSError: a manifest, a folder or a tar file cannot be read any more.
            ValueError: a manifest is damaged as a whole.
        """
        start = 0
        for part in self.parts:
            start = yield from part.rows(start, wanted)


def open_inputs(names: Sequence[str]) -> Inputs:
    """Find out what the names of a command line are, and survey it.

    A name is a manifest (.jsonl, .json, .csv, .tsv, .parquet), a tar file, a folder, a recording,
    or a pattern such as `calls/**/*.wav`. What exists under a name comes before what it means as a
    pattern.

    Args:
        names: at least one.

    Raises:
        OSError: a manifest or a folder cannot be read.
        ValueError: there are no names, a pattern finds nothing, or a manifest is damaged.
        ImportError: a Parquet manifest needs pyarrow, which is not installed.
    """
    if not names:
        raise ValueError("the input is empty: name files, folders, patterns or manifests")
    parts: list[Part] = []
    files: list[str] = []
    for name in names:
        part = _part(name)
        if isinstance(part, Files):
            files += part.paths
            continue
        if files:
            parts.append(Files(files))
            files = []
        parts.append(part)
    if files:
        parts.append(Files(files))
    surveys = [part.survey() for part in parts]
    return Inputs(
        tuple(parts),
        tuple(count for count, _ in surveys),
        [description for _, description in surveys],
    )


def _part(name: str) -> Part:
    if os.path.isdir(name):
        return Folder(name)
    if not os.path.lexists(name) and glob.has_magic(name):
        found = sorted(glob.iglob(name, recursive=True))
        if not found:
            raise ValueError(f"the pattern {name!r} finds no files")
        found = [path for path in found if not os.path.isdir(path)]
        return Files(found)
    if name.lower().endswith(_TAR_SUFFIXES):
        return TarShard(name)
    return open_manifest(name) or Files([name])


def _names(paths: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, paths)))
    return {"files": len(paths), "names": digest.hexdigest()}
