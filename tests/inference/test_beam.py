"""Beam search: exact on small problems, the language model's share, hotwords, words and errors."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import logging
import math
import os
import pickle
import shutil
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.signals import speech_like
from w2vbert_fast import Wav2Vec2CTCTokenizer
from w2vbert_fast.inference import Transcriber, load_pipeline
from w2vbert_fast.inference.ctc.beam import BeamDecoder
from w2vbert_fast.inference.ctc.language_model import find_language_model, words_of
from w2vbert_fast.inference.tasks.transcribe import Transcribe

pytest.importorskip("ctc_beam_decoder")

# Nothing is pruned on the small problems, so that the search has to be exact there.
EXHAUSTIVE = {
    "beam_width": 100_000,
    "token_min_log_prob": -1e9,
    "beam_prune_log_prob": -1e9,
}
LN10 = math.log(10)
# Base-10 logarithms of a bigram model, and its back-off weights.
UNIGRAMS = {"</s>": -0.7, "a": -0.5, "ab": -0.9, "b": -1.3}
BACKOFF = {"<s>": -0.3, "a": -0.2, "ab": -0.1, "b": -0.15}
BIGRAMS = {("<s>", "a"): -0.4, ("a", "ab"): -0.2, ("ab", "</s>"): -0.3, ("ab", "b"): -0.6}


# The same model as KenLM's `build_binary probing` writes it, compressed.
BINARY = (
    "c-qU&O)OBz$yLZGDJihh*U!#KO-##7%}LQq&d=3P&QD2INXswEO)OC;OD!tS%+FIW<zhg9274f}pAks>2Lg}?BUFY7"
    "OdhaD7Gs0bEDWdsBrcepefg5OI6E@~aeyo5`^Vbi2iYKdeq0Rxx2bhs63E<wI>o(~ZKYs4&9$^9)&A*z#fqu@0Lbwm#"
    ";ln$_Zb@-+e7*GXV3WTOG`@w(r5Ojr7g3cHB)jQOcTc^ri_-2#=;;qjYV%i)K=HD0@dx?wT!t>YSq4NK(+gExmUBz{K"
    "B3?%?cp<Y)bR8?HFu|fmk0%Br+r>F(fen06vIZJ^"
)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "bigram.bin"
    path.write_bytes(zlib.decompress(base64.b85decode(BINARY)))
    return path


@pytest.fixture(scope="module")
def wordless(binary: Path) -> Path:
    """As `build_binary -v` writes it: no words at the end, and the header says so."""
    content = bytearray(binary.read_bytes())
    del content[content.rindex(b"<unk>\0") :]
    content[100] = 0
    path = binary.with_name("wordless.bin")
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Wav2Vec2CTCTokenizer:
    """Ids out of the usual order: the delimiter first, special tokens in between, blank last."""
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.json"
    path.write_text(json.dumps({"|": 0, "a": 1, "[UNK]": 2, "b": 3, "[PAD]": 4}))
    return Wav2Vec2CTCTokenizer(
        path, unk_token="[UNK]", pad_token="[PAD]", bos_token=None, eos_token=None
    )


@pytest.fixture(scope="module")
def arpa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = ["\\data\\", "ngram 1=6", "ngram 2=4", "", "\\1-grams:"]
    lines += ["-2.0\t<unk>\t0", f"0\t<s>\t{BACKOFF['<s>']}"]
    lines += [f"{value}\t{word}\t{BACKOFF.get(word, 0)}" for word, value in UNIGRAMS.items()]
    lines += ["", "\\2-grams:"]
    lines += [f"{value}\t{first} {second}" for (first, second), value in BIGRAMS.items()]
    path = tmp_path_factory.mktemp("lm") / "bigram.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    return path


def random_log_probs(frames: int, seed: int) -> Tensor:
    """``[frames, 5]`` with next to nothing for the unknown token, which no text is made of."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(frames, 5, generator=generator, dtype=torch.float64)
    logits[:, 2] = -40
    return logits.log_softmax(-1)


def all_texts(log_probs: Tensor) -> dict[str, float]:
    """The log-probability of every text, summed over all of its paths."""
    spelt = {0: " ", 1: "a", 3: "b"}
    totals: dict[str, float] = defaultdict(float)
    probabilities = log_probs.exp().tolist()
    for path in itertools.product((0, 1, 3, 4), repeat=len(log_probs)):
        text = "".join(spelt[token] for token, _ in itertools.groupby(path) if token != 4)
        totals[" ".join(text.split())] += math.prod(
            row[token] for row, token in zip(probabilities, path, strict=True)
        )
    return {text: math.log(total) for text, total in totals.items()}


def lm_score(text: str) -> float:
    """The natural logarithm of a sentence's probability under the bigram model."""
    total = 0.0
    for pair in itertools.pairwise(["<s>", *text.split(), "</s>"]):
        total += BIGRAMS.get(pair, BACKOFF.get(pair[0], 0.0) + UNIGRAMS.get(pair[1], -2.0))
    return total * LN10


@pytest.mark.parametrize("seed", range(8))
def test_the_best_of_all_texts(tokenizer: Wav2Vec2CTCTokenizer, seed: int) -> None:
    log_probs = random_log_probs(6, seed)
    totals = all_texts(log_probs)
    result = BeamDecoder(tokenizer, **EXHAUSTIVE).decode(log_probs)
    assert result.text == max(totals, key=totals.__getitem__)
    assert result.score == pytest.approx(totals[result.text], abs=1e-4)
    assert [word.text for word in result.words] == result.text.split()


def test_a_sum_of_paths_beats_the_best_path(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    # Graves et al. 2006, figure 2: blank, blank is the best path, but "a" has more of them.
    log_probs = torch.tensor([[1e-9, 0.4, 1e-9, 1e-9, 0.6]] * 2).log()
    assert log_probs.argmax(-1).tolist() == [4, 4]
    result = BeamDecoder(tokenizer).decode(log_probs)
    assert result.text == "a"
    assert result.score == pytest.approx(math.log(0.4 * 0.4 + 2 * 0.4 * 0.6), abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("weight", "bonus"), [(1.0, 0.0), (0.5, 2.0)])
def test_the_language_model_counts_as_documented(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, seed: int, weight: float, bonus: float
) -> None:
    log_probs = random_log_probs(6, seed)
    # Ends in a letter, since the search scores an empty word behind a delimiter at the end, even
    # if that is a path of next to no probability: so those are not tried.
    log_probs[-1, [0, 4]] = -40
    log_probs = log_probs.log_softmax(-1)
    known = {
        text: total + weight * lm_score(text) + bonus * len(text.split())
        for text, total in all_texts(log_probs).items()
        if all(word in UNIGRAMS for word in text.split()) and text
    }
    # Words that the model does not know are out of the question.
    result = BeamDecoder(
        tokenizer,
        arpa,
        lm_weight=weight,
        word_bonus=bonus,
        unknown_word_penalty=1000.0,
        **{**EXHAUSTIVE, "token_min_log_prob": -30.0},
    ).decode(log_probs)
    assert result.text == max(known, key=known.__getitem__)
    assert result.score == pytest.approx(known[result.text], abs=1e-3)


@pytest.mark.parametrize(
    "tokens", [[1, 0, 1, 3], [0, 1, 0, 1, 3], [1, 0, 1, 3, 0], [1, 4, 4, 0, 0, 1, 4, 3, 4, 0]]
)
def test_delimiters_at_the_ends_cost_nothing(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, tokens: list[int]
) -> None:
    log_probs = torch.full((len(tokens), 5), -20.0)
    log_probs[torch.arange(len(tokens)), tokens] = 0
    result = BeamDecoder(tokenizer, arpa, lm_weight=1.0, word_bonus=0.0).decode(
        log_probs.log_softmax(-1)
    )
    assert result.text == "a ab"
    assert result.score == pytest.approx(lm_score("a ab"), abs=1e-3)


def test_ends_of_a_sentence_count_or_not(tokenizer: Wav2Vec2CTCTokenizer, arpa: Path) -> None:
    log_probs = torch.full((4, 5), -30.0)
    log_probs[range(4), [1, 0, 1, 3]] = 0
    for boundary, expected in ((True, lm_score("a ab")), (False, LN10 * (-0.5 - 0.2))):
        decoder = BeamDecoder(
            tokenizer, arpa, lm_weight=1.0, word_bonus=0.0, score_boundary=boundary
        )
        result = decoder.decode(log_probs.log_softmax(-1))
        assert (result.text, result.score) == ("a ab", pytest.approx(expected, abs=1e-3))


def test_the_language_model_changes_the_text(tokenizer: Wav2Vec2CTCTokenizer, arpa: Path) -> None:
    # "b" is a little more probable than "a" in both words; the model has seen "a ab" only.
    rows = [[0.01, 0.4, 0.001, 0.5, 0.089], [0.96, 0.01, 0.001, 0.009, 0.02]]
    rows += [rows[0], [0.01, 0.01, 0.001, 0.959, 0.02]]
    rows.insert(3, [0.001, 0.001, 0.001, 0.001, 0.996])
    log_probs = torch.tensor(rows).log()
    assert BeamDecoder(tokenizer).decode(log_probs).text == "b bb"
    assert BeamDecoder(tokenizer, arpa, lm_weight=1.0).decode(log_probs).text == "a ab"


def test_a_binary_model_is_as_good_as_its_arpa_file(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, binary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sorted(words_of(binary) or ()) == sorted(words_of(arpa) or ()) == ["a", "ab", "b"]
    log_probs = [random_log_probs(12, seed) for seed in range(24)]
    expected = [BeamDecoder(tokenizer, arpa).decode(row) for row in log_probs]
    assert [BeamDecoder(tokenizer, binary).decode(row) for row in log_probs] == expected
    assert caplog.messages == []


def test_a_binary_model_without_words_says_so(
    tokenizer: Wav2Vec2CTCTokenizer,
    arpa: Path,
    wordless: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert words_of(wordless) is None
    log_probs = [random_log_probs(12, seed) for seed in range(24)]
    expected = [BeamDecoder(tokenizer, arpa).decode(row) for row in log_probs]
    assert [BeamDecoder(tokenizer, wordless).decode(row) for row in log_probs] != expected
    (message,) = {record.getMessage() for record in caplog.records}
    assert "wordless.bin" in message and "--unigrams FILE" in message
    assert "13.9 instead of 5.6 %" in message
    caplog.clear()
    given = BeamDecoder(tokenizer, wordless, unigrams=["A", "ab", "b", "é"])
    assert [given.decode(row) for row in log_probs] == expected
    (message,) = caplog.messages
    assert message.startswith("unigrams: 1 of 4 have no effect, such as 'é'")
    with pytest.raises(ValueError, match="unigrams: none of them is spelt with the tokenizer's"):
        BeamDecoder(tokenizer, wordless, unigrams=["é", "42"])


def test_other_weights_draw_no_progress(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    decoder = BeamDecoder(tokenizer, arpa)
    assert "***" in capfd.readouterr().err
    other = decoder.reweighted(1.0, 0.25)
    os.write(2, b"written")
    assert capfd.readouterr() == ("", "written")
    assert (other.lm_weight, other.word_bonus) == (1.0, 0.25)


def test_files_that_are_no_binary_model_hold_no_words(binary: Path, tmp_path: Path) -> None:
    content = binary.read_bytes()
    for number, damaged in enumerate(
        (content[:60], content[:-3], content + b"c\0d\0", content.replace(b"<unk>\0", b"<unc>\0"))
    ):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(damaged)
        assert words_of(path) is None
    # The first of the words may stand in the file before.
    path = tmp_path / "twice.bin"
    path.write_bytes(content[:300] + b"<unk>\0" + content[300:])
    assert words_of(path) == words_of(binary)


@pytest.mark.parametrize(
    ("letters", "given", "expected"),
    [
        ("abc", ["Ab Ba", "ABC", "abc", " "], ["ab ba", "abc"]),
        ("ABC", ["Ab Ba", "abc"], ["AB BA", "ABC"]),
        ("abcABC", ["Ab Ba", "ABC"], ["Ab Ba", "ABC"]),
        ("abcA", ["Ab BA"], ["Ab bA"]),
        ("abé", ["BE\u0301", "É"], ["bé", "é"]),
        ("abe\u0301", ["BÉ", "é"], ["be\u0301", "e\u0301"]),
    ],
)
def test_hotwords_take_the_spelling_of_the_vocabulary(
    tmp_path: Path,
    letters: str,
    given: list[str],
    expected: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = vocabulary(tmp_path / "vocab.json", *letters)
    assert BeamDecoder(tokenizer, hotwords=given).hotwords == expected
    assert caplog.messages == []


def test_hotwords_in_another_case_count(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    log_probs = torch.tensor([[0.02, 0.4, 0.001, 0.5, 0.079]]).log()
    assert BeamDecoder(tokenizer, hotwords=["A"]).decode(log_probs).text == "a"


def test_hotwords_that_cannot_be_spelt_are_named_once(
    tokenizer: Wav2Vec2CTCTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = BeamDecoder(tokenizer, hotwords=["b4", "Ab", "aü"])
    decoder = pickle.loads(pickle.dumps(decoder))
    decoder.decode(random_log_probs(5, 0))
    assert decoder.hotwords == ["ab"]
    assert caplog.messages == [
        "hotwords that have no effect: 'b4', 'aü'; the vocabulary lacks '4', 'ü'"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_weight": 0.3}, "without a language model lm_weight has no effect"),
        (
            {"word_bonus": 0.0, "unigrams": ["a"], "unknown_word_penalty": 2.0},
            "without a language model word_bonus, unigrams, unknown_word_penalty has no effect",
        ),
        ({"hotword_weight": 3.0}, "without hotwords hotword_weight has no effect"),
        (
            {"hotwords": ["a"], "hotword_weight": 0.0},
            "with a hotword_weight of 0 hotwords have no effect",
        ),
    ],
)
def test_what_has_no_effect_says_so(
    tokenizer: Wav2Vec2CTCTokenizer,
    options: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    BeamDecoder(tokenizer, **options)
    assert caplog.messages == [message]


def test_scripts_without_spaces_say_what_hotwords_can_do(
    tmp_path: Path, arpa: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chinese = vocabulary(tmp_path / "zh.json", "今", "天")
    decoder = BeamDecoder(chinese, hotwords=["天"])
    log_probs = torch.full((2, 4), math.log(0.01))
    log_probs[[0, 1], [2, 2]] = math.log(0.5)
    log_probs[[0, 1], [3, 3]] = math.log(0.48)
    # It is as the message says: at the beginning it counts, behind another character it does not.
    assert decoder.decode(log_probs).text == "天"
    assert "count at the beginning of a text" in caplog.messages[0]
    caplog.clear()
    (tmp_path / "vocab.json").write_text(json.dumps({"[PAD]": 0, "a": 1, "b": 2}))
    spaceless = Wav2Vec2CTCTokenizer(
        tmp_path / "vocab.json",
        **{"unk_token": None, "pad_token": "[PAD]", "bos_token": None, "eos_token": None},
        word_delimiter_token=None,
    )
    BeamDecoder(spaceless, arpa)
    assert "the whole text is one word" in caplog.messages[0]


def test_a_model_mostly_of_other_letters_is_named(
    tokenizer: Wav2Vec2CTCTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cased.arpa"
    words = ["<unk>", "<s>", "</s>", "a", "A", "B", "AB"]
    lines = ["\\data\\", "ngram 1=7", "ngram 2=1", "", "\\1-grams:"]
    lines += [f"-1\t{word}\t0" for word in words]
    lines += ["", "\\2-grams:", "-1\ta A", "", "\\end\\", ""]
    path.write_text("\n".join(lines))
    BeamDecoder(tokenizer, path)
    (message,) = caplog.messages
    assert "3 of 4 words, such as 'A', 'B', 'AB', cannot be found" in message
    with pytest.raises(ValueError, match="unigrams: none of them is a word"):
        BeamDecoder(tokenizer, path, unigrams=["b"])


def checkpoint_with_language_model(
    folder: Path, source: Path, language_model: Path, **attributes: Any
) -> Path:
    """A checkpoint as transformers' Wav2Vec2ProcessorWithLM and pyctcdecode save it."""
    shutil.copytree(source, folder)
    (folder / "language_model").mkdir()
    shutil.copy(language_model, folder / "language_model" / "5gram.bin")
    attributes = {"alpha": 0.7, "beta": 0.9, "unk_score_offset": -8.0, **attributes}
    (folder / "language_model" / "attrs.json").write_text(json.dumps(attributes))
    (folder / "language_model" / "unigrams.txt").write_text("a\nab\nb\n")
    tokens = json.loads((source / "vocab.json").read_text())
    labels = sorted(tokens, key=tokens.__getitem__)
    labels = [{"|": " ", "[UNK]": "⁇", "[PAD]": ""}.get(token, token) for token in labels]
    (folder / "alphabet.json").write_text(json.dumps({"labels": labels, "is_bpe": False}))
    return folder


def test_the_language_model_of_a_checkpoint(
    tiny_checkpoint: Path,
    binary: Path,
    arpa: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = checkpoint_with_language_model(
        tmp_path / "model", tiny_checkpoint, binary, score_boundary=False
    )
    caplog.set_level(logging.INFO, "w2vbert_fast.inference")
    runner = Transcriber(model, beam=20)
    decoder = runner.task.decoder
    assert decoder.lm_path == model / "language_model" / "5gram.bin"
    assert (decoder.lm_weight, decoder.word_bonus) == (0.7, 0.9)
    assert (decoder.unknown_word_penalty, decoder.score_boundary) == (8.0, False)
    assert decoder.unigrams == ["a", "ab", "b"]
    path = model / "language_model" / "5gram.bin"
    said = f"language model {path}: 3 words, weight 0.7, word bonus 0.9"
    assert caplog.messages == [said]
    # It is what the decoder of the same model by hand gives.
    samples = torch.from_numpy(speech_like(2, 16_000))
    (result,) = runner(samples)
    pipeline = load_pipeline(tiny_checkpoint)
    logits, _ = pipeline.logits([samples])
    by_hand = BeamDecoder(
        pipeline.processor.tokenizer,
        binary,
        beam_width=20,
        lm_weight=0.7,
        word_bonus=0.9,
        unknown_word_penalty=8,
        score_boundary=False,
    )
    assert result.text == by_hand.decode(logits[0].log_softmax(-1)).text
    # What is named goes before, in parts or as a whole.
    decoder = Transcribe(model, beam=20, lm_weight=0.2, unigrams=write_lines(tmp_path, "a")).decoder
    assert (decoder.lm_weight, decoder.word_bonus, decoder.unigrams) == (0.2, 0.9, ["a"])
    decoder = Transcribe(model, beam=20, lm=arpa).decoder
    assert (decoder.lm_path, decoder.lm_weight, decoder.score_boundary) == (arpa, 0.5, True)
    decoder = Transcribe(model, beam=20, lm="none").decoder
    assert decoder.lm_path is None
    with pytest.raises(ValueError, match="lm_weight needs a language model, and lm is 'none'"):
        Transcribe(model, beam=20, lm="none", lm_weight=1.0)
    # Greedy decoding says what there is.
    caplog.clear()
    Transcribe(model).load()
    assert "has a language model that greedy decoding does not use" in caplog.messages[0]
    # A job's folder knows what its language model was.
    options = Transcribe(model, beam=20).options()
    (model / "language_model" / "unigrams.txt").write_text("a\n")
    assert Transcribe(model, beam=20).options() != options


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "lines.txt"
    path.write_text("\n".join(lines))
    return path


def test_folders_of_language_models_that_are_wrong(
    tiny_checkpoint: Path, binary: Path, tmp_path: Path
) -> None:
    assert find_language_model(tiny_checkpoint) is None
    model = checkpoint_with_language_model(tmp_path / "model", tiny_checkpoint, binary)
    folder = model / "language_model"
    (folder / "attrs.json").write_text('{"alpha": "much"}')
    with pytest.raises(ValueError, match=r"attrs.json: alpha must be a number, got 'much'"):
        find_language_model(model)
    (folder / "attrs.json").write_text('{"score_boundary": "false"}')
    with pytest.raises(ValueError, match="score_boundary must be true or false, got 'false'"):
        find_language_model(model)
    (folder / "attrs.json").unlink()
    # pyctcdecode writes an empty file where it knows no words.
    (folder / "unigrams.txt").write_text("")
    found = find_language_model(model)
    assert found is not None and found.arguments().keys() == {"labels", "score_boundary"}
    (folder / "another.arpa").touch()
    with pytest.raises(ValueError, match=r"must hold one language model .* 5gram.bin"):
        find_language_model(model)
    (folder / "another.arpa").unlink()
    (model / "alphabet.json").write_text('{"labels": ["▁a"], "is_bpe": true}')
    with pytest.raises(ValueError, match="parts of words as labels"):
        find_language_model(model)
    with pytest.raises(ValueError, match="word_bonus needs a language model; set lm, since"):
        Transcribe(tiny_checkpoint, beam=5, word_bonus=1.0).load()


def test_labels_in_another_case_than_the_tokenizer(tmp_path: Path, arpa: Path) -> None:
    """As a well-known recipe for n-gram models makes them: vocabulary in upper case, words not."""
    tokenizer = vocabulary(tmp_path / "vocab.json", "A", "B")
    log_probs = torch.full((5, 4), math.log(0.01))
    log_probs[range(5), [2, 1, 2, 0, 3]] = math.log(0.97)
    decoder = BeamDecoder(tokenizer, arpa, labels=["", " ", "a", "b"], hotwords=["AB"])
    result = decoder.decode(log_probs)
    assert (result.text, decoder.hotwords) == ("a ab", ["ab"])
    assert [word.text for word in result.words] == ["a", "ab"]
    assert [c.text for word in result.words for c in word.characters] == ["a", "a", "b"]
    assert [word.start for word in result.words] == pytest.approx([0, 0.04])
    with pytest.raises(ValueError, match="upper and lower"):
        BeamDecoder(tokenizer, arpa)
    with pytest.raises(ValueError, match="labels must have an entry for every id, got 3"):
        BeamDecoder(tokenizer, labels=["", " ", "a"])
    with pytest.raises(ValueError, match="labels spell the token 'A' as 'aa'"):
        BeamDecoder(tokenizer, labels=["", " ", "aa", "b"])


def test_hotwords_win(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    log_probs = torch.tensor([[0.02, 0.4, 0.001, 0.5, 0.079]]).log()
    assert BeamDecoder(tokenizer).decode(log_probs).text == "b"
    decoder = BeamDecoder(tokenizer, hotwords=["a", "abba"], hotword_weight=5.0)
    assert decoder.decode(log_probs).text == "a"


def test_compressed_models_pickles_and_threads(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "bigram.arpa.gz"
    packed.write_bytes(gzip.compress(arpa.read_bytes()))
    log_probs = [random_log_probs(40, seed) for seed in range(16)]
    decoder = BeamDecoder(tokenizer, arpa)
    expected = [decoder.decode(row) for row in log_probs]
    assert len({result.text for result in expected}) > 8
    for other in (BeamDecoder(tokenizer, packed), pickle.loads(pickle.dumps(decoder))):
        assert [other.decode(row) for row in log_probs] == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decoder.decode, log_probs)) == expected


def test_other_weights_read_the_language_model_once_more(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, built = BeamDecoder(tokenizer, arpa), []
    build = BeamDecoder._build
    monkeypatch.setattr(BeamDecoder, "_build", lambda self: built.append(0) or build(self))
    other = decoder.reweighted(0.7, 2.0)
    assert (other.lm_weight, other.word_bonus, len(built)) == (0.7, 2.0, 1)
    assert (decoder.lm_weight, decoder.word_bonus) == (0.5, 1.5)
    log_probs = random_log_probs(12, 3)
    new = BeamDecoder(tokenizer, arpa, lm_weight=0.7, word_bonus=2.0)
    assert other.search(log_probs) == new.search(log_probs) != decoder.search(log_probs)


def test_the_demo_checkpoint(tmp_path: Path) -> None:
    pipeline = load_pipeline("demo")
    tokenizer = pipeline.processor.tokenizer
    ids = tokenizer("press one to call")["input_ids"]
    path = [token for i in ids for token in (i, tokenizer.pad_token_id)]
    log_probs = torch.full((len(path), len(tokenizer.get_vocab())), math.log(0.1 / 29))
    log_probs[torch.arange(len(path)), path] = math.log(0.9)
    result = BeamDecoder(tokenizer).decode(log_probs)
    assert result.text == "press one to call"
    assert [word.start for word in result.words] == pytest.approx([0, 0.24, 0.4, 0.52])


def test_no_frames_and_bad_frames(tokenizer: Wav2Vec2CTCTokenizer) -> None:
    decoder = BeamDecoder(tokenizer)
    empty = decoder.decode(random_log_probs(1, 0)[:0])
    assert (empty.text, empty.words, empty.score) == ("", [], 0.0)
    silent = torch.full((3, 5), -math.inf)
    silent[:, 4] = 0
    assert decoder.decode(silent).text == ""
    with pytest.raises(ValueError, match=r"must have 5 columns or more, .* got 4"):
        decoder.decode(random_log_probs(3, 0)[:, :4].log_softmax(-1))
    with pytest.raises(ValueError, match="log-softmax"):
        decoder.decode(torch.zeros(3, 5))


def test_bad_arguments_are_named(
    tokenizer: Wav2Vec2CTCTokenizer, arpa: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        BeamDecoder(tokenizer, tmp_path / "missing.arpa")
    for name, content, message in (
        ("empty.arpa", b"", "holds no words"),
        ("cut.arpa", arpa.read_bytes()[:150], "cannot be used"),
        ("text.arpa", b"\\1-grams:\nhello\n", "is damaged"),
        ("model.bin", b"mmap lm", "cannot be used"),
        (
            "upper.arpa",
            b"\\1-grams:\n-1\tAB\t0\n\\end\\\n",
            "upper and lower",
        ),
        ("cut.arpa.gz", gzip.compress(arpa.read_bytes())[:60], "is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"lm_path.*{message}"):
            BeamDecoder(tokenizer, tmp_path / name)
    with pytest.raises(ValueError, match="lm_weight must be 0 or more and finite, got -1"):
        BeamDecoder(tokenizer, lm_weight=-1)
    with pytest.raises(ValueError, match="beam_width must be positive, got 0"):
        BeamDecoder(tokenizer, beam_width=0)
    with pytest.raises(TypeError, match="hotwords must be several words"):
        BeamDecoder(tokenizer, hotwords="name")


def vocabulary(path: Path, *tokens: str, **options: bool) -> Wav2Vec2CTCTokenizer:
    path.write_text(json.dumps({token: i for i, token in enumerate(("[PAD]", "|", *tokens))}))
    return Wav2Vec2CTCTokenizer(
        path, unk_token=None, pad_token="[PAD]", bos_token=None, eos_token=None, **options
    )


@pytest.mark.parametrize(("lower", "text"), [(False, "AB"), (True, "ab")])
def test_capitals_stay_unless_the_tokenizer_has_none(
    tmp_path: Path, lower: bool, text: str
) -> None:
    tokenizer = vocabulary(tmp_path / "vocab.json", "A", "B", do_lower_case=lower)
    log_probs = torch.full((3, 4), math.log(0.01))
    log_probs[[0, 1, 2], [2, 0, 3]] = math.log(0.97)
    result = BeamDecoder(tokenizer).decode(log_probs)
    assert (result.text, [word.text for word in result.words]) == (text, [text])


def test_a_second_blank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer cannot be used: .* duplicate"):
        BeamDecoder(vocabulary(tmp_path / "vocab.json", "a", "<pad>"))
