"""Initial values: a parameter of this package begins as its module says, or is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.reference import TINY
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForXVector, Wav2Vec2BertModel
from w2vbert_fast.models.heads import AMSoftmaxLoss
from w2vbert_fast.models.initialization import initialize_weights


def test_a_parameter_that_nobody_draws_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AMSoftmaxLoss, "INITIAL", {"other": nn.init.ones_})
    message = r"AMSoftmaxLoss\.INITIAL does not say how its parameter 'weight' begins"
    with pytest.raises(ValueError, match=message):
        Wav2Vec2BertForXVector(Wav2Vec2BertConfig(**TINY))


def test_a_module_says_how_its_parameters_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Wav2Vec2BertModel(Wav2Vec2BertConfig(**{**TINY, "mask_time_prob": 0.05}))
    before = model.encoder.layers[0].self_attn.linear_q.weight.clone()
    monkeypatch.setattr(Wav2Vec2BertModel, "INITIAL", {"masked_spec_embed": nn.init.ones_})
    initialize_weights(model, ["masked_spec_embed"])
    assert model.masked_spec_embed.detach().unique().tolist() == [1.0]
    assert torch.equal(model.encoder.layers[0].self_attn.linear_q.weight, before)
