"""Weights of a language model: what is tried, what is kept of it, and what comes out best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from w2vbert_fast import Wav2Vec2CTCTokenizer
from w2vbert_fast.cli.tune_lm import Search
from w2vbert_fast.evaluation import tune_lm
from w2vbert_fast.evaluation.tuning import USUAL_BEAM, Trial, Weights, _Search
from w2vbert_fast.inference.ctc.beam import BeamDecoder
from w2vbert_fast.training.scores import error_rates

pytest.importorskip("ctc_beam_decoder")

ARPA = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-2.0\t<unk>\t0
0\t<s>\t-0.3
-0.7\t</s>\t0
-0.4\ta\t-0.2
-0.9\tab\t-0.1
-1.3\tb\t-0.15

\\2-grams:
-0.3\t<s> a
-0.2\ta ab
-0.6\tab b

\\end\\
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning")
    (path / "vocab.json").write_text(json.dumps({"[PAD]": 0, "|": 1, "a": 2, "b": 3}))
    (path / "bigram.arpa").write_text(ARPA)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Wav2Vec2CTCTokenizer:
    return Wav2Vec2CTCTokenizer(
        folder / "vocab.json", unk_token="[PAD]", pad_token="[PAD]", bos_token=None, eos_token=None
    )


def log_probs(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(16, 4, generator=generator)).log_softmax(-1)


def test_the_weights_that_the_transcripts_were_made_with_are_found(
    folder: Path, tokenizer: Wav2Vec2CTCTokenizer
) -> None:
    rows = [log_probs(seed) for seed in range(30)]
    hidden = Weights(1.375, 3.75)  # no pair of the grid: it is reached in a step from there

    def decoder(weights: Weights) -> BeamDecoder:
        return BeamDecoder(tokenizer, folder / "bigram.arpa", **weights._asdict())

    said = [decoder(hidden).search(row)[0] for row in rows]
    assert len(set(said)) > 10
    told: list[Trial] = []
    search = _Search(decoder(Weights(0.5, 1.5)), rows, said, "none", told.append)
    best, start = search.run()
    assert start == (0.5, 1.5) and told == list(search.trials.values())
    assert told[0].weights == start and len({trial.weights for trial in told}) == len(told)
    assert min(trial.rate for trial in told) == search.trials[best].rate
    assert search.trials[best].rate < 0.5 * search.trials[start].rate
    assert abs(best.lm_weight - hidden.lm_weight) < 0.4
    # Each rate is that of a decoder that was made with these weights.
    for weights in (best, told[7].weights):
        found = [decoder(weights).search(row)[0] for row in rows]
        rate = error_rates(list(zip(said, found, strict=True)))["wer"]
        assert search.trials[weights].rate == pytest.approx(rate)
    # No neighbour of the best is better.
    tried = [
        (abs(w.lm_weight - best.lm_weight), abs(w.word_bonus - best.word_bonus))
        for w in search.trials
    ]
    assert {(0.0625, 0.0), (0.0, 0.375), (0.0625, 0.375)} <= set(tried)


def test_the_search_goes_on_as_long_as_a_neighbour_is_better() -> None:
    class Slope:
        """A decoder with the more wrong words, the further it is from the best weights."""

        def __init__(self, lm_weight: float, word_bonus: float) -> None:
            self.lm_weight, self.word_bonus = lm_weight, word_bonus

        def reweighted(self, lm_weight: float, word_bonus: float) -> Slope:
            return Slope(lm_weight, word_bonus)

        def search(self, log_probs: Tensor) -> tuple[str, float]:
            far = 16 * abs(self.lm_weight - 2.6) + 4 * abs(self.word_bonus - 9.1)
            return "a" + " b" * round(far), 0.0

    slope: Any = Slope(0.5, 1.5)
    best, _ = _Search(slope, [torch.zeros(1, 4)], ["a"], "none", None).run()
    assert best == pytest.approx((2.6, 9.1), abs=0.25)


def test_what_cannot_be_tuned_is_named(folder: Path) -> None:
    data = folder / "data.jsonl"
    data.write_text('{"audio": "a.wav", "text": "a"}\n')
    with pytest.raises(ValueError, match="lm: 'demo' has no language model, and none is given"):
        tune_lm(data, "demo")
    with pytest.raises(ValueError, match="channels must not be 'split'"):
        tune_lm(data, "demo", lm=folder / "bigram.arpa", channels="split")
    with pytest.raises(ValueError, match="beam must be at least 1"):
        tune_lm(data, "demo", lm=folder / "bigram.arpa", beam=0)
    assert Search().beam == USUAL_BEAM
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        tune_lm(data, "demo", resamples=0)
