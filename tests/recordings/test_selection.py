"""What is taken of a recording: a channel or each, one of several tracks, what damage has left."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.helpers.signals import film, speech_like
from w2vbert_fast.inference import AudioError, load_audio
from w2vbert_fast.recordings.audio import Selection, convert_array, load_channels

RATE = 16_000
LEFT = speech_like(3, RATE)
RIGHT = speech_like(3, RATE)[::-1].copy()


def content_of(container: str, samples: np.ndarray, rate: int = RATE, **more: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, **more)
    return file.getvalue()


CALL = content_of("WAV", np.stack([LEFT, RIGHT], 1), subtype="FLOAT")


def test_each_channel_by_itself_is_the_channel() -> None:
    left, right = load_channels(CALL, Selection("split"))
    np.testing.assert_array_equal(left.samples, LEFT)
    np.testing.assert_array_equal(right.samples, RIGHT)
    assert torch.equal(load_audio(CALL, channel=0).samples, left.samples)
    assert torch.equal(load_audio(CALL, channel=1).samples, right.samples)
    np.testing.assert_allclose(load_audio(CALL).samples, (LEFT + RIGHT) / 2, atol=1e-6)


def test_channels_at_another_rate_are_those_of_files_of_their_own() -> None:
    left, right = speech_like(2, 44_100), speech_like(2, 44_100)[::-1].copy()
    content = content_of("WAV", np.stack([left, right], 1), 44_100, subtype="FLOAT")
    for one, samples in zip((left, right), load_channels(content, Selection("split")), strict=True):
        alone = load_audio(content_of("WAV", one, 44_100, subtype="FLOAT"))
        torch.testing.assert_close(samples.samples, alone.samples, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", ["split", 1])
def test_channels_of_arrays(channels: str | int) -> None:
    found = convert_array(np.stack([LEFT, RIGHT]), RATE, channels)
    wanted = [LEFT, RIGHT] if channels == "split" else [RIGHT]
    assert len(found) == len(wanted)
    for audio, samples in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(audio.samples, samples)


def test_a_channel_that_is_not_there() -> None:
    with pytest.raises(AudioError, match=r"no channel 2: it has 2 channels, counted from 0"):
        load_audio(CALL, channel=2)
    with pytest.raises(AudioError, match=r"no channel 1: it has 1 channel,"):
        load_audio(content_of("FLAC", LEFT), channel=1)


def test_channels_that_come_and_go_cannot_be_told_apart() -> None:
    stereo = content_of("FLAC", np.stack([LEFT, RIGHT], 1))
    mono = content_of("FLAC", LEFT)
    with pytest.raises(AudioError, match="now 1, now 2 channels"):
        load_channels(stereo + mono, Selection("split"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channels": "both"}, "channels must be mix or split, or a number from 0, got 'both'"),
        ({"channels": -1}, "channels must be .*, got -1"),
        ({"channels": True}, "channels must be .*, got True"),
        ({"track": ""}, "track must be a language, or a number from 0, got ''"),
        ({"track": -1}, "track must be .*, got -1"),
    ],
)
def test_selections_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**given)


# --- tracks ---------------------------------------------------------------------------------------


def tone(samples: torch.Tensor) -> float:
    """The loudest frequency, in Hz."""
    spectrum = samples.to(torch.float64).sub(samples.mean()).hann_if() if False else None
    del spectrum
    power = torch.fft.rfft(samples.double()).abs()
    return float(power.argmax()) * RATE / samples.numel()


def test_tracks_by_number_and_by_language() -> None:
    content = film(["eng", "deu", None])
    for track, hertz in ((0, 440), (1, 880), (2, 1320), ("deu", 880), ("ENG", 440), (None, 440)):
        assert tone(load_audio(content, track=track).samples) == pytest.approx(hertz, abs=2), track


def test_a_track_that_is_not_there() -> None:
    content = film(["eng", "deu"])
    with pytest.raises(AudioError, match=r"no audio track 2; it has 0 \(eng\), 1 \(deu\)"):
        load_audio(content, track=2)
    with pytest.raises(AudioError, match=r"no audio track fra; it has 0 \(eng\), 1 \(deu\)"):
        load_audio(content, track="fra")
    with pytest.raises(AudioError, match=r"no audio track 1; it has 0 \(unknown\)"):
        load_audio(CALL, track=1)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_only_track_of_a_file_is_the_file(container: str) -> None:
    content = content_of(container, LEFT)
    torch.testing.assert_close(
        load_audio(content, track=0).samples, load_audio(content).samples, atol=1e-4, rtol=0
    )


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "expected"), [("WAV", 12.0), ("FLAC", 12.0), ("OGG", None), ("AIFF", 12.0)]
)
def test_what_is_left_of_truncated_files(container: str, expected: float | None) -> None:
    whole = content_of(container, np.concatenate([LEFT] * 4))
    content = whole[: len(whole) // 2]
    with pytest.raises(AudioError, match="truncated"):
        load_audio(content)
    audio = load_audio(content, salvage=True)
    assert audio.salvaged is not None and "truncated" in audio.salvaged.reason
    assert audio.salvaged.expected_seconds == expected
    assert 2.0 < audio.seconds < 8.0  # an Ogg file is lost page by page
    count = audio.samples.numel() - 1_000
    good = load_audio(whole).samples[:count]
    assert (audio.samples[:count] - good).norm() < 0.01 * good.norm()


def test_what_is_behind_damage_is_taken_too() -> None:
    whole = bytearray(content_of("FLAC", np.concatenate([LEFT] * 4)))
    middle = len(whole) // 2
    whole[middle : middle + 400] = bytes(400)
    with pytest.raises(AudioError, match="damaged"):
        load_audio(bytes(whole))
    audio = load_audio(bytes(whole), salvage=True)
    assert audio.salvaged is not None and audio.salvaged.expected_seconds == 12.0
    assert 11.0 < audio.seconds <= 12.0


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("damage", ["overwritten", "lost", "between"])
def test_damage_within_an_ogg_file(subtype: str, damage: str) -> None:
    """Decoders pass over it."""
    whole = content_of("OGG", np.concatenate([LEFT] * 4), subtype=subtype)
    page = whole.index(b"OggS", len(whole) // 2)
    content = {
        "overwritten": whole[: page + 600] + bytes(400) + whole[page + 1_000 :],
        "lost": whole[: page + 600] + whole[page + 1_000 :],
        "between": whole[:page] + bytes(400) + whole[page:],
    }[damage]
    with pytest.raises(AudioError, match=r"damaged: [\d,]+ bytes in or between the pages"):
        load_audio(content)
    audio = load_audio(content, salvage=True)
    assert audio.salvaged is not None and "damaged" in audio.salvaged.reason
    assert 9.0 < audio.seconds <= 12.1


def test_a_part_of_a_damaged_file() -> None:
    whole = content_of("FLAC", LEFT)
    audio = load_audio(whole[: len(whole) // 2], offset=1.0, duration=1.5, salvage=True)
    assert audio.salvaged is not None and audio.salvaged.expected_seconds == 1.5
    assert 0.1 < audio.seconds < 1.0


def test_whole_files_are_not_salvaged_and_what_holds_nothing_stays_an_error() -> None:
    assert load_audio(CALL, salvage=True).salvaged is None
    for content in (b"nothing", content_of("FLAC", LEFT)[:60], b""):
        with pytest.raises(AudioError):
            load_audio(content, salvage=True)
    # A limit is no damage.
    with pytest.raises(AudioError, match="longer than the limit"):
        load_audio(CALL, salvage=True, longest=1.0)


def test_channels_of_a_damaged_file() -> None:
    left, right = load_channels(CALL[: len(CALL) // 2], Selection("split", salvage=True))
    assert left.salvaged == right.salvaged is not None
    np.testing.assert_array_equal(left.samples, LEFT[: left.samples.numel()])
    np.testing.assert_array_equal(right.samples, RIGHT[: left.samples.numel()])
