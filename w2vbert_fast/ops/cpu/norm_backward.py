"""Gradients of LayerNorm on PyTorch's native backward, a block of rows at a time.

Statistics are computed again from the rows. In dtypes below float32 the block is float32, so that
only the gradients of the rows are rounded. On any device, in any floating dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import layer_norm, row_blocks

_BLOCK_ELEMENTS = 1 << 18
"""Elements at a time, in float32 1 MB: of each are several copies, which must not be larger than
what the allocator keeps."""


def norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `LN(x)`: of x `[rows, hidden]`, of weight and of bias `[hidden]`; one dtype."""
    shape, bias, x = [x.shape[-1]], weight, x.contiguous()
    # The forward pass has the statistics in a tenth of the time of torch.var_mean.
    _, mean, scale = torch.ops.aten.native_layer_norm(x, shape, None, None, eps)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, shape, mean, scale, weight, bias, [True, True, True]
    )
    return grads


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `norm.layer_norm`.

    Args:
        grad: of the result, `[num_tokens, hidden]` in the dtype of `x`.
        x: `[num_tokens, hidden]`.
        weight: `[hidden]`.
        eps: added to the variance.

    Returns:
        The gradients of `x` in its dtype, and of weight and bias, `[hidden]` in float32 at least.
    """
    grad_x, _, grad_weight, grad_bias = residual_layer_norm_backward(
        None, grad, x, 1.0, weight, eps
    )
    return grad_x, grad_weight, grad_bias


def residual_layer_norm_backward(
    grad_y: Tensor | None, grad_z: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm.residual_layer_norm`.

    Args:
        grad_y: of y, `[num_tokens, hidden]` in the dtype of `y`, or `None`.
        grad_z: of z, like `y`.
        y: `[num_tokens, hidden]`, the sum that the forward pass returned.
        scale: of x.
        weight: `[hidden]`.
        eps: added to the variance.

    Returns:
        The gradients of residual and of x (without elements where `scale` is 1: it is the same), in
        the dtype of `y`, and of weight and bias, `[hidden]` in float32 at least.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    grad_residual = torch.empty_like(y, memory_format=torch.contiguous_format)
    sums = _zeros(weight, dtype, 2)
    wide = weight.to(dtype)
    for rows in row_blocks(y, _BLOCK_ELEMENTS):
        block, *shares = norm_gradient(grad_z[rows].to(dtype), y[rows].to(dtype), wide, eps)
        _add_shares(sums, shares)
        grad_residual[rows] = block if grad_y is None else block.add_(grad_y[rows])
    return grad_residual, _scaled(grad_residual, scale), sums[0], sums[1]


def residual_double_layer_norm_backward(
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
    """Gradients of `norm.residual_double_layer_norm`.

    Args:
        grad_z1: of z1, `[num_tokens, hidden]` in the dtype of `x`, or `None`.
        grad_z2: of z2, like `x`.
        residual: `[num_tokens, hidden]`.
        x: like `residual`.
        scale: of `x`.
        weight1: `[hidden]`.
        bias1: `[hidden]`.
        weight2: `[hidden]`.
        eps: added to both variances.

    Returns:
        The gradients of residual and of x (without elements where `scale` is 1: it is the same), in
        the dtype of `x`, and of weight1, bias1, weight2, bias2, `[hidden]` in float32 at least.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = _zeros(weight1, dtype, 2), _zeros(weight2, dtype, 2)
    wide1, wide2 = weight1.to(dtype), weight2.to(dtype)
    for rows in row_blocks(x, _BLOCK_ELEMENTS):
        # Both rounded as the forward pass stored them.
        stored = torch.add(residual[rows], x[rows], alpha=scale)
        z = layer_norm(stored, weight1, bias1, eps).to(dtype)
        y = stored.to(dtype)
        grad, *shares = norm_gradient(grad_z2[rows].to(dtype), z, wide2, eps)
        _add_shares(second, shares)
        if grad_z1 is not None:
            grad.add_(grad_z1[rows])
        grad, *shares = norm_gradient(grad, y, wide1, eps)
        _add_shares(first, shares)
        grad_residual[rows] = grad
    return grad_residual, _scaled(grad_residual, scale), *first, *second


def _zeros(weight: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(weight.dtype, dtype)
    return tuple(torch.zeros_like(weight, dtype=dtype) for _ in range(count))


def _add_shares(sums: tuple[Tensor, ...], shares: list[Tensor]) -> None:
    for total, share in zip(sums, shares, strict=True):
        total += share


def _scaled(grad: Tensor, scale: float) -> Tensor:
    return grad.new_empty(0) if scale == 1.0 else grad * scale
