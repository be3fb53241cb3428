"""A loss for each utterance, whatever the head, so that one bad utterance can be told and dropped.

The heads' own losses average over a batch. Here every utterance's loss is a sum over its own
targets beside the number that it is to be divided by (`utterance_losses` of the heads), and the
batch's loss is the ratio of the two sums, which is what the reference's heads compute (CTC with the
reduction "mean").
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2vbert_fast.training.data import Batch, Utterance
from w2vbert_fast.training.tasks import Task


class UtteranceLosses(NamedTuple):
    """What `TrainingModule` returns.

    Attributes:
        losses: fp32 `[batch]`.
        weights: fp32 `[batch]`; the batch's loss is `losses.sum() / weights.sum()`.
        predictions: int64; the best token or class of each frame `[batch, T']`, or of the utterance
            `[batch]`.
        lengths: int64 `[batch]`, valid frames among T'.
    """

    losses: Tensor
    weights: Tensor
    predictions: Tensor
    lengths: Tensor


class TrainingModule(nn.Module):
    """A model with its loss in `forward`, which is what DDP and FSDP need to wrap.

    Args:
        model: a model with a head, or such a model within PEFT's.
        autocast: dtype to run in under autocast; None: without.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(
        self, input_features: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> UtteranceLosses:
        """Losses of a padded batch; arguments as `pad_batch` returns them."""
        core = unwrapped(self.model)
        kind = input_features.device.type
        dtype = self.autocast
        with contextlib.nullcontext() if dtype is None else torch.autocast(kind, dtype):
            output = self.model(input_features=input_features, attention_mask=attention_mask)
            lengths = core.valid_lengths(attention_mask)
        losses, weights = core.utterance_losses(output.logits, lengths, labels)
        with torch.no_grad():
            predictions = core.class_scores(output.logits).argmax(-1)
        return UtteranceLosses(losses, weights, predictions, lengths)


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

    These have NaN or infinite features, fewer frames than the head needs, or labels that do not go
    with them (`Task.problem`).

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
    if frames < model.fewest_frames:
        return f"it has {frames} frames, and the model's head needs {model.fewest_frames}"
    return task.problem(utterance.labels, frames)


def stand_in(model: Any, task: Task) -> Utterance:
    """An utterance of zeros that a process computes, without weight, when it has no other.

    Processes that train together have to make the same forward and backward passes.
    """
    frames = 64
    width = model.config.feature_projection_input_dim
    return Utterance("stand-in", torch.zeros(frames, width), task.no_labels(frames))
