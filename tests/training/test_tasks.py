"""The tasks of fine-tuning, one a head: every head has its places; what is learnt and scored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.helpers.reference import TINY
from w2vbert_fast import Wav2Vec2BertConfig
from w2vbert_fast.inference.tasks.classify import HEADS
from w2vbert_fast.models import heads
from w2vbert_fast.training.data import Batch, pad_batch
from w2vbert_fast.training.evaluation import Prediction, score
from w2vbert_fast.training.losses import TrainingModule, stand_in, without_unusable
from w2vbert_fast.training.tasks import TASKS

IDS = {"none": 0, "a": 1, "b": 2}
# Of each task: the columns of a row, its target, labels for frames of a second each, and what a
# model that decides so, and one that decides 0, scores.
SEGMENTS = [{"start": 1, "end": 3, "label": "b"}]
KNOWN: dict[str, tuple[dict[str, Any], Any, list[int] | int, float]] = {
    "ctc": ({"text": " a  b "}, "a b", [4, 5], 1.0),
    "classification": ({"label": "b"}, "b", 2, 0.0),
    "xvector": ({"label": "b"}, "b", 2, 0.0),
    "frames": ({"segments": SEGMENTS}, None, [0, 2, 2, 0], 0.5),
}


class Letters:
    """A tokenizer of "a" and "b"."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [{"a": 4, "b": 5}[c] for c in text.replace(" ", "")]}

    def decode(self, ids: list[int]) -> str:
        return " ".join({4: "a", 5: "b"}.get(i, "") for i in ids)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(**{**TINY, "pad_token_id": 0})
    return TASKS[name].model_class(config).train()


def test_every_head_is_trained_classified_with_or_decoded_and_exported() -> None:
    names = set(heads.__all__)
    assert {task.head for task in TASKS.values()} == names
    assert {*HEADS, "Wav2Vec2BertForCTC"} == names
    for task in TASKS.values():
        assert task.model_class.__name__ == task.head
        assert task.model_class.HEAD and task.model_class.EXPORTED


@pytest.mark.parametrize("name", TASKS)
def test_from_the_columns_of_a_row_to_a_score(name: str) -> None:
    task = TASKS[name]
    columns, wanted, ids, of_zeros = KNOWN[name]
    target = task.target(columns, 0.0, 4.0, False)
    assert wanted is None or target == wanted
    middles = torch.arange(4, dtype=torch.float64) + 0.5
    labels = task.labels(target, Letters() if task.transcribes else IDS, middles)
    assert labels.dtype == torch.int64 and labels.tolist() == ids
    if not task.transcribes:
        assert set(task.classes([target])) <= set(IDS)
    found = {}
    for right, decided in ((True, labels), (False, torch.zeros_like(labels))):
        frames = decided.numel()
        outcome = task.outcome(decided, frames, labels, "a b", Letters())
        scores = score([Prediction("x", 2.0, 0.5, outcome)], task)
        assert scores["loss"] == 4.0
        found[right] = scores[task.score]
    best = 0.0 if task.transcribes else 1.0
    assert found == {True: best, False: of_zeros}


@pytest.mark.parametrize("name", TASKS)
def test_what_stands_in_for_an_utterance_can_be_computed(name: str) -> None:
    task, model = TASKS[name], model_of(name)
    utterance = stand_in(model, task)
    result = TrainingModule(model)(**pad_batch([utterance], torch.device("cpu")))
    assert result.losses.dtype == result.weights.dtype == torch.float32
    assert math.isfinite(float(result.losses.detach()))
    (result.losses.sum() * 0.0).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_an_utterance_that_is_too_short_for_the_head_is_left_out(name: str) -> None:
    task, model = TASKS[name], model_of(name)
    whole = stand_in(model, task)
    counts = (model.fewest_frames - 1, model.fewest_frames)
    labels = whole.labels if whole.labels.dim() == 0 else torch.zeros(0, dtype=torch.int64)
    if name == "frames":
        labels = torch.ones(1, dtype=torch.int64)
    short = [type(whole)(f"{n} frames", whole.input_features[:n], labels) for n in counts]
    batch = without_unusable(Batch([0, 1], short, []), model, task)
    assert [u.name for u in batch.utterances] == [f"{counts[1]} frames"]
    assert [s.name for s in batch.skipped] == [f"{counts[0]} frames"]
