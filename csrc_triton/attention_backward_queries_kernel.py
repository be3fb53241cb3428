"""The gradients of queries and of the distance embedding: step 3 of `attention_backward_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward_kernel import (
    head_rows,
    keys_of,
    load_rows,
    load_whole_rows,
    locate_tile,
    near_shift,
    utterance_scores,
)
from .dropout import kept_weights


@triton.jit
def _query_step(
    dq,  # [BLOCK_M, BLOCK_D] fp32
    query,  # [BLOCK_M, BLOCK_D]
    grad,  # [BLOCK_M, BLOCK_D]
    key,  # [BLOCK_N, BLOCK_D]
    value,  # [BLOCK_N, BLOCK_D]
    shift,  # [BLOCK_M, BLOCK_N or 1]
    delta,  # [BLOCK_M]
    scale_log2,
    seed_ptr,
    dropout_p,
    head,
    first_token,  # of the tile of queries, in the batch
    first_key,  # of the block of keys, in the utterance
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """What a block of keys adds to the gradients of a tile of queries, and the scores' gradient."""
    scores = tl.dot(query, tl.trans(key), input_precision=INPUT_PRECISION)
    probabilities = tl.math.exp2(scores * scale_log2 + shift)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(grad, tl.trans(value), input_precision=INPUT_PRECISION)
    if HAS_DROPOUT:
        kept = kept_weights(
            seed_ptr, head, first_token, first_key, dropout_p, query.shape[0], key.shape[0]
        )
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    ds = probabilities * (dp - delta[:, None])
    dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=INPUT_PRECISION)
    return dq, ds


@triton.jit
def _position_gradients(
    dq,  # [BLOCK_M, BLOCK_D] fp32
    query,  # [BLOCK_M, BLOCK_D]
    distance_ptr,
    share_ptr,  # this program's, [LEFT + RIGHT + 1, HEAD_DIM] fp32
    score_rows,  # [BLOCK_M], where each row's dP begins
    rows,  # [BLOCK_M]
    length,
    num_keys,
    left_sum,  # [BLOCK_M]
    right_sum,  # [BLOCK_M]
    channels,  # [BLOCK_D]
    stride_e_row,
    scale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Adds `dP E` to dq, and stores the tile's share of dE, `dP^T q`."""
    for first in tl.range(0, LEFT + RIGHT + 1, BLOCK_P, num_stages=1):
        offs_p = first + tl.arange(0, BLOCK_P)
        is_distance = offs_p <= LEFT + RIGHT
        keys = rows[:, None] + (offs_p - LEFT)[None, :]
        # Where the one key of a distance does not exist, P is still there.
        stored = (keys >= 0) & (keys < num_keys) & (rows < length)[:, None]
        stored &= ((offs_p > 0) & (offs_p < LEFT + RIGHT))[None, :]
        dp = tl.load(score_rows[:, None] + offs_p[None, :], mask=stored, other=0.0)
        dp += tl.where((offs_p == 0)[None, :], left_sum[:, None], 0.0)
        dp += tl.where((offs_p == LEFT + RIGHT)[None, :], right_sum[:, None], 0.0)
        dp = tl.where((rows < length)[:, None], dp, 0.0).to(query.dtype)  # [BLOCK_M, BLOCK_P]
        vectors = load_rows(distance_ptr, offs_p, stride_e_row, channels, is_distance, HEAD_DIM)
        dq = tl.dot(dp, vectors, dq, input_precision=INPUT_PRECISION)
        share = tl.dot(tl.trans(dp), query, input_precision=INPUT_PRECISION)
        tl.store(
            share_ptr + offs_p[:, None] * HEAD_DIM + channels[None, :],
            share * scale,
            mask=is_distance[:, None] & (channels < HEAD_DIM)[None, :],
        )
    return dq


@triton.jit(
    do_not_specialize=["first_head", "num_heads", "stride_row_head", "head_blocks"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "seqused_k_ptr", "tile_map_ptr", "seed_ptr"],
)
def shaw_attention_bwd_queries_kernel(
    q_ptr,  # [num_tokens, all heads, HEAD_DIM]
    k_ptr,
    v_ptr,
    distance_ptr,  # [LEFT + RIGHT + 1, HEAD_DIM]
    grad_ptr,  # [num_tokens, all heads, HEAD_DIM], of the output
    scratch_ptr,  # [num_heads, ...] fp32
    shift_ptr,  # [2, num_heads, num_tokens] fp32
    delta_ptr,  # [num_heads, num_tokens] fp32
    dq_ptr,  # [num_tokens, all heads, HEAD_DIM]
    share_ptr,  # [programs, LEFT + RIGHT + 1, HEAD_DIM] fp32
    cu_seqlens_ptr,  # [batch + 1] int32
    seqused_k_ptr,  # [batch] int32, HAS_SEQUSED
    tile_map_ptr,  # [num_tiles, 2] int32
    seed_ptr,  # int64 [2], HAS_DROPOUT
    dropout_p,
    first_head,
    num_heads,  # of this launch
    scale,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_e_row,
    stride_grad_row,
    stride_grad_head,
    stride_dq_row,
    stride_dq_head,
    stride_row_head,
    head_blocks,  # of 16 rows, in the scratch memory of a head
    HAS_POSITIONS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FAR_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    sequence, start, length, first_row, head = locate_tile(
        tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_M
    )
    channels = tl.arange(0, BLOCK_D)
    share_base = share_ptr
    if HAS_POSITIONS:
        share_base += tl.program_id(0).to(tl.int64) * ((LEFT + RIGHT + 1) * HEAD_DIM)
    if sequence < 0:
        if HAS_POSITIONS:  # the shares of all programs are added up
            for first in tl.range(0, LEFT + RIGHT + 1, BLOCK_P):
                offs_p = first + tl.arange(0, BLOCK_P)
                share_mask = (offs_p <= LEFT + RIGHT)[:, None] & (channels < HEAD_DIM)[None, :]
                share_ptrs = share_base + offs_p[:, None] * HEAD_DIM + channels[None, :]
                tl.store(share_ptrs, tl.zeros([BLOCK_P, BLOCK_D], tl.float32), mask=share_mask)
        return
    wide_head = (first_head + head).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    rows = first_row + offs_m
    row_mask = rows < length
    q_base = head_rows(q_ptr, start, wide_head, stride_q_row, stride_q_head)
    query = load_rows(q_base, rows, stride_q_row, channels, row_mask, HEAD_DIM)
    grad_base = head_rows(grad_ptr, start, wide_head, stride_grad_row, stride_grad_head)
    grad = load_rows(grad_base, rows, stride_grad_row, channels, row_mask, HEAD_DIM)
    row_offsets = head.to(tl.int64) * stride_row_head + start + rows
    delta = tl.load(delta_ptr + row_offsets, mask=row_mask, other=0.0)
    left_shift = tl.load(shift_ptr + row_offsets, mask=row_mask, other=0.0)
    right_shift = left_shift
    k_base = head_rows(k_ptr, start, wide_head, stride_k_row, stride_k_head)
    v_base = head_rows(v_ptr, start, wide_head, stride_v_row, stride_v_head)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    left_sum = tl.zeros([BLOCK_M], tl.float32)
    right_sum = tl.zeros([BLOCK_M], tl.float32)
    scores_base = scratch_ptr
    num_keys = keys_of(sequence, length, seqused_k_ptr, HAS_SEQUSED)
    whole = num_keys // BLOCK_N * BLOCK_N  # keys in whole blocks
    band_first = whole
    band_end = whole
    if HAS_POSITIONS:
        scores_base = utterance_scores(scratch_ptr, start, sequence, head, head_blocks, ROW_STRIDE)
        side = num_heads.to(tl.int64) * stride_row_head
        right_shift = tl.load(shift_ptr + side + row_offsets, mask=row_mask, other=0.0)
        last_row = tl.minimum(first_row + BLOCK_M, length) - 1
        band_first = tl.maximum(first_row - LEFT + 1, 0) // BLOCK_N * BLOCK_N
        band_first = tl.minimum(band_first, whole)
        band_end = (last_row + RIGHT + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        band_end = tl.minimum(band_end, whole)

    band_keys = band_end - band_first
    for far_start in tl.range(0, whole - band_keys, BLOCK_N, num_stages=FAR_STAGES):
        first_key = far_start
        shift = left_shift
        if HAS_POSITIONS:
            first_key = tl.where(far_start < band_first, far_start, far_start + band_keys)
            shift = tl.where(far_start < band_first, left_shift, right_shift)
        keys = first_key + offs_n
        key = load_whole_rows(k_base, keys, stride_k_row, channels, HEAD_DIM, BLOCK_D)
        value = load_whole_rows(v_base, keys, stride_v_row, channels, HEAD_DIM, BLOCK_D)
        dq, ds = _query_step(
            dq, query, grad, key, value, shift[:, None], delta, scale_log2,
            seed_ptr, dropout_p, wide_head, start + first_row, first_key,
            HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
        if HAS_POSITIONS:
            row_sum = tl.sum(ds, 1)
            left_sum += tl.where(far_start < band_first, row_sum, 0.0)
            right_sum += tl.where(far_start < band_first, 0.0, row_sum)

    # The keys after the last whole block, wherever the band is, are the last step.
    last_start = tl.where(whole < num_keys, whole, band_end - BLOCK_N)
    band_end = tl.where(whole < num_keys, band_end + BLOCK_N, band_end)
    for band_start in tl.range(band_first, band_end, BLOCK_N, num_stages=1):
        first_key = tl.where(band_start == band_end - BLOCK_N, last_start, band_start)
        first_key = tl.multiple_of(first_key, BLOCK_N)
        keys = first_key + offs_n
        key_mask = keys < num_keys
        key = load_rows(k_base, keys, stride_k_row, channels, key_mask, HEAD_DIM)
        value = load_rows(v_base, keys, stride_v_row, channels, key_mask, HEAD_DIM)
        if HAS_POSITIONS:
            tile_scores = scores_base + first_row.to(tl.int64) * ROW_STRIDE + first_key
            score_ptrs = tile_scores + offs_m[:, None] * ROW_STRIDE + offs_n[None, :]
            shift = near_shift(
                score_ptrs,
                rows[:, None],
                keys[None, :],
                key_mask[None, :] & row_mask[:, None],
                left_shift[:, None],
                right_shift[:, None],
                LEFT,
                RIGHT,
            )
        else:
            shift = tl.where(key_mask[None, :], left_shift[:, None], -float("inf"))
        dq, ds = _query_step(
            dq, query, grad, key, value, shift, delta, scale_log2,
            seed_ptr, dropout_p, wide_head, start + first_row, first_key,
            HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip
        if HAS_POSITIONS:
            is_left = keys[None, :] <= (rows - LEFT)[:, None]
            is_right = keys[None, :] >= (rows + RIGHT)[:, None]
            left_sum += tl.sum(tl.where(is_left, ds, 0.0), 1)
            right_sum += tl.sum(tl.where(is_right & ~is_left, ds, 0.0), 1)
            tl.debug_barrier()  # other threads may have yet to read the scores of this block
            interior = ~is_left & ~is_right & key_mask[None, :] & row_mask[:, None]
            tl.store(score_ptrs, ds, mask=interior)

    if HAS_POSITIONS:
        tl.debug_barrier()  # dP was written by other threads than those that will read it
        dq = _position_gradients(
            dq, query, distance_ptr, share_base, scores_base + rows * (ROW_STRIDE + 1) - LEFT,
            rows, length, num_keys, left_sum, right_sum, channels, stride_e_row, scale,
            LEFT, RIGHT, HEAD_DIM, BLOCK_P, INPUT_PRECISION,
        )  # fmt: skip
    dq_ptrs = dq_ptr + wide_head * stride_dq_head + (start + rows)[:, None] * stride_dq_row
    tl.store(
        dq_ptrs + channels[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (channels < HEAD_DIM)[None, :],
    )
