"""Gradients of `linear`'s operations, as operations of their own.

The forward pass keeps `x` alone; `x @ weight.T + bias` is computed again where the gradient of an
activation or of the gated unit needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import runs_triton
from .registry import backward_operation, dense_rows, differentiable


def _wanted(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[tuple[Tensor, torch.dtype]]:
    """Which of x, weight and bias get a gradient, and its dtype."""
    needs_bias = needs[2] and bias is not None
    wanted = [(x, x.dtype)] if needs[0] else []
    wanted += [(weight, weight.dtype)] if needs[1] else []
    if needs_bias:
        assert bias is not None
        wanted.append((bias, torch.promote_types(bias.dtype, torch.float32)))
    return wanted


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> list[Tensor]:
    wanted = _wanted(x, weight, bias, needs)
    return [tensor.new_empty(tensor.shape, dtype=dtype) for tensor, dtype in wanted]


def _present(grads: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


def _needs(needs: list[bool]) -> tuple[bool, bool, bool]:
    return needs[0], needs[1], needs[2]


def _in_place_of_arguments(
    grads: list[Tensor], bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, `None` where one is not wanted."""
    left = iter(grads)
    grad_x = next(left) if needs[0] else None
    grad_weight = next(left) if needs[1] else None
    grad_bias = next(left).to(bias.dtype) if needs[2] and bias is not None else None
    return grad_x, grad_weight, grad_bias


def _linear_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    needs: list[bool],
) -> list[Tensor]:
    return _fake(x, weight, bias, needs)


@backward_operation(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str? activation, "
    "bool[] needs) -> Tensor[]",
    _linear_backward_fake,
)
def linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    needs: list[bool],
) -> list[Tensor]:
    """Those gradients of x, weight and (float32 at least) bias that `needs` asks for."""
    if runs_triton(x):
        from csrc_triton.gemm import linear_backward as kernel

        grad = dense_rows(grad)
        grads = kernel(grad, x, weight, bias, activation=activation, needs=_needs(needs))
        return _present(grads)
    from .cpu.linear_backward import linear_backward

    return _present(linear_backward(grad, x, weight, bias, activation, _needs(needs)))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias)


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = linear_backward_op(grad, x, weight, bias, ctx.activation, needs)
    return *_in_place_of_arguments(grads, bias, needs), None


differentiable("linear", _linear_setup, _linear_gradient)


def _linear_glu_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    return _fake(x, weight, bias, needs)


@backward_operation(
    "linear_glu_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool[] needs) "
    "-> Tensor[]",
    _linear_glu_backward_fake,
)
def linear_glu_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """Those gradients of x, weight and (float32 at least) bias that `needs` asks for."""
    if runs_triton(x):
        from csrc_triton.gemm import linear_glu_backward as kernel

        return _present(kernel(dense_rows(grad), x, weight, bias, needs=_needs(needs)))
    from .cpu.linear_backward import linear_glu_backward

    return _present(linear_glu_backward(grad, x, weight, bias, _needs(needs)))


def _linear_glu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_glu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = linear_glu_backward_op(grad, x, weight, bias, needs)
    return _in_place_of_arguments(grads, bias, needs)


differentiable("linear_glu", _linear_glu_setup, _linear_glu_gradient)
