"""Chunks around pauses: the parts of a recording are cut as the whole is, and have its words."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from w2vbert_fast import models
from w2vbert_fast.inference import Transcriber, load_audio
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.ctc.pauses import split_at_pauses

SAMPLES = Path(models.__file__).parents[1] / "demo" / "samples"


def recording(times: int) -> tuple[Tensor, list[int]]:
    """The package's samples in random order with noise between and below, and where each ends."""
    generator = torch.Generator().manual_seed(0)
    clips = [load_audio(path).samples for path in sorted(SAMPLES.glob("*.flac"))]
    parts: list[Tensor] = []
    ends: list[int] = []
    for _ in range(times):
        for index in torch.randperm(len(clips), generator=generator).tolist():
            pause = int(torch.randint(8000, 16_000, (1,), generator=generator))
            part = torch.cat([clips[index], torch.zeros(pause)])
            # No two pauses of a real recording are equally loud.
            floor = 2e-5 * 20 ** float(torch.rand(1, generator=generator))
            parts.append(part + floor * torch.randn(len(part), generator=generator))
            ends.append(sum(map(len, parts)) - pause // 2)
    return torch.cat(parts), ends


@given(
    kind=st.sampled_from(["noise", "silence", "bursts", "long silences", "ramp"]),
    num_samples=st.integers(1, 400_000),
    max_seconds=st.floats(1.0, 30.0),
    overlap_share=st.floats(0.0, 0.5),
)
@settings(max_examples=120, deadline=None)
def test_chunks_cover_any_recording(
    kind: str, num_samples: int, max_seconds: float, overlap_share: float
) -> None:
    samples = torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))
    if kind == "silence":
        samples = torch.zeros(num_samples)
    elif kind == "ramp":
        samples = torch.linspace(0, 1, num_samples)
    elif kind == "bursts":
        samples *= (torch.arange(num_samples) // 3000 % 3 == 0).float()
    elif kind == "long silences":
        samples *= (torch.arange(num_samples) // 7000 % 4 == 0).float()
    overlap = overlap_share * max_seconds
    chunks = split_at_pauses(samples, max_seconds, overlap)
    assert chunks[0].keep_start == 0
    assert chunks[-1].keep_end == num_samples
    loud = samples.abs() >= 2.0**-8
    for chunk in chunks:
        assert 0 <= chunk.start < chunk.end <= num_samples
        assert chunk.end - chunk.start <= max_seconds * 16_000
        assert chunk.keep_start < chunk.keep_end
        assert not loud[chunk.keep_start : chunk.start].any()
        assert not loud[chunk.end : chunk.keep_end].any()
    if len(chunks) > 1:
        assert num_samples > max_seconds * 16_000
        assert min(chunk.keep_end - chunk.keep_start for chunk in chunks) >= 2400
    half = round(overlap * 16_000) // 2
    for left, right in itertools.pairwise(chunks):
        assert left.keep_end == right.keep_start
        if left.end > right.start:
            assert left.end == min(num_samples, left.keep_end + half)
            assert right.start == max(0, right.keep_start - half)


@pytest.mark.parametrize("shift", [0, 1, 79, 12_345])
def test_a_part_is_cut_as_the_whole_is(shift: int) -> None:
    samples, ends = recording(20)
    begin = ends[30] + shift
    whole = split_at_pauses(samples, 20, 4)
    assert len(whole) > 12
    part = [
        Chunk(*(place + begin for place in vars(chunk).values()))
        for chunk in split_at_pauses(samples[begin:], 20, 4)
    ]
    known = [chunk for chunk in whole if chunk.keep_start > begin + 20 * 16_000]
    assert len(known) > 5
    assert part[-len(known) :] == known
    # No cut is in the middle of a word: 50 ms on both sides hold the noise alone.
    for chunk in whole[1:]:
        near = samples[chunk.keep_start - 800 : chunk.keep_start + 800]
        assert near.abs().max() < 0.02


def test_minutes_have_the_words_of_their_halves() -> None:
    """But for half a minute on both sides of where they meet, where chunks are not the same."""
    samples, ends = recording(14)
    half = ends[len(ends) // 2]
    transcriber = Transcriber("demo", max_seconds=20, timestamps="word")

    def words(begin: int, end: int) -> list[tuple[str, float]]:
        (result,) = transcriber([samples[begin:end]])
        assert result.words is not None
        return [(word.text, word.start + begin / 16_000) for word in result.words]

    whole = words(0, len(samples))
    halves = words(0, half) + words(half, len(samples))
    for sign in (-1, 1):
        ours, theirs = (
            [word for word in found if sign * (word[1] - half / 16_000) > 30]
            for found in (whole, halves)
        )
        assert len(ours) > 120
        assert [text for text, _ in ours] == [text for text, _ in theirs]
        for (_, ours_at), (_, theirs_at) in zip(ours, theirs, strict=True):
            assert ours_at == pytest.approx(theirs_at, abs=0.021)


@pytest.mark.parametrize("seconds", [0.5, 1.3, 2.0])
def test_halves_that_meet_in_a_silence_are_cut_as_the_whole_is(seconds: float) -> None:
    """Wherever in it, so that the words are those of the whole."""
    samples, ends = recording(10)
    begin = ends[len(ends) // 2]
    quiet = 1e-4 * torch.randn(2 * 16_000, generator=torch.Generator().manual_seed(1))
    samples = torch.cat([samples[:begin], quiet, samples[begin:]])
    # `recording` has a quarter of a second of silence at least on both sides of each end.
    half = begin + int((seconds - 0.25) * 16_000)
    whole = split_at_pauses(samples, 20, 4)
    left, right = split_at_pauses(samples[:half], 20, 4), split_at_pauses(samples[half:], 20, 4)
    assert len(left) > 2 and len(right) > 2
    parts = [(c.start, c.end) for c in left] + [(c.start + half, c.end + half) for c in right]
    assert parts == [(chunk.start, chunk.end) for chunk in whole]

    transcriber = Transcriber("demo", max_seconds=20)
    texts = [result.text for result in transcriber([samples, samples[:half], samples[half:]])]
    assert len(texts[0].split()) > 150
    assert texts[0] == f"{texts[1]} {texts[2]}"


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"samples must be \[num_samples\], got shape \[1, 8\]"):
        split_at_pauses(torch.zeros(1, 8), 30, 4)
    with pytest.raises(ValueError, match="max_seconds must exceed overlap_seconds"):
        split_at_pauses(torch.zeros(100_000), 4, 4)
