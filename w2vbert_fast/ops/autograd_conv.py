"""The gradient of `conv.conv_norm_act`, as an operation of its own.

The forward pass keeps `x`; the convolution, its norm and the activation are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .conv import has_kernel
from .registry import backward_operation, dense_rows, differentiable


def _fake(
    grad: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, ...]:
    parameters = (conv_weight, norm_weight, norm_bias)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), *(p.new_empty(p.shape, dtype=dtype) for p in parameters)


@backward_operation(
    "conv_norm_act_backward(Tensor grad, Tensor x, Tensor conv_weight, Tensor norm_weight, "
    "Tensor norm_bias, float eps, str activation, Tensor cu_seqlens, Tensor? seqused_k=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def conv_norm_act_backward_op(
    grad: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x and, float32 at least, of the three parameters."""
    arguments = (conv_weight, norm_weight, norm_bias, eps)
    if has_kernel(x, conv_weight):
        from csrc_triton.conv import conv_norm_act_backward as kernel

        name = None if activation == "linear" else activation
        grads = kernel(dense_rows(grad), x, *arguments, name, cu_seqlens, seqused_k=seqused_k)
        return grads[0], grads[1].contiguous(), *grads[2:]
    from .cpu.conv_backward import conv_norm_act_backward

    return conv_norm_act_backward(grad, x, *arguments, activation, cu_seqlens, seqused_k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, conv_weight, norm_weight, norm_bias, ctx.eps, ctx.activation, *layout = inputs
    ctx.save_for_backward(x, conv_weight, norm_weight, norm_bias, *layout)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *parameters, cu_seqlens, seqused_k = ctx.saved_tensors
    grads = conv_norm_act_backward_op(
        grad, x, *parameters, ctx.eps, ctx.activation, cu_seqlens, seqused_k
    )
    rounded = (g.to(p.dtype) for g, p in zip(grads[1:], parameters, strict=True))
    return grads[0], *rounded, None, None, None, None


differentiable("conv_norm_act", _setup, _gradient)
