"""Names of the files that single recordings get: their own, under the tree of the input.

What a tar file, a manifest or a URL calls a recording is somebody else's: nothing of it leads out
of the folder that the files are written to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# What no file system or only some of them have in names: control characters, bytes that are no
# UTF-8, and what means something in names of Windows.
_UNSAFE = re.compile('[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]')
_SCHEME = re.compile(r"^.*(://|::)")
# File systems have 255 bytes for a name; endings, a number and a temporary name need some of them.
_LONGEST_PART = 180
_LONGEST = 1000
_LONGEST_NAME = 250


def in_tree(name: str, roots: Iterable[str]) -> Path:
    """The relative path that a recording's name makes in the tree of the input.

    Args:
        name: of a recording: a path, a URL, a member of a tar file.
        roots: folders of the input. Of several that hold the recording the innermost counts.

    Returns:
        A path below wherever it is put: no absolute one, without "..", drives and links; a name
        that is longer than file systems have is cut.
    """
    inside = [root for root in roots if name.startswith(os.path.join(root, ""))]
    if inside:
        name = name[len(os.path.join(max(inside, key=len), "")) :]
    parts = [_tame(part) for part in re.split(r"[/\\]", _SCHEME.sub("", name))]
    parts = [part for part in parts if part] or ["recording"]
    if len("/".join(parts).encode()) > _LONGEST:
        parts = parts[-1:]
    return Path(*parts)


def _tame(part: str) -> str:
    """A part of a path that any file system takes; empty where nothing is left of it."""
    part = _UNSAFE.sub("_", part).rstrip(". ")
    if len(part.encode()) > _LONGEST_PART:
        part = part.encode()[:_LONGEST_PART].decode(errors="ignore").rstrip(". ")
    return part


def candidates(path: Path, index: int, is_part: bool) -> Iterator[Path]:
    """Names for a file that belongs to a recording, without its own ending; the best one first.

    Args:
        path: the recording's, or what stands for it.
        index: the row's.
        is_part: it is a part of a recording, which has several.
    """
    if not is_part:
        yield path.with_suffix("")
        yield path
    yield path.with_name(f"{path.stem}.{index:09d}")


def may_lie_there(path: Path, root: Path | None) -> bool:
    """Whether a new file can have a name, in or below `root` if all links are followed; makes its
    folder. Nothing that is there is replaced."""
    if len(os.fsencode(path.name)) > _LONGEST_NAME or os.path.lexists(path):
        return False
    if root is not None and not path.parent.resolve().is_relative_to(root.resolve()):
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return False
    return True
