"""Gradients of linear layers and of what follows them.

For x `[N, K]`, weight `[M, K]`, y = x @ weight.T + bias and the gradient g of the output:

    linear      dy = g * act'(y)
    linear_glu  dy = [g * s, g * a * s * (1 - s)]    [a, b] = y, s = sigmoid(b)

    dx = dy @ weight,  dweight = dy.T @ x,  dbias = sum over rows of dy

One kernel reads g and y, and writes dy and, on the way, the program's share of dbias, so that dy is
not read for it again; where it is wanted, it writes the epilogue's output too, which the next
layer's dweight needs and the forward pass then need not keep. The shares are added up in a fixed
order. The two products are the vendor library's.

The forward pass keeps x alone: y is computed again, for 2 K M FLOPs a token, where keeping it would
take M elements.

Per token `epilogue_backward` moves 3 M elements, 4 M with the output; gated 5 M / 2 and 3 M.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.functions import activate, activation_constant, activation_derivative
from csrc_triton.gemm.config import EpilogueBackwardConfig, epilogue_backward_config
from csrc_triton.gemm.forward import check_linear, linear
from csrc_triton.launch import check_device, check_tensor
from csrc_triton.plans import empty, launch, planned


@triton.jit
def _store_rows(ptr, rows, columns, stride_row, value, mask):
    ptrs = ptr + rows[:, None] * stride_row + columns[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _epilogue_bwd_kernel(
    grad_ptr,  # [num_rows, num_columns], of the output
    y_ptr,  # [num_rows, num_columns], GATED: twice as many columns
    dy_ptr,  # as y
    out_ptr,  # [num_rows, num_columns], HAS_OUT
    share_ptr,  # [programs, columns of y] fp32, HAS_BIAS
    num_rows,
    num_columns,
    stride_grad_row,
    stride_y_row,
    stride_dy_row,
    stride_out_row,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < num_columns
    bias_sum = tl.zeros([ROWS, BLOCK_COLUMNS], tl.float32)
    gate_sum = tl.zeros([ROWS, BLOCK_COLUMNS], tl.float32)
    num_blocks = tl.cdiv(num_rows, ROWS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = tl.arange(0, ROWS).to(tl.int64) + block * ROWS  # [ROWS]
        mask = (rows < num_rows)[:, None] & is_column[None, :]
        grad_ptrs = grad_ptr + rows[:, None] * stride_grad_row + columns[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_COLUMNS]
        y_ptrs = y_ptr + rows[:, None] * stride_y_row + columns[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            gate = tl.load(y_ptrs + num_columns, mask=mask, other=0.0).to(tl.float32)
            gate = 1.0 / (1.0 + tl.exp(-gate))
            dy = grad * gate
            dgate = grad * y * (gate * (1.0 - gate))
            _store_rows(dy_ptr, rows, columns + num_columns, stride_dy_row, dgate, mask)
            gate_sum += dgate
            if HAS_OUT:
                _store_rows(out_ptr, rows, columns, stride_out_row, y * gate, mask)
        else:
            dy = grad * activation_derivative(y, ACTIVATION)
            if HAS_OUT:
                out = activate(y, ACTIVATION, "division")  # memory is waited for, not arithmetic
                _store_rows(out_ptr, rows, columns, stride_out_row, out, mask)
        _store_rows(dy_ptr, rows, columns, stride_dy_row, dy, mask)
        bias_sum += dy
    if HAS_BIAS:
        width = num_columns * (1 + GATED)
        share_ptrs = share_ptr + tl.program_id(0).to(tl.int64) * width + columns
        tl.store(share_ptrs, tl.sum(bias_sum, 0), mask=is_column)
        if GATED:
            tl.store(share_ptrs + num_columns, tl.sum(gate_sum, 0), mask=is_column)


def epilogue_backward(
    grad_output: Tensor,
    preactivation: Tensor,
    activation: str | None,
    *,
    gated: bool = False,
    needs_bias: bool = True,
    out: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a linear layer's epilogue with respect to y = x @ weight.T + bias and to bias.

    Args:
        grad_output: gradient of the output, `[num_tokens, features]` in the dtype of
            `preactivation`.
        preactivation: y, `[num_tokens, features]`, or where `gated` twice as many.
        activation: a name of `functions.ACTIVATIONS`, or `None`.
        gated: whether the epilogue is the gated linear unit instead.
        needs_bias: whether the bias's gradient is wanted.
        out: where the gradient of y goes; it may be `preactivation` or, where their shapes are
            one, `grad_output` itself.
        activated: where the epilogue's output goes, if that is wanted.

    Returns:
        The gradient of y, in its dtype, and that of the bias, float32, or `None`.
    """
    grad, shares = _epilogue_backward(
        grad_output, preactivation, activation, gated, needs_bias, out, activated
    )
    return grad, None if shares is None else shares.sum(0)


@planned
def _epilogue_backward(
    grad_output: Tensor,
    preactivation: Tensor,
    activation: str | None,
    gated: bool,
    needs_bias: bool,
    out: Tensor | None,
    activated: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of y, and of the bias each program's share, `[programs, width]`."""
    constant = "identity" if gated else activation_constant(activation)
    check_tensor("preactivation", preactivation, (None, None))
    num_tokens, width = preactivation.shape
    if gated and width % 2 != 0:
        raise ValueError(f"preactivation has {width} columns; a gated unit needs an even number")
    columns = width // 2 if gated else width
    dtype = preactivation.dtype
    check_tensor("grad_output", grad_output, (num_tokens, columns), (dtype,))
    if out is None:
        out = empty(preactivation.shape, dtype, preactivation.device)
    check_tensor("out", out, preactivation.shape, (dtype,))
    if activated is not None:
        check_tensor("activated", activated, grad_output.shape, (dtype,))
    check_device(preactivation=preactivation, grad_output=grad_output, out=out, activated=activated)
    arch, programs = architecture(out.device), 0
    if num_tokens > 0 and columns > 0:
        config = epilogue_backward_config(columns, dtype, arch)
        programs = min(config.programs, triton.cdiv(num_tokens, config.rows))
    shares = empty((programs, width), torch.float32, out.device) if needs_bias else None
    if programs == 0:
        return out, shares
    launch(
        _epilogue_bwd_kernel,
        (programs, triton.cdiv(columns, config.block_columns)),
        grad_output,
        preactivation,
        out,
        activated,
        shares,
        num_tokens,
        columns,
        grad_output.stride(0),
        preactivation.stride(0),
        out.stride(0),
        0 if activated is None else activated.stride(0),
        **_constants(constant, gated, activated is not None, needs_bias, config),
        num_warps=config.num_warps,
    )
    return out, shares


def linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear`. y = x @ weight.T + bias is computed again where they need it.

    Args:
        grad_output: gradient of the output, `[num_tokens, out_features]` in the dtype of `x`; the
            others as in the forward pass.
        needs: which of the gradients of x, weight and bias are wanted.

    Returns:
        The gradients of x and of weight, in their dtype, and of bias, float32; `None` where one is
        not wanted, or there is no bias.
    """
    _check(grad_output, x, weight, bias, False)
    needs_bias = needs[2] and bias is not None
    if activation_constant(activation) == "identity":
        grad_bias = grad_output.sum(0, dtype=torch.float32) if needs_bias else None
        return *products(grad_output, x, weight, needs), grad_bias
    y = linear(x, weight, bias)  # which its gradient then replaces
    dy, grad_bias = epilogue_backward(grad_output, y, activation, needs_bias=needs_bias, out=y)
    return *products(dy, x, weight, needs), grad_bias


def linear_glu_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear_glu`; `needs` and results as of `linear_backward`."""
    _check(grad_output, x, weight, bias, True)
    y = linear(x, weight, bias)  # which its gradient then replaces
    needs_bias = needs[2] and bias is not None
    dy, grad_bias = epilogue_backward(
        grad_output, y, None, gated=True, needs_bias=needs_bias, out=y
    )
    return *products(dy, x, weight, needs), grad_bias


def feed_forward_backward(
    grad_output: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str | None,
    weight2: Tensor,
    bias2: Tensor | None,
    needs: Sequence[bool] = (True, True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `linear(linear(x, weight1, bias1, activation=activation), weight2, bias2)`.

    x is all that the forward pass keeps: y = x @ weight1.T + bias1 is computed again, and its
    activation in the same pass as its gradient.

    Args:
        grad_output: gradient of the output, `[num_tokens, out_features]` in the dtype of `x`; the
            others as in the forward pass.
        needs: which of the gradients of x, weight1, bias1, weight2 and bias2 are wanted.

    Returns:
        The gradients of x, weight1, bias1, weight2 and bias2, the biases' in float32 and the others
        in their dtype; `None` where one is not wanted, or there is no bias.
    """
    _check_feed_forward(grad_output, x, weight1, bias1, weight2, bias2)
    needs_bias = needs[2] and bias1 is not None
    first: tuple[Tensor | None, Tensor | None] = (None, None)
    grad_weight2, grad_bias2 = None, None
    grad_bias1 = None
    if needs[4] and bias2 is not None:
        grad_bias2 = grad_output.sum(0, dtype=torch.float32)
    if needs[3] or needs[0] or needs[1] or needs_bias:
        inner = linear(x, weight1, bias1)
        hidden, _ = products(grad_output, x, weight2, (True, False))
        assert hidden is not None
        # Elementwise, so the results take the place of what they are computed from.
        dy, grad_bias1 = epilogue_backward(
            hidden, inner, activation, needs_bias=needs_bias, out=hidden, activated=inner
        )
        if needs[3]:
            _, grad_weight2 = products(grad_output, inner, weight2, (False, True))
        del inner
        first = products(dy, x, weight1, needs)
    return *first, grad_bias1, grad_weight2, grad_bias2


@planned
def _check_feed_forward(
    grad_output: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> None:
    check_tensor("weight1", weight1, (None, None))
    check_tensor("weight2", weight2, (None, weight1.shape[0]), (weight1.dtype,))
    check_tensor("x", x, (None, weight1.shape[1]), (weight1.dtype,))
    shape = (x.shape[0], weight2.shape[0])
    check_tensor("grad_output", grad_output, shape, (x.dtype,))
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None:
            check_tensor(name, bias, weight.shape[:1], (x.dtype,))
    check_device(
        x=x, grad_output=grad_output, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2
    )


def products(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """`grad @ weight` where `needs[0]`, and `grad.T @ x` where `needs[1]`."""
    grad_x = torch.mm(grad, weight) if needs[0] else None
    return grad_x, torch.mm(grad.t(), x) if needs[1] else None


@planned
def _check(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool
) -> None:
    out_features = check_linear(x, weight, bias, gated)
    check_tensor("grad_output", grad_output, (x.shape[0], out_features), (x.dtype,))
    check_device(x=x, weight=weight, grad_output=grad_output, bias=bias)


def _constants(
    activation: str, gated: bool, has_out: bool, has_bias: bool, config: EpilogueBackwardConfig
) -> dict[str, int | str | bool]:
    return {
        "ACTIVATION": activation,
        "GATED": gated,
        "HAS_OUT": has_out,
        "HAS_BIAS": has_bias,
        "ROWS": config.rows,
        "BLOCK_COLUMNS": config.block_columns,
    }
