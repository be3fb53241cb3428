"""Audio files and arrays to what the models read: 16 kHz, one channel, float32.

libsndfile (`sndfile_reader`) reads the formats that store plain or losslessly packed samples, and
Ogg. FFmpeg's libraries (`ffmpeg_reader`) read everything else: MP4/M4A, WebM, Matroska, MP3, AAC,
... Resampling is soxr's "HQ" recipe. Files are read block by block, so an hour of 48 kHz stereo
never lies in memory at its own rate.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from w2vbert_fast.ops.fbank import FRAME_LENGTH, FRAME_SHIFT
from w2vbert_fast.recordings.audio_files import (
    Block,
    Damaged,
    File,
    Samples,
    Source,
    Unreadable,
    Window,
    open_content,
    open_file,
    read_at,
    size_of,
)
from w2vbert_fast.recordings.ffmpeg_reader import DURATION_TOLERANCE_SECONDS, open_ffmpeg
from w2vbert_fast.recordings.flac import flac_streams
from w2vbert_fast.recordings.headers import corrected
from w2vbert_fast.recordings.mixdown import Channels, convert, each, louder, mean, one
from w2vbert_fast.recordings.ogg import read_pages
from w2vbert_fast.recordings.sndfile_reader import open_sndfile
from w2vbert_fast.recordings.waveforms import to_waveform

SAMPLING_RATE = 16_000
"""Samples per second that Wav2Vec2-BERT models are trained on."""

MIN_SAMPLES = FRAME_LENGTH + FRAME_SHIFT
"""Samples at 16 kHz in two analysis windows (35 ms): one alone cannot be normalised."""

CONTENT_NAME = "audio"
"""What messages call a recording that came as bytes."""

# Below this a header is damaged; believing it would turn a small file into hours of samples.
_LOWEST_RATE = 1_000


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


class Salvaged(NamedTuple):
    """What is wrong with a recording of which was taken what decodes.

    Attributes:
        reason: what is wrong.
        expected_seconds: how long it should be; None: the file does not say it, or says it wrongly.
    """

    reason: str
    expected_seconds: float | None

    def fields(self) -> dict[str, Any]:
        """As rows of tables have it."""
        expected = self.expected_seconds
        rounded = None if expected is None else round(expected, 4)
        return {"salvaged": self.reason, "expected_seconds": rounded}


class Audio(NamedTuple):
    """A decoded recording.

    Attributes:
        samples: float32 ``[num_samples]`` on the CPU, one channel, full scale at -1 and 1.
        seconds: length of the recording as it was stored, in seconds.
        louder_channel: the channel that was taken, from 0, because the mean of all of them would
            have cancelled what is said; None: the mean was taken.
        salvaged: of a damaged file of which was taken what decodes; None: all of it decodes.
    """

    samples: torch.Tensor
    seconds: float
    louder_channel: int | None = None
    salvaged: Salvaged | None = None


MIX, SPLIT = "mix", "split"


@dataclass(frozen=True)
class Selection:
    """What is taken of recordings.

    Attributes:
        channels: "mix": the mean of all; "split": each by itself; or a number: that one, from 0.
        track: audio track of a file with several, by its place among them, from 0, or by its
            language as the file has it, such as "deu"; None: the container's default.
        salvage: take what decodes of damaged files.

    Raises:
        ValueError: a value is none of these.
    """

    channels: str | int = MIX
    track: int | str | None = None
    salvage: bool = False

    def __post_init__(self) -> None:
        for name, value, words in (
            ("channels", self.channels, (MIX, SPLIT)),
            ("track", self.track, None),
        ):
            if isinstance(value, str) and value and (words is None or value in words):
                continue
            if value is None and words is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                other = "a language" if words is None else " or ".join(words)
                raise ValueError(f"{name} must be {other}, or a number from 0, got {value!r}")


EVERYTHING = Selection()


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

    def check_length(self, seconds: float) -> None:
        """Refuse a part of so many seconds, or more."""
        if self.longest is not None and seconds > self.longest:
            raise Unreadable(
                f"longer than the limit of {self.longest:g} seconds ({seconds:.0f} seconds or more)"
            )

    def first_sample(self, rate: int, frames: int) -> int:
        """The first sample of the part, of a recording that states so many."""
        start = self.start(rate)
        if self.duration is None and rate >= _LOWEST_RATE:
            self.check_length((frames - start) / rate)
        return start

    def cut(self, source: Source) -> Iterator[Block]:
        """The part's samples."""
        rate, position, origin = source.sampling_rate, source.skipped, 0.0
        start, stop = self._places(rate, origin)
        for block in source.blocks:
            if block.sampling_rate != rate:
                # From here on samples are counted at another rate.
                origin += position / rate
                rate, position = block.sampling_rate, 0
                start, stop = self._places(rate, origin)
            _check_rate(rate)
            first, position = position, position + block.samples.shape[1]
            self.check_length(((position if stop is None else min(position, stop)) - start) / rate)
            if position > start:
                last = None if stop is None else stop - first
                yield Block(rate, block.samples[:, max(0, start - first) : last])
            if stop is not None and position >= stop:
                return
        early = stop is not None and stop - position > DURATION_TOLERANCE_SECONDS * rate
        seconds = origin + position / rate
        if seconds > 0 and (early or (self.offset > 0 and position <= start)):
            end = "" if stop is None else f" to {origin + stop / rate:.2f}"
            reason = (
                f"ends after {seconds:.2f} seconds; the part from {self.offset:.2f}{end} "
                "is not there"
            )
            raise (Damaged(reason) if position > start else Unreadable(reason))

    def _places(self, rate: int, origin: float) -> tuple[int, int | None]:
        """First sample of the part and the one behind it, counted from `origin` in seconds."""
        start = round((self.offset - origin) * rate)
        if self.duration is None:
            return start, None
        return start, max(0, start + max(1, round(self.duration * rate)))


def _check_rate(rate: int) -> None:
    if rate < _LOWEST_RATE:
        raise Unreadable(f"states a sampling rate of {rate} Hz, too low for speech")


def load_audio(
    path: str | os.PathLike[str] | bytes,
    *,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
    longest: float | None = None,
    channel: int | None = None,
    track: int | str | None = None,
    salvage: bool = False,
) -> Audio:
    """Read an audio file, or a part of it, as one channel at a given sampling rate.

    Channels are averaged; where they cancel, since one is another with its polarity reversed, the
    louder one is taken. Integer samples are scaled to -1 ... 1.

    Times are those of a player: 0 is where the file's earliest stream begins, and where the time
    stamps leave a gap there is silence. Rate and channels may change on the way.

    A file that ends before the length its header states is refused rather than read in part; MP3,
    bare AAC and live streams state no length, so there this cannot be seen. Where a recorder has
    left the length at 0, or behind, the file is read to its end.

    Args:
        path: the file: anything that libsndfile or FFmpeg reads. The content decides, not the name.
            Or a URL, as fsspec opens them; "-", standard input; or the content itself, as bytes.
        sampling_rate: samples per second to return.
        offset: where to begin, in seconds. libsndfile goes there; with FFmpeg all that lies before
            is decoded.
        duration: how much to read, in seconds; None: to the end. A recording that ends up to half a
            second before the part does gives what there is.
        longest: refuse more than this many seconds, before or while they are decoded; None: no
            limit but the memory's.
        channel: take this channel, from 0; None: the mean of all.
        track: the audio track of a file with several, by its place among them, from 0, or by its
            language as the file has it, such as "deu"; None: the container's default.
        salvage: of a damaged file take what decodes, and say so in `salvaged`.

    Returns:
        The samples, float32 ``[num_samples]``, the length of what was read in seconds, and the
        channel if it was taken alone.

    Raises:
        AudioError: the file is missing, a folder, not to be opened, empty, not audio, without an
            audio stream, of a coding that nobody here decodes, truncated or damaged, without
            samples, shorter than 35 ms, longer than ``longest``, ends before the part that is asked
            for, has not that channel or track, or holds NaN or infinite samples.
        ValueError: ``sampling_rate``, ``duration`` or ``longest`` is not positive, or ``offset``,
            ``channel`` or ``track`` negative.
        MemoryError: there is not enough of it.
        ImportError: soundfile, PyAV or soxr is needed and not installed, or cannot be loaded.
    """
    selection = Selection(MIX if channel is None else channel, track, salvage)
    (audio,) = load_channels(
        path,
        selection,
        sampling_rate=sampling_rate,
        offset=offset,
        duration=duration,
        longest=longest,
    )
    return audio


def load_channels(
    path: str | os.PathLike[str] | bytes,
    selection: Selection,
    *,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
    longest: float | None = None,
) -> list[Audio]:
    """Read an audio file as `load_audio` does: one channel, or each of them by itself.

    Args:
        path: as `load_audio`.
        selection: which channels and which track, and whether damage is borne.
        sampling_rate: as `load_audio`.
        offset: as `load_audio`.
        duration: as `load_audio`.
        longest: as `load_audio`.

    Returns:
        The channels that are asked for, equally long.

    Raises:
        Exception: as `load_audio`.
    """
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    part = _Part(offset, duration, longest)
    name = CONTENT_NAME if isinstance(path, bytes) else os.fspath(path)
    try:
        with open_content(path) if isinstance(path, bytes) else open_file(name) as file:
            samples, seconds, channel, salvaged = _selected(file, part, selection, sampling_rate)
    except Unreadable as error:
        raise AudioError(name, str(error)) from error.__cause__
    except OSError as error:
        raise AudioError(name, error.strerror or str(error)) from error
    if seconds == 0:
        raise AudioError(name, "holds no samples")
    if samples.shape[1] * SAMPLING_RATE < MIN_SAMPLES * sampling_rate:
        raise AudioError(
            name, f"too short: {seconds * 1000:.1f} ms; two analysis windows, 35 ms, are needed"
        )
    return [Audio(torch.from_numpy(row), seconds, channel, salvaged) for row in samples]


def _selected(
    file: File, part: _Part, selection: Selection, sampling_rate: int
) -> tuple[Samples, float, int | None, Salvaged | None]:
    """Samples ``[channels, num_samples]``, their length in seconds, the channel that was taken as
    the louder one, and what was wrong."""

    def read(make: Callable[[], Generator[Block, None, None]]) -> tuple[Samples, float, int | None]:
        return _channels(make, selection.channels, sampling_rate)

    try:
        return *read(lambda: _blocks(file, part, selection.track)), None
    except Damaged as error:
        if not selection.salvage:
            raise
        # FFmpeg goes on behind damage, libsndfile does not; and it knows fewer formats.
        found = read(lambda: _until_damaged(_blocks(file, part, selection.track, damaged=True)))
        if found[1] == 0:
            raise
        stated = part.duration
        if stated is None:
            whole = error.stated
            if error.times is not None:
                # In milliseconds, since the last of the samples may be there in part.
                whole = round((part.offset + found[1]) * error.times, 3)
            stated = None if whole is None else max(0.0, whole - part.offset)
        return *found, Salvaged(str(error), stated)


def _until_damaged(blocks: Iterable[Block]) -> Generator[Block, None, None]:
    with contextlib.suppress(Damaged):
        yield from blocks


def stated_seconds(path: str | os.PathLike[str]) -> float | None:
    """The length of a recording by its header, in seconds; None where that takes decoding.

    Raises:
        OSError: it cannot be read.
        ImportError: soundfile is not installed.
    """
    lengths: list[float] = []

    def start(rate: int, frames: int) -> int:
        lengths.append(frames / rate)
        return 0

    try:
        with open_file(os.fspath(path)) as file:
            streams = _streams(file, exact=False)
            # Of FLAC that of the first stream: to look for others the file would have to be read.
            one = not isinstance(streams, list) or len(streams) == 1
            source = open_sndfile(next(iter(streams)), start) if one else None
            if source is not None:
                source.blocks.close()
    except Unreadable:
        return None
    return lengths[0] if lengths else None


def holds_audio(path: str | os.PathLike[str] | bytes) -> bool:
    """Whether a file, or content, is a recording by what is in it: the first samples are decoded.

    Raises:
        OSError: it cannot be read.
        ImportError: soundfile or PyAV is needed and not installed.
    """
    try:
        with open_content(path) if isinstance(path, bytes) else open_file(os.fspath(path)) as file:
            blocks = _blocks(file, _Part(0.0, None, None))
            with contextlib.closing(blocks):
                return any(block.samples.size > 0 for block in blocks)
    except Unreadable:
        return False


def _blocks(
    file: File, part: _Part, track: int | str | None = None, *, damaged: bool = False
) -> Generator[Block, None, None]:
    """The samples of a part of a file, from its beginning on.

    Args:
        file: the file.
        part: the part.
        track: the audio track; None: the container's default.
        damaged: read it with FFmpeg, whatever it is.
    """
    if damaged or track is not None:
        file.seek(0)
        source = _open_by_ffmpeg(corrected(file, truncated=damaged), track, part.first_sample)
    else:
        streams = iter(_streams(file, exact=part.offset > 0))
        source = _open(next(streams), part.first_sample)
        source = source._replace(blocks=_one_after_another(source, streams))
    with contextlib.closing(source.blocks):
        _check_rate(source.sampling_rate)
        yield from part.cut(source)


def _streams(file: File, *, exact: bool) -> Iterable[File]:
    """The streams that follow each other in a file, of formats that are joined end to end."""
    file.seek(0)
    magic = read_at(file, 0, 4)
    if magic == b"fLaC":
        return flac_streams(file, exact=exact)
    if magic != b"OggS":
        return [corrected(file)]
    pages = read_pages(file)
    if not pages.ended:
        raise Damaged("truncated: the Ogg stream has no last page")
    if pages.damaged:
        raise Damaged(f"damaged: {pages.damaged:,} bytes in or between the pages of the Ogg stream")
    if len(pages.starts) == 1:
        return [file]
    ends = [*pages.starts[1:], size_of(file)]
    return [Window(file, start, end) for start, end in zip(pages.starts, ends, strict=True)]


def _open_by_ffmpeg(
    file: File, track: int | str | None, start: Callable[[int, int], int]
) -> Source:
    """Open a file with FFmpeg; with libsndfile where it is of a kind that FFmpeg refuses."""
    try:
        return open_ffmpeg(file, track)
    except Unreadable:
        file.seek(0)
        source = None if track is not None else open_sndfile(file, start)
        if source is None:
            raise
        return source


def _open(file: File, start: Callable[[int, int], int]) -> Source:
    return open_sndfile(file, start) or open_ffmpeg(file)


def _one_after_another(first: Source, others: Iterable[File]) -> Generator[Block, None, None]:
    with contextlib.closing(first.blocks):
        yield from first.blocks
    for file in others:
        with contextlib.closing(_open(file, lambda *_: 0).blocks) as blocks:
            yield from blocks


def _channels(
    read: Callable[[], Iterable[Block]], wanted: str | int, sampling_rate: int
) -> tuple[Samples, float, int | None]:
    """Samples ``[channels, num_samples]``, the length in seconds, and the channel if it is the
    louder one. `read` is called again where the mean would lose what is said."""
    if wanted != MIX:
        pick = one(wanted) if isinstance(wanted, int) else each()
        return *convert(read(), sampling_rate, pick), None
    channels = Channels()
    samples, seconds = convert(read(), sampling_rate, mean(channels))
    channel = channels.to_read_alone()
    if channel is not None:
        samples, seconds = convert(read(), sampling_rate, louder(channel))
    return samples, seconds, channel


def to_mono_16khz(array: torch.Tensor | npt.ArrayLike, sampling_rate: int) -> torch.Tensor:
    """Bring samples in memory to 16 kHz and one channel.

    Channels are averaged; where they cancel the louder one is taken, as `load_audio` does.

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
    return convert_array(array, sampling_rate)[0].samples


def convert_array(
    array: torch.Tensor | npt.ArrayLike, sampling_rate: int, channels: str | int = MIX
) -> list[Audio]:
    """As `to_mono_16khz`, of the channels that `Selection` names, with what is known of them."""
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
    samples: Samples = to_waveform(values.reshape(-1), 0).cpu().numpy().reshape(-1, shape[-1])
    block = Block(sampling_rate, samples)
    try:
        found, seconds, channel = _channels(lambda: [block], channels, SAMPLING_RATE)
    except Unreadable as error:
        raise ValueError(f"array {error}") from None
    return [Audio(torch.from_numpy(row), seconds, channel) for row in found]
