"""A head is one class: what all heads share works for one that this package does not have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.reference import TINY, padded_batch
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.heads import Wav2Vec2BertHead
from w2vbert_fast.models.outputs import HiddenStates, ModelOutput
from w2vbert_fast.models.pooling import without_padding

LENGTHS = (20, 7)


@dataclass(eq=False)
class PitchOutput(ModelOutput):
    """As `HeadOutput`, with a field of its own."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    voiced: Tensor | None = None
    hidden_states: HiddenStates | None = None
    attentions: HiddenStates | None = None


class Pitch(Wav2Vec2BertHead[PitchOutput]):
    """One number a frame, and whether it is above zero."""

    OUTPUT = PitchOutput
    HEAD = ("to_pitch",)
    EXPORTED = ("logits", "lengths")
    MAY_HAVE_ADAPTER = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        self.to_pitch = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        logits = layout.unpack(self.to_pitch(x))
        return {"logits": logits, "voiced": logits > 0}

    def loss(self, logits: Tensor, labels: Tensor, layout: PackedBatch) -> Tensor:
        return F.mse_loss(layout.pack(logits)[:, 0], layout.pack(labels))

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return without_padding(self.to_pitch(x), tokens), mask.sum(1)


def model(**fields: object) -> Pitch:
    torch.manual_seed(0)
    return Pitch(Wav2Vec2BertConfig(**{**TINY, **fields})).eval()


@pytest.mark.parametrize("mixes", [False, True])
def test_forward_and_loss(mixes: bool) -> None:
    ours = model(use_weighted_layer_sum=mixes)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    labels = torch.randn(mask.shape)
    with torch.no_grad():
        output = ours(features, mask, labels, output_hidden_states=True)
        states = output.hidden_states
        x = states[-1]
        if mixes:
            x = torch.stack(states).mean(0)  # all weigh the same at first
        expected = ours.to_pitch(x) * mask[..., None]
        torch.testing.assert_close(output.logits, expected)
        valid = mask.bool()
        loss = F.mse_loss(expected[..., 0][valid], labels[valid])
    torch.testing.assert_close(output.loss, loss)
    assert list(output) == ["loss", "logits", "voiced", "hidden_states"]
    plain = ours(features, mask, return_dict=False)
    assert torch.equal(plain[0], output.logits) and torch.equal(plain[1], output.voiced)
    padded = ours.padded_outputs(x, mask.bool(), mask.bool())
    torch.testing.assert_close(padded[0], output.logits)
    assert padded[1].tolist() == list(LENGTHS)


def test_an_adapter_is_refused_where_a_head_takes_none() -> None:
    with pytest.raises(ValueError, match=r"config.add_adapter is True; Pitch works without"):
        model(add_adapter=True)


def test_its_weights_are_left_out_of_another_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = model()
    ours.save_pretrained(tmp_path)
    again = Pitch.from_pretrained(tmp_path)
    assert torch.equal(again.to_pitch.weight, ours.to_pitch.weight)
    other = Wav2Vec2BertForCTC.from_pretrained(tmp_path, vocab_size=9)
    assert "has no use for to_pitch" in caplog.text
    key = "layers.0.self_attn.linear_k.weight"
    assert torch.equal(
        other.base_model.encoder.get_parameter(key), ours.base_model.encoder.get_parameter(key)
    )
