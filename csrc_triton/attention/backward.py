"""Gradients of attention with Shaw relative keys over packed utterances.

With the scores s and probabilities p of `forward`, the output o, its gradient g, and the
row of position scores P = q E^T:

    delta_i  = o_i . g_i
    ds_ij    = p_ij (g_i . v_j - delta_i)                           gradient of s_ij
    dP[i, r] = sum of ds_ij over the keys j with clip(j - i, -L, R) + L = r
    dv_j     = sum_i p_ij g_i
    dk_j     = sum_i ds_ij q_i / sqrt(D)
    dq_i     = (sum_j ds_ij k_j + dP[i] E) / sqrt(D)
    dE       = sum_i dP[i]^T q_i / sqrt(D)

Scores are computed again, block by block. Every gradient is written by one program, so there is no
atomic addition and two runs give the same bits:

1. *prepare*, a program for each tile of queries: delta, and P in the units of exp2 and less the
   row's log-sum-exp, so that a probability is `exp2(q.k * scale + P)`.
2. *keys*, a program for each tile of keys: dk and dv, over all blocks of queries.
3. *queries*, a program for each tile of queries: dq and dP, over all blocks of keys. An interior
   distance has one key a row, so its dP is ds of that one pair: it takes the place of P[i, r] in
   memory, which nobody reads again. dP[i, 0] and dP[i, L + R] are row sums.
4. *shares*, at most `AttentionBackwardConfig.shares` programs for each 32 distances, whatever the
   batch and the device: the sum of dP^T q over every so many-th tile. *distances* adds up the
   shares in their order.

As in the forward kernel, blocks wholly left or right of the band -L < j - i < R are plain flash
attention (Dao 2023), with a number for each row; only blocks that touch the band read P.

P lies in memory with rows `ROW_STRIDE + 1` apart, so that a block's `P[i, j - i + L]` is a strided
tile with row stride `ROW_STRIDE` (`forward`). Utterance s begins at row
`16 (start // 16 + s)`, so that every tile is aligned.

Per token and layer, with T frames and 16-bit elements: 14 C T + 6 C (L + R + 1) FLOPs; 16 C bytes
of q, k, v, o, g and the three gradients, and 8 H (L + R + 1) bytes of P and dP written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.attention.config import (
    AttentionBackwardConfig,
    ScoresLayout,
    attention_backward_config,
    scores_layout,
)
from csrc_triton.attention.forward import LOG2_E, band_blocks, check_attention
from csrc_triton.attention.tile_map import build_tile_map, check_tile_map
from csrc_triton.functions import kept_weights
from csrc_triton.plans import empty, launch, planned

_SHARE_DISTANCES = 32  # of a program that adds up a share
_SUM_COLUMNS = 32  # numbers of a program that adds up the shares


@triton.jit
def head_rows(ptr, start, head, stride_row, stride_head):
    """Where the rows of one head of an utterance begin; `start` and `head` are int64."""
    return ptr + start * stride_row + head * stride_head


@triton.jit
def load_rows(base, rows, stride_row, channels, row_mask, HEAD_DIM: tl.constexpr):
    """Rows of one head, zero outside `row_mask` and after the last channel."""
    return tl.load(
        base + rows.to(tl.int64)[:, None] * stride_row + channels[None, :],
        mask=row_mask[:, None] & (channels < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def load_whole_rows(
    base, rows, stride_row, channels, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`load_rows` where all rows exist."""
    ptrs = base + rows.to(tl.int64)[:, None] * stride_row + channels[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def locate_tile(work, tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK: tl.constexpr):
    """Utterance, its start and length, the first row in it, and the head of one tile of one head.

    The utterance is -1 where the map has no tile left.
    """
    tile = work // num_heads
    head = work % num_heads
    sequence = tl.load(tile_map_ptr + 2 * tile)
    first = tl.load(tile_map_ptr + 2 * tile + 1) * BLOCK
    known = tl.maximum(sequence, 0)
    start = tl.load(cu_seqlens_ptr + known)
    length = tl.load(cu_seqlens_ptr + known + 1) - start
    return sequence, start.to(tl.int64), length, first, head


@triton.jit
def keys_of(sequence, length, seqused_k_ptr, HAS_SEQUSED: tl.constexpr):
    """Number of keys of an utterance of `length` tokens."""
    if HAS_SEQUSED:
        length = tl.load(seqused_k_ptr + tl.maximum(sequence, 0))
    return length


@triton.jit
def utterance_scores(scratch_ptr, start, sequence, head, head_blocks, ROW_STRIDE: tl.constexpr):
    """Where P of an utterance's row 0 and key 0 lies."""
    block = head.to(tl.int64) * head_blocks + start // 16 + sequence
    return scratch_ptr + block * (16 * (ROW_STRIDE + 1))


@triton.jit
def near_shift(
    score_ptrs,  # [BLOCK_M, BLOCK_N] or its transpose, as all of these
    rows,
    columns,
    exists,
    left_shift,
    right_shift,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """What is added to the scores of a block that touches the band, in units of log 2.

    Where a pair outside of the band would lie, lies one of another row, which is read in vain: with
    a mask loads are as narrow as one number.
    """
    near = tl.load(score_ptrs)
    near = tl.where(columns <= rows - LEFT, left_shift, near)
    near = tl.where(columns >= rows + RIGHT, right_shift, near)
    return tl.where(exists, near, -float("inf"))


@triton.jit(
    do_not_specialize=[
        "first_head",
        "num_heads",
        "stride_lse_head",
        "stride_row_head",
        "head_blocks",
    ],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "tile_map_ptr", "lse_ptr"],
)
def shaw_attention_bwd_prepare_kernel(
    q_ptr,  # [num_tokens, all heads, HEAD_DIM]
    distance_ptr,  # [LEFT + RIGHT + 1, HEAD_DIM]
    out_ptr,  # [num_tokens, all heads, HEAD_DIM]
    grad_ptr,  # [num_tokens, all heads, HEAD_DIM], of the output
    lse_ptr,  # [all heads, num_tokens] fp32
    scratch_ptr,  # [num_heads, ...] fp32
    shift_ptr,  # [2, num_heads, num_tokens] fp32: P[:, 0] and P[:, LEFT + RIGHT]
    delta_ptr,  # [num_heads, num_tokens] fp32
    cu_seqlens_ptr,  # [batch + 1] int32
    tile_map_ptr,  # [num_tiles, 2] int32
    first_head,
    num_heads,  # of this launch
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_e_row,
    stride_out_row,
    stride_out_head,
    stride_grad_row,
    stride_grad_head,
    stride_lse_head,
    stride_row_head,
    head_blocks,  # of 16 rows, in the scratch memory of a head
    HAS_POSITIONS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence, start, length, first_row, head = locate_tile(
        tl.program_id(0), tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_M
    )
    if sequence < 0:
        return
    wide_head = (first_head + head).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < length
    channels = tl.arange(0, BLOCK_D)
    out = load_rows(
        head_rows(out_ptr, start, wide_head, stride_out_row, stride_out_head),
        rows, stride_out_row, channels, row_mask, HEAD_DIM,
    )  # fmt: skip
    grad = load_rows(
        head_rows(grad_ptr, start, wide_head, stride_grad_row, stride_grad_head),
        rows, stride_grad_row, channels, row_mask, HEAD_DIM,
    )  # fmt: skip
    row_offsets = head.to(tl.int64) * stride_row_head + start + rows
    products = out.to(tl.float32) * grad.to(tl.float32)  # [BLOCK_M, BLOCK_D]
    # Selected, so that they are not fused with the sum's first additions: the threads that hold one
    # sum would differ in its last bit.
    delta = tl.sum(tl.where(row_mask[:, None], products, 0.0), 1)  # [BLOCK_M]
    tl.store(delta_ptr + row_offsets, delta, mask=row_mask)

    lse = tl.load(lse_ptr + wide_head * stride_lse_head + start + rows, mask=row_mask, other=0.0)
    lse *= 1.4426950408889634  # 1 / log 2
    left_shift = -lse
    if HAS_POSITIONS:
        left_shift = tl.zeros([BLOCK_M], tl.float32)
        right_shift = left_shift
        query = load_rows(
            head_rows(q_ptr, start, wide_head, stride_q_row, stride_q_head),
            rows, stride_q_row, channels, row_mask, HEAD_DIM,
        )  # fmt: skip
        scores_base = utterance_scores(scratch_ptr, start, sequence, head, head_blocks, ROW_STRIDE)
        score_rows = scores_base + rows * (ROW_STRIDE + 1) - LEFT
        for first in tl.range(0, LEFT + RIGHT + 1, BLOCK_P, num_stages=1):
            offs_p = first + tl.arange(0, BLOCK_P)
            is_distance = offs_p <= LEFT + RIGHT
            vectors = load_rows(
                distance_ptr, offs_p, stride_e_row, channels, is_distance, HEAD_DIM
            )  # [BLOCK_P, BLOCK_D]
            shift = tl.dot(query, tl.trans(vectors), input_precision="ieee")
            shift = shift * scale_log2 - lse[:, None]  # [BLOCK_M, BLOCK_P]
            tl.store(
                score_rows[:, None] + offs_p[None, :],
                shift,
                mask=row_mask[:, None] & is_distance[None, :],
            )
            left_shift += tl.sum(tl.where((offs_p == 0)[None, :], shift, 0.0), 1)
            right_shift += tl.sum(tl.where((offs_p == LEFT + RIGHT)[None, :], shift, 0.0), 1)
        side = num_heads.to(tl.int64) * stride_row_head
        tl.store(shift_ptr + side + row_offsets, right_shift, mask=row_mask)
    tl.store(shift_ptr + row_offsets, left_shift, mask=row_mask)


@triton.jit
def _key_step(
    dk,  # [BLOCK_N, BLOCK_D] fp32
    dv,  # [BLOCK_N, BLOCK_D] fp32
    key,  # [BLOCK_N, BLOCK_D]
    value,  # [BLOCK_N, BLOCK_D]
    query,  # [BLOCK_M, BLOCK_D]
    grad,  # [BLOCK_M, BLOCK_D]
    shift,  # [BLOCK_N or 1, BLOCK_M]
    delta,  # [BLOCK_M]
    scale_log2,
    seed_ptr,
    dropout_p,
    head,
    first_token,  # of the block of queries, in the batch
    first_key,  # of the tile of keys, in the utterance
    HAS_DROPOUT: tl.constexpr,
):
    """What a block of queries adds to the gradients of a tile of keys and values."""
    scores = tl.dot(key, tl.trans(query), input_precision="ieee")
    probabilities = tl.math.exp2(scores * scale_log2 + shift)  # [BLOCK_N, BLOCK_M]
    dp = tl.dot(value, tl.trans(grad), input_precision="ieee")
    weights = probabilities
    if HAS_DROPOUT:
        kept = tl.trans(
            kept_weights(
                seed_ptr, head, first_token, first_key, dropout_p, query.shape[0], key.shape[0]
            )
        )
        weights = tl.where(kept, probabilities * (1.0 / (1.0 - dropout_p)), 0.0)
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
    ds = probabilities * (dp - delta[None, :])
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(
    do_not_specialize=["first_head", "num_heads", "stride_row_head", "head_blocks"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "seqused_k_ptr", "tile_map_ptr", "seed_ptr"],
)
def shaw_attention_bwd_keys_kernel(
    q_ptr,  # [num_tokens, all heads, HEAD_DIM]
    k_ptr,
    v_ptr,
    grad_ptr,  # [num_tokens, all heads, HEAD_DIM], of the output
    scratch_ptr,  # [num_heads, ...] fp32
    shift_ptr,  # [2, num_heads, num_tokens] fp32
    delta_ptr,  # [num_heads, num_tokens] fp32
    dk_ptr,  # [num_tokens, all heads, HEAD_DIM]
    dv_ptr,
    cu_seqlens_ptr,  # [batch + 1] int32
    seqused_k_ptr,  # [batch] int32, HAS_SEQUSED
    tile_map_ptr,  # [num_tiles, 2] int32, of tiles of keys
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
    stride_grad_row,
    stride_grad_head,
    stride_dk_row,
    stride_dk_head,
    stride_dv_row,
    stride_dv_head,
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
    FAR_STAGES: tl.constexpr,
):
    sequence, start, length, first_key, head = locate_tile(
        tl.program_id(0), tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_N
    )
    if sequence < 0:
        return
    wide_head = (first_head + head).to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    key_mask = keys < keys_of(sequence, length, seqused_k_ptr, HAS_SEQUSED)
    offs_m = tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    k_base = head_rows(k_ptr, start, wide_head, stride_k_row, stride_k_head)
    key = load_rows(k_base, keys, stride_k_row, channels, key_mask, HEAD_DIM)
    v_base = head_rows(v_ptr, start, wide_head, stride_v_row, stride_v_head)
    value = load_rows(v_base, keys, stride_v_row, channels, key_mask, HEAD_DIM)
    q_base = head_rows(q_ptr, start, wide_head, stride_q_row, stride_q_head)
    grad_base = head_rows(grad_ptr, start, wide_head, stride_grad_row, stride_grad_head)
    shift_base = shift_ptr + head.to(tl.int64) * stride_row_head + start
    delta_base = delta_ptr + head.to(tl.int64) * stride_row_head + start
    side = num_heads.to(tl.int64) * stride_row_head

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    whole = length // BLOCK_M * BLOCK_M  # queries in whole blocks
    band_first = whole
    band_end = whole
    if HAS_POSITIONS:
        last_key = tl.minimum(first_key + BLOCK_N, length) - 1
        band_first, band_end = band_blocks(first_key, last_key, RIGHT, LEFT, whole, BLOCK_M)

    band_queries = band_end - band_first
    for far_start in tl.range(0, whole - band_queries, BLOCK_M, num_stages=FAR_STAGES):
        first_row = far_start
        far_shift = shift_base
        if HAS_POSITIONS:
            first_row = tl.where(far_start < band_first, far_start, far_start + band_queries)
            # To a query before the band the keys lie on the right.
            far_shift += tl.where(far_start < band_first, side, 0)
        rows = first_row + offs_m
        query = load_whole_rows(q_base, rows, stride_q_row, channels, HEAD_DIM, BLOCK_D)
        grad = load_whole_rows(grad_base, rows, stride_grad_row, channels, HEAD_DIM, BLOCK_D)
        shift = tl.load(far_shift + rows)
        delta = tl.load(delta_base + rows)
        dk, dv = _key_step(
            dk, dv, key, value, query, grad, shift[None, :], delta, scale_log2,
            seed_ptr, dropout_p, wide_head, start + first_row, first_key,
            HAS_DROPOUT,
        )  # fmt: skip

    # The queries after the last whole block, wherever the band is, are the last step.
    last_start = tl.where(whole < length, whole, band_end - BLOCK_M)
    band_end = tl.where(whole < length, band_end + BLOCK_M, band_end)
    scores_base = scratch_ptr
    if HAS_POSITIONS:
        scores_base = utterance_scores(scratch_ptr, start, sequence, head, head_blocks, ROW_STRIDE)
    for band_start in tl.range(band_first, band_end, BLOCK_M, num_stages=1):
        first_row = tl.where(band_start == band_end - BLOCK_M, last_start, band_start)
        first_row = tl.multiple_of(first_row, BLOCK_M)
        rows = first_row + offs_m
        row_mask = rows < length
        query = load_rows(q_base, rows, stride_q_row, channels, row_mask, HEAD_DIM)
        grad = load_rows(grad_base, rows, stride_grad_row, channels, row_mask, HEAD_DIM)
        delta = tl.load(delta_base + rows, mask=row_mask, other=0.0)
        left_shift = tl.load(shift_base + rows, mask=row_mask, other=0.0)
        if HAS_POSITIONS:
            right_shift = tl.load(shift_base + side + rows, mask=row_mask, other=0.0)
            tile_scores = scores_base + first_row.to(tl.int64) * ROW_STRIDE + first_key
            shift = near_shift(
                tile_scores + offs_m[None, :] * ROW_STRIDE + tl.arange(0, BLOCK_N)[:, None],
                rows[None, :],
                keys[:, None],
                row_mask[None, :] & key_mask[:, None],
                left_shift[None, :],
                right_shift[None, :],
                LEFT,
                RIGHT,
            )
        else:
            shift = tl.where(row_mask, left_shift, -float("inf"))[None, :]
        dk, dv = _key_step(
            dk, dv, key, value, query, grad, shift, delta, scale_log2,
            seed_ptr, dropout_p, wide_head, start + first_row, first_key,
            HAS_DROPOUT,
        )  # fmt: skip

    # Read again, so that no registers hold it through the loops.
    sequence, start, length, first_key, head = locate_tile(
        tl.program_id(0), tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_N
    )
    wide_head = (first_head + head).to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    key_mask = keys < keys_of(sequence, length, seqused_k_ptr, HAS_SEQUSED)
    if HAS_SEQUSED:  # tokens that are no keys have no gradients as such
        dk = tl.where(key_mask[:, None], dk, 0.0)
        dv = tl.where(key_mask[:, None], dv, 0.0)
        key_mask = keys < length
    tile_mask = key_mask[:, None] & (channels < HEAD_DIM)[None, :]
    wide_keys = (start + keys)[:, None]
    dk_ptrs = dk_ptr + wide_head * stride_dk_head + wide_keys * stride_dk_row + channels[None, :]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=tile_mask)
    dv_ptrs = dv_ptr + wide_head * stride_dv_head + wide_keys * stride_dv_row + channels[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=tile_mask)


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
):
    """What a block of keys adds to the gradients of a tile of queries, and the scores' gradient."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    probabilities = tl.math.exp2(scores * scale_log2 + shift)  # [BLOCK_M, BLOCK_N]
    dp = tl.dot(grad, tl.trans(value), input_precision="ieee")
    if HAS_DROPOUT:
        kept = kept_weights(
            seed_ptr, head, first_token, first_key, dropout_p, query.shape[0], key.shape[0]
        )
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    ds = probabilities * (dp - delta[:, None])
    dq = tl.dot(ds.to(key.dtype), key, dq, input_precision="ieee")
    return dq, ds


@triton.jit
def _position_gradients(
    score_rows,  # [BLOCK_M], where each row's dP begins
    rows,  # [BLOCK_M]
    row_mask,
    num_keys,
    offs_p,  # [BLOCK_P]
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """dP of some rows and distances, fp32 `[BLOCK_M, BLOCK_P]`."""
    keys = rows[:, None] + (offs_p - LEFT)[None, :]
    # Where the one key of an interior distance does not exist, P is still there.
    is_sum = ((offs_p == 0) | (offs_p == LEFT + RIGHT))[None, :]
    exists = is_sum | ((keys >= 0) & (keys < num_keys) & (offs_p < LEFT + RIGHT)[None, :])
    return tl.load(
        score_rows[:, None] + offs_p[None, :],
        mask=exists & row_mask[:, None],
        other=0.0,
    )


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
):
    sequence, start, length, first_row, head = locate_tile(
        tl.program_id(0), tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_M
    )
    channels = tl.arange(0, BLOCK_D)
    if sequence < 0:
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
        band_first, band_end = band_blocks(first_row, last_row, LEFT, RIGHT, whole, BLOCK_N)

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
            HAS_DROPOUT,
        )  # fmt: skip
        if HAS_POSITIONS:
            row_sum = tl.sum(tl.where(row_mask[:, None], ds, 0.0), 1)  # selected as delta's are
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
            HAS_DROPOUT,
        )  # fmt: skip
        if HAS_POSITIONS:
            is_left = keys[None, :] <= (rows - LEFT)[:, None]
            is_right = keys[None, :] >= (rows + RIGHT)[:, None]
            left_sum += tl.sum(tl.where(is_left, ds, 0.0), 1)
            right_sum += tl.sum(tl.where(is_right & ~is_left, ds, 0.0), 1)
            tl.debug_barrier()  # other threads may have yet to read the scores of this block
            interior = ~is_left & ~is_right & key_mask[None, :] & row_mask[:, None]
            tl.store(score_ptrs, ds, mask=interior)
            tl.debug_barrier()  # other threads than those that wrote dP read there

    # Read again, so that no registers hold it through the loops.
    sequence, start, length, first_row, head = locate_tile(
        tl.program_id(0), tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_M
    )
    rows = first_row + offs_m
    row_mask = rows < length
    wide_head = (first_head + head).to(tl.int64)
    if HAS_POSITIONS:
        num_keys = keys_of(sequence, length, seqused_k_ptr, HAS_SEQUSED)
        scores_base = utterance_scores(scratch_ptr, start, sequence, head, head_blocks, ROW_STRIDE)
        score_rows = scores_base + rows * (ROW_STRIDE + 1) - LEFT
        if LEFT + RIGHT == 0:
            left_sum += right_sum
        else:
            tl.store(score_rows + LEFT + RIGHT, right_sum, mask=row_mask)
        tl.store(score_rows, left_sum, mask=row_mask)
        tl.debug_barrier()
        for first in tl.range(0, LEFT + RIGHT + 1, BLOCK_P, num_stages=1):
            offs_p = first + tl.arange(0, BLOCK_P)
            dp = _position_gradients(score_rows, rows, row_mask, num_keys, offs_p, LEFT, RIGHT)
            is_distance = offs_p <= LEFT + RIGHT
            vectors = load_rows(distance_ptr, offs_p, stride_e_row, channels, is_distance, HEAD_DIM)
            dq = tl.dot(dp.to(query.dtype), vectors, dq, input_precision="ieee")
    dq_ptrs = dq_ptr + wide_head * stride_dq_head + (start + rows)[:, None] * stride_dq_row
    tl.store(
        dq_ptrs + channels[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (channels < HEAD_DIM)[None, :],
    )


@triton.jit(
    do_not_specialize=["first_head", "num_heads", "num_work", "head_blocks"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "seqused_k_ptr", "tile_map_ptr"],
)
def shaw_attention_bwd_shares_kernel(
    q_ptr,  # [num_tokens, all heads, HEAD_DIM]
    scratch_ptr,  # [num_heads, ...] fp32, dP
    share_ptr,  # [programs along x, LEFT + RIGHT + 1, HEAD_DIM] fp32
    cu_seqlens_ptr,  # [batch + 1] int32
    seqused_k_ptr,  # [batch] int32, HAS_SEQUSED
    tile_map_ptr,  # [num_tiles, 2] int32
    first_head,
    num_heads,  # of this launch
    num_work,  # tiles times heads
    scale,
    stride_q_row,
    stride_q_head,
    head_blocks,  # of 16 rows, in the scratch memory of a head
    HAS_SEQUSED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_D)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    share = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    # As many every time and everywhere, so that the sum's order depends on the batch alone.
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), num_stages=1):
        sequence, start, length, first_row, head = locate_tile(
            work, tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_M
        )
        num_keys = keys_of(sequence, length, seqused_k_ptr, HAS_SEQUSED)
        rows = first_row + tl.arange(0, BLOCK_M)
        row_mask = (rows < length) & (sequence >= 0)
        wide_head = (first_head + head).to(tl.int64)
        query = load_rows(
            head_rows(q_ptr, start, wide_head, stride_q_row, stride_q_head),
            rows, stride_q_row, channels, row_mask, HEAD_DIM,
        )  # fmt: skip
        scores_base = utterance_scores(scratch_ptr, start, sequence, head, head_blocks, ROW_STRIDE)
        score_rows = scores_base + rows * (ROW_STRIDE + 1) - LEFT
        dp = _position_gradients(score_rows, rows, row_mask, num_keys, offs_p, LEFT, RIGHT)
        dp = dp.to(query.dtype)  # [BLOCK_M, BLOCK_P]
        share = tl.dot(tl.trans(dp), query, share, input_precision="ieee")
    share_ptr += tl.program_id(0).to(tl.int64) * ((LEFT + RIGHT + 1) * HEAD_DIM)
    tl.store(
        share_ptr + offs_p[:, None] * HEAD_DIM + channels[None, :],
        share * scale,
        mask=(offs_p <= LEFT + RIGHT)[:, None] & (channels < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["first_head", "num_shares"])
def shaw_attention_bwd_distances_kernel(
    share_ptr,  # [num_shares, SIZE] fp32
    grad_ptr,  # [SIZE] fp32, of the position vectors
    first_head,
    num_shares,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SHARES: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column_mask = columns < SIZE
    total = tl.zeros([BLOCK_SHARES, BLOCK], tl.float32)
    for first in tl.range(0, num_shares, BLOCK_SHARES):
        shares = first + tl.arange(0, BLOCK_SHARES)
        total += tl.load(
            share_ptr + shares.to(tl.int64)[:, None] * SIZE + columns[None, :],
            mask=(shares < num_shares)[:, None] & column_mask[None, :],
            other=0.0,
        )
    # Of the heads of earlier launches.
    before = tl.load(grad_ptr + columns, mask=column_mask & (first_head > 0), other=0.0)
    tl.store(grad_ptr + columns, before + tl.sum(total, 0), mask=column_mask)


def shaw_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    distance_embedding: Tensor | None = None,
    left_max_position: int = 0,
    right_max_position: int = 0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    tile_map: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    config: AttentionBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `shaw_attention` with respect to query, key, value and distance embedding.

    Two runs give the same bits. Arguments that are not named as in the forward pass.

    Args:
        grad_output: gradient of the output, like `query`.
        output: what `shaw_attention` returned.
        log_sum_exp: float32 `[num_heads, num_tokens]`, of the same call.
        tile_map: of `build_tile_map` with the configuration's `tile`, which may be that of the
            forward pass; computed when `None`.
        out: where the gradients of query, key and value go, such as views of one buffer.
        config: that of `attention_backward_config` when `None`.

    Returns:
        The gradients of query, key and value, `[num_tokens, num_heads, D]` in the dtype of `query`,
        and that of the distance embedding, float32 `[L + R + 1, D]`, or `None`.
    """
    if tile_map is None:
        left, right = left_max_position, right_max_position
        given = (cu_seqlens, max_seqlen, distance_embedding, left, right, dropout_p, dropout_seed)
        arch = check_attention(query, {}, None, *given, None, seqused_k)
        if config is None:
            kind = (query.shape[2], query.dtype, arch)
            config = attention_backward_config(*kind, has_dropout=dropout_p > 0.0)
        tile_map = build_tile_map(
            cu_seqlens, config.tile, num_tokens=query.shape[0], max_seqlen=max_seqlen
        )
    if out is None:
        grads = torch.empty(3, *query.shape, dtype=query.dtype, device=query.device)
        out = (grads[0], grads[1], grads[2])
    grad_distance = None
    if distance_embedding is not None:
        make = torch.empty if tile_map.shape[0] > 0 else torch.zeros
        grad_distance = make(distance_embedding.shape, dtype=torch.float32, device=query.device)
    first_head = 0
    while True:
        first_head += _launch(
            query,
            key,
            value,
            output,
            grad_output,
            log_sum_exp,
            cu_seqlens,
            max_seqlen,
            distance_embedding,
            left_max_position,
            right_max_position,
            dropout_p,
            dropout_seed,
            tile_map,
            seqused_k,
            *out,
            grad_distance,
            config,
            first_head,
        )
        if first_head >= query.shape[1]:
            return *out, grad_distance


@planned
def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    grad_output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tile_map: Tensor,
    seqused_k: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_distance: Tensor | None,
    config: AttentionBackwardConfig | None,
    first_head: int,
) -> int:
    """The gradients of as many heads from `first_head` on as the scratch memory holds: how many.

    What they add to `grad_distance` is added to what the heads before them did.
    """
    grads = {f"out[{i}]": grad for i, grad in enumerate((grad_query, grad_key, grad_value))}
    arch = check_attention(
        query,
        {"grad_output": grad_output, "key": key, "value": value, "output": output, **grads},
        log_sum_exp,
        cu_seqlens,
        max_seqlen,
        distance_embedding,
        left,
        right,
        dropout_p,
        dropout_seed,
        tile_map,
        seqused_k,
    )
    num_tokens, num_heads, head_dim = query.shape
    has_positions, has_dropout = distance_embedding is not None, dropout_p > 0.0
    if config is None:
        config = attention_backward_config(head_dim, query.dtype, arch, has_dropout=has_dropout)
    check_tile_map(tile_map, cu_seqlens, config.tile, num_tokens, max_seqlen)
    batch_size = cu_seqlens.numel() - 1
    device, float32 = query.device, torch.float32
    vectors = query if distance_embedding is None else distance_embedding
    left, right = (left, right) if has_positions else (0, 0)
    layout = scores_layout(config, batch_size, num_tokens, left, right)
    heads = num_heads - first_head
    scores = log_sum_exp  # not touched without positions
    if has_positions:
        one_head = max(4 * layout.head_size, 1)  # without utterances it is 0
        heads = min(max(config.scratch_limit // one_head, 1), heads)
        elements = layout.front + heads * layout.head_size + layout.back
        scores = empty((elements,), float32, device, front=layout.front)
    grid = (tile_map.shape[0] * heads,)
    # Of P's first and last column; of o . g.
    shifts = empty((1 + has_positions, heads, num_tokens), float32, device)
    delta = empty((heads, num_tokens), float32, device)
    if grid[0] == 0:
        return max(heads, 1)
    scales = (head_dim**-0.5, head_dim**-0.5 * LOG2_E)
    dropout = (dropout_seed, dropout_p) if has_dropout else (None, None)
    prepare, keys, queries, shares, distances = _kernels(
        config,
        layout,
        head_dim,
        left,
        right,
        has_positions=has_positions,
        has_dropout=has_dropout,
        has_seqused=seqused_k is not None,
    )
    launch(
        prepare.kernel,
        grid,
        query,
        vectors,
        output,
        grad_output,
        log_sum_exp,
        scores,
        shifts,
        delta,
        cu_seqlens,
        tile_map,
        first_head,
        heads,
        scales[1],
        *_strides(query),
        vectors.stride(0),
        *_strides(output),
        *_strides(grad_output),
        num_tokens,
        num_tokens,
        layout.head_blocks,
        **prepare.constants,
        **prepare.options,
    )
    # The kernel over queries overwrites the scores that the one over keys reads.
    launch(
        keys.kernel,
        grid,
        query,
        key,
        value,
        grad_output,
        scores,
        shifts,
        delta,
        grad_key,
        grad_value,
        cu_seqlens,
        seqused_k,
        tile_map,
        *dropout,
        first_head,
        heads,
        *scales,
        *_strides(query),
        *_strides(key),
        *_strides(value),
        *_strides(grad_output),
        *_strides(grad_key),
        *_strides(grad_value),
        num_tokens,
        layout.head_blocks,
        **keys.constants,
        **keys.options,
    )
    launch(
        queries.kernel,
        grid,
        query,
        key,
        value,
        vectors,
        grad_output,
        scores,
        shifts,
        delta,
        grad_query,
        cu_seqlens,
        seqused_k,
        tile_map,
        *dropout,
        first_head,
        heads,
        *scales,
        *_strides(query),
        *_strides(key),
        *_strides(value),
        vectors.stride(0),
        *_strides(grad_output),
        *_strides(grad_query),
        num_tokens,
        layout.head_blocks,
        **queries.constants,
        **queries.options,
    )
    if has_positions:
        programs = min(grid[0], config.shares)
        sums = empty((programs, *vectors.shape), float32, device)
        launch(
            shares.kernel,
            (programs, triton.cdiv(vectors.shape[0], _SHARE_DISTANCES)),
            query,
            scores,
            sums,
            cu_seqlens,
            seqused_k,
            tile_map,
            first_head,
            heads,
            grid[0],
            scales[0],
            *_strides(query),
            layout.head_blocks,
            **shares.constants,
            **shares.options,
        )
        launch(
            distances.kernel,
            (triton.cdiv(vectors.numel(), _SUM_COLUMNS),),
            sums,
            grad_distance,
            first_head,
            programs,
            **distances.constants,
            **distances.options,
        )
    return heads


def _strides(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.stride(1)


@dataclass(frozen=True)
class _Launch:
    """A kernel with its constants and its compiler options."""

    kernel: Any
    constants: dict[str, bool | int | str]
    options: dict[str, int]


def _kernels(
    config: AttentionBackwardConfig,
    layout: ScoresLayout,
    head_dim: int,
    left: int,
    right: int,
    *,
    has_positions: bool,
    has_dropout: bool,
    has_seqused: bool,
) -> tuple[_Launch, _Launch, _Launch, _Launch, _Launch]:
    common: dict[str, bool | int | str] = {
        "HAS_POSITIONS": has_positions,
        "LEFT": left,
        "RIGHT": right,
        "ROW_STRIDE": layout.row_stride,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
    }
    short = {"num_warps": config.query_warps, "num_stages": 1}
    queries = {"num_warps": config.query_warps, "num_stages": config.query_stages}
    if has_positions and config.query_registers is not None:
        queries["maxnreg"] = config.query_registers
    keys = {"num_warps": config.key_warps, "num_stages": config.key_stages}
    tile = {"BLOCK_M": config.tile, "BLOCK_P": config.block_p}
    return (
        _Launch(shaw_attention_bwd_prepare_kernel, {**common, **tile}, short),
        _Launch(
            shaw_attention_bwd_keys_kernel,
            {
                **common,
                "HAS_DROPOUT": has_dropout,
                "HAS_SEQUSED": has_seqused,
                "BLOCK_M": config.query_step,
                "BLOCK_N": config.tile,
                "FAR_STAGES": config.key_stages,
            },
            keys,
        ),
        _Launch(
            shaw_attention_bwd_queries_kernel,
            {
                **common,
                **tile,
                "HAS_DROPOUT": has_dropout,
                "HAS_SEQUSED": has_seqused,
                "BLOCK_N": config.key_step,
                "FAR_STAGES": config.query_stages,
            },
            queries,
        ),
        _Launch(
            shaw_attention_bwd_shares_kernel,
            {
                **{name: value for name, value in common.items() if name != "HAS_POSITIONS"},
                "HAS_SEQUSED": has_seqused,
                "BLOCK_M": config.tile,
                "BLOCK_P": _SHARE_DISTANCES,
            },
            short,
        ),
        _Launch(
            shaw_attention_bwd_distances_kernel,
            {"SIZE": (left + right + 1) * head_dim, "BLOCK": _SUM_COLUMNS, "BLOCK_SHARES": 64},
            {"num_warps": 4},
        ),
    )
