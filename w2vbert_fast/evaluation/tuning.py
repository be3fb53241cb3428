"""`tune_lm`: weights of a language model, by the error rate on transcribed recordings.

The model computes each recording once; its log-probabilities are kept, and searched again with
every pair of weights that is tried.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w2vbert_fast import cpus
from w2vbert_fast.evaluation.bootstrap import interval, resampled_rates, share_better
from w2vbert_fast.evaluation.normalisation import AUTO, chosen
from w2vbert_fast.evaluation.outcomes import references
from w2vbert_fast.inference.ctc.beam import BeamDecoder
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.runner import Flow, Runner
from w2vbert_fast.inference.tasks.base import identity
from w2vbert_fast.inference.tasks.transcribe import Transcribe, Transcription
from w2vbert_fast.recordings.audio import SPLIT
from w2vbert_fast.recordings.inputs import Inputs, open_inputs
from w2vbert_fast.training.scores import align, separates_words

USUAL_BEAM = 100

# What is tried first, and how far from the best of them the search for a better one begins.
_LM_WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.5)
_WORD_BONUSES = (0.0, 1.5, 3.0, 4.5)
_STEPS = ((0.125, 0.75), (0.0625, 0.375))


class Weights(NamedTuple):
    """What is tuned: `BeamDecoder`'s arguments of these names."""

    lm_weight: float
    word_bonus: float


class Trial(NamedTuple):
    """Weights, and the error rate with them, a fraction."""

    weights: Weights
    rate: float


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        best: the weights with the lowest error rate.
        start: those that it began with: the given ones, or the checkpoint's, or the decoder's.
        greedy: error rate without beam search.
        trials: all that was tried, in order; the first is `start`.
        interval: between which bounds 95 % of the bootstrap's draws have the best weights' rate.
        better: share of the draws in which the best weights have a lower rate than the first.
        metric: "wer", or "cer" where no spaces separate words.
        normalisation: how texts were made alike.
        rows: how many recordings were scored.
        left_out: names of the others, and why.
    """

    best: Trial
    start: Trial
    greedy: float
    trials: tuple[Trial, ...]
    interval: tuple[float, float]
    better: float
    metric: str
    normalisation: str
    rows: int
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Emissions(Transcription):
    """Log-probabilities ``[frames, vocab]`` beside what is read off them greedily."""

    log_probs: Tensor = field(default_factory=lambda: torch.empty(0))


class _Emit(Transcribe):
    """The model's part of transcribing."""

    result = _Emissions

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Transcription:
        log_probs = self.merged(chunks, outputs)
        text = str(self.pipeline.processor.tokenizer.decode(log_probs.argmax(-1).tolist()))
        return _Emissions(**identity(loaded), text=text, log_probs=log_probs)


def tune_lm(
    data: str | os.PathLike[str] | Inputs,
    model: str | os.PathLike[str] = "demo",
    *,
    normalise: str = AUTO,
    resamples: int = 1000,
    seed: int = 0,
    flow: Flow | None = None,
    watch: Callable[[Trial], None] | None = None,
    **options: Any,
) -> Tuned:
    """Find weight and word bonus of a language model on transcribed recordings.

    A grid is tried, and then the neighbours of the best, as long as one is better, in smaller and
    smaller steps: some forty trials. Take recordings that neither the model nor the language model
    was trained on, and others for the error rate that you report.

    Args:
        data: data set with transcripts, as `evaluate` takes it.
        model: "demo", a folder or a hub id.
        normalise: as for `evaluate`.
        resamples: draws of the bootstrap.
        seed: of them.
        flow: how recordings are read and batched.
        watch: is told each trial.
        **options: of `Transcribe`: lm (else the checkpoint's), unigrams, hotwords, beam (100), ...;
            `lm_weight` and `word_bonus` are where it begins.

    Raises:
        OSError: data, the model or the language model cannot be found.
        ValueError: there is no language model, nothing can be scored, or an argument is impossible.
        TypeError: an option is unknown.
        ImportError: a package of the extras `beam` or `evaluate` is missing.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    chosen(normalise, ())
    beam = options.setdefault("beam", USUAL_BEAM)
    if beam < 1:
        raise ValueError(f"beam must be at least 1, since it is a search that is tuned, got {beam}")
    task = _Emit(model, **options)
    if task.channels == SPLIT:
        raise ValueError(f"channels must not be {SPLIT!r}: a transcript is of the whole recording")
    if task.language_model is None:
        raise ValueError(f"lm: {os.fspath(model)!r} has no language model, and none is given")
    inputs = data if isinstance(data, Inputs) else open_inputs([os.fspath(data)])
    wanted = references(inputs)
    runner: Runner[_Emissions] = Runner(task, flow)
    runner.batcher.prepare()
    emitted: list[_Emissions] = []
    said: list[str] = []
    left_out: list[tuple[str, str]] = []
    for reference, result in zip(wanted, runner(inputs.rows()), strict=True):
        problem = reference.problem or result.error
        if problem is None:
            emitted.append(result)
            said.append(reference.text or "")
        else:
            left_out.append((reference.id, problem))
    if not emitted:
        raise ValueError(f"no row can be scored: {left_out[0][0]}: {left_out[0][1]}")
    search = _Search(task.decoder, [e.log_probs for e in emitted], said, normalise, watch)
    best, start = search.run()
    rates = resampled_rates(
        [search.errors(start), search.errors(best)], search.lengths, resamples, seed
    )
    greedy = search.counted([result.text or "" for result in emitted])[search.metric]
    return Tuned(
        best=search.trials[best],
        start=search.trials[start],
        greedy=sum(greedy) / max(1, sum(search.lengths)),
        trials=tuple(search.trials.values()),
        interval=interval(rates[1]),
        better=share_better(*rates),
        metric=search.metric,
        normalisation=str(search.normalisation),
        rows=len(emitted),
        left_out=tuple(left_out),
    )


class _Search:
    """Looks for the best weights; what was tried is kept.

    Args:
        decoder: with the weights that it begins with.
        log_probs: of each utterance ``[frames, vocab]``.
        said: its transcript.
        normalise: as for `evaluate`.
        watch: is told each trial.

    Attributes:
        trials: what was tried.
        metric: "wer" or "cer".
        lengths: words or characters of each transcript.
    """

    def __init__(
        self,
        decoder: BeamDecoder,
        log_probs: Sequence[Tensor],
        said: Sequence[str],
        normalise: str,
        watch: Callable[[Trial], None] | None,
    ) -> None:
        self.decoder = decoder
        self.log_probs = log_probs
        self.start = Weights(decoder.lm_weight, decoder.word_bonus)
        self.watch = watch
        self.trials: dict[Weights, Trial] = {}
        self._errors: dict[Weights, dict[str, list[int]]] = {}
        heard = self._heard(decoder)
        self.normalisation = chosen(normalise, (said, heard))
        self.said = [self.normalisation(text) for text in said]
        self.metric = "wer" if separates_words(self.said) else "cer"
        empty = [(text, "") for text in self.said]
        self.lengths = [alignment.length for alignment in align(empty, self.metric)]
        self._keep(self.start, heard)

    def run(self) -> tuple[Weights, Weights]:
        """The best weights, and the first."""
        self._try(Weights(*pair) for pair in itertools.product(_LM_WEIGHTS, _WORD_BONUSES))
        for steps in _STEPS:
            before = None
            while before != (before := self._best()):
                self._try(
                    Weights(before.lm_weight + i * steps[0], before.word_bonus + j * steps[1])
                    for i, j in itertools.product((-1, 0, 1), repeat=2)
                )
        return self._best(), self.start

    def errors(self, weights: Weights) -> list[int]:
        """Errors of each utterance."""
        return self._errors[weights][self.metric]

    def counted(self, heard: Sequence[str]) -> dict[str, list[int]]:
        """Errors of each utterance, in words and in characters."""
        pairs = [(a, self.normalisation(b)) for a, b in zip(self.said, heard, strict=True)]
        return {s: [len(each.edits) for each in align(pairs, s)] for s in ("wer", "cer")}

    def _best(self) -> Weights:
        """Of equal error rates the one with fewer wrong characters, and then the first."""
        return min(self._errors, key=lambda w: (sum(self.errors(w)), sum(self._errors[w]["cer"])))

    def _try(self, candidates: Iterable[Weights]) -> None:
        for weights in candidates:
            if weights.lm_weight >= 0 and weights not in self.trials:
                self._keep(weights, self._heard(self.decoder.reweighted(*weights)))

    def _keep(self, weights: Weights, heard: Sequence[str]) -> None:
        self._errors[weights] = self.counted(heard)
        rate = sum(self.errors(weights)) / max(1, sum(self.lengths))
        self.trials[weights] = Trial(weights, rate)
        if self.watch is not None:
            self.watch(self.trials[weights])

    def _heard(self, decoder: BeamDecoder) -> list[str]:
        with ThreadPoolExecutor(max(1, cpus.of_process().usable)) as pool:
            return [text for text, _ in pool.map(decoder.search, self.log_probs)]
