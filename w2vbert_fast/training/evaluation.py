"""Scores of a model on held-out data: word error rate, character error rate, accuracy."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from w2vbert_fast._extras import require
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer
from w2vbert_fast.training.batches import frame_budget_batches
from w2vbert_fast.training.data import (
    EpochDataset,
    Skipped,
    Utterance,
    UtteranceSource,
    pad_batch,
    to_batch,
)
from w2vbert_fast.training.losses import UtteranceLosses, stand_in, without_unusable
from w2vbert_fast.training.tasks import Task


@dataclass(frozen=True)
class Prediction:
    """What the model makes of an utterance.

    Attributes:
        name: the utterance.
        loss: its loss, to be divided by `weight`; may be infinite.
        weight: see `losses`.
        outcome: what is scored: `reference` and `hypothesis` of a transcript; else the decisions
            that are `correct`, frames or the utterance, and all `decisions`.
    """

    name: str
    loss: float
    weight: float
    outcome: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """A line of `predictions.jsonl`."""
        return {"name": self.name, "loss": self.loss, "weight": self.weight, **self.outcome}


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
    numbers = (result.losses.tolist(), result.weights.tolist(), result.lengths.tolist())
    return [
        Prediction(u.name, loss, weight, task.outcome(decided, frames, wanted, u.text, tokenizer))
        for u, decided, wanted, loss, weight, frames in zip(
            utterances, result.predictions, labels, *numbers, strict=True
        )
    ]


def score(predictions: Sequence[Prediction], task: Task) -> dict[str, float]:
    """The scores of predictions; infinite losses are left out of `loss`."""
    finite = [p for p in predictions if math.isfinite(p.loss)]
    weight = sum(p.weight for p in finite)
    loss = sum(p.loss for p in finite) / weight if weight else math.nan
    return {"loss": loss, **task.scores([p.outcome for p in predictions])}
