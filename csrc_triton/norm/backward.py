"""Gradients of LayerNorm, alone and fused with the residual connection before it.

With z = h * weight + bias, h = (y - mean(y)) / sqrt(var(y) + eps) and g the gradient of z:

    dy      = (g w - mean(g w) - h mean(g w h)) / sqrt(var(y) + eps)      means over a row
    dweight = sum over rows of g h
    dbias   = sum over rows of g

and, where y = residual + scale * x, dresidual = dy plus the gradient of y itself, and dx = scale *
dresidual. Mean and variance are computed again from the row, which is in registers anyway, so the
forward pass saves no statistics. The norm of a norm computes z1 again as well, rounded as the
forward pass stored it.

A program takes every `programs`-th group of rows and keeps sums of g h and g in registers. It
stores them once, as its share; the shares are then added up in a fixed order. No atomic addition,
so two runs give the same bits.

Per token of C channels and e bytes an element: `layer_norm_backward` moves 3 C e bytes, the one
with a residual 4 C e (5 where scale is not 1), the double one 5 C e (6).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.functions import norm_gradient, standardize
from csrc_triton.launch import check_rows
from csrc_triton.norm.config import NormBackwardConfig, norm_backward_config
from csrc_triton.plans import empty, launch, planned


@triton.jit(do_not_specialize=["num_rows"])
def _norm_bwd_kernel(
    x_ptr,  # [num_rows, WIDTH]; y itself unless HAS_RESIDUAL
    residual_ptr,  # [num_rows, WIDTH], HAS_RESIDUAL
    grad_sum_ptr,  # [num_rows, WIDTH], HAS_GRAD_SUM
    grad_first_ptr,  # [num_rows, WIDTH], HAS_GRAD_FIRST
    grad_second_ptr,  # [num_rows, WIDTH], IS_DOUBLE
    first_weight_ptr,  # [WIDTH]
    first_bias_ptr,  # [WIDTH], IS_DOUBLE
    second_weight_ptr,  # [WIDTH], IS_DOUBLE
    dy_ptr,  # [num_rows, WIDTH]
    dx_ptr,  # [num_rows, WIDTH], HAS_SCALED
    share_ptr,  # [programs, 2 or 4, WIDTH] fp32
    num_rows,
    scale,
    eps,
    stride_x_row,
    stride_residual_row,
    stride_grad_sum_row,
    stride_grad_first_row,
    stride_grad_second_row,
    stride_dy_row,
    stride_dx_row,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_GRAD_FIRST: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    HAS_SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    EVEN: tl.constexpr = WIDTH == BLOCK_WIDTH
    columns = tl.arange(0, BLOCK_WIDTH)  # [BLOCK_WIDTH]
    is_column = columns < WIDTH
    first_weight = tl.load(first_weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    first_weight_sum = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    first_bias_sum = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
    if IS_DOUBLE:
        first_bias = tl.load(first_bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        second_weight = tl.load(second_weight_ptr + columns, mask=is_column, other=0.0)
        second_weight = second_weight.to(tl.float32)
        second_weight_sum = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
        second_bias_sum = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)

    num_blocks = tl.cdiv(num_rows, ROWS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = tl.arange(0, ROWS).to(tl.int64) + block * ROWS  # [ROWS]
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_x_row + columns[None, :]
        y = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_WIDTH]
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + rows[:, None] * stride_residual_row + columns[None, :]
            y = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + scale * y
        standard, deviation = standardize(y, is_row, columns, eps, WIDTH, EVEN)

        grad = tl.zeros([ROWS, BLOCK_WIDTH], tl.float32)
        if HAS_GRAD_FIRST:
            grad_ptrs = grad_first_ptr + rows[:, None] * stride_grad_first_row + columns[None, :]
            grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        if IS_DOUBLE:
            z = standard * first_weight[None, :] + first_bias[None, :]
            z = z.to(dy_ptr.dtype.element_ty).to(tl.float32)
            second, second_deviation = standardize(z, is_row, columns, eps, WIDTH, EVEN)
            grad_ptrs = grad_second_ptr + rows[:, None] * stride_grad_second_row + columns[None, :]
            grad_second = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
            second_weight_sum += grad_second * second
            second_bias_sum += grad_second
            grad += norm_gradient(grad_second, second_weight, second, second_deviation, WIDTH)
        first_weight_sum += grad * standard
        first_bias_sum += grad
        dy = norm_gradient(grad, first_weight, standard, deviation, WIDTH)
        if HAS_GRAD_SUM:
            grad_ptrs = grad_sum_ptr + rows[:, None] * stride_grad_sum_row + columns[None, :]
            dy += tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy_ptrs = dy_ptr + rows[:, None] * stride_dy_row + columns[None, :]
        tl.store(dy_ptrs, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        if HAS_SCALED:
            dx_ptrs = dx_ptr + rows[:, None] * stride_dx_row + columns[None, :]
            tl.store(dx_ptrs, (scale * dy).to(dx_ptr.dtype.element_ty), mask=mask)

    share_ptrs = share_ptr + tl.program_id(0).to(tl.int64) * (2 * WIDTH * (1 + IS_DOUBLE)) + columns
    tl.store(share_ptrs, tl.sum(first_weight_sum, 0), mask=is_column)
    tl.store(share_ptrs + WIDTH, tl.sum(first_bias_sum, 0), mask=is_column)
    if IS_DOUBLE:
        tl.store(share_ptrs + 2 * WIDTH, tl.sum(second_weight_sum, 0), mask=is_column)
        tl.store(share_ptrs + 3 * WIDTH, tl.sum(second_bias_sum, 0), mask=is_column)


def layer_norm_backward(
    grad_z: Tensor, x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm`.

    `grad_z` is that of the result; where the gradient of `x` is written, `out`, may be `grad_z`.

    Returns:
        The gradients of `x`, in its dtype, and of weight and bias, float32 `[hidden]`.
    """
    grad_x, shares = _layer_norm_backward(x, grad_z, weight, eps, out)
    sums = shares.sum(0)
    return grad_x, sums[0], sums[1]


@planned
def _layer_norm_backward(
    x: Tensor, grad_z: Tensor, weight: Tensor, eps: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_rows({"x": x, "grad_z": grad_z, "out": out}, {"weight": weight})
    out = empty(x.shape, x.dtype, x.device) if out is None else out
    return out, _launch(x, None, 1.0, None, grad_z, None, (weight,), out, None, eps)


def residual_layer_norm_backward(
    grad_y: Tensor | None,
    grad_z: Tensor,
    y: Tensor,
    scale: float,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `residual_layer_norm`.

    Args:
        grad_y: gradient of y, `[num_tokens, hidden]` in the dtype of `y`; `None` where there is
            none.
        grad_z: gradient of z, like `grad_y`.
        y: what the forward pass returned first; the others as in the forward pass.
        out: where to write the gradients of `residual` and `x`, both like `y`.

    Returns:
        The gradients of `residual` and of `x`, in their dtype, and of weight and bias, float32
        `[hidden]`. Without `out`, and when `scale` is 1, the first two are one tensor.
    """
    given = (None, None) if out is None else out
    grad_residual, grad_x, shares = _residual_layer_norm_backward(
        y, grad_y, grad_z, scale, weight, eps, *given
    )
    sums = shares.sum(0)
    return grad_residual, grad_residual if grad_x is None else grad_x, sums[0], sums[1]


@planned
def _residual_layer_norm_backward(
    y: Tensor,
    grad_y: Tensor | None,
    grad_z: Tensor,
    scale: float,
    weight: Tensor,
    eps: float,
    *out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    check_rows({"y": y, "grad_y": grad_y, "grad_z": grad_z, **_named(out)}, {"weight": weight})
    grad_residual, grad_x = _outputs(y, scale, out)
    norms = (weight,)
    shares = _launch(y, None, scale, grad_y, grad_z, None, norms, grad_residual, grad_x, eps)
    return grad_residual, grad_x, shares


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
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `residual_double_layer_norm`, from the arguments of the forward pass.

    `grad_z1` and `grad_z2` are the gradients of its results, of which the first may be `None`.

    Returns:
        The gradients of `residual` and of `x`, as `residual_layer_norm_backward` has them, and of
        weight1, bias1, weight2 and bias2, float32 `[hidden]`.
    """
    norms = (weight1, bias1, weight2)
    given = (None, None) if out is None else out
    grad_residual, grad_x, shares = _residual_double_layer_norm_backward(
        x, residual, grad_z1, grad_z2, scale, *norms, eps, *given
    )
    sums = shares.sum(0)
    grad_x = grad_residual if grad_x is None else grad_x
    return grad_residual, grad_x, sums[0], sums[1], sums[2], sums[3]


@planned
def _residual_double_layer_norm_backward(
    x: Tensor,
    residual: Tensor,
    grad_z1: Tensor | None,
    grad_z2: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    eps: float,
    *out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows = {"x": x, "residual": residual, "grad_z1": grad_z1, "grad_z2": grad_z2, **_named(out)}
    check_rows(rows, {"weight1": weight1, "bias1": bias1, "weight2": weight2})
    grad_residual, grad_x = _outputs(x, scale, out)
    norms = (weight1, bias1, weight2)
    shares = _launch(x, residual, scale, None, grad_z1, grad_z2, norms, grad_residual, grad_x, eps)
    return grad_residual, grad_x, shares


def _named(out: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    return {f"out[{i}]": tensor for i, tensor in enumerate(out)}


def _outputs(
    x: Tensor, scale: float, out: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None]:
    first, second = out
    if first is not None:
        return first, second
    first = empty(x.shape, x.dtype, x.device)
    return first, None if scale == 1 else empty(x.shape, x.dtype, x.device)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    scale: float,
    grad_sum: Tensor | None,
    grad_first: Tensor | None,
    grad_second: Tensor | None,
    norms: tuple[Tensor, ...],
    dy: Tensor,
    dx: Tensor | None,
    eps: float,
) -> Tensor:
    """Writes the gradients of the rows; returns each program's share of those of weights and
    biases, `[programs, 2 or 4, width]`."""
    num_rows, width = x.shape
    config = norm_backward_config(width, x.dtype, architecture(x.device))
    parameters = 2 if grad_second is None else 4
    programs = min(config.programs, triton.cdiv(num_rows, config.rows))
    shares = empty((programs, parameters, width), torch.float32, x.device)
    if num_rows == 0:
        return shares
    weight1, bias1, weight2 = norms if len(norms) == 3 else (norms[0], None, None)
    launch(
        _norm_bwd_kernel,
        (programs,),
        x,
        residual,
        grad_sum,
        grad_first,
        grad_second,
        weight1,
        bias1,
        weight2,
        dy,
        dx,
        shares,
        num_rows,
        float(scale),
        float(eps),
        *(
            0 if tensor is None else tensor.stride(0)
            for tensor in (x, residual, grad_sum, grad_first, grad_second, dy, dx)
        ),
        **_constants(
            width,
            config,
            has_residual=residual is not None,
            has_grad_sum=grad_sum is not None,
            has_grad_first=grad_first is not None,
            is_double=grad_second is not None,
            has_scaled=dx is not None,
        ),
        num_warps=config.num_warps,
    )
    return shares


def _constants(
    width: int,
    config: NormBackwardConfig,
    *,
    has_residual: bool = False,
    has_grad_sum: bool = False,
    has_grad_first: bool = True,
    is_double: bool = False,
    has_scaled: bool = False,
) -> dict[str, int | bool]:
    return {
        "WIDTH": width,
        "HAS_RESIDUAL": has_residual,
        "HAS_GRAD_SUM": has_grad_sum,
        "HAS_GRAD_FIRST": has_grad_first,
        "IS_DOUBLE": is_double,
        "HAS_SCALED": has_scaled,
        "ROWS": config.rows,
        "BLOCK_WIDTH": config.block_width,
    }
