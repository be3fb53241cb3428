"""Layer normalisation, alone and fused with the residual connection before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import runs_triton, takes_fast_path


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
    if takes_fast_path(fast, x, weight, bias):
        y: Tensor = layer_norm_op(x, weight, bias, eps)
        return y
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
    if takes_fast_path(fast, residual, x, weight, bias):
        y, z = residual_layer_norm_op(residual, x, scale, weight, bias, eps)
        return y, z
    y = residual + (x if scale == 1.0 else x * scale)
    return y, layer_norm(y, weight, bias, eps)


@torch.library.custom_op("w2vbert::layer_norm", mutates_args=())
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if runs_triton(x):
        from csrc_triton.norm import layer_norm as kernel

        return kernel(x, weight, bias, eps)
    return layer_norm(x, weight, bias, eps)


@layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("w2vbert::residual_layer_norm", mutates_args=())
def residual_layer_norm_op(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        from csrc_triton.norm import residual_layer_norm as kernel

        return kernel(residual, x, scale, weight, bias, eps)
    return residual_layer_norm(residual, x, scale, weight, bias, eps)


@residual_layer_norm_op.register_fake
def _(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)
