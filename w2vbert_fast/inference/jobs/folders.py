"""The recordings in a folder and those below it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from w2vbert_fast.inference.jobs.which_files import (
    TWICE,
    PassedOver,
    is_hidden,
    why_not,
    why_not_by_name,
)
from w2vbert_fast.recordings.rows import Row, Rows, Wanted


class Folder:
    """The recordings in a folder and those below it, in alphabetical order.

    Hidden files are left out. Linked folders are followed; no file is read twice by that.

    Attributes:
        path: the folder.
        passed_over: what else is there, once it was surveyed.
    """

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
