"""The gradient of `linear.feed_forward`, as an operation of its own.

The forward pass keeps `x` alone: what is inside, four times as wide, is computed again, which the
gradient of an activation needs anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import runs_triton
from .registry import backward_operation, dense_rows, differentiable


def _fake(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str,
    weight2: Tensor,
    bias2: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    wanted = []
    for tensor, needed in zip((x, weight1, bias1, weight2, bias2), needs, strict=True):
        if needed and tensor is not None:
            is_bias = tensor is bias1 or tensor is bias2
            dtype = torch.promote_types(tensor.dtype, torch.float32) if is_bias else tensor.dtype
            wanted.append(tensor.new_empty(tensor.shape, dtype=dtype))
    return wanted


@backward_operation(
    "feed_forward_backward(Tensor grad, Tensor x, Tensor weight1, Tensor? bias1, str activation, "
    "Tensor weight2, Tensor? bias2, bool[] needs) -> Tensor[]",
    _fake,
)
def feed_forward_backward_op(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str,
    weight2: Tensor,
    bias2: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Those gradients of x, weight1, bias1, weight2 and bias2 that `needs` asks for; biases in
    float32 at least."""
    if runs_triton(x):
        from csrc_triton.gemm import feed_forward_backward as kernel

        wanted = (needs[0], needs[1], needs[2], needs[3], needs[4])
        grads = kernel(
            dense_rows(grad), x, weight1, bias1, activation, weight2, bias2, needs=wanted
        )
    else:
        from .cpu.linear_backward import linear_backward
        from .linear import linear

        with torch.no_grad():
            inner = linear(x, weight1, bias1, activation)
        second = linear_backward(grad, inner, weight2, bias2, None, (True, needs[3], needs[4]))
        assert second[0] is not None
        first = (needs[0], needs[1], needs[2])
        # y once more: on this path nothing is gained by the fusion.
        grads = (
            *linear_backward(second[0], x, weight1, bias1, activation, first),
            *second[1:],
        )
    return [found for found in grads if found is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight1, bias1, ctx.activation, weight2, bias2 = inputs
    ctx.save_for_backward(x, weight1, bias1, weight2, bias2)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight1, bias1, weight2, bias2 = ctx.saved_tensors
    tensors = (x, weight1, bias1, weight2, bias2)
    of_tensors = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:])
    needs = [
        needed and tensor is not None for needed, tensor in zip(of_tensors, tensors, strict=True)
    ]
    found = iter(
        feed_forward_backward_op(grad, x, weight1, bias1, ctx.activation, weight2, bias2, needs)
    )
    grads = [
        next(found).to(tensor.dtype) if needed else None
        for needed, tensor in zip(needs, tensors, strict=True)
    ]
    return *grads[:3], None, *grads[3:]


differentiable("feed_forward", _setup, _gradient)
