"""Gradients of the causal depthwise convolution with its LayerNorm and activation.

With y the convolution, h its rows less their mean and by their deviation, u = h * norm_weight +
norm_bias, g the gradient of the output, and sums that stop where an utterance does:

    du[t, c]     = g[t, c] * activation'(u[t, c])
    dy[t]        = (du w - mean(du w) - h mean(du w h)) / sqrt(var(y) + eps)     w: norm_weight
    dx[t, c]     = sum_k weight[c, k] * dy[t + (K - 1) - k, c]
    dweight[c,k] = sum_t dy[t, c] * x[t - (K - 1) + k, c]

and dnorm_weight, dnorm_bias are the sums of du h and du over rows. Four launches, none with an
atomic addition, so two runs give the same bits:

1. y is computed again, which costs less than keeping it: a program owns ROWS successive rows and
   some channels, and slides the window of the forward kernel.
2. dy takes the place of y, whole rows at a time; each program leaves its share of the norm's
   gradients.
3. dx is the first kernel over dy: forwards in time and with the taps in reverse.
4. dweight: a program owns some channels, 8 successive taps and a chunk of rows. It walks down the
   rows with 8 sums and a window of 8 rows of x in registers: two loads for 8 multiply-adds.

Convolution, norm and activation in one kernel spill: a thread would hold its rows of y and of g
beside the window. Shares are added up in a fixed order. Per token of C channels and e bytes an
element: 9 C e bytes through memory, 4 K C / CHUNK of shares, and 6 K C FLOPs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.conv.config import ConvBackwardConfig, conv_backward_config
from csrc_triton.conv.forward import check_conv, slide_window, tap_by_tap
from csrc_triton.functions import (
    activation_constant,
    activation_derivative,
    locate_block,
    norm_gradient,
    standardize,
    used_end,
)
from csrc_triton.launch import num_blocks
from csrc_triton.plans import empty, launch, planned


@triton.jit(do_not_specialize=["num_rows", "num_sequences"])
def _slide_kernel(
    x_ptr,  # [num_rows, CHANNELS]
    weight_ptr,  # [K, CHANNELS]: tap by tap
    out_ptr,  # [num_rows, CHANNELS]
    cu_seqlens_ptr,  # int32 [num_sequences + 1]
    seqused_k_ptr,  # int32 [num_sequences], HAS_SEQUSED
    num_rows,
    num_sequences,
    stride_x_row,
    stride_weight_tap,
    stride_out_row,
    BACKWARDS: tl.constexpr,  # the gradient of the convolution instead of the convolution
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
):
    sequence, start, end, first = locate_block(
        tl.program_id(0), cu_seqlens_ptr, num_sequences, num_rows, ROWS
    )
    if first >= end:
        return
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_channel = channels < CHANNELS
    x_end = used_end(sequence, start, end, seqused_k_ptr, HAS_SEQUSED)
    row = first
    read_end = x_end
    if BACKWARDS:
        read_end = end
        # The row itself was under the last tap, the next one under the last but one.
        weight_ptr += tl.cast(stride_weight_tap, tl.int64) * (K - 1)
        stride_weight_tap = -stride_weight_tap
    else:
        row -= K - 1
    sums = slide_window(
        x_ptr, weight_ptr, row, start, read_end, stride_x_row, stride_weight_tap,
        channels, is_channel, K, ROWS, UNROLL,
    )  # fmt: skip
    # Not as first + i < end: that was asked of the first rows that were read, and would be kept.
    rows_left = end - first
    x_rows_left = x_end - first
    for i in tl.static_range(ROWS):
        row_ptr = out_ptr + (first + i).to(tl.int64) * stride_out_row
        total = sums[i]
        if BACKWARDS and HAS_SEQUSED:  # rows that were not read have no gradient
            total = tl.where(i < x_rows_left, total, 0.0)
        tl.store(
            row_ptr + channels,
            total.to(out_ptr.dtype.element_ty),
            mask=is_channel & (i < rows_left),
        )


@triton.jit(do_not_specialize=["num_rows"])
def _norm_act_bwd_kernel(
    grad_ptr,  # [num_rows, CHANNELS], of the output
    y_ptr,  # [num_rows, CHANNELS]; its gradient is written over it
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    share_ptr,  # [programs, 2, CHANNELS] fp32
    num_rows,
    eps,
    stride_grad_row,
    stride_y_row,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_column = columns < CHANNELS
    weight = tl.load(norm_weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    num_blocks = tl.cdiv(num_rows, ROWS)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = tl.arange(0, ROWS).to(tl.int64) + block * ROWS  # [ROWS]
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        y_ptrs = y_ptr + rows[:, None] * stride_y_row + columns[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_C]
        standard, deviation = standardize(y, is_row, columns, eps, CHANNELS, CHANNELS == BLOCK_C)
        grad_ptrs = grad_ptr + rows[:, None] * stride_grad_row + columns[None, :]
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        normed = standard * weight[None, :] + bias[None, :]
        grad = grad * activation_derivative(normed, ACTIVATION)
        weight_sum += grad * standard
        bias_sum += grad
        dy = norm_gradient(grad, weight, standard, deviation, CHANNELS)
        tl.store(y_ptrs, dy.to(y_ptr.dtype.element_ty), mask=mask)
    share_ptrs = share_ptr + tl.program_id(0).to(tl.int64) * (2 * CHANNELS) + columns
    tl.store(share_ptrs, tl.sum(weight_sum, 0), mask=is_column)
    tl.store(share_ptrs + CHANNELS, tl.sum(bias_sum, 0), mask=is_column)


@triton.jit(do_not_specialize=["num_rows", "num_sequences"])
def _conv_bwd_weight_kernel(
    dy_ptr,  # [num_rows, CHANNELS]
    x_ptr,  # [num_rows, CHANNELS]
    share_ptr,  # [chunks, K, CHANNELS] fp32
    cu_seqlens_ptr,  # int32 [num_sequences + 1]
    seqused_k_ptr,  # int32 [num_sequences], HAS_SEQUSED
    num_rows,
    num_sequences,
    stride_dy_row,
    stride_x_row,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
):
    chunk = tl.program_id(0)
    first_tap = tl.program_id(2) * TAPS
    sequence, start, end, first = locate_block(
        chunk, cu_seqlens_ptr, num_sequences, num_rows, CHUNK
    )
    x_end = used_end(sequence, start, end, seqused_k_ptr, HAS_SEQUSED)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_channel = channels < CHANNELS
    x_row = first - (K - 1) + first_tap
    x_row_ptr = x_ptr + x_row.to(tl.int64) * stride_x_row
    dy_row_ptr = dy_ptr + first.to(tl.int64) * stride_dy_row
    sums = ()
    window = ()  # TAPS - 1 x [BLOCK_C]: rows of x under all taps but the last
    for i in tl.static_range(TAPS):
        sums += (tl.zeros([BLOCK_C], dtype=tl.float32),)  # type: ignore[assignment]
        if i < TAPS - 1:
            is_row = (x_row >= start) & (x_row < x_end)
            loaded = tl.load(x_row_ptr + channels, mask=is_channel & is_row, other=0.0)
            window += (loaded.to(tl.float32),)  # type: ignore[assignment]
            x_row += 1
            x_row_ptr += stride_x_row
    # A window that moves on TAPS times holds new rows only: no copies.
    for row in range(first, tl.minimum(first + CHUNK, end), TAPS):
        for i in tl.static_range(TAPS):
            is_row = is_channel & (row + i < end)
            grad = tl.load(dy_row_ptr + channels, mask=is_row, other=0.0).to(tl.float32)
            is_row = (x_row >= start) & (x_row < x_end)
            loaded = tl.load(x_row_ptr + channels, mask=is_channel & is_row, other=0.0)
            window += (loaded.to(tl.float32),)  # type: ignore[assignment]
            new_sums = sums[:0]
            for tap in tl.static_range(TAPS):
                new_sums += (sums[tap] + grad * window[tap],)  # type: ignore[assignment]
            sums = new_sums
            window = window[1:]
            x_row += 1
            x_row_ptr += stride_x_row
            dy_row_ptr += stride_dy_row
    share_ptrs = share_ptr + (chunk.to(tl.int64) * K + first_tap) * CHANNELS + channels
    for tap in tl.static_range(TAPS):
        tl.store(share_ptrs + tap * CHANNELS, sums[tap], mask=is_channel & (first_tap + tap < K))


def conv_norm_act_backward(
    grad_output: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str | None,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `conv_norm_act`.

    Args:
        grad_output: gradient of the output, `[num_tokens, channels]` in the dtype of `x`; the
            others as in the forward pass.
        out: where to write the gradient of `x`, like `x`.

    Returns:
        The gradients of `x`, in its dtype, and of conv_weight `[channels, K]`, norm_weight and
        norm_bias `[channels]`, all three float32.
    """
    others = (norm_weight, norm_bias, eps, activation, cu_seqlens, seqused_k, out)
    grad_x, shares, norm_shares = _launch(x, grad_output, tap_by_tap(conv_weight), *others)
    norms = norm_shares.sum(0)
    return grad_x, shares.sum(0).t().contiguous(), norms[0], norms[1]


@planned
def _launch(
    x: Tensor,
    grad_output: Tensor,
    taps: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str | None,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, and each program's share of the weights': `[chunks, K, channels]` of the
    convolution, `[programs, 2, channels]` of the norm."""
    check_conv(
        x, taps, norm_weight, norm_bias, cu_seqlens, seqused_k, grad_output=grad_output, out=out
    )
    num_tokens, channels = x.shape
    kernel_size = taps.shape[1]
    config = conv_backward_config(channels, kernel_size, x.dtype, architecture(x.device))
    constant = activation_constant(activation)
    out = empty(x.shape, x.dtype, x.device) if out is None else out
    batch = cu_seqlens.shape[0] - 1
    is_empty = num_tokens == 0 or batch < 1
    chunks = 0 if is_empty else num_blocks(num_tokens, batch, config.chunk)
    programs = min(config.norm.programs, triton.cdiv(num_tokens, config.norm.rows))
    programs = 0 if is_empty else programs
    shares = empty((chunks, kernel_size, channels), torch.float32, x.device)
    norm_shares = empty((programs, 2, channels), torch.float32, x.device)
    if is_empty:
        return out, shares, norm_shares
    dy = empty(x.shape, x.dtype, x.device)
    has_seqused = seqused_k is not None
    window, norm, weights = _constants(channels, kernel_size, constant, config, has_seqused)
    blocks = num_blocks(num_tokens, batch, config.rows)
    channel_blocks = triton.cdiv(channels, config.block_channels)

    def slide(source: Tensor, target: Tensor, backwards: bool) -> None:
        launch(
            _slide_kernel,
            (blocks, channel_blocks),
            source,
            taps,
            target,
            cu_seqlens,
            seqused_k,
            num_tokens,
            batch,
            source.stride(0),
            taps.stride(1),
            target.stride(0),
            BACKWARDS=backwards,
            **window,
            num_warps=config.num_warps,
        )

    slide(x, dy, backwards=False)
    launch(
        _norm_act_bwd_kernel,
        (programs,),
        grad_output,
        dy,
        norm_weight,
        norm_bias,
        norm_shares,
        num_tokens,
        float(eps),
        grad_output.stride(0),
        dy.stride(0),
        **norm,
        num_warps=config.norm.num_warps,
    )
    slide(dy, out, backwards=True)
    launch(
        _conv_bwd_weight_kernel,
        (chunks, channel_blocks, triton.cdiv(kernel_size, config.taps)),
        dy,
        x,
        shares,
        cu_seqlens,
        seqused_k,
        num_tokens,
        batch,
        dy.stride(0),
        x.stride(0),
        **weights,
        num_warps=config.num_warps,
    )
    return out, shares, norm_shares


def _constants(
    channels: int, kernel_size: int, activation: str, config: ConvBackwardConfig, has_seqused: bool
) -> tuple[dict[str, int | str], dict[str, int | str], dict[str, int | str]]:
    """Of the kernel that slides a window, of the one for the norm, of the one for the weight."""
    block = {"CHANNELS": channels, "BLOCK_C": config.block_channels}
    slide = {"K": kernel_size, "ROWS": config.rows, "UNROLL": config.unroll}
    weight = {"K": kernel_size, "TAPS": config.taps, "CHUNK": config.chunk}
    norm: dict[str, int | str] = {
        "CHANNELS": channels,
        "ACTIVATION": activation,
        "ROWS": config.norm.rows,
        "BLOCK_C": config.norm.block_width,
    }
    used = {"HAS_SEQUSED": has_seqused}
    return {**block, **slide, **used}, norm, {**block, **weight, **used}
