"""The input of a job: files, folders, patterns, tar files and manifests, one after another.

Nothing is held but names of the command line: rows are read as they are needed.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from w2vbert_fast.inference.jobs.folders import Folder
from w2vbert_fast.inference.jobs.tar import Tar
from w2vbert_fast.inference.jobs.which_files import TAR_SUFFIXES, PassedOver, is_hidden
from w2vbert_fast.recordings.manifest import open_manifest
from w2vbert_fast.recordings.rows import Part, Row, Rows, Wanted, everything


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

    @property
    def passed_over(self) -> PassedOver:
        """What of folders, and of tar files that were read to their ends, is in no row."""
        found = PassedOver()
        for part in self.parts:
            if isinstance(part, Folder | Tar):
                found.update(part.passed_over)
        return found

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
    or a pattern such as `calls/**/*.wav` of any of these. What exists under a name comes before
    what it means as a pattern.

    Args:
        names: at least one.

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
        for part in _parts(name):
            if isinstance(part, Files) and parts and isinstance(parts[-1], Files):
                parts[-1].paths += part.paths
                continue
            parts.append(part)
            sources.append(name)
    surveys = []
    for part, name in zip(parts, sources, strict=True):
        surveys.append(part.survey())
        if surveys[-1][0] == 0:
            where = getattr(part, "path", name)
            passed_over = str(getattr(part, "passed_over", ""))
            raise ValueError(
                f"{where} holds no recordings" + (f": {passed_over}" if passed_over else "")
            )
    return Inputs(
        tuple(parts),
        tuple(count for count, _ in surveys),
        [description for _, description in surveys],
    )


def _parts(name: str) -> list[Part]:
    if os.path.lexists(name) or not glob.has_magic(name):
        return [_part(name)]
    parts: list[Part] = []
    folder: str | None = None
    for path in sorted(glob.iglob(name, recursive=True)):
        if _is_hidden_in(path, name):
            continue
        part = _part(path)
        if folder is not None and path.startswith(folder):
            # `calls/**` finds `calls`, and all that is in it once more.
            if isinstance(part, Folder | Files):
                continue
        elif isinstance(part, Folder):
            folder = os.path.join(path, "")
        parts.append(part)
    if not parts:
        raise ValueError(f"the pattern {name!r} finds no files")
    return parts


def _is_hidden_in(path: str, pattern: str) -> bool:
    """Whether a pattern finds what is none of the user's, and does not ask for it."""
    asked = pattern.split(os.sep)
    return any(is_hidden(one) and one not in asked for one in path.split(os.sep)[:-1])


def _part(name: str) -> Part:
    if os.path.isdir(name):
        return Folder(name)
    if name.lower().endswith(TAR_SUFFIXES):
        return Tar(name)
    return open_manifest(name) or Files([name])


def _names(paths: Sequence[str]) -> dict[str, Any]:
    digest = hashlib.sha256(b"\0".join(map(os.fsencode, paths)))
    return {"files": len(paths), "names": digest.hexdigest()}
