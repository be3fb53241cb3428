"""Accelerated CTC models: what decoders find in the padded frames of a batch."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.helpers.reference import padded_batch, pair, relative_error
from tests.integrations.test_integration_transformers import (
    ADAPTER,
    FEATURES,
    always_fast,
    both,
    encoder_of,
    said,
)
from w2vbert_fast.integrations.transformers import accelerate, restore

__all__ = ["always_fast", "said"]

LENGTHS = (37, 21, 4)
BLANK = 5


class Mine(transformers.Wav2Vec2BertForCTC):
    """A user's model, with a method more."""

    def letters(self, x: Tensor, mask: Tensor) -> Tensor:
        return self(x, attention_mask=mask).logits.argmax(-1)


def assert_blank_behind(logits: Tensor, reference: Any, x: Tensor) -> None:
    """Each utterance as the reference answers it alone, and nothing but blanks behind it."""
    sure = 100 * torch.eye(logits.shape[2])[BLANK]
    for row, length in enumerate(LENGTHS):
        alone = reference(x[row : row + 1, :length]).logits[0]
        assert relative_error(logits[row, : len(alone)], alone) <= 1e-5
        padded = logits[row, len(alone) :]
        assert torch.equal(padded, sure.expand_as(padded))


@pytest.mark.parametrize("config", [{}, ADAPTER], ids=["plain", "adapter"])
@torch.no_grad()
def test_padded_frames_are_the_blank(config: dict[str, Any], always_fast: None) -> None:
    reference, fast = both(pad_token_id=BLANK, **config)
    x, mask = padded_batch(LENGTHS, FEATURES)
    labels = torch.tensor([[1, 2], [3, -100], [4, -100]])
    assert_blank_behind(fast(x, attention_mask=mask).logits, reference, x)
    for options in ({}, {"labels": labels}):
        output = fast(x, mask, return_dict=False, **options)
        assert_blank_behind(output[len(options)], reference, x)
    assert output[0].dim() == 0  # the loss is not taken for logits
    assert relative_error(fast(x).logits, reference(x).logits) <= 1e-5


@torch.no_grad()
def test_padding_in_front(always_fast: None) -> None:
    reference, fast = both(pad_token_id=BLANK)
    x, mask = padded_batch(LENGTHS, FEATURES)
    rows = list(zip(x, LENGTHS, strict=True))
    behind = torch.stack([row.roll(37 - length, 0) for row, length in rows])
    logits = fast(behind, attention_mask=mask.flip(1)).logits
    for row, (features, length) in enumerate(rows):
        alone = reference(features[None, :length]).logits[0]
        assert relative_error(logits[row, 37 - length :], alone) <= 1e-5
        assert logits[row, : 37 - length].argmax(-1).eq(BLANK).all()


@torch.no_grad()
def test_blank_where_the_original_code_runs(said: list[str]) -> None:
    reference, fast = both(pad_token_id=BLANK, attn_implementation="eager")
    x, mask = padded_batch(LENGTHS, FEATURES)
    logits = fast(x, attention_mask=mask, output_attentions=True).logits
    assert said == ["attention maps are asked for"]
    assert_blank_behind(logits, reference, x)


@torch.no_grad()
def test_a_model_without_a_blank_keeps_its_logits(always_fast: None) -> None:
    _, fast = both(pad_token_id=None)
    x, mask = padded_batch(LENGTHS, FEATURES)
    logits = fast(x, attention_mask=mask).logits
    assert torch.equal(logits[2, 4:], logits[2, 3].expand_as(logits[2, 4:]))


def test_gradients_end_where_the_utterance_does(always_fast: None) -> None:
    _, fast = both(pad_token_id=BLANK)
    x, mask = padded_batch(LENGTHS, FEATURES)
    x.requires_grad_()
    fast(x, attention_mask=mask).logits.sum().backward()
    assert x.grad is not None and x.grad[~mask.bool()].eq(0).all()
    assert x.grad[mask.bool()].ne(0).any(-1).all()


@torch.no_grad()
def test_models_that_derive_from_transformers(always_fast: None) -> None:
    reference, _ = pair("Wav2Vec2BertForCTC", pad_token_id=BLANK)
    mine = Mine(reference.config).eval()
    mine.load_state_dict(reference.state_dict())
    x, mask = padded_batch(LENGTHS, FEATURES)
    assert accelerate(mine) is mine and isinstance(mine, Mine) and type(mine).__name__ == "Mine"
    for model in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(model) is type(mine) and type(encoder_of(model)) is type(encoder_of(mine))
        assert_blank_behind(model(x, attention_mask=mask).logits, reference, x)
        assert model.letters(x, mask)[2, 4:].eq(BLANK).all()
    assert type(restore(mine)) is Mine


def test_the_signature_is_the_references() -> None:
    reference, fast = both()
    assert inspect.signature(type(fast).forward) == inspect.signature(type(reference).forward)
    assert transformers.utils.generic.find_labels(type(fast)) == ["labels"]
