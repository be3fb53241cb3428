"""`from_pretrained(..., dtype="int8")`: what is quantised, how close it stays, what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.reference import relative_error
from w2vbert_fast import Wav2Vec2BertForCTC
from w2vbert_fast.models.optimized.int8 import (
    Int8FeedForward,
    Int8Linear,
    Int8SelfAttention,
    WideLinear,
)
from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.cpu import int8

VNNI = torch.cpu._is_vnni_supported()
needs_int8 = pytest.mark.skipif(bool(int8.reasons()), reason="this CPU has no 8-bit linear layer")


def load(path: Path, dtype: str | None = "int8") -> Wav2Vec2BertForCTC:
    return Wav2Vec2BertForCTC.from_pretrained(path, dtype=dtype, use_fast_kernels=True)


@needs_int8
def test_the_encoders_linear_layers_are_quantised(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    quantised = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    kinds = (nn.Linear, WideLinear)
    plain = {name for name, module in model.named_modules() if type(module) in kinds}
    assert len(quantised) == 2 * 8  # two layers, of two feed-forward blocks and four projections
    assert all(name.startswith("wav2vec2_bert.encoder.layers.") for name in quantised)
    assert plain == {"wav2vec2_bert.feature_projection.projection", "lm_head"}
    assert not model.training
    layer = model.wav2vec2_bert.encoder.layers[1]
    assert {type(layer.ffn1), type(layer.ffn2)} == {Int8FeedForward}
    assert type(layer.self_attn) is Int8SelfAttention


@needs_int8
@pytest.mark.parametrize("native", [False, True])
def test_the_rest_is_in_bfloat16_where_the_cpu_has_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(dispatch, "cpu_multiplies_bfloat16", lambda: native)
    model = load(tiny_checkpoint)
    expected = torch.bfloat16 if native else torch.float32
    assert model.dtype == model.config.dtype == expected
    head = {"lm_head.weight", "lm_head.bias"}
    dtypes = {n: parameter.dtype for n, parameter in model.named_parameters()}
    assert {dtypes[name] for name in dtypes.keys() - head} == {expected}
    # bfloat16 logits tie. The head is neither rounded nor does it round.
    plain = load(tiny_checkpoint, None).lm_head
    assert torch.equal(model.lm_head.weight, plain.weight)
    hidden = torch.randn(3, plain.in_features).to(expected)
    with torch.no_grad():
        assert torch.equal(model.lm_head(hidden), plain(hidden.float()))
    # The weights were quantised before the rest was rounded.
    name = "encoder.layers.0.ffn1.intermediate_dense"
    weight = load(tiny_checkpoint, None).base_model.get_submodule(name).weight.detach()
    scale = model.base_model.get_submodule(name).matrix.scale
    torch.testing.assert_close(scale, weight.abs().amax(1) / (127 if VNNI else 63))


class Rounded(nn.Module):
    """A linear layer with rounded weights and activations, in float64."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight), linear.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return (rounded(x) @ self.weight.T + self.bias).float()


def rounded(x: Tensor) -> Tensor:
    """Each row in whole multiples of a 127th of its largest magnitude."""
    x = x.detach().double()
    unit = x.abs().amax(-1, keepdim=True) / 127
    return (x / unit).round() * unit


@needs_int8
def test_logits_are_those_of_rounded_weights_and_activations(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "cpu_multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    features = torch.randn(2, 40, 160)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 23:] = 0
    plain = load(tiny_checkpoint, None)
    with torch.no_grad():
        unrounded = plain(features, mask).logits[0]
        for layer in plain.base_model.encoder.layers:
            for name, module in list(layer.named_modules()):
                if type(module) is nn.Linear:
                    path, _, leaf = name.rpartition(".")
                    setattr(layer.get_submodule(path), leaf, Rounded(module))
        expected = plain(features, mask).logits
        model = load(tiny_checkpoint)
        got = model(features, mask).logits
        errors = [relative_error(logits[0], expected[0]) for logits in (got, unrounded[None])]
        # A value on the border between two levels falls to one side or the other.
        assert errors[0] <= 0.2 * errors[1], errors
        assert relative_error(model(features[1:, :23]).logits[0], got[1, :23]) <= 1e-5
        low = model.bfloat16()(features.bfloat16(), mask).logits
    assert low.dtype == torch.bfloat16
    assert not low.isnan().any()


@needs_int8
def test_what_an_int8_model_cannot_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint)
    with pytest.raises(ValueError, match="is quantised to int8 and has no weight"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.ffn1\.intermediate_dense is quant"):
        model.state_dict()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)
    features = torch.randn(1, 20, 160, dtype=model.dtype)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(features).logits, model(features).logits)


def test_int8_is_for_the_cpu(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8' and device is 'meta'; int8 needs the CP"):
        Wav2Vec2BertForCTC.from_pretrained(tiny_checkpoint, dtype="int8", device="meta")


def test_a_cpu_without_int8_is_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "reasons", lambda: ("no oneDNN",))
    with pytest.raises(ValueError, match="dtype is 'int8', which cannot run here: no oneDNN"):
        load(tiny_checkpoint)
