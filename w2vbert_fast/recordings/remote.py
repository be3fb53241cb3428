"""Recordings elsewhere: `https://`, `s3://`, `gs://`, `hf://` and what else fsspec has a name for.

A recording is copied into a temporary file before it is decoded, since decoders seek, and the copy
ends with the reading. What is read again and again can be kept by fsspec itself
(``simplecache::https://...``, ``filecache::...``).
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import tempfile

from w2vbert_fast._extras import require

_URL = re.compile(r"[a-z][a-z0-9+.-]*(://|::)", re.IGNORECASE)
_BLOCK = 1 << 20
_NOT_FOUND = 404


def is_remote(name: str) -> bool:
    """Whether a name is a URL, or one of fsspec's chains of them; no file of that name is meant."""
    return _URL.match(name) is not None


STANDARD_INPUT = "-"


def is_elsewhere(name: str) -> bool:
    """Whether a name is that of no file here: a URL, or standard input."""
    return name == STANDARD_INPUT or is_remote(name)


def join(folder: str | os.PathLike[str], name: str) -> str:
    """What a manifest calls a recording: a URL, or a name relative to the manifest's folder."""
    return name if is_remote(name) else os.path.join(folder, name)


def open_remote(url: str) -> io.FileIO:
    """Copy what a URL leads to into a temporary file, and open that; closing it removes it.

    Raises:
        OSError: it is not there, a folder, or cannot be had; the message says why.
        ImportError: fsspec, or what it needs for such URLs, is not installed.
    """
    fsspec = require("fsspec", "remote")
    with tempfile.TemporaryFile(buffering=0) as copy:
        try:
            found = fsspec.open(url, "rb")
            with found as source:
                shutil.copyfileobj(source, copy, _BLOCK)
            # In a store of objects what a folder is called can be read, and holds nothing.
            is_folder = copy.tell() == 0 and found.fs.isdir(found.path)
        except Exception as error:
            raise _explained(error, "cannot be fetched") from error
        if is_folder:
            raise IsADirectoryError(errno.EISDIR, "a folder; with / at its end its files are read")
        return io.FileIO(os.dup(copy.fileno()), "rb")


def _explained(error: Exception, what: str) -> Exception:
    """What a back end's own error comes to: an `OSError` that says what could not be done and why,
    or an `ImportError` that says what to install."""
    if isinstance(error, ImportError):
        return ImportError(f"{error}. Install it with: pip install 'w2vbert_fast[remote]'")
    # Of HTTP everything is a FileNotFoundError, with the reason behind it.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
    if cause is None or getattr(cause, "status", None) == _NOT_FOUND:
        return FileNotFoundError(errno.ENOENT, "not found")
    reason = str(cause).partition("\n")[0] or type(cause).__name__
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    return kind(f"{what}: {reason}")


def find(pattern: str) -> list[str]:
    """The files of a folder or of a pattern elsewhere, in alphabetical order, as URLs.

    Args:
        pattern: such as ``s3://bucket/calls/*.wav`` or ``s3://bucket/calls/``. What is neither
            stands for itself.

    Raises:
        OSError: it cannot be looked at.
        ImportError: as `open_remote`.
    """
    fsspec = require("fsspec", "remote")
    is_folder = pattern.endswith("/")
    if not (is_folder or any(c in pattern.partition("?")[0] for c in "*[")):
        return [pattern]
    try:
        files, path = fsspec.url_to_fs(pattern)
        found = files.find(path) if is_folder else files.glob(path)
    except Exception as error:
        raise _explained(error, f"{pattern} cannot be listed") from error
    return [files.unstrip_protocol(name) for name in sorted(found)]
