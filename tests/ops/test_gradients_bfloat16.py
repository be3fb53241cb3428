"""Gradients in bfloat16 on a CPU: at most as far from those in float64 as the plain form's."""

from __future__ import annotations

import pytest
import torch
from torch import randn

from tests.helpers.reference import relative_error
from tests.ops.test_gradients import cumulative, gradients, leaf, plain_form
from tests.ops.test_operation import DIFFERENTIABLE
from w2vbert_fast.ops.examples import Sizes, example

N, WIDTH, INNER = 300, 160, 256
SIZES = Sizes(lengths=(217, 3, 80), width=WIDTH, inner=INNER, taps=31)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n != "shaw_attention"])
def test_gradients_are_as_accurate_as_those_of_the_plain_form(name: str) -> None:
    args = example(name, SIZES, dtype=torch.bfloat16)
    exact = gradients(plain_form(name), tuple(leaf(arg, torch.float64) for arg in args))
    plain = gradients(plain_form(name), tuple(map(leaf, args)))
    got = gradients(getattr(torch.ops.w2vbert, name).default, tuple(map(leaf, args)))
    for mine, theirs, expected in zip(got, plain, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        limit = 1.1 * relative_error(theirs.double(), expected)
        assert relative_error(mine.double(), expected) <= limit


def test_a_common_part_of_the_values_costs_attentions_gradients_no_accuracy() -> None:
    """It adds nothing to the gradient of the scores, though far more than that is rounded to."""
    errors: list[list[float]] = []
    for offset in (0.0, 64.0):
        torch.manual_seed(0)
        query, key, value = randn(3, N, 2, 64)
        tensors = [x.bfloat16() for x in (query, key, value + offset)]
        args = (*tensors, cumulative((N,)), N, randn(73, 64).bfloat16(), 64, 8)
        wide = tuple(leaf(arg, torch.float64) for arg in args)
        exact = gradients(plain_form("shaw_attention"), wide)
        got = gradients(torch.ops.w2vbert.shaw_attention.default, tuple(map(leaf, args)))
        pairs = zip(got, exact, strict=True)
        errors.append([relative_error(mine.double(), expected) for mine, expected in pairs])
    assert all(large <= 1.2 * small for small, large in zip(*errors, strict=True)), errors


def test_gradients_of_biases_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    grad, x, weight, bias = (
        tensor.bfloat16()
        for tensor in (randn(N, INNER), randn(N, WIDTH), randn(INNER, WIDTH), randn(INNER))
    )
    args = (grad, x, weight, bias, None, [False, False, True])
    operation = torch.ops.w2vbert.linear_backward.default
    torch.library.opcheck(operation, args, test_utils="test_faketensor")
    got = operation(*args)
    assert [tensor.dtype for tensor in got] == [torch.float32]
    assert relative_error(got[0].double(), grad.double().sum(0)) <= 1e-6
