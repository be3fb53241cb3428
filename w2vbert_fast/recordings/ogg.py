"""Pages of an Ogg file: where its streams begin, what is damaged, and whether libsndfile can be
trusted with them.

Decoders pass over a page whose checksum is another one, and all that lies between two pages,
without a word. libsndfile reads the first of several streams that follow each other, and takes the
position that the last page states for the length. So streams are read one by one, and those with a
gap (a muted call, lost pages) by FFmpeg. (RFC 3533; the positions in RFC 7845, 4.)
"""

from __future__ import annotations

import statistics
import zlib
from typing import NamedTuple

from w2vbert_fast.recordings.audio_files import File, read_at, size_of

_MAGIC = b"OggS"
_HEADER = 27  # bytes of a page before the lengths of its segments
_CHECKSUM = slice(22, 26)
_LONGEST_PAGE = 1 << 16
_BLOCK = 1 << 18
_BEGINNING, _END = 2, 4  # flags of a stream's first and last page
# A page may hold packets of several lengths. Its share of a gap is beyond that.
_LONGEST_PACKETS = 2
_SMALLEST_GAP = 9_600  # samples
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_ONES = 0xFFFF_FFFF


class Pages(NamedTuple):
    """What the pages of an Ogg file say.

    Attributes:
        starts: where streams begin that follow each other.
        plain: one stream, all of whose pages and samples are there.
        ended: the last page is a stream's last one, and complete.
        damaged: bytes that lie between pages, or in pages whose checksum is another one.
    """

    starts: tuple[int, ...]
    plain: bool
    ended: bool
    damaged: int


def read_pages(file: File) -> Pages:
    """Go through the pages of an Ogg file; what is no page behind them is passed over."""
    size = size_of(file)
    position = sequence = before = 0
    serial: bytes | None = None
    starts = [0]
    beginning = True  # streams that are mixed begin together
    plain, ended, damaged, window = True, False, 0, (0, b"")
    steps: list[tuple[int, int]] = []  # of each page its samples and how many packets end there
    while position < size:
        at = position - window[0]
        if at < 0 or at + _LONGEST_PAGE > len(window[1]):
            window, at = (position, read_at(file, position, _BLOCK)), 0
        page = window[1][at : at + _LONGEST_PAGE]
        if not page.startswith(_MAGIC):
            following = page.find(_MAGIC, 1)
            if following < 0:
                break
            position += following
            damaged += following
            plain = False
            continue
        lengths = page[_HEADER : _HEADER + page[_HEADER - 1]] if len(page) >= _HEADER else b""
        length = _HEADER + len(lengths) + sum(lengths)
        if len(page) < _HEADER + 1 or position + length > size:
            return Pages(tuple(starts), False, False, damaged)
        if not _is_whole(page[:length]):
            damaged += length
        ended = bool(page[5] & _END)
        if not page[5] & _BEGINNING:
            beginning = False
        elif not beginning:
            beginning, plain = True, False
            starts.append(position)
        serial = serial or page[14:18]
        number = int.from_bytes(page[18:22], "little")
        plain = plain and page[14:18] == serial and number == sequence
        sequence = number + 1
        granule = int.from_bytes(page[6:14], "little", signed=True)
        packets = sum(value < 255 for value in lengths)
        if granule > 0 and packets:
            steps.append((granule - before, packets))
            before = granule
        position += length
    usual = statistics.median([step / packets for step, packets in steps]) if steps else 0
    gap = any(step > _LONGEST_PACKETS * packets * usual + _SMALLEST_GAP for step, packets in steps)
    return Pages(tuple(starts), plain and not gap, ended, damaged)


def _is_whole(page: bytes) -> bool:
    """Whether a page has the checksum that it states.

    It is that of zlib, with all bits in the other order, and without ones at both ends.
    """
    stated = page[_CHECKSUM]
    zeroed = page[: _CHECKSUM.start] + bytes(4) + page[_CHECKSUM.stop :]
    checksum = zlib.crc32(zeroed.translate(_REVERSED), _ONES) ^ _ONES
    return checksum.to_bytes(4, "big").translate(_REVERSED) == stated
