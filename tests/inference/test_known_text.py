"""Transcripts as people write them: what keeps its place, what is found missing or too much."""

# ruff: noqa: RUF001 - full-width marks

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.inference.test_timestamps import random_log_probs, spelt
from w2vbert_fast import Wav2Vec2CTCTokenizer
from w2vbert_fast.inference import load_pipeline
from w2vbert_fast.inference.ctc import known_text
from w2vbert_fast.inference.ctc.known_text import Alignment, Stretch, align_text
from w2vbert_fast.inference.ctc.timestamps import Delay, word_timestamps


@pytest.fixture(scope="module")
def tokenizer() -> Wav2Vec2CTCTokenizer:
    return load_pipeline("demo").processor.tokenizer


def aligned(path: str, text: str, tokenizer: Wav2Vec2CTCTokenizer) -> Alignment:
    """The alignment to a path, in frames."""
    return align_text(spelt(path, tokenizer, sure=0.999), text, tokenizer, 1.0)


def shown(found: Alignment) -> list[tuple[str, float, float]]:
    return [(word.text, word.start, word.end) for word in found.words]


def test_marks_capitals_and_digits_keep_their_place(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    path = "--hhi-||-five-|tto----"
    found = aligned(path, "“Hi”, 5 - To!", tokenizer)
    assert shown(found) == [("“Hi”,", 2, 5), ("5 -", 9, 13), ("To!", 15, 18)]
    assert (found.unwritten, found.unsaid) == ((), ())
    characters = [(c.text, c.start, c.end) for c in found.words[0].characters]
    assert characters == [("“", 2, 2), ("H", 2, 4), ("i", 4, 5), ("”", 5, 5), (",", 5, 5)]
    assert [(c.text, c.start, c.end) for c in found.words[1].characters][:2] == [
        *(("5", 9, 13), (" ", 13, 13)),
    ]
    assert found.words[0].confidence == pytest.approx(0.999**2, rel=1e-4)
    assert found.words[1].confidence == pytest.approx(0.999, rel=1e-4)


def test_digits_of_several_words_and_inside_of_words(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    found = aligned("a|forty--|two||b", "a 42 b", tokenizer)
    assert shown(found) == [("a", 0, 1), ("42", 2, 13), ("b", 15, 16)]
    assert [(c.text, c.start, c.end) for c in found.words[1].characters] == [
        *(("4", 2, 7.5), ("2", 7.5, 13)),
    ]
    assert shown(aligned("-at-|-star-|go-", "*at* * go", tokenizer)) == [
        *(("*at*", 1, 3), ("*", 6, 10), ("go", 12, 14)),
    ]
    # What the model hears at its ends belongs to it, and no more.
    assert shown(aligned("a|-|forty-|two-|-|b", "a 42 b", tokenizer)) == [
        *(("a", 0, 1), ("42", 4, 14), ("b", 18, 19)),
    ]
    found = aligned("-second-|or|fiveth-", "2nd or 5th", tokenizer)
    assert [word[0] for word in shown(found)] == ["2nd", "or", "5th"]
    assert [(c.text, c.end) for c in found.words[0].characters][1:] == [("n", 6), ("d", 7)]


def test_other_ways_to_write_what_the_vocabulary_has(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    for text in ("Éte", "E\u0301TE", "ｅｔｅ", "ête"):
        assert [(c.start, c.end) for c in aligned("--e-tte-", text, tokenizer).words[0].characters]
        assert shown(aligned("--e-tte-", text, tokenizer)) == [(text, 2, 7)]
    assert shown(aligned("-s-s-fi-", "ßﬁ", tokenizer)) == [("ßﬁ", 1, 7)]
    # A letter of another script takes what lies between its neighbours.
    found = aligned("-aa-zzz-b--", "aЖb", tokenizer)
    assert [(c.text, c.start, c.end) for c in found.words[0].characters] == [
        *(("a", 1, 3), ("Ж", 4, 7), ("b", 8, 9)),
    ]


def test_a_transcript_of_a_part_of_the_recording(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    path = "--howdy-|-there-|--fine-|day---|--bye-|now-"
    found = aligned(path, "Fine day", tokenizer)
    assert shown(found) == [("Fine", 19, 23), ("day", 25, 28)]
    assert found.unwritten == (Stretch(2, 15, "howdy there"), Stretch(34, 42, "bye now"))
    assert found.unsaid == ()


def test_a_word_that_the_transcript_lacks_and_one_too_many(
    tokenizer: Wav2Vec2CTCTokenizer,
) -> None:
    path = "-touch-|-seven-|-to-|-leave-"
    found = aligned(path, "touch to leave", tokenizer)
    assert shown(found) == [("touch", 1, 6), ("to", 17, 19), ("leave", 22, 27)]
    assert found.unwritten == (Stretch(9, 14, "seven"),)
    found = aligned("-touch---|---|---to-|-leave-", "touch quickly to leave", tokenizer)
    assert found.unsaid == (1,)
    assert [word for word in shown(found) if word[0] != "quickly"] == [
        *(("touch", 1, 6), ("to", 17, 19), ("leave", 22, 27)),
    ]
    assert aligned("--a-|---|-b-", "a 7 b", tokenizer).unsaid == (1,)


def test_a_text_without_spaces(tmp_path: Path) -> None:
    vocabulary = {"<pad>": 0, "今": 1, "天": 2, "很": 3, "好": 4, "<unk>": 5, "|": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    found = aligned("-今-天---很-天-好--", "今天，很9好。", tokenizer)
    assert [(c.text, c.start, c.end) for c in found.words[0].characters] == [
        *(("今", 1, 2), ("天", 3, 4), ("，", 4, 4), ("很", 7, 8), ("9", 9, 10), ("好", 11, 12)),
        ("。", 12, 12),
    ]
    found = aligned("-今-天天--很-好--", "今天好", tokenizer)
    assert [(c.text, c.start, c.end) for c in found.words[0].characters] == [
        *(("今", 1, 2), ("天", 3, 5), ("好", 9, 10)),
    ]
    assert found.unwritten == (Stretch(7, 8, "很"),)


def test_times_are_those_of_the_exact_search(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    """Of a text in the vocabulary's own spelling that is what is said."""
    path = "--hh-i|||--to-o---|-all-l|of-you--"
    log_probs, delay = spelt(path, tokenizer), Delay(0.05, 0.01)
    expected = word_timestamps(
        log_probs, tokenizer, 0.02, 5.0, text="hi too all of you", delay=delay
    )
    found = align_text(log_probs, "hi too all of you", tokenizer, 0.02, 5.0, delay=delay)
    assert [(w.text, w.start, w.end) for w in found.words] == [
        (w.text, pytest.approx(w.start), pytest.approx(w.end)) for w in expected
    ]
    assert [w.confidence for w in found.words] == [
        pytest.approx(w.confidence, rel=1e-5) for w in expected
    ]


def noisy(path: str, tokenizer: Wav2Vec2CTCTokenizer, seed: int) -> Tensor:
    """A path that a model is not very sure of."""
    noise = torch.randn(len(path), 30, generator=torch.Generator().manual_seed(seed))
    return (spelt(path, tokenizer, sure=0.9) + 1.5 * noise).log_softmax(-1)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_given_up_does_not_matter(
    tokenizer: Wav2Vec2CTCTokenizer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "-".join("press|three|to|leave|a|message|or|hang|up|".replace("|", "--|--")) * 12
    text = "press 3 to leave a message or up " * 12
    log_probs = noisy(said, tokenizer, seed)
    found = align_text(log_probs, text, tokenizer, 0.02)
    monkeypatch.setattr(known_text, "_BEAMS", (math.inf,))
    assert align_text(log_probs, text, tokenizer, 0.02) == found
    assert len(found.unwritten) >= 10  # "hang"


def test_a_search_that_loses_the_end_is_repeated(
    tokenizer: Wav2Vec2CTCTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_probs, text = noisy("-hello-" * 9, tokenizer, 0), "goodbye " * 5
    monkeypatch.setattr(known_text, "_BEAMS", (1e-3,))
    with pytest.raises(ValueError, match="probability 0"):
        align_text(log_probs, text, tokenizer, 0.02)
    monkeypatch.setattr(known_text, "_BEAMS", (1e-3, math.inf))
    assert len(align_text(log_probs, text, tokenizer, 0.02).words) == 5


def test_memory_grows_with_the_recording_alone(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    """Two minutes and a transcript to them, for which an exact search needs twice as much."""
    said = "press|three|to|leave|a|message|or|hang|up|" * 34
    log_probs = spelt("".join(f"--{c}-" for c in said), tokenizer)
    text = said.replace("|", " ")
    tracemalloc.start()
    try:
        found = align_text(log_probs, text, tokenizer, 0.02)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.words) == 34 * 9 and not found.unsaid and not found.unwritten
    # An hour is 180,000 frames: 0.36 GB.
    assert peak < 2000 * len(log_probs)


def test_bad_input_is_named(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    good = spelt("-hi-", tokenizer)
    for text in ("", " ", "... — !"):
        with pytest.raises(ValueError, match="nothing that can be said"):
            align_text(good, text, tokenizer, 0.02)
    with pytest.raises(ValueError, match="needs at least 6 frames, log_probs has 4"):
        align_text(good, "hi, you", tokenizer, 0.02)
    with pytest.raises(ValueError, match="needs at least 5 frames, log_probs has 4"):
        align_text(good, "LLL", tokenizer, 0.02)
    with pytest.raises(ValueError, match="log-softmax"):
        align_text(good + 1, "hi", tokenizer, 0.02)
    with pytest.raises(ValueError, match="frame_seconds"):
        align_text(good, "hi", tokenizer, -1.0)
    with pytest.raises(ValueError, match="offset"):
        align_text(good, "hi", tokenizer, 0.02, math.nan)
    assert align_text(random_log_probs(40, 30, 0).float(), "hi", tokenizer, 0.02).words
