"""Files, JSON among them, of which a crash never leaves half under the final name."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder, its parents too, and return its path.

    Raises:
        NotADirectoryError: the path, or a parent of it, is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{folder} cannot be made a folder: {error.filename or folder} is a file"
        ) from error
    return folder


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class StagedFile:
    """A temporary file on its way to its final name.

    Attributes:
        path: where to write; whatever is written may replace the file there.
        final: the final name, in the same folder.
        mode: the permissions that a new file gets here, whatever the writer gives it.
    """

    path: Path
    final: Path
    mode: int

    def commit(self) -> None:
        """Give the complete file its final name, once its bytes are on the disk."""
        self.path.chmod(self.mode)
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.final)


@contextmanager
def staged_file(final: Path) -> Iterator[StagedFile]:
    """Make an empty temporary file beside `final`; removed again unless it was committed."""
    path = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
    path.touch(exist_ok=False)
    try:
        yield StagedFile(path, final, stat.S_IMODE(path.stat().st_mode))
    finally:
        path.unlink(missing_ok=True)


def write_text(final: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it to `final`."""
    with staged_file(final) as staged:
        staged.path.write_text(text, encoding="utf-8")
        staged.commit()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a UTF-8 JSON file that holds an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or no object; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def to_json_string(content: Mapping[str, Any]) -> str:
    """The text that `write_json` writes."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a UTF-8 JSON file; a reader finds the old content or the new, never a part of it."""
    write_text(Path(path), to_json_string(content))
