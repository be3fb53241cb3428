"""Files that may be compressed by gzip, bzip2 or xz, which is known by what they begin with."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from typing import IO, cast

_ENDINGS = (".gz", ".bz2", ".xz")
_OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


def name_inside(name: str) -> str:
    """A name without the ending of a compressed file."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in _ENDINGS else name


def open_uncompressed(path: str) -> IO[bytes]:
    """A file, unpacked where it is compressed, however many compressed streams it is joined of."""
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, opener in _OPENERS:
        if head.startswith(magic):
            return cast(IO[bytes], opener(path, "rb"))
    return open(path, "rb")


def is_damage(error: Exception) -> bool:
    """Whether an error of reading says that a compressed file is damaged; else the disk may be."""
    return isinstance(error, _DAMAGE) or (isinstance(error, OSError) and error.errno is None)
