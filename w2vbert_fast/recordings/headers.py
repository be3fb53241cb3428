"""Headers that do not tell the truth about how many samples follow them.

A recorder that dies leaves the size of the samples at 0, or at what it was when it last wrote it; a
program that writes to a pipe puts a huge one. Such files hold samples up to their end. What both
readers are given instead is the file with the size that is right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from w2vbert_fast.recordings.audio_files import Damaged, File, Window, read_at, size_of

# A program that writes to a pipe cannot know the size beforehand and puts one near these limits.
_SMALLEST_UNKNOWN_SIZE = {4: 0x7FFF_0000, 8: 0x7FFF_0000_0000_0000}
# Some recorders count the header among the samples.
_LARGEST_HEADER = 64
_MOST_CHUNKS = 10_000
_BLOCK = 1 << 20
# Tags stand behind the samples of formats that do not have them.
_TAGS = (b"ID3", b"TAG", b"APET", b"LYRI")

_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


class _Field(NamedTuple):
    """A number of a header: where it stands, how it is written, and what it counts in front of the
    samples."""

    place: int
    format: str
    extra: int = 0


class _Layout(NamedTuple):
    """How a format's chunks follow each other: the length of their names, how their sizes are
    written, what of a chunk its size counts beside its content, and to what they are aligned."""

    name: int
    size: str
    counted: int
    align: int


class _Header(NamedTuple):
    """Where the samples begin, how many bytes of them are stated, in which fields, and what chunks
    may follow them."""

    start: int
    stated: int
    fields: tuple[_Field, ...]
    following: _Layout | None


class Corrected(Window):
    """A file some of whose bytes are others.

    Args:
        file: the file.
        patches: those bytes, by the place of the first one.
    """

    def __init__(self, file: File, patches: dict[int, bytes]) -> None:
        super().__init__(file, 0, size_of(file))
        self._patches = patches

    def read(self, size: int = -1) -> bytes:
        """The bytes from the position on."""
        start = self.tell()
        content = bytearray(super().read(size))
        for place, patch in self._patches.items():
            for i, byte in enumerate(patch, place - start):
                if 0 <= i < len(content):
                    content[i] = byte
        return bytes(content)


def corrected(file: File, *, truncated: bool = False) -> File:
    """A file as its header should describe it; the file itself where there is nothing to correct.

    Of WAV (RF64 and BW64 too), W64, AIFF, AU and CAF.

    Args:
        file: the file.
        truncated: take a file that ends before the samples that its header states for what is left
            of it.

    Raises:
        Damaged: the file ends before the samples that its header states.
    """
    header = _read_header(file)
    if header is None:
        return file
    present = size_of(file) - header.start
    try:
        actual = _actual_size(file, header, present)
    except Damaged:
        if not truncated:
            raise
        actual = present
    if actual == header.stated:
        return file
    patches = {}
    for field in header.fields:
        width = struct.calcsize(field.format)
        value = min(actual + field.extra, (1 << 8 * width) - 1)
        patches[field.place] = struct.pack(field.format, value)
    return Corrected(file, patches)


def _actual_size(file: File, header: _Header, present: int) -> int:
    """Bytes of samples."""
    stated = header.stated
    width = max(struct.calcsize(field.format) for field in header.fields)
    if stated >= _SMALLEST_UNKNOWN_SIZE[width]:
        return present
    if stated > present + _LARGEST_HEADER:
        reason = f"truncated: {present} of {stated} bytes of samples are there"
        raise Damaged(reason, times=stated / present if present > 0 else None)
    if stated >= present:
        return stated
    if header.following is None:
        return present
    end = header.start + stated
    # Not all programs align what follows.
    align = header.following.align
    places = {end, -(-end // align) * align}
    if any(_no_samples(file, place, header.following) for place in places):
        return stated
    return present


def _no_samples(file: File, start: int, layout: _Layout) -> bool:
    """Whether what stands behind the samples are chunks, tags or padding, up to the file's end."""
    width = layout.name + struct.calcsize(layout.size)
    head = read_at(file, start, width)
    if len(head) < width or head.startswith(_TAGS):
        return True
    if not any(head):
        return not any(
            any(read_at(file, place, _BLOCK)) for place in range(start, size_of(file), _BLOCK)
        )
    (size,) = struct.unpack(layout.size, head[layout.name :])
    fits = size - layout.counted <= size_of(file) - start - width + _LARGEST_HEADER
    return _is_name(head) and fits


def _is_name(head: bytes) -> bool:
    """Whether bytes begin as a chunk does: with four printable characters."""
    return all(0x20 <= byte < 0x7F for byte in head[:4])


def _chunks(file: File, start: int, layout: _Layout) -> Iterator[tuple[bytes, int, int]]:
    """Names of chunks, where their content begins, and its size."""
    size_width = struct.calcsize(layout.size)
    for _ in range(_MOST_CHUNKS):
        head = read_at(file, start, layout.name + size_width)
        if len(head) < layout.name + size_width:
            return
        (size,) = struct.unpack(layout.size, head[layout.name :])
        content = start + len(head)
        yield head[: layout.name], content, size - layout.counted
        end = content + max(0, size - layout.counted)
        start = -(-end // layout.align) * layout.align
        if start > end and _is_name(read_at(file, end, 4)):
            start = end  # not aligned


def _read_header(file: File) -> _Header | None:
    """What a file's header says; None for other formats, and where no samples are found."""
    magic = read_at(file, 0, 40)
    if magic[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and magic[8:12] == b"WAVE":
        return _riff(file, ">" if magic[:4] == b"RIFX" else "<")
    if magic[:16] == _W64_RIFF:
        return _w64(file)
    if magic[:4] == b"FORM" and magic[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(file)
    if magic[:4] in (b".snd", b"dns.") and len(magic) >= 12:
        order = ">" if magic[:4] == b".snd" else "<"
        start, stated = struct.unpack(order + "II", magic[4:12])
        return _Header(start, stated, (_Field(8, order + "I"),), None)
    if magic[:4] == b"caff":
        return _caf(file)
    return None


def _riff(file: File, order: str) -> _Header | None:
    large: tuple[int, int] | None = None
    layout = _Layout(4, order + "I", 0, 2)
    for name, content, size in _chunks(file, 12, layout):
        if name == b"ds64" and size >= 16:
            (stated,) = struct.unpack("<Q", read_at(file, content + 8, 8).ljust(8, b"\0"))
            large = (content + 8, stated)
        elif name == b"data":
            if large is not None and size in (0, 0xFFFF_FFFF):
                place, stated = large
                fields = (_Field(content - 4, "<I", 0xFFFF_FFFF), _Field(place, "<Q"))
                return _Header(content, stated, fields, layout)
            return _Header(content, size, (_Field(content - 4, order + "I"),), layout)
    return None


def _w64(file: File) -> _Header | None:
    layout = _Layout(16, "<Q", 24, 8)
    for name, content, size in _chunks(file, 40, layout):
        if name == _W64_DATA:
            return _Header(content, max(0, size), (_Field(content - 8, "<Q", 24),), layout)
    return None


def _aiff(file: File) -> _Header | None:
    layout = _Layout(4, ">I", 0, 2)
    for name, content, size in _chunks(file, 12, layout):
        if name == b"SSND":
            # Its first numbers are an offset and a block size.
            field = _Field(content - 4, ">I", 8)
            return _Header(content + 8, max(0, size - 8), (field,), layout)
    return None


def _caf(file: File) -> _Header | None:
    layout = _Layout(4, ">Q", 0, 1)
    for name, content, size in _chunks(file, 8, layout):
        if name == b"data":
            # Its first number counts edits.
            return _Header(content + 4, max(0, size - 4), (_Field(content - 8, ">Q", 4),), layout)
    return None
