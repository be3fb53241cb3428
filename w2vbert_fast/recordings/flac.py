"""Streams of a FLAC file, of which libsndfile reads the first one only.

FFmpeg would read on, but takes what the first one states for all of them (RFC 9639, 8.2).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

from w2vbert_fast.recordings.audio_files import File, Window, read_at, size_of

_BEGINNING = b"fLaC\0\0\0\x22"  # of a stream, its first block being STREAMINFO
_COUNT = 21  # where that states how many samples there are: in the last 36 of 40 bits
_SEARCHED = 1 << 22
# A decoder has read no further than this behind the end of a stream.
_LONGEST_BUFFER = 1 << 20
_MOST_FOUND = 1 << 16
_found: dict[tuple[int, ...], int | None] = {}


def flac_streams(file: File, *, exact: bool) -> Iterator[File]:
    """The streams, each as a file. The next one is looked for where the reader has stopped.

    Args:
        file: the file.
        exact: each ends where the next one begins, as it must where the reader seeks: it would find
            samples of the next one.
    """
    start: int | None = 0
    end = size_of(file)
    while start is not None:
        count = int.from_bytes(read_at(file, start + _COUNT, 5), "big") % (1 << 36)
        # One of unknown length is read to the end of what the reader is given.
        looked = exact or not count
        following = _next(file, start + 1, end) if looked else None
        if start == 0 and following is None:
            stream = file
        else:
            stream = Window(file, start, end if following is None else following)
        yield stream
        if not looked:
            read = start + stream.tell()
            following = _next(file, max(start + 1, read - _LONGEST_BUFFER), end)
        start = following


def _next(file: File, start: int, end: int) -> int | None:
    """Where the first stream from a place on begins."""
    key: tuple[int, ...] = ()
    if isinstance(file, io.FileIO):
        # Parts of one recording follow each other, and each would read all of it.
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, start)
        if key in _found:
            return _found[key]
    found = _search(file, start, end)
    if key:
        if len(_found) >= _MOST_FOUND:
            _found.clear()
        _found[key] = found
    return found


def _search(file: File, start: int, end: int) -> int | None:
    overlap = len(_BEGINNING) - 1
    for place in range(start, end, _SEARCHED):
        found = read_at(file, place, _SEARCHED + overlap).find(_BEGINNING)
        if found >= 0:
            return place + found
    return None
