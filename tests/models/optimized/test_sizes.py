"""Batches on a CPU have few different numbers of rows, and no answer depends on what fills them."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.reference import CLASSES, TINY, padded_batch, pair, relative_error
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.integrations.transformers import accelerate
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.encoder import Wav2Vec2BertEncoder
from w2vbert_fast.models.optimized import sizes
from w2vbert_fast.models.optimized.int8 import quantize_encoder
from w2vbert_fast.models.optimized.sizes import rounded_up
from w2vbert_fast.ops.cpu import gemm, int8

FEATURES = TINY["feature_projection_input_dim"]
CPU = torch.device("cpu")


class Watching(TorchDispatchMode):
    """Is handed every call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def fast_model(kind: str, **config: Any) -> Any:
    _, model = pair(kind, **config)
    model.use_fast_kernels = True
    return model


def not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "rounded_up", lambda num_rows: num_rows)


def test_there_are_few_numbers_of_rows_and_none_is_much_larger_than_it_must_be() -> None:
    numbers = range(20_000)
    rounded = [rounded_up(number) for number in numbers]
    assert all(n <= r <= max(n, n * 17 / 16) for n, r in zip(numbers, rounded, strict=True))
    assert all(rounded_up(r) == r for r in rounded)
    assert len({r for r in rounded if 1024 < r <= 2048}) == 16
    assert len(set(rounded)) < 200


@pytest.mark.parametrize("lengths", [(5, 3, 0, 4), (4, 4), (2, 6, 0, 0), (6,)])
@pytest.mark.parametrize("left", [False, True])
def test_packing_fills_and_unpacking_leaves_out(lengths: tuple[int, ...], left: bool) -> None:
    mask = torch.arange(6)[None, :] < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    layout = PackedBatch.from_attention_mask(mask, len(lengths), 6, CPU)
    filled = layout.filled(20)
    padded = torch.randn(len(lengths), 6, 2)
    packed = filled.pack(padded)
    assert len(packed) == filled.num_tokens == int(filled.cu_seqlens[-1]) == 20
    assert packed[layout.num_tokens :].eq(0).all()
    for either in (layout, filled):
        assert torch.equal(either.unpack(packed), layout.unpack(layout.pack(padded)))
    valid, behind = layout.valid_part(packed)
    assert torch.equal(valid, layout.valid_part(layout.pack(padded))[0])
    assert behind.num_tokens == len(valid)
    assert filled.valid_lengths == layout.valid_lengths
    assert filled.seqused_k is not None and filled.seqused_k.tolist() == [*layout.valid_lengths]


def test_an_empty_batch_stays_empty() -> None:
    layout = PackedBatch.from_lengths([0, 0], 3, CPU)
    assert layout.filled(8) is layout


@pytest.mark.parametrize("kind", ["as stored", "packed", "int8"])
def test_products_see_few_numbers_of_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fast_model("Wav2Vec2BertForCTC", add_adapter=True, output_hidden_size=32)
    if kind == "packed":
        model.pack_weights()
    if kind == "int8":
        if missing := int8.reasons():
            pytest.skip(missing[0])
        quantize_encoder(model.wav2vec2_bert)
    seen: set[int] = set()

    def note(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noting(x: Any, *others: Any) -> Any:
            seen.add(len(x if isinstance(x, Tensor) else x.values))
            return function(x, *others)

        monkeypatch.setattr(module, name, noting)

    note(gemm, "_takes_onednn")
    note(gemm, "_check_packed")
    note(int8, "_product")
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: (seen.add(len(x)), forward(m, x))[1])
    draw = random.Random(0)
    batches = {tuple(draw.randint(1, 60) for _ in range(6)) for _ in range(60)}
    with torch.inference_mode():
        for lengths in batches:
            model(*padded_batch(lengths, FEATURES))
    assert len({sum(lengths) for lengths in batches}) > 40
    assert all(rounded_up(number) == number for number in seen)
    assert len(seen) < 40


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("lengths", [(45, 30, 22), (300, 23, 41)])
def test_answers_stay_as_they_are(
    kind: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_adapt = kind in ("Wav2Vec2BertModel", "Wav2Vec2BertForCTC", "Wav2Vec2BertForXVector")
    model = fast_model(kind, add_adapter=may_adapt, use_intermediate_ffn_before_adapter=may_adapt)
    features, mask = padded_batch(lengths, FEATURES)
    with torch.inference_mode():
        filled = model(features, mask, output_hidden_states=True)
        pooled = model.encode(features, mask, pool="mean")
        not_filled(monkeypatch)
        plain = model(features, mask, output_hidden_states=True)
        assert relative_error(pooled, model.encode(features, mask, pool="mean")) <= 1e-6
    for got, expected in zip(filled.to_tuple(), plain.to_tuple(), strict=True):
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        assert all(g.shape == e.shape and relative_error(g, e) <= 1e-6 for g, e in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(45, 30, 22), (300, 170, 41), (41, 300)])
def test_no_answer_depends_on_what_fills(
    lengths: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fast_model("Wav2Vec2BertModel").to(dtype)
    features, mask = padded_batch(lengths, FEATURES)
    run_layers = Wav2Vec2BertEncoder.run_layers
    spoilt = 0

    def with_nan(self: Any, x: Tensor, layout: PackedBatch, *others: Any) -> Any:
        nonlocal spoilt
        x = x.clone()
        x[sum(lengths) :] = torch.nan
        spoilt += len(x) - sum(lengths)
        return run_layers(self, x, layout, *others)

    with torch.inference_mode():
        expected = model(features.to(dtype), mask)[0]
        monkeypatch.setattr(Wav2Vec2BertEncoder, "run_layers", with_nan)
        got = model(features.to(dtype), mask)[0]
    assert spoilt > 0
    assert relative_error(got, expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    "why",
    [
        "nothing",
        "gradient",
        "training",
        "maps",
        "hook",
        "hook inside",
        "hook in front",
        "own layer",
        "padded attention",
        "plain",
        "watched",
    ],
)
def test_where_batches_are_filled(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = "relative" if why == "padded attention" else "relative_key"
    model = fast_model("Wav2Vec2BertModel", position_embeddings_type=positions)
    features, mask = padded_batch((40, 11, 18), FEATURES)
    seen: list[int] = []
    projection = type(model.feature_projection)
    forward = projection.forward
    monkeypatch.setattr(projection, "forward", lambda m, x: (seen.append(len(x)), forward(m, x))[1])
    layer = model.encoder.layers[0]
    if why == "training":
        model.train()
    if why == "hook":
        layer.register_forward_hook(lambda *_: None)
    if why == "hook inside":
        layer.ffn1.output_dense.register_forward_hook(lambda *_: None)
    if why == "hook in front":
        model.feature_projection.projection.register_forward_hook(lambda *_: None)
    if why == "own layer":
        model.encoder.layers[0] = type("Own", (type(layer),), {})(model.config).eval()
    if why == "plain":
        model.use_fast_kernels = False
    watching = Watching() if why == "watched" else contextlib.nullcontext()
    with torch.set_grad_enabled(why == "gradient"), watching:
        model(features, mask, output_attentions=why == "maps")
    assert seen == [72 if why == "nothing" else 69]


class Means(Wav2Vec2BertForCTC):
    """A head of a caller's own, which takes `[N, C]` apart by the utterances' lengths."""

    def compute(self, x: Tensor, layout: PackedBatch) -> dict[str, Tensor]:
        return {"logits": self.lm_head(torch.stack([u.mean(0) for u in x.split(layout.lengths)]))}


@torch.no_grad()
def test_a_head_of_a_callers_own_gets_the_utterances_alone() -> None:
    torch.manual_seed(0)
    model = Means(Wav2Vec2BertConfig(**TINY)).eval()
    features, mask = padded_batch((40, 11, 18), FEATURES)
    expected = model(features, mask).logits
    model.use_fast_kernels = True
    assert relative_error(model(features, mask).logits, expected) <= 1e-5


@torch.no_grad()
def test_hooks_do_not_see_what_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sums up what goes into a linear layer, to quantise it say, sees utterances alone."""
    ours = fast_model("Wav2Vec2BertForCTC", add_adapter=True)
    reference, _ = pair("Wav2Vec2BertForCTC", add_adapter=True)
    accelerate(reference)
    seen: list[int] = []
    features, mask = padded_batch((40, 11, 18), FEATURES)
    for model, names in (
        (ours, ("lm_head", "adapter.layers.0.ffn.output_dense")),
        (reference, ("encoder.layers.0.ffn1.output_dense", "adapter.layers.0.self_attn.linear_q")),
    ):
        for name, count in zip(names, (35, 35) if model is ours else (69, 35), strict=True):
            base = model if name == "lm_head" else model.wav2vec2_bert
            part = base.get_submodule(name)
            hook = part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
            model(features, attention_mask=mask)
            hook.remove()
            assert seen == [count], name
            seen.clear()
