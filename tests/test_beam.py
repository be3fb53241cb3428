"""Beam search: exact on small problems, the language model's share, hotwords, words and errors."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import pickle
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from w2vbert_fast import Wav2Vec2CTCTokenizer
from w2vbert_fast.inference import load_pipeline
from w2vbert_fast.inference.beam import BeamDecoder

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


def test_the_language_model_changes_the_text(tokenizer: Wav2Vec2CTCTokenizer, arpa: Path) -> None:
    # "b" is a little more probable than "a" in both words; the model has seen "a ab" only.
    rows = [[0.01, 0.4, 0.001, 0.5, 0.089], [0.96, 0.01, 0.001, 0.009, 0.02]]
    rows += [rows[0], [0.01, 0.01, 0.001, 0.959, 0.02]]
    rows.insert(3, [0.001, 0.001, 0.001, 0.001, 0.996])
    log_probs = torch.tensor(rows).log()
    assert BeamDecoder(tokenizer).decode(log_probs).text == "b bb"
    assert BeamDecoder(tokenizer, arpa, lm_weight=1.0).decode(log_probs).text == "a ab"


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
