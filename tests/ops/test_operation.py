"""The registered operations, `torch.ops.w2vbert.*`: schema, fake kernels, dispatch, compilation."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import w2vbert_fast
from tests.helpers.reference import TINY, padded_batch, pair, relative_error
from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops import operation as declaration
from w2vbert_fast.ops.dispatch import force_triton, has_triton
from w2vbert_fast.ops.examples import example
from w2vbert_fast.ops.gemm import FUSED_ACTIVATIONS
from w2vbert_fast.ops.operation import OPERATIONS

VARIANTS: dict[str, tuple[str, dict[int, Any]]] = {
    "linear, gelu": ("linear", {3: "gelu"}),
    "linear_glu, no bias": ("linear_glu", {2: None}),
    "feed_forward, no bias": ("feed_forward", {2: None}),
    "layer norm of a sum that nobody else reads": ("residual_layer_norm_backward", {0: None}),
    "double norm of a whole sum": ("residual_double_layer_norm_backward", {4: 1.0}),
    "linear, weight frozen": ("linear_backward", {4: "gelu", 5: [True, False, True]}),
    "linear_glu, no bias, backward": ("linear_glu_backward", {3: None}),
    "feed_forward, weight frozen": (
        "feed_forward_backward",
        {7: [True, False, True, True, True]},
    ),
    "attention, dropout": ("shaw_attention_backward", {12: 0.5, 13: torch.tensor([3, 4])}),
}
"""An operation and what replaces its example's arguments at these places."""


def arguments(name: str) -> tuple[Any, ...]:
    operation, changes = VARIANTS.get(name, (name, {}))
    return tuple(changes.get(i, value) for i, value in enumerate(example(operation)))


NAMES = sorted(OPERATIONS)
DIFFERENTIABLE = [name for name in NAMES if f"{name}_backward" in OPERATIONS]


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_opcheck(name: str) -> None:
    operation = getattr(torch.ops.w2vbert, VARIANTS.get(name, (name,))[0]).default
    result = torch.library.opcheck(operation, arguments(name))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["linear", "linear_glu", "feed_forward"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_exactly_the_gradients_that_are_asked_for(name: str, has_bias: bool) -> None:
    operation = getattr(torch.ops.w2vbert, f"{name}_backward").default
    *given, needs = arguments(f"{name}_backward")
    for i, weight in enumerate(given[:-1]):
        if i > 1 and isinstance(weight, Tensor) and weight.dim() == 2:
            given[i + 1] = torch.randn(len(weight)) if has_bias else None
    tensors = [arg for arg in given[1:] if arg is None or isinstance(arg, Tensor)]
    found = iter(operation(*given, [True] * len(needs)))
    grads = [None if tensor is None else next(found) for tensor in tensors]
    for wanted in itertools.product([False, True], repeat=len(needs)):
        expected = [grad for grad, asked in zip(grads, wanted, strict=True) if asked]
        expected = [grad for grad in expected if grad is not None]
        got = operation(*given, list(wanted))
        assert len(got) == len(expected)
        assert all(map(torch.equal, got, expected))
        torch.library.opcheck(operation, (*given, list(wanted)), test_utils="test_faketensor")


def test_every_registered_operation_is_checked() -> None:
    registered = {
        schema.name.removeprefix("w2vbert::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("w2vbert::")
    }
    assert registered == set(NAMES) and len(DIFFERENTIABLE) >= 8


@pytest.mark.skipif(not has_triton(), reason="no Triton that compiles the kernels")
def test_every_launcher_that_an_operation_names_exists() -> None:
    launchers = [op.triton for op in OPERATIONS.values() if isinstance(op.triton, str)]
    assert "csrc_triton.norm:layer_norm_backward" in launchers
    for launcher in launchers:
        module, _, name = launcher.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), launcher


def test_packed_greedy_decoding_equals_the_padded_form() -> None:
    torch.manual_seed(0)
    lengths = [5, 0, 1, 9]
    padded = torch.randn(4, 9, 4)
    layout = PackedBatch.from_lengths(lengths, 9, "cpu")
    tokens, counts = torch.ops.w2vbert.ctc_greedy(layout.pack(padded), layout.cu_seqlens, 2)
    expected = ops.greedy_decode(padded, torch.tensor(lengths), blank=2)
    for row, start in enumerate(layout.cu_seqlens[:-1].tolist()):
        assert tokens[start : start + int(counts[row])].tolist() == expected[row]
        assert (tokens[start + int(counts[row]) : start + lengths[row]] == -1).all()


def test_log_sum_exp_of_attention() -> None:
    tensors = arguments("shaw_attention")
    query, key, value = (x.double() for x in tensors[:3])
    cu_seqlens, longest, embedding, left, right = *tensors[3:5], tensors[5].double(), *tensors[6:]
    output, log_sum_exp = torch.ops.w2vbert.shaw_attention(
        query, key, value, cu_seqlens, longest, embedding, left, right
    )
    for start, end in ((0, 5), (5, 12)):
        for head in range(2):
            q, k = query[start:end, head], key[start:end, head]
            frames = torch.arange(end - start)
            distance = (frames[None] - frames[:, None]).clamp(-left, right) + left
            scores = (q @ k.T + torch.einsum("id,ijd->ij", q, embedding[distance])) / 2
            assert log_sum_exp.dtype == torch.float32
            expected = scores.logsumexp(1).float()
            torch.testing.assert_close(log_sum_exp[head, start:end], expected)
            expected = scores.softmax(1) @ value[start:end, head]
            torch.testing.assert_close(output[start:end, head], expected)


@pytest.mark.parametrize("name", ["Wav2Vec2BertModel", "Wav2Vec2BertForCTC"])
def test_fast_path_gives_the_same_answers(name: str) -> None:
    _, ours = pair(name, add_adapter=True, output_hidden_size=24, hidden_act="mish")
    features, mask = padded_batch((31, 24, 13), TINY["feature_projection_input_dim"])
    with torch.no_grad():
        expected = ours(features, mask)[0]
        ours.use_fast_kernels = True
        assert all(layer.ffn1.use_fast_kernels for layer in ours.base_model.encoder.layers)
        assert relative_error(ours(features, mask)[0], expected) <= 1e-6


def test_fast_path_calls_the_registered_operations() -> None:
    _, ours = pair("Wav2Vec2BertModel")
    features, mask = padded_batch((31, 24), TINY["feature_projection_input_dim"])
    with torch.profiler.profile() as profile, torch.no_grad():
        ours.use_fast_kernels = True
        ours(features, mask)
    calls = {event.key: event.count for event in profile.key_averages()}
    expected = {
        "layer_norm": 1 + 1,  # of the features, and in front of the first layer
        "residual_layer_norm": 3 + 4,
        "residual_double_layer_norm": 1,
        "linear": 1 + 2 * 5,  # of the features; query, key and value are three on a CPU
        "feed_forward": 2 * 2,
        "linear_glu": 2,
        "conv_norm_act": 2,
        "shaw_attention": 2,
    }
    assert {name: calls[f"w2vbert::{name}"] for name in expected} == expected


def test_an_encoder_layer_compiles_without_a_graph_break() -> None:
    _, ours = pair("Wav2Vec2BertModel")
    ours.use_fast_kernels = True
    layer = ours.encoder.layers[0]

    def run(x: Tensor, layout: PackedBatch) -> Tensor:
        return layer(x, layout)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for lengths in ((5, 7), (3, 9, 1)):
            layout = PackedBatch.from_lengths(lengths, max(lengths), "cpu")
            x = torch.randn(sum(lengths), TINY["hidden_size"])
            torch.testing.assert_close(compiled(x, layout), run(x, layout))


def test_triton_cannot_be_forced_outside_its_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), force_triton():
        pass


def test_the_epilogues_are_those_that_the_kernels_have() -> None:
    from csrc_triton.functions import ACTIVATIONS

    assert {*FUSED_ACTIVATIONS, "linear"} == ACTIVATIONS.keys()


def test_plain_path_is_the_default() -> None:
    model = w2vbert_fast.Wav2Vec2BertModel(w2vbert_fast.Wav2Vec2BertConfig(**TINY))
    assert model.use_fast_kernels is False
    assert ops.layer_norm(torch.ones(1, 2), torch.ones(2), torch.zeros(2), 1e-5).abs().sum() == 0


def test_a_call_is_watched_by_compilers_modes_profilers_transforms_and_subclasses() -> None:
    x = torch.ones(2, 3)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert not declaration.is_watched((x, nn.Parameter(x), None, "silu", 1e-5, [x]))
            for watcher in (FlopCounterMode(display=False), torch.profiler.profile()):
                with watcher:
                    assert declaration.is_watched((x,))
            with FakeTensorMode():
                assert declaration.is_watched((torch.empty(2, 3),))
            assert declaration.is_watched((x, torch.nn.Buffer(x).as_subclass(Special)))
            rows = torch.vmap(lambda row: row + float(not declaration.is_watched((row,))))(x)
            assert torch.equal(rows, x)
            assert not declaration.is_watched((x,))


class Special(Tensor):
    pass


@pytest.mark.parametrize("name", ["layer_norm", "residual_layer_norm", "conv_norm_act", "linear"])
def test_a_call_that_nobody_watches_is_recorded_as_one_that_somebody_does(name: str) -> None:
    given = example(name)
    found = []
    for call in (OPERATIONS[name].call, getattr(torch.ops.w2vbert, name)):
        leaves = [
            value.clone().requires_grad_()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value in given
        ]
        results = call(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        assert all(result.requires_grad for result in results)
        sum(float(i + 1) * result.square().sum() for i, result in enumerate(results)).backward()
        grads = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor)]
        found.append([*(result.detach() for result in results), *grads])
    assert type(results[0].grad_fn).__name__ != "RecordedBackward"
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
