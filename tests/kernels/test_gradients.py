"""Gradients on the device: each operation, and every parameter of a small encoder.

The oracle is float64 autograd of the plain operation, as in the forward tests.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.operations import plain_form
from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, DTYPES, FP32_TOLERANCE, LEFT, RIGHT, choose, random
from tests.kernels.models import LENGTHS as MODEL_LENGTHS, SIZES, batch, kernels, make
from w2vbert_fast.ops.examples import Sizes, example

LENGTHS = choose([0, 1, 2, 63, 64, 65, 217, 1500, 0], [0, 1, 31, 33, 0])
TOKENS = sum(LENGTHS)
WIDTH = choose(1024, 48)
INNER = choose(4096, 80)
HEADS = choose(16, 2)
HEAD_DIM = choose(64, 16)
TAPS = choose(31, 7)
# Gradients of parameters are sums over all tokens: in fp32 their rounding errors add up.
SUM_TOLERANCE = choose(5e-5, FP32_TOLERANCE)
# Roundings in other places than PyTorch's; the largest of many scatters.
LIMIT, LARGEST_LIMIT = 1.25, 2.0


EXAMPLES = Sizes(
    lengths=tuple(LENGTHS),
    width=WIDTH,
    inner=INNER,
    heads=HEADS,
    head_size=HEAD_DIM,
    left=LEFT,
    right=RIGHT,
    taps=TAPS,
)


def arguments(case: str, dtype: torch.dtype) -> tuple[Any, ...]:
    name, _, variant = case.partition("/")
    given = example(name, EXAMPLES, dtype=dtype, device=DEVICE)
    if variant == "no_activation":
        return *given[:3], None
    if variant == "no_bias":
        return *given[:2], None
    return (*given[:5], None, 0, 0) if variant == "no_positions" else given


CASES = (
    "layer_norm",
    "residual_layer_norm",
    "residual_double_layer_norm",
    "linear",
    "linear/no_activation",
    "linear_glu/no_bias",
    "feed_forward",
    "conv_norm_act",
    "shaw_attention",
    "shaw_attention/no_positions",
)


def gradients(function: Callable[..., Any], given: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """Of every floating-point argument, by its position; the same random gradients come in."""
    leaves = [
        x.detach().to(dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in given
    ]
    found = function(*leaves)
    outputs = [y for y in torch.utils._pytree.tree_leaves(found) if y.requires_grad]
    generator = torch.Generator().manual_seed(7)
    kind = given[0].dtype  # as the dtype under test rounds them
    grads = [
        torch.randn(y.shape, generator=generator).to(device=DEVICE, dtype=kind).to(dtype)
        for y in outputs
    ]
    wanted = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    results = torch.autograd.grad(outputs, list(wanted.values()), grads)
    return dict(zip(wanted, results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_an_operation(case: str, dtype: torch.dtype, judge: Judge) -> None:
    given = arguments(case, dtype)
    name = case.partition("/")[0]
    operation = getattr(torch.ops.w2vbert, name)
    with kernels():
        ours, again = (gradients(operation, given, dtype) for _ in range(2))
    exact = gradients(plain_form(name), given, torch.float64)
    plain = gradients(plain_form(name), given, dtype)
    for index, gradient in ours.items():
        assert gradient.dtype == given[index].dtype
        assert torch.equal(gradient, again[index]), "two runs differ"
        assert bool(gradient.isfinite().all())
        judge(
            f"{name}_grad/{index}",
            gradient,
            exact[index],
            plain[index],
            limit=LIMIT,
            largest_limit=LARGEST_LIMIT,
            tolerance=FP32_TOLERANCE if given[index].shape[0] == TOKENS else SUM_TOLERANCE,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_of_attention_is_the_same_backwards(dtype: torch.dtype, judge: Judge) -> None:
    """The output is linear in the values: its gradient must have dropped the same weights."""
    query, key, value, *rest = arguments("shaw_attention", dtype)
    seed = torch.tensor([3, 1], device=DEVICE)
    grad = random(*value.shape, dtype=dtype)

    def attend(values: Tensor) -> Tensor:
        with kernels():
            output: Tensor = torch.ops.w2vbert.shaw_attention(
                query, key, values, *rest, dropout_p=0.4, dropout_seed=seed
            )[0]
        return output

    leaf = value.clone().requires_grad_()
    output = attend(leaf)
    with kernels():
        (first,) = torch.autograd.grad(output, leaf, grad, retain_graph=True)
        (second,) = torch.autograd.grad(output, leaf, grad)
    assert torch.equal(first, second)
    direction = random(*value.shape, dtype=dtype)
    moved = (attend(direction).double() * grad.double()).sum()
    along = (first.double() * direction.double()).sum()
    # Sums of as many products of both signs: relative to what they would be without cancellation.
    scale = (first.double() * direction.double()).norm()
    assert float((moved - along).abs() / scale) <= 50 * torch.finfo(dtype).eps
    without = torch.ops.w2vbert.shaw_attention
    with kernels():
        assert not torch.equal(without(query, key, value, *rest)[0], output)
    judge.counted("shaw_attention_grad/dropout", dtype)


def step(model: nn.Module, dtype: torch.dtype, on_kernels: bool) -> dict[str, Tensor]:
    """The gradients of all parameters for a random gradient of the hidden states.

    Features and that gradient are what `dtype` makes of them, in the dtype of the model.
    """
    torch.manual_seed(1)
    features, mask = batch(MODEL_LENGTHS)
    kind = next(model.parameters()).dtype
    model.zero_grad()
    model.use_fast_kernels = on_kernels  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(5)
    try:  # what is computed again in the backward pass takes the same path
        with kernels() if on_kernels else contextlib.nullcontext():
            output = model(features.to(dtype).to(kind), mask).last_hidden_state
            grad = torch.randn(output.shape, generator=generator)
            grad = grad.to(device=DEVICE, dtype=dtype).to(kind)
            output.backward(grad * mask[..., None])
    finally:
        model.use_fast_kernels = False  # type: ignore[assignment]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["none", "attention", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_an_encoder(size: str, dtype: torch.dtype, policy: str, judge: Judge) -> None:
    """RMS of every parameter's gradient against PyTorch's; those that are zero are noise."""
    model: Any = make("Wav2Vec2BertModel", size, apply_spec_augment=False, layerdrop=0.0)
    model = model.to(dtype).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model.gradient_checkpointing_enable(policy=policy)
    ours = step(model, dtype, True)
    again = step(model, dtype, True)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "two runs differ"
    if policy != "none":
        judge.counted(f"model_grad/{policy}", dtype)
        return
    plain = step(model, dtype, False)
    exact = step(copy.deepcopy(model).double(), dtype, False)
    assert ours.keys() == exact.keys()
    largest = max(float(grad.norm()) for grad in exact.values())
    for name, grad in ours.items():
        if float(exact[name].norm()) < 1e-6 * largest:  # exactly zero, such as a key's bias
            assert float(grad.double().norm()) <= 0.02 * largest, name
            continue
        judge(
            f"model_grad/{name}",
            grad,
            exact[name],
            plain[name],
            limit=1.5,
            largest_limit=3.0,
            tolerance=choose(2e-4, 2e-5),
        )
