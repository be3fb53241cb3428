"""Gradients of attention with Shaw relative keys over packed utterances.

With the scores s and probabilities p of `attention_kernel`, the output o, its gradient g, and the
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
3. *queries*, a program for each tile of queries: dq and the tile's share of dE, over all blocks of
   keys. An interior distance has one key a row, so its dP is ds of that one pair: it takes the
   place of P[i, r] in memory, which nobody reads again. dP[i, 0] and dP[i, L + R] are row sums.

As in the forward kernel, blocks wholly left or right of the band -L < j - i < R are plain flash
attention (Dao 2023), with a number for each row; only blocks that touch the band read P.

P lies in memory with rows `ROW_STRIDE + 1` apart, so that a block's `P[i, j - i + L]` is a strided
tile with row stride `ROW_STRIDE` (`attention_kernel`). Utterance s begins at row
`16 (start // 16 + s)`, so that every tile is aligned.

Per token and layer, with T frames and 16-bit elements: 14 C T + 6 C (L + R + 1) FLOPs; 16 C bytes
of q, k, v, o, g and the three gradients, 8 H (L + R + 1) bytes of P and dP written, and
4 H (L + R + 1) D / BLOCK_M bytes of shares of dE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import kept_weights


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
def locate_tile(tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK: tl.constexpr):
    """Utterance, its start and length, the tile's first row in it, and the program's head.

    The utterance is -1 where the map has no tile left.
    """
    tile = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
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
    """What is added to the scores of a block that touches the band, in units of log 2."""
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
    INPUT_PRECISION: tl.constexpr,
):
    sequence, start, length, first_row, head = locate_tile(
        tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_M
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
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)  # [BLOCK_M]
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
            shift = tl.dot(query, tl.trans(vectors), input_precision=INPUT_PRECISION)
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
    INPUT_PRECISION: tl.constexpr,
):
    """What a block of queries adds to the gradients of a tile of keys and values."""
    scores = tl.dot(key, tl.trans(query), input_precision=INPUT_PRECISION)
    probabilities = tl.math.exp2(scores * scale_log2 + shift)  # [BLOCK_N, BLOCK_M]
    dp = tl.dot(value, tl.trans(grad), input_precision=INPUT_PRECISION)
    weights = probabilities
    if HAS_DROPOUT:
        kept = tl.trans(
            kept_weights(
                seed_ptr, head, first_token, first_key, dropout_p, query.shape[0], key.shape[0]
            )
        )
        weights = tl.where(kept, probabilities * (1.0 / (1.0 - dropout_p)), 0.0)
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=INPUT_PRECISION)
    ds = probabilities * (dp - delta[None, :])
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=INPUT_PRECISION)
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
    INPUT_PRECISION: tl.constexpr,
):
    sequence, start, length, first_key, head = locate_tile(
        tile_map_ptr, cu_seqlens_ptr, num_heads, BLOCK_N
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
        # Queries of the band of key j: j - RIGHT < i < j + LEFT.
        last_key = tl.minimum(first_key + BLOCK_N, length) - 1
        band_first = tl.maximum(first_key - RIGHT + 1, 0) // BLOCK_M * BLOCK_M
        band_first = tl.minimum(band_first, whole)
        band_end = (last_key + LEFT + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        band_end = tl.minimum(band_end, whole)

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
            HAS_DROPOUT, INPUT_PRECISION,
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
            HAS_DROPOUT, INPUT_PRECISION,
        )  # fmt: skip

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
