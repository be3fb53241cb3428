"""Word and character timestamps: the paths, the frames, the confidences and the real positions."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2CTCTokenizer
from w2vbert_fast.inference import Pipeline, load_audio, load_pipeline
from w2vbert_fast.inference.ctc import alignment as ctc_alignment, timestamps
from w2vbert_fast.inference.ctc.alignment import align
from w2vbert_fast.inference.ctc.timestamps import (
    Delay,
    frame_seconds,
    measure_delay,
    word_timestamps,
)

CLIPS = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline("demo")


@pytest.fixture(scope="module")
def tokenizer(pipeline: Pipeline) -> Wav2Vec2CTCTokenizer:
    return pipeline.processor.tokenizer


def spelt(path: str, tokenizer: Wav2Vec2CTCTokenizer, *, sure: float = 0.9) -> Tensor:
    """Log-probabilities ``[len(path), vocab]`` whose best path is `path`, "-" the blank."""
    vocab = len(tokenizer.get_vocab())
    ids = [tokenizer.pad_token_id if c == "-" else tokenizer.get_vocab()[c] for c in path]
    rest = (1 - sure) / (vocab - 1)
    log_probs = torch.full((len(path), vocab), math.log(rest))
    log_probs[torch.arange(len(path)), ids] = math.log(sure)
    return log_probs


def random_log_probs(frames: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(frames, vocab, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def recognise(pipeline: Pipeline, waveform: Tensor) -> Tensor:
    features = pipeline.processor.feature_extractor(
        [waveform], sampling_rate=16_000, return_tensors="pt", return_attention_mask=True
    )
    with torch.inference_mode():
        logits = pipeline.model(
            features["input_features"], attention_mask=features["attention_mask"]
        ).logits
    return logits[0].float().log_softmax(-1)


def test_words_and_characters_of_a_known_path(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    words = word_timestamps(spelt("--hh-i|||--to-o--", tokenizer), tokenizer, 0.02, offset=10.0)
    assert [word.text for word in words] == ["hi", "too"]
    assert [(word.start, word.end) for word in words] == [
        pytest.approx((10.04, 10.12)),
        pytest.approx((10.22, 10.30)),
    ]
    assert [(c.text, c.start, c.end) for c in words[0].characters] == [
        ("h", pytest.approx(10.04), pytest.approx(10.08)),
        ("i", pytest.approx(10.10), pytest.approx(10.12)),
    ]
    assert words[0].characters[0].confidence == pytest.approx(0.9)
    assert words[1].confidence == pytest.approx(0.9**3)


def test_confidence_is_the_mean_over_a_character_and_the_product_over_a_word(
    tokenizer: Wav2Vec2CTCTokenizer,
) -> None:
    log_probs = torch.cat([spelt("h", tokenizer, sure=0.5), spelt("hi", tokenizer, sure=0.8)])
    (word,) = word_timestamps(log_probs, tokenizer, 0.02)
    assert word.characters[0].confidence == pytest.approx(0.65)
    assert word.confidence == pytest.approx(0.65 * 0.8)


@pytest.mark.parametrize("seed", range(5))
def test_frames_are_those_of_the_tokenizer(tokenizer: Wav2Vec2CTCTokenizer, seed: int) -> None:
    log_probs = random_log_probs(1000, len(tokenizer.get_vocab()), seed)
    decoded = tokenizer.decode(
        log_probs.argmax(-1), output_char_offsets=True, output_word_offsets=True
    )
    words = word_timestamps(log_probs, tokenizer, 1.0)
    assert len(words) > 5
    assert [(w.text, w.start, w.end) for w in words] == [
        (w["word"], w["start_offset"], w["end_offset"]) for w in decoded.word_offsets
    ]
    characters = [c for word in words for c in word.characters]
    assert [(c.text, c.start, c.end) for c in characters] == [
        (c["char"], c["start_offset"], c["end_offset"])
        for c in decoded.char_offsets
        if c["char"] != " "
    ]
    posteriors = log_probs.exp()
    for c in characters:
        column = posteriors[int(c.start) : int(c.end), tokenizer.get_vocab()[c.text]]
        assert c.confidence == pytest.approx(column.mean().item(), rel=1e-5)
    assert all(0.0 <= c.confidence <= 1.0 for c in [*words, *characters])


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token != 0]


@pytest.mark.parametrize("labels", [[], [1], [1, 2], [1, 1], [2, 1, 2], [1, 2, 2]])
@pytest.mark.parametrize("frames", [4, 6])
def test_align_finds_the_best_of_all_paths(labels: list[int], frames: int) -> None:
    for seed in range(5):
        log_probs = random_log_probs(frames, 3, seed)
        paths = [
            path for path in itertools.product(range(3), repeat=frames) if collapsed(path) == labels
        ]
        scores = [sum(log_probs[t, token].item() for t, token in enumerate(p)) for p in paths]
        found = tuple(align(log_probs, labels, blank=0).tolist())
        assert found == paths[scores.index(max(scores))]


def test_align_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = random_log_probs(1000, 5, 1)
    labels = torch.randint(1, 5, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    whole = align(log_probs, labels, blank=0)
    assert collapsed(tuple(whole.tolist())) == labels
    monkeypatch.setattr(ctc_alignment, "_MAX_BACK_POINTERS", 1000)
    assert (align(log_probs, labels, blank=0) == whole).all()


def test_known_text_is_what_comes_back(pipeline: Pipeline, tokenizer: Wav2Vec2CTCTokenizer) -> None:
    rows = [json.loads(line) for line in (CLIPS / "manifest.jsonl").open(encoding="utf-8")]
    for row in rows:
        log_probs = recognise(pipeline, load_audio(CLIPS / row["file"]).samples)
        words = word_timestamps(log_probs, tokenizer, 0.02, text=f"  {row['text']} ")
        assert [word.text for word in words] == row["text"].split()
        times = [t for word in words for c in word.characters for t in (c.start, c.end)]
        assert times == sorted(times)
        assert times[0] >= 0 and times[-1] <= 0.02 * len(log_probs) + 1e-9
        assert all(0 <= word.confidence <= 1 for word in words)


def test_the_best_path_aligned_to_its_own_text_is_itself(
    tokenizer: Wav2Vec2CTCTokenizer,
) -> None:
    log_probs = spelt("--hh-i||--to-o--", tokenizer)
    greedy = word_timestamps(log_probs, tokenizer, 0.02)
    assert word_timestamps(log_probs, tokenizer, 0.02, text="hi too") == greedy


def test_lower_case_tokenizers(tmp_path: Path) -> None:
    vocabulary = {"<pad>": 0, "|": 1, "A": 2, "B": 3, "<unk>": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", do_lower_case=True)
    log_probs = random_log_probs(20, len(tokenizer.get_vocab()), 3)
    for text in (None, "ab ba"):
        words = word_timestamps(log_probs, tokenizer, 0.02, text=text)
        assert words and all(w.text == w.text.lower() for w in words)
        assert all(w.text == "".join(c.text for c in w.characters) for w in words)


def test_frame_seconds_counts_the_adapter() -> None:
    assert frame_seconds(Wav2Vec2BertConfig()) == pytest.approx(0.02)
    config = Wav2Vec2BertConfig(add_adapter=True, num_adapter_layers=2, adapter_stride=2)
    assert frame_seconds(config) == pytest.approx(0.08)


def test_no_frames_and_no_words(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    assert word_timestamps(spelt("----", tokenizer), tokenizer, 0.02) == []
    assert word_timestamps(spelt("-|--", tokenizer), tokenizer, 0.02) == []
    assert word_timestamps(spelt("----", tokenizer), tokenizer, 0.02, text=" ") == []
    empty = spelt("----", tokenizer)[:0]
    assert word_timestamps(empty, tokenizer, 0.02) == []


def test_bad_input_is_named(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    good = spelt("-hi-", tokenizer)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        word_timestamps(torch.zeros(3, 4, dtype=torch.int64), tokenizer, 0.02)
    with pytest.raises(ValueError, match=r"\[num_frames, vocab\], got shape \[1, 4, 30\]"):
        word_timestamps(good[None], tokenizer, 0.02)
    with pytest.raises(ValueError, match="log-softmax"):
        word_timestamps(good + 1, tokenizer, 0.02)
    with pytest.raises(ValueError, match="log-softmax"):
        word_timestamps(good * float("nan"), tokenizer, 0.02)
    with pytest.raises(ValueError, match="frame_seconds"):
        word_timestamps(good, tokenizer, 0.0)
    with pytest.raises(ValueError, match=r"lacks: '1é'"):
        word_timestamps(good, tokenizer, 0.02, text="é 1 hi")
    with pytest.raises(ValueError, match="needs at least 5 frames, log_probs has 4"):
        word_timestamps(good, tokenizer, 0.02, text="llll"[:3])
    with pytest.raises(ValueError, match="offset must be finite"):
        word_timestamps(good, tokenizer, 0.02, offset=float("inf"))
    impossible = good.clone()
    impossible[:, tokenizer.get_vocab()["x"]] = -torch.inf
    with pytest.raises(ValueError, match="probability 0"):
        word_timestamps(impossible, tokenizer, 0.02, text="x")


def test_delay_is_taken_off(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    # "hi" on frames 20 to 24, "to" on 26 to 28: far from the start, close to each other.
    log_probs = spelt("-" * 20 + "hh-i|-to" + "-" * 9, tokenizer)
    words = word_timestamps(log_probs, tokenizer, 0.02, 5.0, delay=Delay(0.2, 0.02))
    assert (words[0].start, words[1].end) == pytest.approx((5.2, 5.54))
    # 0.48 - 0.02 and 0.52 - 0.2 meet halfway.
    assert (words[0].end, words[1].start) == pytest.approx((5.39, 5.39))
    first, last = words[0].characters
    assert (first.start, last.end) == (words[0].start, words[0].end)
    assert first.end - first.start == pytest.approx(2 / 4 * 0.19)
    early = word_timestamps(spelt("h|i|t", tokenizer), tokenizer, 0.02, 5.0, delay=Delay(1, 0.5))
    times = [t for word in early for t in (word.start, word.end)]
    assert times[0] == 5.0 and times == sorted(times)
    assert all(word.end > word.start for word in early)


def test_words_are_where_they_were_put(pipeline: Pipeline) -> None:
    """Clips joined at known places; the delay is measured on others, the package's samples."""
    tokenizer = pipeline.processor.tokenizer
    delay = measure_delay(pipeline.model, pipeline.processor)
    rows = [json.loads(line) for line in (CLIPS / "manifest.jsonl").open(encoding="utf-8")]
    speech = {
        row["text"]: timestamps._speech(load_audio(CLIPS / row["file"]).samples) for row in rows
    }
    rng = random.Random(0)
    errors = []
    for _ in range(5):
        texts = rng.sample(sorted(speech), len(speech))
        parts, spans, position = [], [], 0
        for text in texts:
            gap = rng.randint(800, 8000)
            start = position + gap
            position = start + len(speech[text])
            parts += [torch.zeros(gap), speech[text]]
            spans.append((start / 16_000, position / 16_000))
        waveform = torch.cat([*parts, torch.zeros(4000)])
        waveform += 1e-4 * torch.randn(len(waveform), generator=torch.Generator().manual_seed(1))
        words = iter(
            word_timestamps(
                recognise(pipeline, waveform),
                tokenizer,
                frame_seconds(pipeline.model.config),
                text=" ".join(texts),
                delay=delay,
            )
        )
        for text, (start, end) in zip(texts, spans, strict=True):
            own = list(itertools.islice(words, len(text.split())))
            assert " ".join(word.text for word in own) == text
            errors += [abs(own[0].start - start), abs(own[-1].end - end)]
    assert len(errors) == 2 * 5 * len(rows)
    assert sorted(errors)[len(errors) // 2] < 0.060


def test_speech_is_cut_to_its_loud_part() -> None:
    waveform = 1e-3 * torch.randn(8000, generator=torch.Generator().manual_seed(0))  # 60 dB below
    waveform[2400:4000] = 1.0
    assert torch.equal(timestamps._speech(waveform), waveform[2400:4000])
    waveform[6000] = 0.5  # in the 5 ms from 6000 on, 25 dB below the loudest
    assert torch.equal(timestamps._speech(waveform), waveform[2400:6080])


def test_measure_delay_refuses_what_it_cannot_measure(pipeline: Pipeline) -> None:
    model, processor = pipeline.model, pipeline.processor
    with pytest.raises(ValueError, match="hold sound"):
        measure_delay(model, processor, [torch.zeros(16_000)])
    with pytest.raises(ValueError, match=r"got shape \[1, 16000\]"):
        measure_delay(model, processor, [torch.ones(1, 16_000)])
    with pytest.raises(ValueError, match="no characters"):
        measure_delay(model, processor, [])
