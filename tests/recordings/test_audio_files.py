"""Recordings as they come: headers that lie, gaps, streams that change, channels that cancel.

The right value of every case is known from how its file is made.
"""

from __future__ import annotations

import errno
import io
import math
import os
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from tests.helpers.offline import Stub, run, table
from tests.helpers.signals import speech_like
from w2vbert_fast import _extras
from w2vbert_fast.inference import AudioError, load_audio, to_mono_16khz
from w2vbert_fast.inference.tasks.transcribe import Transcribe
from w2vbert_fast.recordings import flac
from w2vbert_fast.recordings.audio import holds_audio
from w2vbert_fast.recordings.audio_files import Block
from w2vbert_fast.recordings.ffmpeg_reader import open_ffmpeg
from w2vbert_fast.recordings.timeline import Frame, on_timeline

RATE = 16_000
SIGNAL = speech_like(3, RATE)
PCM = np.round(SIGNAL * 32_767).astype(np.int16)
WHOLE = torch.from_numpy(PCM / np.float32(32_768))


def content_of(container: str, samples: np.ndarray = PCM, rate: int = RATE, **more: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, **more)
    return file.getvalue()


# --- headers ------------------------------------------------------------------------------------

BYTES = PCM.nbytes
# Format, the mark in front of the size, bytes between, how the size is written, what it counts.
SIZES: dict[str, tuple[bytes, int, str, int]] = {
    "WAV": (b"data", 0, "<I", 0),
    "WAVEX": (b"data", 0, "<I", 0),
    "RF64": (b"ds64", 12, "<Q", 0),
    "W64": (b"data", 12, "<Q", 24),
    "AU": (b".snd", 4, ">I", 0),
    "AIFF": (b"SSND", 0, ">I", 8),
    "CAF": (b"data", 0, ">Q", 4),
}


def with_size(container: str, size: int, counted: bool = True) -> bytearray:
    """A file whose header states another size of its samples."""
    content = bytearray(content_of(container, subtype="PCM_16"))
    mark, between, form, extra = SIZES[container]
    at = content.index(mark) + len(mark) + between
    struct.pack_into(form, content, at, size + (extra if counted else 0))
    return content


@pytest.mark.parametrize("container", SIZES)
@pytest.mark.parametrize("state", ["0", "unknown", "behind"])
def test_a_header_that_does_not_know_the_length(container: str, state: str) -> None:
    limit = (1 << 8 * struct.calcsize(SIZES[container][2])) - 1
    # As recorders leave it that die at once, or later; and as programs write it to a pipe.
    size = {"0": 0, "unknown": limit, "behind": 2 * RATE}[state]
    content = bytes(with_size(container, size, counted=state != "unknown"))
    audio = load_audio(content)
    assert audio.seconds == 3
    assert torch.equal(audio.samples, WHOLE)
    assert torch.equal(load_audio(content, offset=2.5).samples, WHOLE[40_000:])


def test_sizes_of_zero_that_leave_out_what_the_chunk_counts_itself() -> None:
    for container in ("W64", "AIFF", "CAF"):
        content = bytes(with_size(container, 0, counted=False))
        assert torch.equal(load_audio(content).samples, WHOLE)


@pytest.mark.parametrize(
    "behind",
    [
        b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf58.29.100\0",
        b"ID3\x03\0\0\0\0\0\x0a" + bytes(10),
        b"TAG" + bytes(125),
        bytes(512),
        b"\0",
    ],
)
def test_what_follows_the_samples_is_no_sound(behind: bytes) -> None:
    audio = load_audio(content_of("WAV") + behind)
    assert torch.equal(audio.samples, WHOLE)
    empty = bytes(with_size("WAV", 0))[:44] + behind
    with pytest.raises(AudioError, match="holds no samples"):
        load_audio(empty)


def test_samples_of_an_odd_number_of_bytes() -> None:
    content = with_size("WAV", BYTES - 1)
    assert torch.equal(load_audio(bytes(content)).samples, WHOLE[:-1])
    assert torch.equal(load_audio(content_of("WAV")[:-1]).samples, WHOLE[:-1])


@pytest.mark.parametrize("container", [name for name in SIZES if name != "RF64"])
def test_a_file_that_ends_before_its_length_is_refused(container: str) -> None:
    with pytest.raises(AudioError, match="truncated"):
        load_audio(content_of(container, subtype="PCM_16")[: -BYTES // 2])


# --- the timeline -------------------------------------------------------------------------------


def timed(
    container_format: str,
    codec: str,
    starts: Callable[[float], float],
    *,
    rate: int = RATE,
    signal: np.ndarray = SIGNAL,
    video: float | None = None,
    seconds: float = 8.0,
) -> bytes:
    """A file of frames that lie at `starts(time)`; beside a video that begins at `video`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        audio = container.add_stream(codec, rate=rate, layout="mono")
        size = 1024 if codec == "aac" else 1152 if codec.startswith("libmp3") else rate // 50
        packets: list[Any] = []
        if video is not None:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width = pictures.height = 32
            pictures.pix_fmt = "yuv420p"
            for number in range(round(seconds * 10)):
                picture = av.VideoFrame(32, 32, "yuv420p")
                picture.pts = number + round(video * 10)
                picture.time_base = Fraction(1, 10)
                packets += pictures.encode(picture)
            packets += pictures.encode(None)
        form = "s16" if codec in ("libopus", "pcm_s16le", "flac") else "fltp"
        values = signal if form == "fltp" else np.round(signal * 32_767).astype(np.int16)
        for start in range(0, len(values) - size + 1, size):
            frame = av.AudioFrame.from_ndarray(
                values[None, start : start + size], format=form, layout="mono"
            )
            frame.sample_rate = rate
            frame.pts = round(starts(start / rate) * rate)
            frame.time_base = Fraction(1, rate)
            packets += audio.encode(frame)
        packets += audio.encode(None)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return file.getvalue()


def lag(samples: torch.Tensor, start: float, part: np.ndarray = SIGNAL[8_000:16_000]) -> float:
    """By how many seconds a part of the signal lies behind a place where it should be."""
    first = round(start * RATE) - 2_000
    window = samples.numpy()[max(0, first) : first + 4_000 + part.size]
    window = np.pad(window, (max(0, -first), 0))
    product = np.correlate(window, part, "valid")
    # Where it is at all: the best place explains nearly all of the part.
    assert product.max() > 0.8 * np.dot(part, part)
    return float(product.argmax() - 2_000) / RATE


def muted(time: float) -> float:
    return time + (5 if time >= 2 else 0)


@pytest.mark.parametrize(
    ("container_format", "codec", "rate"),
    [
        ("matroska", "pcm_s16le", RATE),
        ("matroska", "libmp3lame", 48_000),
        ("webm", "libopus", 48_000),
        ("ogg", "libopus", 48_000),
        ("ogg", "flac", RATE),
        ("mp4", "aac", 48_000),
        ("mpegts", "aac", 48_000),
        ("flv", "aac", 44_100),
    ],
)
def test_a_gap_in_the_time_stamps_is_silence(container_format: str, codec: str, rate: int) -> None:
    content = timed(container_format, codec, muted, rate=rate, signal=speech_like(3, rate))
    audio = load_audio(content)
    assert audio.seconds == pytest.approx(8, abs=0.15)
    delay = 0.0 if container_format != "flv" else 1024 / rate  # that cannot be stated there
    assert abs(lag(audio.samples, 0.5) - delay) < 0.03
    assert abs(lag(audio.samples, 7.2, SIGNAL[35_200:43_200]) - delay) < 0.03
    assert audio.samples[round(2.2 * RATE) : round(6.8 * RATE)].abs().max() == 0
    # Parts are parts of this timeline.
    part = load_audio(content, offset=7, duration=0.9)
    assert abs(lag(part.samples, 0.2, SIGNAL[35_200:43_200]) - delay) < 0.03
    assert load_audio(content, offset=3, duration=2).samples.abs().max() == 0
    with pytest.raises(AudioError, match="longer than the limit of 4 seconds"):
        load_audio(content, longest=4)
    assert load_audio(content, longest=4, offset=1, duration=3).seconds == 3


@pytest.mark.parametrize(
    ("container_format", "codec", "rate"),
    [
        ("mp4", "aac", 48_000),
        ("matroska", "libopus", 48_000),
        ("matroska", "pcm_s16le", RATE),
        ("mpegts", "aac", 48_000),
    ],
)
@pytest.mark.parametrize("begins", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("origin", [0.0, 4_000.0])
def test_audio_that_begins_late_in_a_video(
    container_format: str, codec: str, rate: int, begins: float, origin: float
) -> None:
    signal = speech_like(3, rate)
    content = timed(
        container_format, codec, lambda t: t + begins + origin, rate=rate, signal=signal,
        video=origin,
    )  # fmt: skip
    audio = load_audio(content)
    assert audio.seconds == pytest.approx(3 + begins, abs=0.1)
    delay = 0.0 if container_format != "mpegts" else 1024 / rate
    assert abs(lag(audio.samples, 0.5 + begins) - delay) < 0.03


def test_times_begin_with_the_only_stream() -> None:
    content = timed("matroska", "pcm_s16le", lambda t: t + 7)
    assert torch.equal(load_audio(content).samples, WHOLE)


def test_jitter_is_no_gap() -> None:
    content = timed("matroska", "pcm_s16le", lambda t: t + 0.045 * (1 + math.sin(20 * t)))
    assert torch.equal(load_audio(content).samples, WHOLE)


def frames(times: Sequence[float | None], length: float = 0.02) -> list[Frame]:
    """Frames of ones."""
    count = round(length * RATE)
    return [Frame(time, Block(RATE, np.ones((1, count), np.float32))) for time in times]


def runs(blocks: Sequence[Block]) -> list[tuple[float, float]]:
    """Sound and silence in turn, as (value, seconds)."""
    found: list[list[float]] = []
    for block in blocks:
        value = float(block.samples.flat[0])
        if not found or found[-1][0] != value:
            found.append([value, 0.0])
        found[-1][1] += block.seconds
    return [(value, round(seconds, 4)) for value, seconds in found]


def steady(start: float, seconds: float) -> list[float]:
    return [start + 0.02 * i for i in range(round(seconds * 50))]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (steady(0, 2), [(1, 2)]),
        (steady(0, 2) + steady(5, 2), [(1, 2), (0, 3), (1, 2)]),
        # Two gaps within a second.
        (
            steady(0, 2) + steady(5, 0.4) + steady(6, 2),
            [(1, 2), (0, 3), (1, 0.4), (0, 0.6), (1, 2)],
        ),
        # Frames that come late for a moment: what was held up follows at once.
        (steady(0, 2) + steady(2.5, 0.5) + steady(2.5, 2), [(1, 4.5)]),
        ([*steady(0, 2), 900.0, *steady(2.02, 2)], [(1, 4.02)]),
        # A gap at the end, behind which there is less than a second.
        (steady(0, 2) + steady(5, 0.1), [(1, 2), (0, 3), (1, 0.1)]),
        # Lost packets add up.
        ([t for i, t in enumerate(steady(0, 4)) if i % 10], [(1, 3.6)]),
        # The clock starts anew: after the first part, and then with a gap of its own.
        (steady(50, 3) + steady(0, 1) + steady(2, 2), [(1, 4), (0, 1), (1, 2)]),
        # Overlaps lose nothing, and the next gap is shorter.
        (steady(0, 2) + steady(1.5, 2) + steady(4, 2), [(1, 4), (1, 2)]),
        # Frames without time stamps follow those before them.
        ([*steady(0, 1), None, None, *steady(3.04, 2)], [(1, 1.04), (0, 2), (1, 2)]),
    ],
)
def test_silence_between_frames(times: list[float], expected: list[tuple[float, float]]) -> None:
    found = runs(list(on_timeline(frames(times), None, False)))
    if len(expected) == 1:
        # Lost packets: the parts of silence are short and many.
        total = sum(seconds for value, seconds in found if value)
        assert total == pytest.approx(expected[0][1])
        if len(times) == 180:
            length = sum(seconds for _, seconds in found)
            assert length == pytest.approx(4, abs=0.13)
        else:
            assert len(found) == 1
        return
    merged = [expected[0]]
    for value, seconds in expected[1:]:
        if value == merged[-1][0]:
            merged[-1] = (value, merged[-1][1] + seconds)
        else:
            merged.append((value, seconds))
    assert found == merged


def test_hours_ahead_are_another_clock_where_clocks_restart() -> None:
    times = steady(0, 2) + steady(7_200, 2)
    assert runs(list(on_timeline(frames(times), None, True))) == [(1, 4)]
    assert runs(list(on_timeline(frames(times), None, False))) == [(1, 2), (0, 7_198), (1, 2)]
    content = timed("matroska", "pcm_s16le", lambda t: t + (200_000 if t >= 1 else 0))
    with pytest.raises(AudioError, match="its time stamps leave out 56 hours"):
        load_audio(content)


def mp3(rate: int = RATE, channels: int = 1, seconds: float = 3) -> bytes:
    signal = np.repeat(speech_like(seconds, rate)[:, None], channels, axis=1)
    return content_of(
        "MP3", signal, rate, subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT",
        compression_level=0.5,
    )  # fmt: skip


def test_a_hole_in_an_mp3_takes_its_time() -> None:
    content = mp3(seconds=9)
    whole = load_audio(content)
    first, last = len(content) // 3, len(content) * 2 // 3
    holed = content[:first] + bytes(last - first) + content[last:]
    audio = load_audio(holed)
    assert audio.seconds == pytest.approx(whole.seconds, abs=0.1)
    place = 8.0
    part = whole.samples.numpy()[round(place * RATE) : round((place + 0.5) * RATE)]
    assert abs(lag(audio.samples, place, part)) < 0.1
    assert audio.samples[round(3.5 * RATE) : round(5.5 * RATE)].abs().max() == 0


def test_a_hole_in_bare_aac_takes_its_time() -> None:
    content = timed("adts", "aac", lambda t: t, signal=speech_like(9, RATE))
    whole = load_audio(content).seconds
    third = len(content) // 3
    holed = content[:third] + bytes(third) + content[2 * third :]
    assert load_audio(holed).seconds == pytest.approx(whole, abs=0.5)


def test_tags_between_joined_mp3s_take_no_time() -> None:
    one = mp3()
    picture = np.random.default_rng(0).bytes(60_000)
    size = bytes(len(picture) >> 7 * i & 0x7F for i in (3, 2, 1, 0))
    for inside in (picture, bytes(len(picture))):
        audio = load_audio(one + b"ID3\x03\0\0" + size + inside + one)
        assert audio.seconds == pytest.approx(2 * load_audio(one).seconds, abs=0.2)


# --- streams that change ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [((44_100, 2), (22_050, 1)), ((22_050, 1), (44_100, 2)), ((44_100, 2), (44_100, 1))],
)
def test_an_mp3_that_changes_rate_or_channels(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    content = mp3(*first) + mp3(*second)
    audio = load_audio(content)
    assert audio.seconds == pytest.approx(6, abs=0.2)
    assert audio.samples.numel() == pytest.approx(audio.seconds * RATE, abs=2)
    for start in (0.5, 3.5):
        assert abs(lag(audio.samples, start)) < 0.12
    # A part of it is of the same timeline, on either side and across.
    for offset in (1.0, 3.6):
        part = load_audio(content, offset=offset, duration=2.0)
        assert part.seconds == pytest.approx(2, abs=1e-3)
        first_sample = round(offset * RATE)
        wanted = audio.samples[first_sample + 400 : first_sample + 31_600]
        # Both are rounded to samples of their own.
        assert (part.samples[400:31_600] - wanted).norm() < 0.15 * wanted.norm()


def test_bare_aac_that_changes_rate() -> None:
    def adts(rate: int) -> bytes:
        return timed("adts", "aac", lambda t: t, rate=rate, signal=speech_like(3, rate))

    audio = load_audio(adts(16_000) + adts(44_100) + adts(24_000))
    assert audio.seconds == pytest.approx(9, abs=0.4)
    for start in (0.5, 3.55, 6.6):
        assert abs(lag(audio.samples, start)) < 0.12


@pytest.mark.parametrize(
    ("container", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16")]
)
def test_joined_files_are_read_to_the_end(container: str, subtype: str) -> None:
    one = content_of(container, SIGNAL, RATE, subtype=subtype)
    other = content_of(container, speech_like(3, 48_000), 48_000, subtype=subtype)
    audio = load_audio(one + other)
    assert audio.seconds == pytest.approx(6, abs=0.05)
    for start in (0.5, 3.5):
        assert abs(lag(audio.samples, start)) < 0.05


@pytest.mark.parametrize("rates", [(16_000, 44_100), (48_000, 16_000), (16_000, 16_000)])
@pytest.mark.parametrize("offset", [0.5, 2.5, 3.5])
def test_parts_of_joined_flac_files(tmp_path: Path, rates: tuple[int, int], offset: float) -> None:
    signals = [speech_like(3, rate, seed=i) for i, rate in enumerate(rates)]
    path = tmp_path / "a.flac"
    contents = [content_of("FLAC", x, rate) for x, rate in zip(signals, rates, strict=True)]
    path.write_bytes(b"".join(contents))
    whole = load_audio(path)
    assert whole.seconds == pytest.approx(6, abs=1e-3)
    assert torch.equal(load_audio(path.read_bytes()).samples, whole.samples)
    part = load_audio(path, offset=offset, duration=1.0).samples
    first = round(offset * RATE)
    wanted = whole.samples[first : first + RATE]
    assert (part - wanted)[400:15_600].norm() < 0.05 * wanted.norm()
    # Where the first one does not say how long it is.
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert load_audio(bytes(content)).seconds == pytest.approx(6, abs=1e-3)


def test_a_flac_file_is_not_searched_for_others_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * RATE)
    soundfile.write(path, noise, RATE, subtype="PCM_24")
    read: list[int] = []
    read_at = flac.read_at
    monkeypatch.setattr(flac, "_LONGEST_BUFFER", 1 << 14)
    monkeypatch.setattr(flac, "read_at", lambda *args: (read.append(args[2]), read_at(*args))[1])
    monkeypatch.setattr(flac, "_SEARCHED", 1 << 12)
    load_audio(path)
    assert sum(read) < 1 << 16 < path.stat().st_size
    # A part is not found without, but of one recording only once.
    load_audio(path, offset=1, duration=1)
    assert sum(read) > path.stat().st_size
    read.clear()
    load_audio(path, offset=2, duration=1)
    assert sum(read) < 1 << 10


def test_joined_transport_streams() -> None:
    one = timed("mpegts", "aac", lambda t: t, rate=48_000, signal=speech_like(3, 48_000))
    later = timed("mpegts", "aac", lambda t: t + 20_000, rate=48_000, signal=speech_like(3, 48_000))
    for content in (one + one, one + later, later + one):
        audio = load_audio(content)
        assert audio.seconds == pytest.approx(6, abs=0.2)
        assert abs(lag(audio.samples, 3.55)) < 0.12


# --- channels -----------------------------------------------------------------------------------

OTHER = speech_like(3, RATE, seed=1)[::-1].copy()
HUM = np.sin(np.arange(3 * RATE) * 2 * np.pi * 50 / RATE).astype(np.float32) * SIGNAL.std()


def multi(*channels: np.ndarray, rate: int = RATE) -> bytes:
    return content_of("WAV", np.stack(channels, axis=1), rate, subtype="FLOAT")


@pytest.mark.parametrize(
    ("channels", "louder"),
    [
        ((SIGNAL, -SIGNAL), 0),
        ((SIGNAL, -0.98 * SIGNAL), 0),
        ((-0.7 * SIGNAL, SIGNAL), 1),
        ((SIGNAL, -SIGNAL + 0.001 * OTHER), 0),
        # An offset in common does not hide it.
        ((SIGNAL + np.float32(0.1), -SIGNAL + np.float32(0.1)), 0),
        # Nor does a cable's hum, nor what else both have.
        ((SIGNAL + HUM, -SIGNAL + HUM), 0),
        ((SIGNAL + 0.3 * OTHER, -SIGNAL + 0.3 * OTHER), 0),
        ((0 * SIGNAL, SIGNAL, -0.9 * SIGNAL, 0 * SIGNAL), 1),
        # The first half is in phase.
        ((SIGNAL, np.concatenate([SIGNAL[:24_000], -SIGNAL[24_000:]])), 0),
        ((SIGNAL, SIGNAL), None),
        ((SIGNAL, 0 * SIGNAL), None),
        ((SIGNAL, OTHER), None),
        ((SIGNAL, SIGNAL - 0.3 * OTHER), None),
        ((0 * SIGNAL,) * 7 + (SIGNAL,), None),
        ((0 * SIGNAL, 0 * SIGNAL), None),
    ],
)
def test_channels_that_cancel(channels: tuple[np.ndarray, ...], louder: int | None) -> None:
    audio = load_audio(multi(*channels))
    assert audio.louder_channel == louder
    wanted = np.mean(channels, axis=0) if louder is None else channels[louder]
    np.testing.assert_allclose(audio.samples, wanted, atol=1e-6)
    np.testing.assert_array_equal(to_mono_16khz(np.stack(channels), RATE), audio.samples)


def test_a_second_of_opposite_phase_does_not_cost_another_speaker() -> None:
    right = OTHER.copy()
    right[16_000:32_000] = -SIGNAL[16_000:32_000]
    audio = load_audio(multi(SIGNAL, right))
    assert audio.louder_channel is None


def test_channels_that_cancel_at_another_rate_and_in_other_containers() -> None:
    signal = speech_like(3, 44_100)
    content = multi(0.9 * signal, -signal, rate=44_100)
    audio = load_audio(content)
    assert audio.louder_channel == 1
    alone = load_audio(content_of("WAV", -signal, 44_100, subtype="FLOAT"))
    assert torch.equal(audio.samples, alone.samples)
    assert load_audio(content, offset=1, duration=1).louder_channel == 1
    joint = content_of("MP3", np.stack([signal, -signal], 1), 44_100)
    assert load_audio(joint).louder_channel in (0, 1)
    assert abs(lag(load_audio(joint).samples, 0.5)) < 0.1


class Texts(Stub, Transcribe):
    """A stub whose results are texts to tables, too."""


def test_the_row_says_which_channel_was_taken(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(multi(SIGNAL, -SIGNAL))
    (tmp_path / "b.wav").write_bytes(multi(SIGNAL, SIGNAL))
    (tmp_path / "c.wav").write_bytes(b"nothing")
    names = [str(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav")]
    for kind in ("jsonl", "parquet"):
        run(names, tmp_path / kind, Texts(), [kind])
        assert [row["louder_channel"] for row in table(tmp_path / kind)] == [0, None, None]


# --- who is at fault ----------------------------------------------------------------------------


class Failing(io.BytesIO):
    """A disk that fails after some bytes."""

    def __init__(self, content: bytes, good: int) -> None:
        super().__init__(content)
        self.good = good

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= self.good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("good", [0, 100_000])
def test_a_disk_that_fails_is_no_damaged_file(good: int) -> None:
    content = timed("matroska", "pcm_s16le", lambda t: t, signal=speech_like(9, RATE))
    with pytest.raises(OSError, match="Input/output error"):
        list(open_ffmpeg(Failing(content, good)).blocks)


def test_too_little_memory_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    content = mp3()

    def fail(*arguments: Any, **options: Any) -> None:
        raise av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(MemoryError):
        load_audio(content)


def test_a_library_that_cannot_be_loaded_is_no_damaged_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise OSError("sndfile library not found")

    monkeypatch.setattr(_extras.importlib, "import_module", fail)
    with pytest.raises(ImportError, match="soundfile cannot be loaded: sndfile library not found"):
        load_audio(content_of("WAV"))


def test_what_a_recording_is_decides_its_content() -> None:
    for content in (content_of("WAV"), mp3(), timed("mpegts", "aac", lambda t: t)):
        assert holds_audio(content)
    for content in (b"", b"notes\n" * 100, bytes(5_000), content_of("WAV")[:30]):
        assert not holds_audio(content)
