"""Damaged audio files: whatever their bytes are, a row is decoded or is an error, and soon."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.helpers.offline import encoded
from w2vbert_fast.inference.reading import Decoder
from w2vbert_fast.recordings.audio import Selection
from w2vbert_fast.recordings.rows import Row

WHOLE = {
    "wav": encoded("WAV", 0.5),
    "flac": encoded("FLAC", 0.5),
    "mp3": encoded("MP3", 0.5),
    "ogg": encoded("OGG", 0.5),
    "opus": encoded("OGG", 0.5, subtype="OPUS"),
}
HEADER = 200  # bytes at the start that hold what is known about the samples
LONGEST = 60.0

decoder = Decoder(longest=LONGEST)
salvaging = Decoder(longest=LONGEST, selection=Selection(salvage=True))
positions = st.one_of(st.integers(0, HEADER), st.integers(0, 20_000))


def replaced(data: st.DataObject, content: bytearray) -> None:
    """Some bytes are others."""
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(positions) % len(content)] = data.draw(
            st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255))
        )


def number(data: st.DataObject, content: bytearray) -> None:
    """A field of the header is an extreme number."""
    width = data.draw(st.sampled_from([2, 4, 8]))
    extremes = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
    value = data.draw(st.sampled_from(extremes)) % (1 << 8 * width)
    start = data.draw(st.integers(0, HEADER))
    order = data.draw(st.sampled_from(["little", "big"]))
    content[start : start + width] = value.to_bytes(width, order)


def cut(data: st.DataObject, content: bytearray) -> None:
    """The end is missing."""
    del content[data.draw(positions) % len(content) :]


def dropped(data: st.DataObject, content: bytearray) -> None:
    """Bytes in the middle are missing."""
    start = data.draw(positions) % len(content)
    del content[start : start + data.draw(st.integers(1, 3_000))]


def inserted(data: st.DataObject, content: bytearray) -> None:
    """There are bytes that do not belong there, or a part of the file twice."""
    start = data.draw(positions) % len(content)
    if data.draw(st.booleans()):
        content[start:start] = data.draw(st.binary(min_size=1, max_size=200))
    else:
        content[start:start] = content[: data.draw(st.integers(1, HEADER))]


MUTATIONS: list[Callable[[st.DataObject, bytearray], None]] = [
    replaced,
    number,
    cut,
    dropped,
    inserted,
]


def check(content: bytes, offset: float = 0.0, salvage: bool = False) -> None:
    loaded = (salvaging if salvage else decoder)(Row(0, content, "fuzz", "fuzz", offset=offset))
    if loaded.error is None:
        assert loaded.error_type is None
        (samples,) = loaded.channels
        assert loaded.seconds is not None
        assert samples.dtype == torch.float32 and samples.dim() == 1
        assert bool(samples.isfinite().all())
        assert 0 < loaded.seconds <= LONGEST
    else:
        assert loaded.error and loaded.error_type
        assert not loaded.channels and loaded.seconds is None
        # Another type would be a fault of ours that the decoder has taken for the file's.
        assert loaded.error_type == "AudioError", (loaded.error_type, loaded.error)


@pytest.mark.parametrize("container", WHOLE)
def test_the_files_to_be_damaged_are_good(container: str) -> None:
    loaded = decoder(Row(0, WHOLE[container], container, container))
    assert loaded.error is None
    assert loaded.seconds == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("container", WHOLE)
@given(data=st.data())
@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_damaged_files_are_decoded_or_errors(container: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[container])
    for mutation in data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        if content:
            mutation(data, content)
    check(bytes(content), data.draw(st.sampled_from([0.0, 0.0, 0.25])), data.draw(st.booleans()))


@given(content=st.binary(max_size=2_000), magic=st.sampled_from(sorted(WHOLE)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_anything_behind_the_first_bytes_of_a_format(content: bytes, magic: str) -> None:
    check(WHOLE[magic][:12] + content)
    check(content)
