"""Recordings read with FFmpeg's libraries, through PyAV: everything that libsndfile does not read.

What a frame says of itself counts, not what the file's header says of all: where rate or channels
change on the way, so do those of the blocks. Time stamps are kept (`timeline`), and of streams that
have none, such as MP3 and bare AAC, the time that missing bytes take.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from w2vbert_fast._extras import require
from w2vbert_fast.recordings.audio_files import (
    HEAD,
    Block,
    Damaged,
    File,
    Samples,
    Source,
    Unreadable,
    is_text,
    read_at,
)
from w2vbert_fast.recordings.timeline import Frame, on_timeline

DURATION_TOLERANCE_SECONDS = 0.5
"""By how much a recording may end before what its header, or a manifest, says: encoder delay and
rounding are far below this."""

# Undecodable packets that are dropped before the file counts as damaged. Players drop them too:
# tags and padding at the end of an MP3 look like a packet.
_MAX_BAD_PACKETS = 2
_MAX_BAD_PACKET_SHARE = 0.01
_JOINED_SAMPLES = 1 << 16
# FFmpeg's flags of formats, AVFMT_TS_DISCONT and AVFMT_GENERIC_INDEX, and of streams.
_CLOCK_RESTARTS, _NO_INDEX = 0x0200, 0x0100
_ATTACHED_PICTURE = 0x0400
# A stream that begins up to so much before 0 begins with its encoder's delay, which is not played.
_LONGEST_DELAY = 1.0
# Offset and full scale of FFmpeg's sample formats.
_FULL_SCALES = {
    "u8": (128, 2.0**7),
    "s16": (0, 2.0**15),
    "s32": (0, 2.0**31),
    "flt": (0, 1.0),
    "dbl": (0, 1.0),
}
_MANY_CHANNELS = 8  # with as many planes PyAV reads past the end of their list
_TAG = b"ID3"
_TAG_HEADER = 10
_HOLE = bytes(64)
_SEARCHED = 1 << 14


class _ForFFmpeg:
    """A file that refuses impossible positions with a number, as FFmpeg expects, not an exception.

    Damaged headers point outside the file, and PyAV prints exceptions to standard error.

    Attributes:
        failure: what the operating system said when it could not read; None: it could.
    """

    def __init__(self, file: File) -> None:
        self.tell = file.tell
        self.failure: OSError | None = None
        self._file = file

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size) or b""
        except OSError as error:
            self.failure = error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            return -1

    def check(self, error: Exception | None = None) -> None:
        """Raise what is no fault of the file's content: the operating system's error, or memory."""
        if self.failure is not None:
            raise self.failure
        if isinstance(error, MemoryError):
            raise MemoryError("not enough memory to decode it") from error


def open_ffmpeg(file: File, track: int | str | None = None) -> Source:
    """Open a file with FFmpeg's demuxers and decoders.

    Args:
        file: the file.
        track: the audio track, by its place among them, from 0, or by its language; None: the one
            that the container, or else FFmpeg, takes for the main one.

    Raises:
        Unreadable: it is no audio, without that track, or of a kind that FFmpeg does not decode.
        OSError: it cannot be read.
        MemoryError: there is not enough memory.
        ImportError: PyAV is not installed.
    """
    av = require("av", "audio")
    guarded = _ForFFmpeg(file)
    try:
        container = av.open(guarded, metadata_errors="ignore")
    except (av.FFmpegError, MemoryError) as error:
        guarded.check(error)
        what = _IS_TEXT if is_text(read_at(file, 0, HEAD)) else "unknown format, or damaged"
        raise Unreadable(f"cannot be read as audio: {what}") from error
    try:
        stream = container.streams.best("audio") if track is None else _track(container, track)
    except Unreadable:
        container.close()
        raise
    if stream is None:
        found = any(one.type == "audio" for one in container.streams)
        container.close()
        if found:
            raise Unreadable(_UNKNOWN_CODING)
        raise Unreadable("has no audio stream")
    if stream.codec_context is None or not stream.rate:
        container.close()
        raise Unreadable(_UNKNOWN_CODING)
    return Source(stream.rate, _blocks(av, container, stream, file, guarded))


def _track(container: Any, track: int | str) -> Any:
    """The audio stream of a number or a language; None where there is no audio."""
    streams = [one for one in container.streams if one.type == "audio"]
    languages = [str(one.metadata.get("language", "unknown")) for one in streams]
    if isinstance(track, int):
        if track < len(streams):
            return streams[track]
    elif track.lower() in map(str.lower, languages):
        return streams[[language.lower() for language in languages].index(track.lower())]
    if not streams:
        return None
    listed = ", ".join(f"{number} ({language})" for number, language in enumerate(languages))
    raise Unreadable(f"has no audio track {track}; it has {listed}")


_IS_TEXT = "it is text; names of manifests end with .jsonl, .json, .ndjson, .csv or .tsv"
_UNKNOWN_CODING = (
    "has audio of a coding that neither libsndfile nor this build of FFmpeg decodes, or is damaged"
)


def _blocks(
    av: Any, container: Any, stream: Any, file: File, guarded: _ForFFmpeg
) -> Generator[Block, None, None]:
    flags = int(container.format.flags)
    restarts = bool(flags & _CLOCK_RESTARTS)
    timed = restarts or not flags & _NO_INDEX
    with container:
        try:
            frames = _frames(av, container, stream, file, guarded, timed)
            yield from _joined(on_timeline(frames, _origin(container, stream), restarts))
        except av.FFmpegError as error:
            guarded.check(error)
            raise Damaged(f"truncated or damaged: {error}") from error


def _origin(container: Any, stream: Any) -> float | None:
    """When the earliest of the other streams begins, in seconds; None where there is none."""
    starts = [
        float(other.start_time * other.time_base)
        for other in container.streams
        if other.index != stream.index
        and other.type in ("audio", "video")
        and other.start_time is not None
        and not int(getattr(other, "disposition", 0)) & _ATTACHED_PICTURE
    ]
    return min((0.0 if -_LONGEST_DELAY < s < 0 else s for s in starts), default=None)


def _frames(
    av: Any, container: Any, stream: Any, file: File, guarded: _ForFFmpeg, timed: bool
) -> Iterator[Frame]:
    """Decoded frames with their times; without time stamps, from the lengths of frames and holes.

    Raises:
        Damaged: there are too many packets that cannot be decoded, or too few.
    """
    packets = bad_packets = 0
    end_seconds = clock = 0.0
    holes = _Holes(file)
    to_float = _ToFloat(av)
    for packet in container.demux(stream):
        guarded.check()
        packets += 1
        try:
            frames = packet.decode()
        except (av.FFmpegError, MemoryError) as error:
            guarded.check(error)
            lost = 0.0 if timed else holes.seconds(packet)
            if lost is not None:
                clock += lost
                bad_packets += 1
            continue
        before = clock
        for frame in frames:
            if frame.time is not None:
                end_seconds = max(end_seconds, frame.time + frame.samples / frame.sample_rate)
            block = to_float(frame)
            if block is not None:
                yield Frame(frame.time if timed else clock, block)
                clock += block.seconds
        if not timed:
            holes.decoded(packet, clock - before)
    guarded.check()
    stated = _stated_end_seconds(container, stream)
    if bad_packets > max(_MAX_BAD_PACKETS, _MAX_BAD_PACKET_SHARE * packets):
        raise Damaged(
            f"damaged: {bad_packets} of {packets} audio packets cannot be decoded", stated
        )
    if stated is not None and end_seconds < stated - DURATION_TOLERANCE_SECONDS:
        raise Damaged(
            f"truncated or damaged: it ends after {end_seconds:.2f} of {stated:.2f} seconds", stated
        )


class _ToFloat:
    """Frames of every sample format to float; rate and channels stay."""

    def __init__(self, av: Any) -> None:
        self._make = av.AudioResampler
        self._kind: tuple[Any, ...] = ()
        self._convert: Any = None

    def __call__(self, frame: Any) -> Block | None:
        channels = frame.layout.nb_channels
        kind = frame.format.name.removesuffix("p")
        if channels < _MANY_CHANNELS and kind in _FULL_SCALES:
            samples = frame.to_ndarray()
            if not frame.format.is_planar:
                samples = samples.reshape(-1, channels).T
            offset, scale = _FULL_SCALES[kind]
            samples = samples.astype(np.float32)  # a copy: FFmpeg uses the frame's memory again
            if scale != 1:
                samples -= offset
                samples /= scale
            return Block(frame.sample_rate, samples)
        # Interleaved, because of the planes.
        now = (kind, frame.layout.name, frame.sample_rate, frame.time_base)
        if now != self._kind:
            # As long as the rate stays, nothing is left in the one before.
            self._kind, self._convert = now, self._make(format="flt")
        parts = [x.to_ndarray().reshape(-1, channels).T for x in self._convert.resample(frame)]
        return Block(frame.sample_rate, np.concatenate(parts, axis=1)) if parts else None


class _Holes:
    """Bytes of a stream without time stamps that are no frames: zeros in their place, or damage.

    A player of such a file goes by the bytes: those that are missing take as long as others.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self._good_bytes = 0
        self._good_seconds = 0.0
        self._passed_over = 0  # by a demuxer that does not count it
        self._tag_end = 0

    def decoded(self, packet: Any, seconds: float) -> None:
        """Take in a packet that was decoded."""
        if seconds > 0:
            self._good_bytes += packet.size
            self._good_seconds += seconds

    def seconds(self, packet: Any) -> float | None:
        """How long the sound would be in place of a packet; None: it is a tag between files."""
        if packet.pos is None or self._good_bytes == 0:
            return 0.0
        start: int = packet.pos + self._passed_over
        end: int = start + packet.size
        head = read_at(self._file, start, _SEARCHED)
        tag = head[: packet.size].find(_TAG)
        if tag >= 0 and len(head) >= tag + _TAG_HEADER:
            size = head[tag + 6 : tag + _TAG_HEADER]
            if max(size) < 0x80:
                # 28 bits, seven in a byte.
                number = int.from_bytes(size, "big")
                length = sum((number >> 8 * i & 0x7F) << 7 * i for i in range(4))
                self._tag_end = max(self._tag_end, start + tag + _TAG_HEADER + length)
        if start < self._tag_end or tag >= 0:
            lost = end - max(start, self._tag_end)
            return None if lost <= 0 else self._seconds_of(lost)
        hole = head.find(_HOLE)
        if hole >= 0:
            zeros_end = self._end_of_zeros(start + hole)
            self._passed_over += max(0, zeros_end - end)
            end = max(end, zeros_end)
        return self._seconds_of(end - start)

    def _seconds_of(self, count: int) -> float:
        return self._good_seconds / self._good_bytes * count

    def _end_of_zeros(self, start: int) -> int:
        while block := read_at(self._file, start, 1 << 20):
            rest = len(block.lstrip(b"\0"))
            start += len(block) - rest
            if rest:
                break
        return start


def _joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks of about a second instead of single frames; those before an error, too."""
    parts: list[Samples] = []
    count = rate = channels = 0
    try:
        for block in blocks:
            samples = block.samples
            same = block.sampling_rate == rate and samples.shape[0] == channels
            if parts and (not same or count + samples.shape[1] > _JOINED_SAMPLES):
                yield Block(rate, np.concatenate(parts, axis=1))
                parts, count = [], 0
            rate, channels = block.sampling_rate, samples.shape[0]
            if samples.shape[1] > _JOINED_SAMPLES:
                yield block  # a gap may be hours of it
                continue
            parts.append(samples)
            count += samples.shape[1]
    except GeneratorExit:
        raise
    except Exception:
        if parts:
            yield Block(rate, np.concatenate(parts, axis=1))
        raise
    if parts:
        yield Block(rate, np.concatenate(parts, axis=1))


def _stated_end_seconds(container: Any, stream: Any) -> float | None:
    """When the audio ends by the file's header; None where FFmpeg only estimates that."""
    formats = container.format.name.split(",")
    if "mp4" in formats and stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    if "matroska" in formats and container.duration is not None and len(container.streams) == 1:
        return float(container.duration / 1_000_000)
    return None
