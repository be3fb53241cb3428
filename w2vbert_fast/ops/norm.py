"""Layer normalisation, alone and fused with the residual connection before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dispatch import cpu_kernels_for, runs_triton
from .registry import operation

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
    if fast:
        y, z = residual_layer_norm_op(residual, x, scale, weight, bias, eps)
        return y, z
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
    if fast:
        z1, z2 = residual_double_layer_norm_op(
            residual, x, scale, weight1, bias1, weight2, bias2, eps
        )
        return z1, z2
    z1 = layer_norm(_add_scaled(residual, x, scale), weight1, bias1, eps)
    return z1, layer_norm(z1, weight2, bias2, eps)


def _add_scaled(residual: Tensor, x: Tensor, scale: float) -> Tensor:
    return residual + (x if scale == 1.0 else x * scale)


def has_kernel(x: Tensor) -> bool:
    """Whether the Triton kernels, forward and backward, take a tensor of this kind and width."""
    return x.shape[-1] <= MAX_TRITON_WIDTH and runs_triton(x)


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operation(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    _layer_norm_fake,
    autocast="float32",
)
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if has_kernel(x):
        from csrc_triton.norm import layer_norm as kernel

        return kernel(x, weight, bias, eps)
    if (fast := cpu_kernels_for(x)) is not None:
        y: Tensor = fast.layer_norm(x, weight, bias, eps)
        return y
    return layer_norm(x, weight, bias, eps)


def _residual_layer_norm_fake(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


@operation(
    "residual_layer_norm(Tensor residual, Tensor x, float scale, Tensor weight, Tensor bias, "
    "float eps) -> (Tensor, Tensor)",
    _residual_layer_norm_fake,
    autocast="float32",
)
def residual_layer_norm_op(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if has_kernel(x):
        from csrc_triton.norm import residual_layer_norm as kernel

        return kernel(residual, x, scale, weight, bias, eps)
    if (fast := cpu_kernels_for(x)) is not None:
        y, z = fast.residual_layer_norm(residual, x, scale, weight, bias, eps)
        return y, z
    return residual_layer_norm(residual, x, scale, weight, bias, eps)


def _residual_double_layer_norm_fake(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


@operation(
    "residual_double_layer_norm(Tensor residual, Tensor x, float scale, Tensor weight1, "
    "Tensor bias1, Tensor weight2, Tensor bias2, float eps) -> (Tensor, Tensor)",
    _residual_double_layer_norm_fake,
    autocast="float32",
)
def residual_double_layer_norm_op(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    norms = (weight1, bias1, weight2, bias2)
    if has_kernel(x):
        from csrc_triton.norm import residual_double_layer_norm as kernel

        return kernel(residual, x, scale, *norms, eps)
    if (fast := cpu_kernels_for(x)) is not None:
        z1, z2 = fast.residual_double_layer_norm(
            residual, x, scale, weight1, bias1, eps, weight2, bias2, eps
        )
        return z1, z2
    return residual_double_layer_norm(residual, x, scale, *norms, eps)
