"""Gradients of `norm`'s operations, as operations of their own.

The forward pass keeps `x`, or `y`, or `residual` and `x`; means and variances are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .norm import has_kernel
from .registry import backward_operation, dense_rows, differentiable


def _vectors(weight: Tensor, count: int) -> tuple[Tensor, ...]:
    """Empty gradients of parameters: sums over tokens, in float32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return tuple(weight.new_empty(weight.shape, dtype=dtype) for _ in range(count))


def _grad_x(x: Tensor, scale: float) -> Tensor:
    """Empty: `scale` times another gradient; without elements where it would be the same one."""
    return x.new_empty(0 if scale == 1.0 else x.shape)


def _without_alias(grads: tuple[Tensor, ...], x: Tensor, scale: float) -> tuple[Tensor, ...]:
    """A kernel's gradients, of which an operation may return none twice."""
    return grads[0], grads[1] if scale != 1.0 else _grad_x(x, scale), *grads[2:]


def _with_alias(grads: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of residual and x, of what an operation returned."""
    return grads[0], grads[0] if scale == 1.0 else grads[1]


def _layer_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_vectors(weight, 2)


@backward_operation(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_norm_backward_fake,
)
def layer_norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """Gradients of x `[num_tokens, hidden]` and, float32 `[hidden]`, of weight and bias."""
    if has_kernel(x):
        from csrc_triton.norm import layer_norm_backward as kernel

        return kernel(dense_rows(grad), x, weight, eps)
    from .cpu.norm_backward import layer_norm_backward

    return layer_norm_backward(grad, x, weight, eps)


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight)


def _layer_norm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = layer_norm_backward_op(grad, x, weight, ctx.eps)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None


differentiable("layer_norm", _layer_norm_setup, _layer_norm_gradient)


def _residual_layer_norm_backward_fake(
    grad_y: Tensor | None, grad_z: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return y.new_empty(y.shape), _grad_x(y, scale), *_vectors(weight, 2)


@backward_operation(
    "residual_layer_norm_backward(Tensor? grad_y, Tensor grad_z, Tensor y, float scale, "
    "Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _residual_layer_norm_backward_fake,
)
def residual_layer_norm_backward_op(
    grad_y: Tensor | None, grad_z: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """Gradients of residual, x (without elements where `scale` is 1: the same), weight, bias."""
    if has_kernel(y):
        from csrc_triton.norm import residual_layer_norm_backward as kernel

        first = None if grad_y is None else dense_rows(grad_y)
        grads = kernel(first, dense_rows(grad_z), y, scale, weight, eps)
        return _without_alias(grads, y, scale)
    from .cpu.norm_backward import residual_layer_norm_backward

    return residual_layer_norm_backward(grad_y, grad_z, y, scale, weight, eps)


def _residual_layer_norm_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    _, _, ctx.scale, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight)


def _residual_layer_norm_gradient(
    ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None
) -> tuple[Tensor | None, ...]:
    y, weight = ctx.saved_tensors
    grad_z = torch.zeros_like(y) if grad_z is None else grad_z
    grads = residual_layer_norm_backward_op(grad_y, grad_z, y, ctx.scale, weight, ctx.eps)
    parameters = (grads[2].to(weight.dtype), grads[3].to(ctx.bias_dtype))
    return *_with_alias(grads, ctx.scale), None, *parameters, None


differentiable("residual_layer_norm", _residual_layer_norm_setup, _residual_layer_norm_gradient)


def _residual_double_layer_norm_backward_fake(
    grad_z1: Tensor | None,
    grad_z2: Tensor,
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    vectors = (*_vectors(weight1, 2), *_vectors(weight2, 2))
    return x.new_empty(x.shape), _grad_x(x, scale), *vectors


@backward_operation(
    "residual_double_layer_norm_backward(Tensor? grad_z1, Tensor grad_z2, Tensor residual, "
    "Tensor x, float scale, Tensor weight1, Tensor bias1, Tensor weight2, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _residual_double_layer_norm_backward_fake,
)
def residual_double_layer_norm_backward_op(
    grad_z1: Tensor | None,
    grad_z2: Tensor,
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of residual, x (without elements where `scale` is 1), weight1, bias1, weight2,
    bias2."""
    if has_kernel(x):
        from csrc_triton.norm import residual_double_layer_norm_backward as kernel

        first, second = None if grad_z1 is None else dense_rows(grad_z1), dense_rows(grad_z2)
        grads = kernel(first, second, residual, x, scale, weight1, bias1, weight2, eps)
        return _without_alias(grads, x, scale)
    from .cpu.norm_backward import residual_double_layer_norm_backward

    return residual_double_layer_norm_backward(
        grad_z1, grad_z2, residual, x, scale, weight1, bias1, weight2, eps
    )


def _double_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, x, ctx.scale, weight1, bias1, weight2, bias2, ctx.eps = inputs
    ctx.bias_dtype = bias2.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, x, weight1, bias1, weight2)


def _double_gradient(
    ctx: Any, grad_z1: Tensor | None, grad_z2: Tensor | None
) -> tuple[Tensor | None, ...]:
    residual, x, weight1, bias1, weight2 = ctx.saved_tensors
    grad_z2 = torch.zeros_like(x) if grad_z2 is None else grad_z2
    grads = residual_double_layer_norm_backward_op(
        grad_z1, grad_z2, residual, x, ctx.scale, weight1, bias1, weight2, ctx.eps
    )
    dtypes = (weight1.dtype, bias1.dtype, weight2.dtype, ctx.bias_dtype)
    parameters = (grad.to(dtype) for grad, dtype in zip(grads[2:], dtypes, strict=True))
    return *_with_alias(grads, ctx.scale), None, *parameters, None


differentiable("residual_double_layer_norm", _double_setup, _double_gradient)
