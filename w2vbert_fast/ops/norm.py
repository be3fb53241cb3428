"""Layer normalisation, alone and fused with the residual connection before it.

The gradients keep `x`, or `y`, or `residual` and `x`; means and variances are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.cpu import norm as cpu
from w2vbert_fast.ops.operation import gradient, operation

MAX_TRITON_WIDTH = 8192
"""Wider rows are normalised by PyTorch."""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, fast: bool = False
) -> Tensor:
    """`LN(x)` over the last dimension.

    Args:
        x: `[num_tokens, hidden]`.
        weight: `[hidden]`.
        bias: `[hidden]`.
        eps: added to the variance.
        fast: use the device's fast implementation, `torch.ops.w2vbert.layer_norm`.
    """
    if fast:
        return _layer_norm_op(x, weight, bias, eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def residual_layer_norm(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """`y = residual + scale * x` and `z = LN(y)`.

    Args:
        residual: `[num_tokens, hidden]`.
        x: `[num_tokens, hidden]`, the output of the block that ends here.
        scale: 0.5 for the Conformer's half-step feed-forwards, else 1.
        weight: `[hidden]` of the norm that opens the next block.
        bias: `[hidden]`.
        eps: added to the variance.
        fast: use the device's fast implementation, `torch.ops.w2vbert.residual_layer_norm`.

    Returns:
        `(y, z)`, both `[num_tokens, hidden]`.
    """
    if fast:
        return _residual_layer_norm_op(residual, x, scale, weight, bias, eps)
    y = _add_scaled(residual, x, scale)
    return y, layer_norm(y, weight, bias, eps)


def residual_double_layer_norm(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    *,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """`z1 = LN1(residual + scale * x)` and `z2 = LN2(z1)`: a layer's end and the next one's start.

    Args:
        residual: `[num_tokens, hidden]`.
        x: `[num_tokens, hidden]`, the output of the layer's last block.
        scale: of `x`.
        weight1: `[hidden]` of the norm that closes the layer.
        bias1: `[hidden]`.
        weight2: `[hidden]` of the norm that opens the next layer.
        bias2: `[hidden]`.
        eps: added to both variances.
        fast: use the device's fast implementation, `torch.ops.w2vbert.residual_double_layer_norm`.

    Returns:
        `(z1, z2)`, both `[num_tokens, hidden]`.
    """
    norms = (weight1, bias1, weight2, bias2, eps)
    if fast:
        return _residual_double_layer_norm_op(residual, x, scale, *norms)
    z1 = layer_norm(_add_scaled(residual, x, scale), weight1, bias1, eps)
    return z1, layer_norm(z1, weight2, bias2, eps)


def _add_scaled(residual: Tensor, x: Tensor, scale: float) -> Tensor:
    return residual + (x if scale == 1.0 else x * scale)


def _fits(x: Tensor, *_: Any) -> bool:
    return x.shape[-1] <= MAX_TRITON_WIDTH


def _pair(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_layer_norm_op = operation(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    layer_norm,
    fake=lambda x, *_: x.new_empty(x.shape),
    triton="csrc_triton.norm:layer_norm",
    takes=_fits,
    cpu=cpu.layer_norm,
    autocast="float32",
)
_residual_layer_norm_op = operation(
    "residual_layer_norm(Tensor residual, Tensor x, float scale, Tensor weight, Tensor bias, "
    "float eps) -> (Tensor y, Tensor z)",
    residual_layer_norm,
    fake=_pair,
    triton="csrc_triton.norm:residual_layer_norm",
    takes=_fits,
    cpu=cpu.residual_layer_norm,
    autocast="float32",
)
_residual_double_layer_norm_op = operation(
    "residual_double_layer_norm(Tensor residual, Tensor x, float scale, Tensor weight1, "
    "Tensor bias1, Tensor weight2, Tensor bias2, float eps) -> (Tensor z1, Tensor z2)",
    residual_double_layer_norm,
    fake=_pair,
    triton="csrc_triton.norm:residual_double_layer_norm",
    takes=_fits,
    cpu=cpu.residual_double_layer_norm,
    autocast="float32",
)


def _sums(*weights: Tensor) -> tuple[Tensor, ...]:
    """Empty gradients of weight and bias: sums over tokens, in float32 at least."""
    return tuple(
        weight.new_empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        for weight in weights
        for _ in range(2)
    )


def _of_sum(like: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Empty gradients of residual and of x, which are equal where `scale` is 1."""
    return like.new_empty(like.shape), like.new_empty(0 if scale == 1.0 else like.shape)


gradient(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    cpu.layer_norm_backward,
    fake=lambda _, x, weight, eps: (x.new_empty(x.shape), *_sums(weight)),
    triton="csrc_triton.norm:layer_norm_backward",
)
gradient(
    "residual_layer_norm_backward(Tensor? grad_y, Tensor grad_z, Tensor y, float scale, "
    "Tensor weight, float eps) "
    "-> (Tensor grad_residual, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    cpu.residual_layer_norm_backward,
    fake=lambda _y, _z, y, scale, weight, eps: (*_of_sum(y, scale), *_sums(weight)),
    triton="csrc_triton.norm:residual_layer_norm_backward",
)
gradient(
    "residual_double_layer_norm_backward(Tensor? grad_z1, Tensor grad_z2, Tensor residual, "
    "Tensor x, float scale, Tensor weight1, Tensor bias1, Tensor weight2, float eps) "
    "-> (Tensor grad_residual, Tensor grad_x, Tensor grad_weight1, Tensor grad_bias1, "
    "Tensor grad_weight2, Tensor grad_bias2)",
    cpu.residual_double_layer_norm_backward,
    fake=lambda _z1, _z2, residual, x, scale, weight1, bias1, weight2, eps: (
        *_of_sum(x, scale),
        *_sums(weight1, weight2),
    ),
    triton="csrc_triton.norm:residual_double_layer_norm_backward",
)
