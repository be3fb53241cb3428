"""LayerNorm, alone and fused with the residual connection before it.

    y = residual + scale * x        (x alone in `layer_norm`)
    z = (y - mean(y)) / sqrt(var(y) + eps) * weight + bias

over the last dimension, one pass over memory. `residual_layer_norm` writes y and z;
`residual_double_layer_norm` writes z and the norm of z, which is how one Conformer layer ends and
the next begins. Statistics are fp32, in two passes over a row that stays in registers. z is taken
of y before y is rounded to the storage dtype; the second norm is taken of z as it is stored, so
that the fused form gives what two launches give.

Per token of C channels and e bytes an element, weights aside: `layer_norm` moves 2 C e bytes, the
others 4 C e (8 KB for C = 1024 in bf16), with about 8 C FLOPs a norm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.launch import check_rows
from csrc_triton.norm.config import NormConfig, norm_config
from csrc_triton.plans import empty, launch, planned


@triton.jit
def _normalize(x, columns, weight_ptr, bias_ptr, eps, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """LayerNorm of the rows of a tile whose masked columns are zero."""
    mean = tl.sum(x, 1) / WIDTH  # [ROWS]
    centered = x - mean[:, None]  # [ROWS, BLOCK_WIDTH]
    if not EVEN:
        centered = tl.where((columns < WIDTH)[None, :], centered, 0.0)
    variance = tl.sum(centered * centered, 1) / WIDTH  # [ROWS]
    scale = tl.rsqrt(variance + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    return centered * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _norm_fwd_kernel(
    x_ptr,  # [num_rows, WIDTH]
    residual_ptr,  # [num_rows, WIDTH], HAS_RESIDUAL
    first_weight_ptr,  # [WIDTH]
    first_bias_ptr,  # [WIDTH]
    second_weight_ptr,  # [WIDTH], IS_DOUBLE
    second_bias_ptr,  # [WIDTH], IS_DOUBLE
    sum_ptr,  # [num_rows, WIDTH], HAS_RESIDUAL and not IS_DOUBLE
    first_ptr,  # [num_rows, WIDTH]
    second_ptr,  # [num_rows, WIDTH], IS_DOUBLE
    num_rows,
    scale,
    eps,
    stride_x_row,
    stride_residual_row,
    stride_sum_row,
    stride_first_row,
    stride_second_row,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    EVEN: tl.constexpr = WIDTH == BLOCK_WIDTH
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = tl.arange(0, BLOCK_WIDTH)  # [BLOCK_WIDTH]
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]

    x_ptrs = x_ptr + rows[:, None] * stride_x_row + columns[None, :]
    y = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_WIDTH]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + rows[:, None] * stride_residual_row + columns[None, :]
        y = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + scale * y
        if not IS_DOUBLE:
            sum_ptrs = sum_ptr + rows[:, None] * stride_sum_row + columns[None, :]
            tl.store(sum_ptrs, y.to(sum_ptr.dtype.element_ty), mask=mask)

    z = _normalize(y, columns, first_weight_ptr, first_bias_ptr, eps, WIDTH, EVEN)
    z = z.to(first_ptr.dtype.element_ty)
    tl.store(first_ptr + rows[:, None] * stride_first_row + columns[None, :], z, mask=mask)
    if IS_DOUBLE:
        z = z.to(tl.float32)
        z = _normalize(z, columns, second_weight_ptr, second_bias_ptr, eps, WIDTH, EVEN)
        second_ptrs = second_ptr + rows[:, None] * stride_second_row + columns[None, :]
        tl.store(second_ptrs, z.to(second_ptr.dtype.element_ty), mask=mask)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """`LN(x)` over the last dimension, of at most 8192 elements, as `ops.layer_norm`."""
    return _layer_norm(x, weight, bias, eps, out)


@planned
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None) -> Tensor:
    check_rows({"x": x, "out": out}, {"weight": weight, "bias": bias})
    out = empty(x.shape, x.dtype, x.device) if out is None else out
    _launch(x, None, 1.0, (weight, bias), None, None, out, None, eps)
    return out


def residual_layer_norm(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = residual + scale * x` and `z = LN(y)`, as `ops.residual_layer_norm`.

    `out` is where y and z go, both like `x`; y may be `residual` itself.
    """
    y, z = (None, None) if out is None else out
    return _residual_layer_norm(x, residual, scale, weight, bias, eps, y, z)


@planned
def _residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    scale: float,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    y: Tensor | None,
    z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = {"x": x, "residual": residual, "out[0]": y, "out[1]": z}
    check_rows(rows, {"weight": weight, "bias": bias})
    y = empty(x.shape, x.dtype, x.device) if y is None else y
    z = empty(x.shape, x.dtype, x.device) if z is None else z
    _launch(x, residual, scale, (weight, bias), None, y, z, None, eps)
    return y, z


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
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`z1 = LN1(residual + scale * x)` and `z2 = LN2(z1)`, as `ops.residual_double_layer_norm`.

    z2 is the norm of z1 as it is stored. `out` is where they go, both like `x`.
    """
    z1, z2 = (None, None) if out is None else out
    norms = (weight1, bias1, weight2, bias2)
    return _residual_double_layer_norm(x, residual, scale, *norms, eps, z1, z2)


@planned
def _residual_double_layer_norm(
    x: Tensor,
    residual: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    z1: Tensor | None,
    z2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = {"x": x, "residual": residual, "out[0]": z1, "out[1]": z2}
    check_rows(rows, {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2})
    z1 = empty(x.shape, x.dtype, x.device) if z1 is None else z1
    z2 = empty(x.shape, x.dtype, x.device) if z2 is None else z2
    _launch(x, residual, scale, (weight1, bias1), (weight2, bias2), None, z1, z2, eps)
    return z1, z2


def _launch(
    x: Tensor,
    residual: Tensor | None,
    scale: float,
    first_norm: tuple[Tensor, Tensor],
    second_norm: tuple[Tensor, Tensor] | None,
    y: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    eps: float,
) -> None:
    num_rows, width = x.shape
    config = norm_config(width, x.dtype, architecture(x.device))
    if num_rows == 0:
        return
    # Arguments that a variant does not have are stood in for by ones that it has.
    absent_residual = x if residual is None else residual
    absent_sum = first if y is None else y
    absent_second = first if second is None else second
    weight2, bias2 = first_norm if second_norm is None else second_norm
    launch(
        _norm_fwd_kernel,
        (triton.cdiv(num_rows, config.rows),),
        x,
        absent_residual,
        *first_norm,
        weight2,
        bias2,
        absent_sum,
        first,
        absent_second,
        num_rows,
        float(scale),
        float(eps),
        x.stride(0),
        absent_residual.stride(0),
        absent_sum.stride(0),
        first.stride(0),
        absent_second.stride(0),
        **_constants(width, residual is not None, second is not None, config),
        num_warps=config.num_warps,
    )


def _constants(
    width: int, has_residual: bool, is_double: bool, config: NormConfig
) -> dict[str, int | bool]:
    return {
        "WIDTH": width,
        "HAS_RESIDUAL": has_residual,
        "IS_DOUBLE": is_double,
        "ROWS": config.rows,
        "BLOCK_WIDTH": config.block_width,
    }
