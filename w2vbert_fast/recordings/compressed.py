"""Files that may be compressed by gzip, bzip2, xz or Zstandard, which is known by what they begin
with."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from w2vbert_fast._extras import require

_BLOCK = 1 << 16
_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError)


class _Streams(io.RawIOBase):
    """Compressed streams, one behind the other, with or without zeros between them.

    Python's own readers of bzip2 and xz take what is none for the end, and so a damaged stream
    with all that follows it. Here it is an error.

    Args:
        path: the file.
        decompressor: makes what unpacks one stream.
    """

    def __init__(self, path: str, decompressor: Callable[[], Any]) -> None:
        self._file = io.FileIO(path)
        self._decompressor = decompressor
        self._stream = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        unpacked = b""
        while not unpacked:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed:
                    block = self._file.read(_BLOCK)
                    if not block:
                        return 0
                    packed = block.lstrip(b"\0")
                self._stream = self._decompressor()
            elif self._stream.needs_input:
                packed = self._file.read(_BLOCK)
                if not packed:
                    raise EOFError("it ends before the end of a compressed stream")
            unpacked = self._stream.decompress(packed, len(buffer))
        buffer[: len(unpacked)] = unpacked
        return len(unpacked)

    def close(self) -> None:
        self._file.close()
        super().close()


def name_inside(name: str) -> str:
    """A name without the ending of a compressed file."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in _ENDINGS else name


def open_uncompressed(path: str) -> IO[bytes]:
    """A file, unpacked where it is compressed, however many compressed streams it is joined of.

    Raises:
        ImportError: it is compressed by Zstandard, and pyarrow is not installed.
    """
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return cast(IO[bytes], opener(path))
    return open(path, "rb")


def is_damage(error: Exception) -> bool:
    """Whether an error of reading says that a compressed file is damaged; else the disk may be."""
    return isinstance(error, _DAMAGE) or (isinstance(error, OSError) and error.errno is None)


def _buffered(raw: Any) -> io.BufferedReader:
    return io.BufferedReader(raw, _BLOCK)


def _zstandard(path: str) -> io.BufferedReader:
    arrow = require("pyarrow", "offline")
    return _buffered(arrow.CompressedInputStream(arrow.OSFile(path), "zstd"))


_OPENERS: dict[bytes, Callable[[str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": lambda path: _buffered(_Streams(path, bz2.BZ2Decompressor)),
    b"\xfd7zXZ": lambda path: _buffered(_Streams(path, lzma.LZMADecompressor)),
    b"\x28\xb5\x2f\xfd": _zstandard,
    b"\x50\x2a\x4d\x18": _zstandard,  # a frame that is skipped, as pzstd begins
}
