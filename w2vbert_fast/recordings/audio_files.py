"""Files of recordings as both readers, libsndfile's and FFmpeg's, take and give them."""

from __future__ import annotations

import codecs
import io
import os
import stat
import sys
from collections.abc import Generator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from w2vbert_fast.recordings.remote import STANDARD_INPUT, is_remote, open_remote

Samples = npt.NDArray[np.float32]

HEAD = 2048
"""So many of its first bytes tell whether a file is text."""


class File(Protocol):
    """What both readers read: unbuffered, seekable, binary."""

    def read(self, size: int = -1, /) -> bytes | None: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def tell(self) -> int: ...


class Unreadable(Exception):
    """The reason why a file cannot be read, on its way to the AudioError that names the file."""


class Damaged(Unreadable):
    """The reason is damage, so that what lies before it, or around it, may be decoded.

    Args:
        reason: what is wrong.
        stated: the length that the file states, in seconds; None: none that is known.
        times: so many times as long as what is there it states to be; None: not known.
    """

    def __init__(
        self, reason: str, stated: float | None = None, times: float | None = None
    ) -> None:
        super().__init__(reason)
        self.stated = stated
        self.times = times


class Block(NamedTuple):
    """Successive samples of a recording.

    Attributes:
        sampling_rate: samples per second.
        samples: float32 ``[channels, num_samples]``.
    """

    sampling_rate: int
    samples: Samples

    @property
    def seconds(self) -> float:
        """Its length."""
        count: int = self.samples.shape[1]
        return count / self.sampling_rate


class Source(NamedTuple):
    """A recording that is being decoded.

    Attributes:
        sampling_rate: of its first samples, in Hz.
        blocks: its samples, in order and without a gap. Rate and channels may change on the way.
        skipped: how many samples of each channel were left out in front of the first block.
    """

    sampling_rate: int
    blocks: Generator[Block, None, None]
    skipped: int = 0


def open_content(content: bytes) -> io.BytesIO:
    """A file in memory.

    Raises:
        Unreadable: it is empty.
    """
    if not content:
        raise Unreadable("the file is empty")
    return io.BytesIO(content)


def open_file(name: str) -> io.FileIO | io.BytesIO:
    """Open a file, or a copy of what a URL leads to, for both readers: a descriptor and a seekable
    object.

    Raises:
        OSError: it is not there, or not to be opened.
        Unreadable: it is empty or no file.
        ImportError: it is a URL, and what fsspec needs for it is not installed.
    """
    if name == STANDARD_INPUT:
        return open_content(sys.stdin.buffer.read())
    if is_remote(name):
        copy = open_remote(name)
        if os.fstat(copy.fileno()).st_size > 0:
            return copy
        copy.close()
        raise Unreadable("the file is empty")
    if "\0" in name:
        raise Unreadable("the name holds a null character")
    # Unbuffered, so that the object and its descriptor agree on the position.
    file = open(name, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size > 0:
        return file
    with file:
        if stat.S_ISREG(status.st_mode):
            raise Unreadable("the file is empty")
        if not stat.S_ISFIFO(status.st_mode):
            raise Unreadable("not a regular file")
        # A pipe, such as a shell's <(...), is taken in as a whole, because both readers seek.
        content = file.read()
    return open_content(content)


def size_of(file: File) -> int:
    """Bytes of a file."""
    if isinstance(file, io.BytesIO):
        return file.getbuffer().nbytes
    if isinstance(file, io.FileIO):
        return os.fstat(file.fileno()).st_size
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(position)
    return size


class Window:
    """A part of a file as a file of its own.

    Args:
        file: the file.
        start: the first byte.
        end: the byte behind the last.
    """

    def __init__(self, file: File, start: int, end: int) -> None:
        self._file = file
        self._start = start
        self._size = end - start
        self._position = 0

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """The bytes from the position on."""
        left = max(0, self._size - self._position)
        count = left if size < 0 else min(size, left)
        content = read_at(self._file, self._start + self._position, count)
        self._position += len(content)
        return content


def read_at(file: File, start: int, size: int) -> bytes:
    """Up to so many bytes from a place on; the file's position stays."""
    if isinstance(file, io.BytesIO):
        return bytes(file.getbuffer()[start : start + size])
    if isinstance(file, io.FileIO) and hasattr(os, "pread"):
        return os.pread(file.fileno(), size, start)
    position = file.tell()
    file.seek(start)
    content = file.read(size) or b""
    file.seek(position)
    return content


def is_text(head: bytes) -> bool:
    """Whether a file that begins so is text, as playlists are. It saves trying all decoders."""
    if head.startswith(b"NIST_1A"):
        return False  # the header of a SPHERE file may be any length
    try:
        # The last character may be cut off.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character >= " " or character in "\t\n\r\f\v\x1b" for character in text)
