"""Weights of query, key and value in one buffer: never out of date, and invisible to others.

The launcher is replaced by PyTorch here: these tests look at which memory it is given, and
`tests/kernels/test_encoder.py` runs the kernel.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csrc_triton.gemm
import w2vbert_fast
from tests.helpers.reference import TINY, padded_batch, pair, relative_error
from w2vbert_fast.models.optimized import stacked
from w2vbert_fast.models.optimized.stacked import lay_end_to_end
from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.cpu import gemm as cpu
from w2vbert_fast.ops.gemm import lie_end_to_end

LENGTHS = (33, 1, 18)

# Rows of the weight of every product.
products: list[int] = []


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight, bias)
    products.append(len(weight))
    y = y if activation is None else w2vbert_fast.ops.get_activation(activation)(y)
    return y if out is None else out.copy_(y)


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Linear layers run as on a device with Triton kernels."""
    monkeypatch.setattr(dispatch, "implementation", lambda tensor: "triton")
    monkeypatch.setattr(csrc_triton.gemm, "linear", launch)
    monkeypatch.setattr(csrc_triton.gemm, "linear_glu", w2vbert_fast.ops.linear_glu)
    for name, limit in (
        ("attention", "MAX_TRITON_HEAD_SIZE"),
        ("conv", "MAX_TRITON_CHANNELS"),
        ("norm", "MAX_TRITON_WIDTH"),
    ):
        monkeypatch.setattr(f"w2vbert_fast.ops.{name}.{limit}", 0)
    monkeypatch.setattr(stacked, "on_triton_device", lambda tensor: True)
    products.clear()
    yield


def run(ours: nn.Module, fast: bool = True) -> Tensor:
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    ours.use_fast_kernels = fast
    with torch.no_grad():
        output: Tensor = ours(features, mask)[0]
    return output


def projections(ours: nn.Module, kind: str = "weight") -> list[nn.Parameter]:
    attention = ours.base_model.encoder.layers[0].self_attn
    return [getattr(attention, f"linear_{name}")._parameters[kind] for name in "qkv"]


def test_projections_are_laid_end_to_end_when_kernels_are_switched_on() -> None:
    _, ours = pair("Wav2Vec2BertModel")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    assert not lie_end_to_end(projections(ours))
    run(ours, fast=False)
    assert not lie_end_to_end(projections(ours)), "without kernels the weights are left alone"
    ours.use_fast_kernels = True
    for kind in ("weight", "bias"):
        parts = projections(ours, kind)
        assert lie_end_to_end(parts)
        assert parts[0].untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    products.clear()
    run(ours)
    width, rows = TINY["hidden_size"], [len(part) for part in projections(ours)]
    assert rows == [width] * 3
    assert products.count(3 * width) == TINY["num_hidden_layers"]
    after = ours.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_projections_are_laid_when_moved_or_loaded_and_never_by_a_forward_pass() -> None:
    _, ours = pair("Wav2Vec2BertModel")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    ours.use_fast_kernels = True
    for how in ("conversion and back", "load_state_dict", "load_state_dict, assigned"):
        ours = change(how, ours)
        assert lie_end_to_end(projections(ours)) and lie_end_to_end(projections(ours, "bias")), how
    assert lie_end_to_end(projections(ours.to(torch.float16)))
    ours = change("other data", ours.float())
    addresses = [part.data_ptr() for part in projections(ours)]
    with torch.no_grad():
        ours(features, mask)
    assert [part.data_ptr() for part in projections(ours)] == addresses
    _, plain = pair("Wav2Vec2BertModel")
    assert not lie_end_to_end(projections(plain.half().float())), "without kernels nothing is laid"


def change(how: str, ours: nn.Module) -> nn.Module:
    """Gives the first layer's key projection other values, in one of the ways people do."""
    key = ours.base_model.encoder.layers[0].self_attn.linear_k
    new = torch.randn(key.weight.shape, generator=torch.Generator().manual_seed(5)) / 7
    if how == "optimiser step":
        key.weight.grad = new
        torch.optim.SGD([key.weight], lr=1.0).step()
    elif how == "load_state_dict":
        state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        state["encoder.layers.0.self_attn.linear_k.weight"] = new
        ours.load_state_dict(state)
    elif how == "load_state_dict, assigned":
        state = dict(ours.state_dict())
        state["encoder.layers.0.self_attn.linear_k.weight"] = new
        ours.load_state_dict(state, assign=True)
    elif how == "copy into data":
        key.weight.data.copy_(new)
    elif how == "other data":
        key.weight.data = new
    elif how == "other parameter":
        key.weight = nn.Parameter(new)
    elif how == "other module":
        replaced = nn.Linear(*key.weight.shape)
        replaced.weight = nn.Parameter(new)
        ours.base_model.encoder.layers[0].self_attn.linear_k = replaced
    elif how == "low-rank update beside it":

        class Adapted(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + x @ new.T

        adapted = Adapted(*key.weight.shape)
        adapted.load_state_dict(key.state_dict())
        ours.base_model.encoder.layers[0].self_attn.linear_k = adapted
    elif how == "conversion and back":
        ours = ours.half().float()
    elif how == "copy of the model":
        ours = copy.deepcopy(ours)
        ours.base_model.encoder.layers[0].self_attn.linear_k.weight.data.copy_(new)
    return ours


@pytest.mark.parametrize(
    "how",
    [
        "optimiser step",
        "load_state_dict",
        "load_state_dict, assigned",
        "copy into data",
        "other data",
        "other parameter",
        "other module",
        "low-rank update beside it",
        "conversion and back",
        "copy of the model",
    ],
)
def test_changed_weights_count_at_once(how: str) -> None:
    _, ours = pair("Wav2Vec2BertModel")
    before = run(ours)
    original = ours
    ours = change(how, ours)
    got, expected = run(ours), run(ours, fast=False)
    assert relative_error(got, expected) <= 1e-5
    assert relative_error(got, before) > 1e-5
    if how == "copy of the model":
        assert torch.equal(run(original), before)
    if how != "low-rank update beside it":
        assert lie_end_to_end(projections(ours)), "switching on lays them again"


def test_what_cannot_be_arranged_again_is_not_out_of_date(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, ours = pair("Wav2Vec2BertModel")
    run(ours)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ours = change("other data", ours)
    assert not lie_end_to_end(projections(ours))
    assert relative_error(run(ours), run(ours, fast=False)) <= 1e-5
    assert not lie_end_to_end(projections(ours))


def test_training_goes_on_after_inference() -> None:
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    labels = torch.tensor([[1, 2], [3, -100], [4, 4]])
    losses: list[list[float]] = [[], []]
    for infer in (False, True):
        _, ours = pair("Wav2Vec2BertForCTC")
        optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
        for _ in range(3):
            if infer:
                run(ours)
                ours.use_fast_kernels = False
            loss = ours(features, mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[infer].append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_projections_are_trained_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csrc_triton.gemm, "linear_backward", cpu.linear_backward)
    _, ours = pair("Wav2Vec2BertModel")
    ours.use_fast_kernels = True
    attention = ours.base_model.encoder.layers[0].self_attn
    layers = [attention.linear_q, attention.linear_k, attention.linear_v]
    parameters = projections(ours) + projections(ours, "bias")
    x = torch.randn(5, TINY["hidden_size"], requires_grad=True)
    ways = torch.randn(3, 5, TINY["hidden_size"])

    def loss(outputs: list[Tensor]) -> Tensor:
        return sum((way * y.square()).sum() for way, y in zip(ways, outputs, strict=True))

    def rows() -> list[int]:
        products.clear()
        attention._project(x, *layers)
        return list(products)

    width = TINY["hidden_size"]
    assert rows() == [3 * width]
    wanted = [x, *parameters]
    expected = torch.autograd.grad(loss([F.linear(x, p.weight, p.bias) for p in layers]), wanted)
    found = torch.autograd.grad(loss(attention._project(x, *layers)), wanted)
    torch.testing.assert_close(found, expected)
    for parameter in parameters:
        outputs = attention._project(x, *layers)
        with torch.no_grad():
            parameter.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(outputs).backward()
    layers[1].bias.requires_grad_(False)
    assert rows() == [width] * 3, "one is not trained"
    layers[1].bias.requires_grad_(True)
    layers[2].weight.data = layers[2].weight.detach().clone()
    assert rows() == [width] * 3, "one lies elsewhere"


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_packed_model_is_saved_and_loaded_by_both(tmp_path: Path, shards: str) -> None:
    import transformers

    reference, ours = pair("Wav2Vec2BertForCTC")
    run(ours)
    assert lie_end_to_end(projections(ours))
    ours.save_pretrained(tmp_path, max_shard_size=shards)
    for library in (w2vbert_fast, transformers):
        loaded = library.Wav2Vec2BertForCTC.from_pretrained(tmp_path)
        state = loaded.state_dict()
        assert state.keys() == reference.state_dict().keys()
        for name, tensor in reference.state_dict().items():
            assert torch.equal(state[name], tensor), name
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "by hand.safetensors")
    torch.save(ours, tmp_path / "whole.pt")
    unpickled = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert lie_end_to_end(projections(unpickled))
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), unpickled):
        assert torch.equal(run(again), run(ours))


@pytest.mark.parametrize("case", ["view of more", "shared", "distributed", "other dtype"])
def test_memory_of_others_is_left_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    parts = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    if case == "view of more":
        parts[1] = nn.Parameter(torch.randn(8, 6)[:4])
    elif case == "shared":
        parts[2].share_memory_()
    elif case == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    else:
        parts[0] = nn.Parameter(torch.randn(4, 6, dtype=torch.float16))
    addresses = [part.data_ptr() for part in parts]
    assert not lay_end_to_end(parts)
    assert [part.data_ptr() for part in parts] == addresses
    if case != "other dtype":
        x = torch.randn(5, 6)
        with torch.no_grad():
            got = w2vbert_fast.ops.linear_stacked(x, parts, [], fast=True)
            torch.testing.assert_close(got, torch.cat([x @ part.T for part in parts], 1))


def test_neighbours_by_chance_are_not_one_buffer() -> None:
    buffer = torch.randn(12, 6)
    assert lie_end_to_end(buffer.split(4))
    assert not lie_end_to_end([buffer[:4], buffer[5:9]])
    assert not lie_end_to_end([buffer[4:8], buffer[:4]])
    assert not lie_end_to_end([buffer[:4, :3], buffer[4:8, :3]])
