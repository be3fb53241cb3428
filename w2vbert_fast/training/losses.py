"""A loss for each utterance, whatever the task, so that one bad utterance can be told and dropped.

The heads average over a batch. Here every utterance's loss is a sum over its own targets beside the
number that it is to be divided by, and the batch's loss is the ratio of the two sums:

| task | loss of an utterance | weight |
| --- | --- | --- |
| ctc | negative log-likelihood / number of tokens | 1 |
| classification, xvector | cross-entropy | 1 |
| frames | sum of the frames' cross-entropies | number of labelled frames |

which over a batch is what the reference's heads compute (CTC with the reduction "mean").
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.models import (
    Wav2Vec2BertForAudioFrameClassification,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertForSequenceClassification,
    Wav2Vec2BertForXVector,
)
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel
from w2vbert_fast.training.config import Task
from w2vbert_fast.training.data import IGNORED_LABEL, Batch, Utterance

MODEL_CLASSES: dict[Task, type[Wav2Vec2BertPreTrainedModel]] = {
    "ctc": Wav2Vec2BertForCTC,
    "classification": Wav2Vec2BertForSequenceClassification,
    "frames": Wav2Vec2BertForAudioFrameClassification,
    "xvector": Wav2Vec2BertForXVector,
}


class UtteranceLosses(NamedTuple):
    """What `TrainingModule` returns.

    Attributes:
        losses: fp32 `[batch]`.
        weights: fp32 `[batch]`; the batch's loss is `losses.sum() / weights.sum()`.
        predictions: int64, detached; the best token or class of each frame `[batch, T']` ("ctc",
            "frames") or of the utterance `[batch]`.
        lengths: int64 `[batch]`, valid frames among T'.
    """

    losses: Tensor
    weights: Tensor
    predictions: Tensor
    lengths: Tensor


class TrainingModule(nn.Module):
    """A model with its loss in `forward`, which is what DDP and FSDP need to wrap.

    Args:
        model: a model with the head of the task, or such a model within PEFT's.
        task: the task.
        bf16: run under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, task: Task, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.bf16 = bf16

    def forward(
        self, input_features: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> UtteranceLosses:
        """Losses of a padded batch; arguments as `pad_batch` returns them."""
        core = unwrapped(self.model)
        kind = input_features.device.type
        autocast = torch.autocast(kind, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with autocast:
            output = self.model(input_features=input_features, attention_mask=attention_mask)
            logits = output.logits
            lengths = core.valid_lengths(attention_mask)
        weights = torch.ones(len(lengths), device=logits.device)
        scores = logits.float()
        if self.task == "ctc":
            blank = core.config.pad_token_id
            losses = ops.ctc_loss(logits, lengths, labels, blank=blank, reduction="none")
            losses = losses / (labels != IGNORED_LABEL).sum(-1).clamp(min=1)
        elif self.task == "frames":
            per_frame = F.cross_entropy(
                scores.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
            )
            losses = per_frame.sum(-1)
            weights = (labels != IGNORED_LABEL).sum(-1).float()
        elif self.task == "xvector":
            losses = core.objective(scores, labels, reduction="none")
            scores = core.objective.cosines(scores)
        else:
            losses = F.cross_entropy(scores, labels, reduction="none")
        return UtteranceLosses(losses, weights, scores.detach().argmax(-1), lengths)


def unwrapped(model: nn.Module) -> Any:
    """The model itself, where PEFT has wrapped it."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def non_finite(result: UtteranceLosses) -> dict[int, str]:
    """The positions of losses that are NaN or infinite, and a reason for each."""
    losses: list[float] = result.losses.detach().tolist()
    return {i: f"its loss is {loss}" for i, loss in enumerate(losses) if not math.isfinite(loss)}


def without_unusable(batch: Batch, model: Any, task: Task) -> Batch:
    """Drop the utterances whose loss cannot be finite, before anything is computed.

    These have NaN or infinite features, no frames, more tokens than frames to emit them in (CTC
    needs one for each, and one more between equal neighbours), or too few frames for the TDNN.

    Args:
        batch: what was loaded.
        model: the model, unwrapped.
        task: its task.
    """
    if not batch.utterances:
        return batch
    lengths = [len(utterance.input_features) for utterance in batch.utterances]
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    output_lengths = model.valid_lengths(mask.long()).tolist()
    problems = {}
    for i, (utterance, frames) in enumerate(zip(batch.utterances, output_lengths, strict=True)):
        reason = _problem(utterance, frames, model, task)
        if reason is not None:
            problems[i] = reason
    return batch.without(problems) if problems else batch


def _problem(utterance: Utterance, frames: int, model: Any, task: Task) -> str | None:
    if frames == 0:
        return "it is too short for a single frame"
    if not bool(torch.isfinite(utterance.input_features).all()):
        return "its features hold NaN or infinite values"
    if task == "ctc":
        labels = utterance.labels
        needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
        if needed > frames:
            return f"its {len(labels)} tokens need {needed} frames, and there are {frames}"
    if task == "frames" and bool((utterance.labels == IGNORED_LABEL).all()):
        return "no frame has a label"
    if task == "xvector":
        # One frame has no deviation.
        needed = 2 + sum(layer.context for layer in model.tdnn)
        if frames < needed:
            return f"it has {frames} frames, and the TDNN needs {needed}"
    return None


def stand_in(model: Any, task: Task) -> Utterance:
    """An utterance of zeros that a process computes, without weight, when it has no other.

    Processes that train together have to make the same forward and backward passes.
    """
    frames = 64
    labels = {"ctc": torch.zeros(0), "frames": torch.full((frames,), IGNORED_LABEL)}
    target = labels.get(task, torch.tensor(0)).to(torch.int64)
    width = model.config.feature_projection_input_dim
    return Utterance("stand-in", torch.zeros(frames, width), target)
