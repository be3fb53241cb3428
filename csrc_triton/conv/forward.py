"""Causal depthwise convolution over packed utterances, with its LayerNorm and activation.

    y[t, c] = sum_k weight[c, k] * x[t - (K - 1) + k, c]      zero before an utterance's start
    out     = activation(LN(y))                               LN over the channels

A program owns ROWS successive rows of one utterance and all their channels, because the norm needs
whole rows; ROWS is 16, and less where a short batch would leave multiprocessors without work. A
thread owns a few channels of all ROWS rows and slides a window down the utterance: ROWS input rows
and ROWS accumulators in registers. Tap k multiplies the window by `weight[:, k]`, then the window
drops its oldest row and takes in the next one. So a program loads ROWS + K rows of x (the last of
them is not used) and K rows of weight for its ROWS rows of output: 2 K / ROWS + 1 loads an output
element, 4.9 for K = 31 and ROWS = 16, against 62 if each tap fetched its operands. Consecutive
programs share K - 1 input rows, which come from L2.

Per token of C channels and e bytes an element: 2 C e bytes through memory (4 KB for C = 1024 in
bf16) and 2 K C FLOPs (63 thousand), plus about 12 C for the norm and the activation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture, device_multiprocessors
from csrc_triton.conv.config import ConvConfig, conv_config
from csrc_triton.functions import (
    activate,
    activation_constant,
    locate_block,
    logistic_form,
    used_end,
)
from csrc_triton.launch import FLOAT_DTYPES, check_offsets, check_rows, num_blocks
from csrc_triton.plans import empty, launch, planned


@triton.jit
def _stack(rows, LOG_ROWS: tl.constexpr):
    """2^n tensors `[BLOCK_C]` as one `[BLOCK_C, 2, ..., 2]`; every thread keeps its elements."""
    for _ in tl.static_range(LOG_ROWS):
        pairs = rows[:0]
        for i in tl.static_range(len(rows) // 2):
            pairs += (tl.join(rows[2 * i], rows[2 * i + 1]),)
        rows = pairs
    return rows[0]


@triton.jit
def _unstack(tile, LOG_ROWS: tl.constexpr):
    """The inverse of `_stack`."""
    rows = (tile,)
    for _ in tl.static_range(LOG_ROWS):
        halves = rows[:0]
        for i in tl.static_range(len(rows)):
            halves += tl.split(rows[i])
        rows = halves  # type: ignore[assignment]
    return rows


@triton.jit
def _per_channel(x, LOG_ROWS: tl.constexpr):
    """`[BLOCK_C]` as `[BLOCK_C, 1, ..., 1]`, to broadcast against a stack of tensors."""
    for _ in tl.static_range(LOG_ROWS):
        x = tl.expand_dims(x, -1)
    return x


@triton.jit
def _if_row(is_channel, is_row):
    """`is_channel & is_row`, for a tile and a scalar.

    The scalar is broadcast as an integer, because Triton 3.9's interpreter takes no mask that came
    from broadcasting a truth value.
    """
    return is_channel & (tl.full(is_channel.shape, is_row.to(tl.int32), tl.int32) != 0)


@triton.jit
def _apply_tap(
    sums, window, weight_ptr, row_ptr, is_row, channels, is_channel, ROWS: tl.constexpr
):  # fmt: skip
    """Adds one tap's products to ROWS sums, then moves the window on to end with a further row."""
    weight = tl.load(weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)  # [BLOCK_C]
    mask = _if_row(is_channel, is_row)
    following = tl.load(row_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    new_sums = sums[:0]
    for i in tl.static_range(ROWS):
        new_sums += (sums[i] + weight * window[i],)
    window += (following,)
    return new_sums, window[1:]


@triton.jit
def slide_window(
    x_ptr,  # [num_rows, channels]
    weight_ptr,  # of the first tap
    row,  # under the first tap, for the first sum
    start,  # of the utterance's rows that are read
    end,
    stride_x_row,
    stride_weight_tap,
    channels,  # [BLOCK_C]
    is_channel,  # [BLOCK_C]
    K: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The convolution's sums for ROWS successive rows, ROWS x [BLOCK_C]."""
    row_ptr = x_ptr + row.to(tl.int64) * stride_x_row
    sums = ()
    window = ()  # ROWS x [BLOCK_C], and so are the sums
    for _ in tl.static_range(ROWS):
        is_row = (row >= start) & (row < end)
        mask = _if_row(is_channel, is_row)
        loaded = tl.load(row_ptr + channels, mask=mask, other=0.0).to(tl.float32)
        sums += (tl.zeros(channels.shape, dtype=tl.float32),)  # type: ignore[assignment]
        window += (loaded,)  # type: ignore[assignment]
        row += 1
        row_ptr += stride_x_row

    # A window that moves on is a renaming where the loop is unrolled, and copies where it is not.
    # All K taps unrolled would take the compiler minutes. The row that follows the last tap's
    # window is not used.
    for _ in tl.static_range(K % UNROLL):
        is_row = (row >= start) & (row < end)
        sums, window = _apply_tap(
            sums, window, weight_ptr, row_ptr, is_row, channels, is_channel, ROWS
        )
        row += 1
        row_ptr += stride_x_row
        weight_ptr += stride_weight_tap
    # Names of their own: Triton 3.5 carries through a loop what was a constant in another one.
    for _step in range(K // UNROLL):
        for _unrolled in tl.static_range(UNROLL):
            is_row = (row >= start) & (row < end)
            sums, window = _apply_tap(
                sums, window, weight_ptr, row_ptr, is_row, channels, is_channel, ROWS
            )
            row += 1
            row_ptr += stride_x_row
            weight_ptr += stride_weight_tap
    return sums


@triton.jit(do_not_specialize=["num_rows", "num_sequences"])
def _conv_norm_act_fwd_kernel(
    x_ptr,  # [num_rows, CHANNELS]
    weight_ptr,  # [K, CHANNELS]: tap by tap
    norm_weight_ptr,  # [CHANNELS]
    norm_bias_ptr,  # [CHANNELS]
    out_ptr,  # [num_rows, CHANNELS]
    cu_seqlens_ptr,  # int32 [num_sequences + 1]
    seqused_k_ptr,  # int32 [num_sequences], HAS_SEQUSED
    num_rows,
    num_sequences,
    eps,
    stride_x_row,
    stride_weight_tap,
    stride_out_row,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOGISTIC: tl.constexpr,
    LOG_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
):
    ROWS: tl.constexpr = 1 << LOG_ROWS
    sequence, start, end, first = locate_block(
        tl.program_id(0), cu_seqlens_ptr, num_sequences, num_rows, ROWS
    )
    if first >= end:
        return
    x_end = used_end(sequence, start, end, seqused_k_ptr, HAS_SEQUSED)

    channels = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_channel = channels < CHANNELS
    sums = slide_window(
        x_ptr, weight_ptr, first - (K - 1), start, x_end, stride_x_row, stride_weight_tap,
        channels, is_channel, K, ROWS, UNROLL,
    )  # fmt: skip

    tile = _stack(sums, LOG_ROWS)  # [BLOCK_C, 2, ..., 2]
    mean = tl.sum(tile, 0) / CHANNELS  # [2, ..., 2]
    tile = tile - mean[None]
    if CHANNELS < BLOCK_C:
        tile = tl.where(_per_channel(is_channel, LOG_ROWS), tile, 0.0)
    variance = tl.sum(tile * tile, 0) / CHANNELS
    norm_weight = tl.load(norm_weight_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    tile = tile * tl.rsqrt(variance + eps)[None]
    tile = tile * _per_channel(norm_weight, LOG_ROWS) + _per_channel(norm_bias, LOG_ROWS)
    rows = _unstack(activate(tile, ACTIVATION, LOGISTIC).to(out_ptr.dtype.element_ty), LOG_ROWS)
    for i in tl.static_range(ROWS):
        row_ptr = out_ptr + (first + i).to(tl.int64) * stride_out_row
        mask = _if_row(is_channel, first + i < end)
        tl.store(row_ptr + channels, rows[i], mask=mask)


def conv_norm_act(
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
    config: ConvConfig | None = None,
) -> Tensor:
    """`activation(LN(causal_depthwise_conv(x)))` over packed utterances, as `ops.conv_norm_act`.

    Of at most 2048 channels and 3 to 63 taps; the activation is a name of `functions.ACTIVATIONS`
    or `None`. `conv_weight` may have any strides: laid out tap by tap (a transposed view of a
    contiguous `[K, channels]`) it is read in place, otherwise it is first copied to that layout.
    `config` is that of `conv_config` when `None`.
    """
    others = (norm_weight, norm_bias, eps, activation, cu_seqlens, seqused_k, out, config)
    return _launch(x, tap_by_tap(conv_weight), *others)


@planned
def _launch(
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str | None,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None,
    out: Tensor | None,
    config: ConvConfig | None,
) -> Tensor:
    check_conv(x, conv_weight, norm_weight, norm_bias, cu_seqlens, seqused_k, out=out)
    num_tokens, channels = x.shape
    arch = architecture(x.device)
    if config is None:
        count = device_multiprocessors(x.device)
        config = conv_config(num_tokens, channels, conv_weight.shape[1], x.dtype, arch, count)
    constant = activation_constant(activation)
    out = empty(x.shape, x.dtype, x.device) if out is None else out
    batch = cu_seqlens.shape[0] - 1
    if num_tokens == 0 or batch < 1:
        return out
    launch(
        _conv_norm_act_fwd_kernel,
        (num_blocks(num_tokens, batch, config.rows),),
        x,
        conv_weight,
        norm_weight,
        norm_bias,
        out,
        cu_seqlens,
        seqused_k,
        num_tokens,
        batch,
        float(eps),
        x.stride(0),
        conv_weight.stride(1),
        out.stride(0),
        LOGISTIC=logistic_form(x.dtype, arch),
        **_constants(channels, conv_weight.shape[1], constant, config, seqused_k is not None),
        num_warps=config.num_warps,
    )
    return out


def check_conv(
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None,
    **like_x: Tensor | None,
) -> None:
    """The checks that `conv_norm_act` and its gradient share; `like_x` are optional tensors."""
    check_rows(
        {"x": x, **like_x},
        {"norm_weight": norm_weight, "norm_bias": norm_bias},
        conv_weight=conv_weight,
        cu_seqlens=cu_seqlens,
        seqused_k=seqused_k,
    )
    check_offsets(cu_seqlens, seqused_k)
    # Not by `check_tensor`: the weight may have any strides.
    channels = x.shape[1]
    if conv_weight.dim() != 2 or conv_weight.shape[0] != channels:
        shape = tuple(conv_weight.shape)
        raise ValueError(f"conv_weight has shape {shape}; it must be ({channels}, kernel size)")
    if conv_weight.dtype not in FLOAT_DTYPES:
        dtype = conv_weight.dtype
        raise ValueError(f"conv_weight is {dtype}; it must be float32, float16, bfloat16")


def tap_by_tap(conv_weight: Tensor) -> Tensor:
    """`[channels, K]` with a tap's channels side by side, copied only where it must be."""
    if conv_weight.dim() != 2 or conv_weight.stride(0) == 1:
        return conv_weight
    return conv_weight.t().contiguous().t()


def _constants(
    channels: int, kernel_size: int, activation: str, config: ConvConfig, has_seqused: bool
) -> dict[str, int | str]:
    return {
        "CHANNELS": channels,
        "K": kernel_size,
        "ACTIVATION": activation,
        "LOG_ROWS": config.rows.bit_length() - 1,
        "BLOCK_C": config.block_channels,
        "UNROLL": config.unroll,
        "HAS_SEQUSED": has_seqused,
    }
