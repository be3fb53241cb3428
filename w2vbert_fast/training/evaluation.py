"""Scores of a model on held-out data: word error rate, character error rate, accuracy."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from w2vbert_fast._extras import require
from w2vbert_fast.processing.scripts import is_unspaced
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer
from w2vbert_fast.training.batches import frame_budget_batches
from w2vbert_fast.training.config import Metric, Task
from w2vbert_fast.training.data import (
    EpochDataset,
    Skipped,
    Utterance,
    UtteranceSource,
    pad_batch,
    to_batch,
)
from w2vbert_fast.training.losses import UtteranceLosses, stand_in, without_unusable


@dataclass(frozen=True)
class Prediction:
    """What the model makes of an utterance.

    Attributes:
        name: the utterance.
        loss: its loss, to be divided by `weight`; may be infinite.
        weight: see `losses`.
        correct: right decisions: frames, or the utterance; None for "ctc".
        decisions: decisions in all.
        reference: transcript, for "ctc".
        hypothesis: what was recognised, for "ctc".
    """

    name: str
    loss: float
    weight: float
    correct: int | None = None
    decisions: int = 0
    reference: str = ""
    hypothesis: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation, the same on every process.

    Attributes:
        scores: `loss`, and `wer` and `cer` or `accuracy`, as fractions.
        predictions: of every utterance that could be scored, in the order of the data.
        skipped: the others.
    """

    scores: dict[str, float]
    predictions: list[Prediction]
    skipped: list[Skipped]


def choosing_score(
    task: Task,
    metric: Metric,
    tokenizer: Wav2Vec2CTCTokenizer | None,
    transcripts: Iterable[str] | None,
) -> str:
    """Name of the score that chooses the best checkpoint.

    Where nothing separates words, the word error rate counts utterances with an error, and stays at
    1 while a model learns.

    Args:
        task: the task.
        metric: "wer" or "cer"; "auto": "wer" where words are separated, by a token of the
            vocabulary, and by spaces in the transcripts, most of which is of a script with spaces.
        tokenizer: for "ctc".
        transcripts: of the data; None where they are not known beforehand.

    Returns:
        "wer", "cer" or, of tasks other than "ctc", "accuracy".
    """
    if task != "ctc":
        return "accuracy"
    if metric != "auto":
        return metric
    assert tokenizer is not None
    if tokenizer.word_delimiter_token not in tokenizer.encoder:
        return "cer"
    if transcripts is None:
        return "wer"
    # A foreign name, or a stray space, does not separate the words of Chinese.
    count = Counter(
        "space" if c == " " else "unspaced" if is_unspaced(c) else "letter"
        for text in transcripts
        for c in text
    )
    return "wer" if count["space"] and count["letter"] >= count["unspaced"] else "cer"


def is_better(name: str, score: float, best: float | None) -> bool:
    """Whether a score beats the best so far: below it for error rates, above it for accuracy."""
    if best is None:
        return True
    return score > best if name == "accuracy" else score < best


@torch.no_grad()
def evaluate(
    module: nn.Module,
    core: Any,
    source: UtteranceSource,
    task: Task,
    budget: int,
    accelerator: Any,
    tokenizer: Wav2Vec2CTCTokenizer | None = None,
    num_workers: int = 0,
) -> Evaluation:
    """Score a model. Every process calls this and takes its share.

    Nothing is drawn from the global random generators, so that training goes on as if there had
    been no evaluation.

    Args:
        module: a `TrainingModule`, prepared.
        core: the model in it.
        source: the data; its epoch 0.
        task: the task.
        budget: frames in a batch.
        accelerator: Accelerate's.
        tokenizer: for "ctc".
        num_workers: processes that read audio.

    Raises:
        ValueError: not one utterance can be scored.
    """
    lengths = [max(1, source.num_frames(i, 0)) for i in range(len(source))]
    batches = frame_budget_batches(lengths, budget, random.Random(0))
    share = batches[accelerator.process_index :: accelerator.num_processes]
    loader: Any = torch.utils.data.DataLoader(
        EpochDataset(source),
        batch_sampler=[[(index, 0) for index in batch] for batch in share],
        collate_fn=to_batch,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    found: list[tuple[int, Prediction]] = []
    skipped: list[Skipped] = []
    was_training = module.training
    module.eval()
    loaded = iter(loader)
    # Sharded models compute together: every process makes the same number of passes.
    for turn in range(-(-len(batches) // accelerator.num_processes)):
        batch = to_batch([])
        if turn < len(share):
            batch = next(loaded)
            batch = without_unusable(batch, core, task)
        skipped += batch.skipped
        inputs = pad_batch(batch.utterances or [stand_in(core, task)], accelerator.device)
        result = module(**inputs)
        if batch.utterances:
            predictions = _predictions(result, inputs["labels"], batch.utterances, task, tokenizer)
            found += zip(batch.indices, predictions, strict=True)
    module.train(was_training)
    if accelerator.num_processes > 1:
        gather_object = require("accelerate.utils", "train").gather_object
        found = gather_object(found)
        skipped = gather_object(skipped)
    ordered = [prediction for _, prediction in sorted(found, key=lambda item: item[0])]
    if not ordered:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3])
        raise ValueError(f"no utterance of the evaluation data can be scored: {reasons}")
    return Evaluation(score(ordered, task), ordered, skipped)


def _predictions(
    result: UtteranceLosses,
    labels: torch.Tensor,
    utterances: Sequence[Utterance],
    task: Task,
    tokenizer: Wav2Vec2CTCTokenizer | None,
) -> list[Prediction]:
    losses, weights = result.losses.tolist(), result.weights.tolist()
    rows = []
    for i, utterance in enumerate(utterances):
        common = (utterance.name, losses[i], weights[i])
        if task == "ctc":
            assert tokenizer is not None
            ids = result.predictions[i, : int(result.lengths[i])].tolist()
            hypothesis = tokenizer.decode(ids).strip() if ids else ""
            rows.append(Prediction(*common, reference=utterance.text, hypothesis=hypothesis))
        else:
            wanted = labels[i].flatten()
            labelled = wanted >= 0
            right = (result.predictions[i].flatten()[: len(wanted)] == wanted) & labelled
            rows.append(Prediction(*common, int(right.sum()), int(labelled.sum())))
    return rows


def score(predictions: Sequence[Prediction], task: Task) -> dict[str, float]:
    """The scores of predictions; infinite losses are left out of `loss`."""
    finite = [p for p in predictions if torch.isfinite(torch.tensor(p.loss))]
    weight = sum(p.weight for p in finite)
    scores = {"loss": sum(p.loss for p in finite) / weight if weight else float("nan")}
    if task == "ctc":
        scores |= error_rates([(p.reference, p.hypothesis) for p in predictions])
    else:
        decisions = sum(p.decisions for p in predictions)
        scores["accuracy"] = sum(p.correct or 0 for p in predictions) / max(1, decisions)
    return scores


def error_rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Word and character error rate over all utterances together.

    Texts are compared in NFC: a composed character and its parts are the same.

    Args:
        pairs: reference and hypothesis of each. An empty reference is allowed, and what is
            recognised there counts as inserted.

    Returns:
        `wer` and `cer`: substitutions, deletions and insertions over the length of the references.
    """
    jiwer = require("jiwer", "train")
    pairs = [
        (unicodedata.normalize("NFC", reference), unicodedata.normalize("NFC", hypothesis))
        for reference, hypothesis in pairs
    ]
    spoken = [pair for pair in pairs if pair[0]]
    silent = [hypothesis for reference, hypothesis in pairs if not reference]
    rates = {}
    for name, process, split in (
        ("wer", jiwer.process_words, str.split),
        ("cer", jiwer.process_characters, list),
    ):
        errors = sum(len(split(hypothesis)) for hypothesis in silent)
        total = 0
        if spoken:
            counts = process(*map(list, zip(*spoken, strict=True)))
            errors += counts.substitutions + counts.deletions + counts.insertions
            total = counts.hits + counts.substitutions + counts.deletions
        rates[name] = errors / max(1, total)
    return rates


def prediction_rows(evaluation: Evaluation, task: Task) -> list[dict[str, Any]]:
    """The predictions, as lines of `predictions.jsonl`."""
    unused = ("correct", "decisions") if task == "ctc" else ("reference", "hypothesis")
    return [
        {key: value for key, value in asdict(p).items() if key not in unused}
        for p in evaluation.predictions
    ]
