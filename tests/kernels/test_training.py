"""A tiny encoder trained on the Triton kernels, in their interpreter, against the plain path."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.reference import TINY, padded_batch, pair, relative_error
from tests.ops.test_gradients import Calls, check, gradients, leaf
from tests.ops.test_operation import DIFFERENTIABLE, arguments
from w2vbert_fast import ops
from w2vbert_fast.ops.dispatch import force_triton

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

FEATURES = TINY["feature_projection_input_dim"]
LENGTHS = (33, 1, 18)
STILL = {"apply_spec_augment": False}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_operations(name: str) -> None:
    with force_triton():
        check(name, arguments(name), 5e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name: str) -> None:
    operation = getattr(torch.ops.w2vbert, name).default
    with force_triton():
        args = tuple(leaf(arg) for arg in arguments(name))
        # Interpreted kernels cannot be traced, so the tests that trace are left out.
        utilities = ("test_schema", "test_autograd_registration")
        result = torch.library.opcheck(operation, args, test_utils=utilities)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_gradient_that_a_sum_expanded(name: str) -> None:
    operation = getattr(torch.ops.w2vbert, name)
    inputs = tuple(leaf(arg) for arg in arguments(name))
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    results = []
    for expanded in (True, False):
        with force_triton():
            found = torch.utils._pytree.tree_leaves(operation(*inputs))
            outputs = [y for y in found if y.requires_grad]
            ones = [y.new_ones(()).expand(y.shape) for y in outputs]
            given = ones if expanded else [one.contiguous() for one in ones]
            results.append(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_attention_without_the_log_sum_exp_computes_it_again() -> None:
    args = arguments("shaw_attention")
    results = []
    for keep in (True, False):
        with force_triton():
            found = gradients(
                lambda *a, keep=keep: torch.ops.w2vbert.shaw_attention(*a, None, keep),
                tuple(map(leaf, args)),
            )
        results.append(found)
    for kept, computed in zip(*results, strict=True):
        assert torch.equal(kept, computed)


def step(model: nn.Module) -> list[Tensor | None]:
    """The gradient of every parameter of one step on a padded batch."""
    features, mask = padded_batch(LENGTHS, FEATURES)
    model.zero_grad()
    torch.manual_seed(3)
    output = model(features, mask)[0]
    generator = torch.Generator().manual_seed(5)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


CONFIGS: dict[str, dict[str, Any]] = {
    "relative_key": {},
    "rotary": {"position_embeddings_type": "rotary", "num_hidden_layers": 1},
    "relative": {"position_embeddings_type": "relative", "num_hidden_layers": 1},
    "checkpointing": {"num_hidden_layers": 1},
    "layerdrop": {"layerdrop": 0.5, "num_hidden_layers": 3},
    "adapter": {"add_adapter": True, "num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_gradient_of_a_training_step(name: str) -> None:
    _, ours = pair("Wav2Vec2BertModel", **STILL, **CONFIGS[name])
    ours.train()
    expected = step(ours)
    if name == "checkpointing":
        ours.gradient_checkpointing_enable()
    with force_triton():
        ours.use_fast_kernels = True
        got = step(ours)
        again = step(ours) if name == "relative_key" else got
    largest = max(float(g.norm()) for g in expected if g is not None)
    parameters = [parameter for parameter, _ in ours.named_parameters()]
    for parameter, mine, twice, plain in zip(parameters, got, again, expected, strict=True):
        assert (mine is None) == (plain is None), parameter
        if plain is None or mine is None or twice is None:
            continue
        assert torch.equal(mine, twice), parameter
        if float(plain.norm()) < 1e-6 * largest:  # exactly zero, such as a key's bias
            assert float(mine.norm()) < 1e-5 * largest, parameter
        else:
            assert relative_error(mine, plain) <= 1e-4, parameter


def counted(name: str, launcher: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    def launch(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return launcher(*args, **kwargs)

    return launch


def test_a_step_runs_the_kernels_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    for module, name in (
        ("attention", "shaw_attention_backward"),
        ("conv", "conv_norm_act_backward"),
        ("gemm", "linear_backward"),
        ("gemm", "linear_glu_backward"),
        ("gemm", "feed_forward_backward"),
        ("norm", "layer_norm_backward"),
        ("norm", "residual_layer_norm_backward"),
        ("norm", "residual_double_layer_norm_backward"),
    ):
        owner = importlib.import_module(f"csrc_triton.{module}")

        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name), counts))
    _, ours = pair("Wav2Vec2BertModel", **STILL)
    with force_triton():
        ours.train().use_fast_kernels = True
        step(ours)
    assert counts == {
        "shaw_attention_backward": 2,
        "conv_norm_act_backward": 2,
        "linear_backward": 1 + 2 * 3,  # query, key and value are one
        "feed_forward_backward": 2 * 2,
        "linear_glu_backward": 2,
        "layer_norm_backward": 2,
        "residual_layer_norm_backward": 7,
        "residual_double_layer_norm_backward": 1,
    }


def test_autocast_takes_the_kernels_in_its_dtypes() -> None:
    """float16: bfloat16 products are wrong in the interpreter."""
    _, ours = pair("Wav2Vec2BertModel", **STILL, num_hidden_layers=1)
    ours.train().use_fast_kernels = True
    exact = step(ours)
    with force_triton(), Calls() as calls, torch.autocast("cpu", torch.float16):
        got = step(ours)
    for name in ("linear", "linear_glu", "conv_norm_act", "shaw_attention"):
        assert calls.dtypes[name] == {torch.float16}, name
    assert calls.dtypes["residual_layer_norm"] == {torch.float32}
    largest = max(float(g.norm()) for g in exact if g is not None)
    for mine, plain in zip(got, exact, strict=True):
        if mine is None or plain is None:
            continue
        assert mine.dtype == torch.float32
        assert float((mine - plain).norm()) <= 2e-2 * float(plain.norm()) + 1e-3 * largest


def test_attention_dropout_is_drawn_anew_and_the_same_backwards() -> None:
    """The gradient of the value is linear in the kept weights: it must fit the output's own."""
    query, key = torch.randn(2, 12, 2, 4)
    cu_seqlens, seed = torch.tensor([0, 5, 12], dtype=torch.int32), torch.tensor([3, 1])
    embedding = torch.randn(6, 4)

    def attend(value: Tensor) -> Tensor:
        return torch.ops.w2vbert.shaw_attention(
            query, key, value, cu_seqlens, 7, embedding, 3, 2, dropout_p=0.4, dropout_seed=seed
        )[0]

    value, direction, grad = torch.randn(3, 12, 2, 4)
    with force_triton():
        leaf_value = value.clone().requires_grad_()
        output = attend(leaf_value)
        output.backward(grad)
        moved = attend(direction)
        assert leaf_value.grad is not None
        expected = (moved * grad).sum()
        torch.testing.assert_close((leaf_value.grad * direction).sum(), expected)
        layout = (cu_seqlens, 7)
        runs = [
            ops.shaw_attention(query, key, value, *layout, dropout_p=0.4, fast=True)[0]
            for _ in range(2)
        ]
    assert not torch.equal(*runs)
