"""Packed weights: `pack_weights()`, and the linear layers that take what it makes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.reference import relative_error
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC, Wav2Vec2BertModel, ops
from w2vbert_fast.export import export
from w2vbert_fast.models.layers import Wav2Vec2BertConvolutionModule
from w2vbert_fast.models.optimized.packed import (
    PackedConvolutionModule,
    PackedFeedForward,
    PackedLinear,
    PackedSelfAttention,
    StackedLinear,
)
from w2vbert_fast.ops.cpu import capability, gemm

DTYPES = [d for d in (torch.float32, torch.bfloat16) if capability.onednn_linear(d)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="; ".join(capability.reasons()))
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def tensors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((256, 160), (256,), (40, 256), (40,))
    return tuple((torch.randn(shape) / 12).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_bytes", [1 << 30, 50_000])
@torch.no_grad()
def test_products_are_those_of_the_weights(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "_BLOCK_BYTES", block_bytes)
    weight1, bias1, weight2, bias2 = tensors(dtype)
    packed1, packed2 = gemm.pack_weight(weight1), gemm.pack_weight(weight2)
    assert packed1.shape == (256, 160)
    wide = [part.double() for part in (weight1, bias1, weight2, bias2)]
    for tokens in (0, 1, 63, 300):
        x = torch.randn(tokens, 160).to(dtype)
        for activation in (None, "silu", "selu"):
            expected = ops.linear(x.double(), wide[0], wide[1], activation)
            got = gemm.linear(x, packed1, bias1, activation)
            assert got.dtype == dtype
            assert relative_error(got, expected) <= LIMIT[dtype]
        expected = ops.linear_glu(x.double(), wide[0], None)
        assert relative_error(gemm.linear_glu(x, packed1, None), expected) <= LIMIT[dtype]
        expected = ops.feed_forward(x.double(), wide[0], wide[1], "silu", wide[2], wide[3])
        got = gemm.feed_forward(x, packed1, bias1, "silu", packed2, bias2)
        assert relative_error(got, expected) <= LIMIT[dtype]


def test_a_packed_weight_does_not_follow_its_source() -> None:
    weight, x = tensors(torch.float32)[0], torch.randn(7, 160)
    packed = gemm.pack_weight(weight)
    before = gemm.linear(x, packed, None, None)
    weight.zero_()
    assert torch.equal(gemm.linear(x, packed, None, None), before)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"weight has shape \(3,\) on cpu; it must be a matrix"),
        (torch.ones(0, 3), "with elements"),
        (torch.ones(3, 4, device="meta"), "on meta"),
        (torch.ones(3, 4, dtype=torch.float64), "torch.float64, which oneDNN does not multiply"),
    ],
)
def test_weights_that_cannot_be_packed(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gemm.pack_weight(weight)


@pytest.mark.parametrize("x", [torch.ones(2, 159), torch.ones(2, 160, dtype=torch.float64)])
def test_what_does_not_fit_a_packed_weight(x: Tensor) -> None:
    packed = gemm.pack_weight(tensors(torch.float32)[0])
    with pytest.raises(ValueError, match=r"packed weight needs torch.float32 \[tokens, 160\]"):
        gemm.linear(x, packed, None, None)


def load(path: Path, dtype: torch.dtype | str = torch.float32) -> Wav2Vec2BertForCTC:
    return Wav2Vec2BertForCTC.from_pretrained(path, dtype=dtype, use_fast_kernels=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_gives_the_same_answer(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 40, 160)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 23:] = 0
    plain = load(tiny_checkpoint, dtype)
    model = copy.deepcopy(plain).pack_weights()
    packed = {n for n, module in model.named_modules() if isinstance(module, PackedLinear)}
    stacked = {n for n, module in model.named_modules() if isinstance(module, StackedLinear)}
    assert len(packed) == 2 * (5 + 2)  # two layers, of five linear layers and two convolutions
    assert {name.rpartition(".")[2] for name in stacked} == {"linear_q", "linear_k", "linear_v"}
    assert len(stacked) == 2 * 3
    assert all(name.startswith("wav2vec2_bert.encoder.layers.") for name in packed)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(features.to(dtype).double(), mask).logits[0]
        errors = [
            relative_error(m(features.to(dtype), mask).logits[0], exact) for m in (plain, model)
        ]
        assert errors[1] <= max(1.1 * errors[0], 1e-6), errors
        again = copy.deepcopy(model)(features.to(dtype), mask).logits
        assert torch.equal(again, model(features.to(dtype), mask).logits)


@pytest.mark.parametrize("positions", ["rotary", "relative", "relative_key", None])
def test_projections_of_one_input_are_one_product(
    positions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Wav2Vec2BertConfig(
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=1,
        position_embeddings_type=positions,
    )
    torch.manual_seed(0)
    plain = Wav2Vec2BertModel(config).eval()
    plain.use_fast_kernels = True
    model = copy.deepcopy(plain).pack_weights()
    kinds = [type(getattr(model.encoder.layers[0].self_attn, f"linear_{n}")) for n in "qkv"]
    last = PackedLinear if positions == "rotary" else StackedLinear  # another input
    assert kinds == [StackedLinear, StackedLinear, last]

    calls: list[int] = []
    all_outputs = StackedLinear.all_outputs
    monkeypatch.setattr(
        StackedLinear, "all_outputs", lambda self, x: (calls.append(1), all_outputs(self, x))[1]
    )
    x = torch.randn(2, 17, 160)
    with torch.no_grad():
        expected = plain(x)[0]
        assert relative_error(model(x)[0], expected) <= 1e-6
        assert relative_error(copy.deepcopy(model)(x)[0], expected) <= 1e-6
        assert len(calls) == 2
        # Each by itself is right too.
        seen: list[Tensor] = []
        hooked = model.encoder.layers[0].self_attn.linear_k
        hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert relative_error(model(x)[0], expected) <= 1e-6
    assert seen[0].shape == (34, 32)


def test_projections_that_differ_are_packed_one_by_one(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    attention = model.wav2vec2_bert.encoder.layers[0].self_attn
    attention.linear_k.bias = None
    expected = model(x := torch.randn(1, 20, 160)).logits.detach()
    model.pack_weights()
    assert {type(getattr(attention, f"linear_{n}")) for n in "qkv"} == {PackedLinear}
    assert relative_error(model(x).logits, expected) <= 1e-6


def test_blocks_are_swapped_and_stay_the_same_objects(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    layer = model.wav2vec2_bert.encoder.layers[0]
    blocks = (layer.ffn1, layer.self_attn, layer.conv_module)
    seen: list[str] = []
    layer.ffn1.register_forward_hook(lambda *_: seen.append("block"))
    model.pack_weights()
    assert blocks == (layer.ffn1, layer.self_attn, layer.conv_module)
    assert [type(b) for b in blocks] == [
        PackedFeedForward, PackedSelfAttention, PackedConvolutionModule
    ]  # fmt: skip
    x = torch.randn(1, 20, 160)
    with torch.no_grad():
        expected = model(x).logits
        # What is attached to a part later is called, with what the linear layer itself gives.
        outputs: list[Tensor] = []
        first = layer.ffn1.intermediate_dense
        first.register_forward_hook(lambda module, given, output: outputs.append(output))
        assert relative_error(model(x).logits, expected) <= 1e-6
    assert seen == ["block", "block"]
    assert (outputs[0] < -0.5).any(), "silu gives nothing below -0.28"


def test_a_convolution_that_somebody_watches_stays(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    module = model.wav2vec2_bert.encoder.layers[0].conv_module
    module.pointwise_conv2.register_forward_hook(lambda *_: None)
    x = torch.randn(1, 20, 160)
    with torch.no_grad():
        expected = model(x).logits
        model.pack_weights()
        assert type(module) is Wav2Vec2BertConvolutionModule
        assert type(module.pointwise_conv1) is nn.Conv1d
        assert relative_error(model(x).logits, expected) <= 1e-6


def test_layers_that_somebody_changed_stay(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    layer = model.wav2vec2_bert.encoder.layers[0]
    seen: list[int] = []
    layer.ffn1.output_dense.register_forward_hook(lambda *_: seen.append(1))
    model.pack_weights()
    assert type(layer.ffn1.output_dense) is nn.Linear
    assert type(layer.ffn1.intermediate_dense) is PackedLinear
    with torch.no_grad():
        model(torch.randn(1, 20, 160))
    assert seen == [1]


def test_what_a_packed_model_cannot_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint).pack_weights()
    with pytest.raises(ValueError, match=r"is packed by pack_weights\(\) and has no weight"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(ValueError, match="has packed weights; export it as it was before"):
        export(model, tmp_path / "m.pt2", "torch")
    with pytest.raises(ValueError, match=r"packed weight needs torch\.float32"):
        model.double()(torch.randn(1, 20, 160, dtype=torch.float64))


def test_what_cannot_be_packed(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="in training mode"):
        load(tiny_checkpoint).train().pack_weights()
    with pytest.raises(ValueError, match=r"torch\.float64, which oneDNN does not multiply"):
        load(tiny_checkpoint).double().pack_weights()
    with pytest.raises(ValueError, match="the model is on meta"):
        load(tiny_checkpoint).to("meta").pack_weights()
