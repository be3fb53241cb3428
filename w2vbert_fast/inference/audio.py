"""Audio files and arrays to what the models read: 16 kHz, one channel, float32.

libsndfile (through soundfile) reads the formats that store plain or losslessly packed samples, and
Ogg. FFmpeg's libraries (through PyAV) read everything else: MP4/M4A, WebM, Matroska, MP3, AAC, ...
Resampling is soxr's "HQ" recipe. Files are read block by block, so an hour of 48 kHz stereo never
lies in memory at its own rate.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import stat
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from w2vbert_fast._extras import require
from w2vbert_fast.ops.fbank import FRAME_LENGTH, FRAME_SHIFT
from w2vbert_fast.waveforms import to_waveform

SAMPLING_RATE = 16_000
"""Samples per second that Wav2Vec2-BERT models are trained on."""

MIN_SAMPLES = FRAME_LENGTH + FRAME_SHIFT
"""Samples at 16 kHz in two analysis windows (35 ms): one alone cannot be normalised."""

CONTENT_NAME = "audio"
"""What messages call a recording that came as bytes."""

_BLOCK_FRAMES = 1 << 20
_SF_ERR_MALFORMED_FILE = 3

# The sizes of the chunk that holds the samples, as libsndfile logs them: what the header says and,
# where the file ends before that, what is there.
_CHUNK_SIZE = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# A program that writes to a pipe cannot know the size beforehand and puts one near these limits.
_SMALLEST_UNKNOWN_SIZE = 0x7FFF_0000
# Some recorders count the header among the samples.
_LARGEST_HEADER = 64

_OGG_HEADER = 27  # bytes of a page before the lengths of its segments
_LONGEST_OGG_PAGE = 1 << 16

# Below this a header is damaged; believing it would turn a small file into hours of samples.
_LOWEST_RATE = 1_000

# Undecodable packets that are dropped before the file counts as damaged. Players drop them too:
# tags and padding at the end of an MP3 look like a packet.
_MAX_BAD_PACKETS = 2
_MAX_BAD_PACKET_SHARE = 0.01
# What the header of an MP4 or a Matroska file promises may differ from what is there by encoder
# delay and rounding, which is far below this.
_DURATION_TOLERANCE_SECONDS = 0.5

_Samples = npt.NDArray[np.float32]
_File = io.FileIO | io.BytesIO


class AudioError(ValueError):
    """An audio file that cannot be read; the message names the file and what is wrong with it.

    Attributes:
        path: the file, as the caller named it.
        reason: what is wrong, without the name.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class Audio(NamedTuple):
    """A decoded recording.

    Attributes:
        samples: float32 ``[num_samples]`` on the CPU, one channel, full scale at -1 and 1.
        seconds: length of the recording as it was stored, in seconds.
    """

    samples: torch.Tensor
    seconds: float


class _Unreadable(Exception):
    """The reason why a file cannot be read, on its way to the AudioError that names the file."""


class _Source(NamedTuple):
    """A file that is being decoded: its sampling rate in Hz, its blocks ``[channels, n]``, and how
    many samples of each channel were left out in front of them."""

    sampling_rate: int
    blocks: Generator[_Samples, None, None]
    skipped: int = 0


@dataclass(frozen=True)
class _Part:
    """Which part of a recording is wanted, in seconds; `load_audio` says what the fields mean."""

    offset: float
    duration: float | None
    longest: float | None

    def __post_init__(self) -> None:
        # `not (... >= ...)`, so that NaN is refused.
        if not (math.isfinite(self.offset) and self.offset >= 0):
            raise ValueError(f"offset must be seconds of at least 0, got {self.offset}")
        for name, value in (("duration", self.duration), ("longest", self.longest)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be seconds above 0, got {value}")

    def start(self, rate: int) -> int:
        """First sample of the part."""
        return round(self.offset * rate)

    def check_length(self, frames: int, rate: int) -> None:
        """Refuse a part of so many samples, or more, at `rate`."""
        if self.longest is not None and frames > self.longest * rate:
            raise _Unreadable(
                f"longer than the limit of {self.longest:g} seconds "
                f"({frames / rate:.0f} seconds or more)"
            )

    def cut(self, blocks: Iterable[_Samples], rate: int, position: int) -> Iterator[_Samples]:
        """The part's samples, of blocks that begin at sample `position`."""
        start = self.start(rate)
        stop = None if self.duration is None else start + max(1, round(self.duration * rate))
        for block in blocks:
            first, position = position, position + block.shape[1]
            self.check_length(min(position, stop or position) - start, rate)
            if position > start:
                yield block[:, max(0, start - first) : None if stop is None else stop - first]
            if stop is not None and position >= stop:
                return
        early = stop is not None and stop - position > _DURATION_TOLERANCE_SECONDS * rate
        if position > 0 and (early or (start > 0 and position <= start)):
            end = "" if stop is None else f" to {stop / rate:.2f}"
            raise _Unreadable(
                f"ends after {position / rate:.2f} seconds; the part from {self.offset:.2f}{end} "
                "is not there"
            )


def load_audio(
    path: str | os.PathLike[str] | bytes,
    *,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
    longest: float | None = None,
) -> Audio:
    """Read an audio file, or a part of it, as one channel at a given sampling rate.

    Channels are averaged; integer samples are scaled to -1 ... 1. A file that ends before the
    length its header states is refused rather than read in part; MP3, bare AAC and live streams
    state no length, so there this cannot be seen.

    Args:
        path: the file: anything that libsndfile or FFmpeg reads. The content decides, not the name.
            Or the content itself, as bytes.
        sampling_rate: samples per second to return.
        offset: where to begin, in seconds. libsndfile goes there; with FFmpeg all that lies before
            is decoded.
        duration: how much to read, in seconds; None: to the end. A recording that ends up to half a
            second before the part does gives what there is.
        longest: refuse more than this many seconds, before or while they are decoded; None: no
            limit but the memory's.

    Returns:
        The samples, float32 ``[num_samples]``, and the length of what was read in seconds.

    Raises:
        AudioError: the file is missing, a folder, not to be opened, empty, not audio, without an
            stream, truncated or damaged, without samples, shorter than 35 ms, longer than
            ``longest``, ends before the part that is asked for, or holds NaN or infinite samples.
        ValueError: ``sampling_rate``, ``duration`` or ``longest`` is not positive, or ``offset``
            negative.
        ImportError: soundfile, PyAV or soxr is needed and not installed.
    """
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    part = _Part(offset, duration, longest)
    name = CONTENT_NAME if isinstance(path, bytes) else os.fspath(path)
    try:
        with _open_content(path) if isinstance(path, bytes) else _open(name) as file:
            source = _open_sndfile(file, part) or _open_ffmpeg(file)
            if source.sampling_rate < _LOWEST_RATE:
                raise _Unreadable(
                    f"states a sampling rate of {source.sampling_rate} Hz, too low for speech"
                )
            with contextlib.closing(source.blocks) as blocks:
                wanted = part.cut(blocks, source.sampling_rate, source.skipped)
                samples, frames = _resample(wanted, source.sampling_rate, sampling_rate)
    except _Unreadable as error:
        raise AudioError(name, str(error)) from error.__cause__
    except OSError as error:
        raise AudioError(name, error.strerror or str(error)) from error
    seconds = frames / source.sampling_rate
    if frames == 0:
        raise AudioError(name, "holds no samples")
    if samples.size * SAMPLING_RATE < MIN_SAMPLES * sampling_rate:
        raise AudioError(
            name, f"too short: {seconds * 1000:.1f} ms; two analysis windows, 35 ms, are needed"
        )
    return Audio(torch.from_numpy(samples), seconds)


def to_mono_16khz(array: torch.Tensor | npt.ArrayLike, sampling_rate: int) -> torch.Tensor:
    """Bring samples in memory to 16 kHz and one channel.

    Args:
        array: ``[num_samples]`` or ``[channels, num_samples]``; floating point with a full scale of
            1, or int8, uint8, int16 or int32 PCM, which is scaled.
        sampling_rate: samples per second of ``array``.

    Returns:
        float32 ``[num_samples]`` on the CPU.

    Raises:
        ValueError: another number of dimensions, no samples, NaN or infinite samples, integers
            without a full scale (such as int64), or a sampling rate that is not positive.
        TypeError: samples that are neither integers nor floating-point numbers.
        ImportError: the rate has to change and soxr is not installed.
    """
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    values = array if isinstance(array, torch.Tensor) else np.asarray(array)
    shape = list(values.shape)
    if len(shape) not in (1, 2):
        raise ValueError(
            f"array must be [num_samples] or [channels, num_samples], got sizes {shape}"
        )
    if 0 in shape:
        raise ValueError(f"array holds no samples: sizes {shape}")
    if len(shape) == 2 and shape[0] > shape[1]:
        raise ValueError(
            f"array must be [channels, num_samples], got sizes {shape}: more channels than "
            "samples. Transpose it?"
        )
    block: _Samples = to_waveform(values.reshape(-1), 0).cpu().numpy().reshape(-1, shape[-1])
    try:
        samples, _ = _resample([block], sampling_rate, SAMPLING_RATE)
    except _Unreadable as error:
        raise ValueError(f"array {error}") from None
    return torch.from_numpy(samples)


def _open_content(content: bytes) -> _File:
    if not content:
        raise _Unreadable("the file is empty")
    return io.BytesIO(content)


def _open(name: str) -> _File:
    """Open a file for both readers: a descriptor and a seekable object."""
    if "\0" in name:
        raise _Unreadable("the name holds a null character")
    # Unbuffered, so that the object and its descriptor agree on the position.
    file = open(name, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size > 0:
        return file
    with file:
        if stat.S_ISREG(status.st_mode):
            raise _Unreadable("the file is empty")
        if not stat.S_ISFIFO(status.st_mode):
            raise _Unreadable("not a regular file")
        # A pipe, such as a shell's <(...), is taken in as a whole, because both readers seek.
        content = file.read()
    if not content:
        raise _Unreadable("the file is empty")
    return io.BytesIO(content)


def _resample(
    blocks: Iterable[_Samples], source_rate: int, target_rate: int
) -> tuple[_Samples, int]:
    """Average the channels of blocks ``[channels, n]`` and convert their rate.

    Returns the samples ``[num_samples]`` and how many there were, a channel, at ``source_rate``.
    """
    stream = None
    if source_rate != target_rate:
        stream = require("soxr", "audio").ResampleStream(
            source_rate, target_rate, 1, dtype="float32", quality="HQ"
        )
    parts: list[_Samples] = []
    frames = 0
    for block in blocks:
        with np.errstate(invalid="ignore", over="ignore"):
            mono = block[0] if block.shape[0] == 1 else block.mean(axis=0, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise _Unreadable("holds NaN or infinite samples")
        mono = np.ascontiguousarray(mono)
        frames += mono.size
        parts.append(mono if stream is None else stream.resample_chunk(mono))
    if stream is not None:
        parts.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), frames


def _open_sndfile(file: _File, part: _Part) -> _Source | None:
    """Open a file with libsndfile, at the part; None when the other reader should have it."""
    soundfile = require("soundfile", "audio")
    start = file.read(3)
    file.seek(0)
    # MP3: libsndfile guesses the length where none is stored, from the first frames, and reads no
    # further. Its decoder also writes to standard error.
    if start == b"ID3" or (start[:1] == b"\xff" and start[1:2] >= b"\xe0"):
        return None
    handle: Any = file
    if not isinstance(file, io.BytesIO):
        # A descriptor rather than the object: it spares a Python call for each read.
        handle = file.fileno()
    try:
        sound = soundfile.SoundFile(handle, closefd=False)
    except soundfile.LibsndfileError as error:
        file.seek(0)
        if error.code == _SF_ERR_MALFORMED_FILE:
            raise _Unreadable(f"truncated or damaged: {error.error_string}") from error
        return None
    # MP3 within another format; and a FLAC stream of unknown length, which libsndfile reports as
    # the largest integer before it fails at the end.
    if sound.subtype.startswith("MPEG") or sound.frames >= 1 << 60:
        sound.close()
        file.seek(0)
        return None
    # libsndfile takes a page that is cut off for junk, as it does tags behind the last page.
    if "Junk after the last page" in sound.extra_info and _ends_within_ogg_page(file):
        sound.close()
        raise _Unreadable("truncated: the Ogg stream has no last page")
    rate: int = sound.samplerate
    skipped = 0
    if rate >= _LOWEST_RATE:
        start = part.start(rate)
        if part.duration is None:
            part.check_length(sound.frames - start, rate)
        # A position behind the end is refused when the blocks are cut.
        if 0 < start < sound.frames and sound.seekable():
            with contextlib.suppress(soundfile.LibsndfileError):
                skipped = sound.seek(start)
    blocks = _sndfile_blocks(sound, skipped, soundfile.LibsndfileError)
    return _Source(rate, blocks, skipped)


def _ends_within_ogg_page(file: _File) -> bool:
    """Whether the last Ogg page of a file is not all there; the position stays."""
    if isinstance(file, io.BytesIO):
        tail = bytes(file.getbuffer()[-_LONGEST_OGG_PAGE:])
    else:
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), _LONGEST_OGG_PAGE, max(0, size - _LONGEST_OGG_PAGE))
    start = tail.rfind(b"OggS")
    if start < 0:
        return False
    page = tail[start:]
    if len(page) < _OGG_HEADER:
        return True
    segments = page[_OGG_HEADER - 1]
    lengths = page[_OGG_HEADER : _OGG_HEADER + segments]
    return len(page) < _OGG_HEADER + segments + sum(lengths)


def _sndfile_blocks(
    sound: Any, position: int, decode_error: type[Exception]
) -> Generator[_Samples, None, None]:
    """Blocks ``[channels, n]`` from a position on, at which the file stands already."""
    with sound:
        log: str = sound.extra_info
        rate: int = sound.samplerate
        for found in _CHUNK_SIZE.finditer(log):
            stated, present = int(found[1]), int(found[2])
            if present + _LARGEST_HEADER < stated < _SMALLEST_UNKNOWN_SIZE:
                raise _Unreadable(f"truncated: {present} of {stated} bytes of samples are there")
        if "lacks an end-of-stream bit" in log:
            raise _Unreadable("truncated: the Ogg stream has no last page")
        frames = position
        while frames < sound.frames:
            try:
                block = sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
            except decode_error as error:
                raise _Unreadable(f"truncated or damaged: {error}") from error
            if len(block) == 0:
                raise _Unreadable(
                    f"truncated or damaged: {frames / rate:.2f} of "
                    f"{sound.frames / rate:.2f} seconds can be decoded"
                )
            frames += len(block)
            yield block.T


class _ForFFmpeg:
    """A file that refuses impossible positions with a number, as FFmpeg expects, not an exception.

    Damaged headers point outside the file, and PyAV prints exceptions to standard error.
    """

    def __init__(self, file: _File) -> None:
        self.read = file.read
        self.tell = file.tell
        self._seek = file.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._seek(offset, whence)
        except (OSError, ValueError):
            return -1


def _open_ffmpeg(file: _File) -> _Source:
    """Open a file with FFmpeg's demuxers and decoders."""
    av = require("av", "audio")
    try:
        container = av.open(_ForFFmpeg(file), metadata_errors="ignore")
    except av.FFmpegError as error:
        raise _Unreadable("cannot be read as audio: unknown format, or damaged") from error
    stream = container.streams.best("audio")
    if stream is None:
        container.close()
        raise _Unreadable("has no audio stream")
    if stream.codec_context is None or not stream.rate:
        container.close()
        raise _Unreadable("has audio of an unknown kind, or is damaged")
    return _Source(stream.rate, _ffmpeg_blocks(av, container, stream))


def _ffmpeg_blocks(av: Any, container: Any, stream: Any) -> Generator[_Samples, None, None]:
    packets = bad_packets = 0
    end_seconds = 0.0
    # Every sample format to float; channels and rate stay. Interleaved, because PyAV reads past the
    # end of its list of planes when there are eight or more.
    to_float = av.AudioResampler(format="flt", rate=stream.rate)
    with container:
        try:
            for packet in container.demux(stream):
                packets += 1
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    bad_packets += 1
                    continue
                for frame in frames:
                    if frame.time is not None:
                        end_seconds = max(end_seconds, frame.time + frame.samples / frame.rate)
                    for converted in to_float.resample(frame):
                        yield _deinterleaved(converted)
            for converted in to_float.resample(None):
                yield _deinterleaved(converted)
        except (av.FFmpegError, ValueError) as error:
            raise _Unreadable(f"truncated or damaged: {error}") from error
        if bad_packets > max(_MAX_BAD_PACKETS, _MAX_BAD_PACKET_SHARE * packets):
            raise _Unreadable(
                f"damaged: {bad_packets} of {packets} audio packets cannot be decoded"
            )
        stated = _stated_end_seconds(container, stream)
        if stated is not None and end_seconds < stated - _DURATION_TOLERANCE_SECONDS:
            raise _Unreadable(
                f"truncated or damaged: it ends after {end_seconds:.2f} of {stated:.2f} seconds"
            )


def _deinterleaved(frame: Any) -> _Samples:
    samples: _Samples = frame.to_ndarray()
    return samples.reshape(-1, frame.layout.nb_channels).T


def _stated_end_seconds(container: Any, stream: Any) -> float | None:
    """When the audio ends by the file's header; None where FFmpeg only estimates that."""
    formats = container.format.name.split(",")
    if "mp4" in formats and stream.duration is not None:
        return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
    if "matroska" in formats and container.duration is not None and len(container.streams) == 1:
        return float(container.duration / 1_000_000)
    return None
