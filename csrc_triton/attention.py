"""x"""

from __future__ import annotations

import triton
import triton.language as tl

@triton.jit
def _softmax_block(
    acc,  # [BLOCK_M, BLOCK_D] fp32, sum of exp2(score - row_max) * value
    row_sum,  # [BLOCK_M] fp32, sum of exp2(score - row_max)
    row_max,  # [BLOCK_M] fp32, in units of log2
    query,  # [BLOCK_M, BLOCK_D]
    key_ptrs,  # [BLOCK_N, BLOCK_D]
    value_ptrs,  # [BLOCK_N, BLOCK_D]
    keys_left,  # keys from the block's first to the end of the utterance
    row_term,  # [BLOCK_M] fp32, added to every score of a row
    element_term,  # [BLOCK_M, BLOCK_N] fp32, added to every score
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ROW_TERM: tl.constexpr,
    HAS_ELEMENT_TERM: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the online softmax over a block of keys."""
    offs_n = tl.arange(0, BLOCK_N)
    key_mask = None
    if HEAD_DIM != BLOCK_D:
        key_mask = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        if MASK_KEYS:
            key_mask = key_mask & (offs_n < keys_left)[:, None]
    elif MASK_KEYS:
        key_mask = (offs_n < keys_left)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if key_mask is None:
        key = tl.load(key_ptrs)
    else:
        key = tl.load(key_ptrs, mask=key_mask, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_ELEMENT_TERM:
        scores = scores * scale_log2 + element_term
        if MASK_KEYS:
            scores = tl.where((offs_n < keys_left)[None, :], scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probabilities = tl.math.exp2(scores - new_max[:, None])
    else:
        if MASK_KEYS:
            scores = tl.where((offs_n < keys_left)[None, :], scores, -float("inf"))
        block_max = tl.max(scores, 1) * scale_log2
        if HAS_ROW_TERM:
            block_max += row_term
        new_max = tl.maximum(row_max, block_max)
        shift = new_max
        if HAS_ROW_TERM:
            shift -= row_term
        probabilities = tl.math.exp2(scores * scale_log2 - shift[:, None])
    correction = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(probabilities, 1)
    acc = acc * correction[:, None]
    if key_mask is None:
        value = tl.load(value_ptrs)
    else:
        value = tl.load(value_ptrs, mask=key_mask, other=0.0)
    acc = tl.dot(probabilities.to(value.dtype), value, acc, input_precision=INPUT_PRECISION)
    return acc, row_sum, new_max


@triton.jit
def _position_scores(
    query,  # [BLOCK_M, BLOCK_D]
    distance_ptr,
    scratch_ptrs,  # [BLOCK_M]
    stride_e_row,
    scale_log2,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Writes `query . E` to scratch memory; returns its first and last column."""
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(0, LEFT + RIGHT + 1, BLOCK_P, num_stages=1):
        offs_p = first + tl.arange(0, BLOCK_P)
        vectors = tl.load(
            distance_ptr + offs_p.to(tl.int64)[:, None] * stride_e_row + offs_d[None, :],
            mask=(offs_p <= LEFT + RIGHT)[:, None] & (offs_d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_P, BLOCK_D]
        scores = tl.dot(query, tl.trans(vectors), input_precision=INPUT_PRECISION)
        tl.store(
            scratch_ptrs[:, None] + offs_p[None, :],
            scores * scale_log2,
            mask=(offs_p <= LEFT + RIGHT)[None, :],
        )
    left_vector = tl.load(distance_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
    last = tl.full((), LEFT + RIGHT, tl.int64) * stride_e_row
    right_vector = tl.load(distance_ptr + last + offs_d, mask=offs_d < HEAD_DIM, other=0.0)
    query = query.to(tl.float32)
    left_term = tl.sum(query * left_vector.to(tl.float32)[None, :], 1) * scale_log2  # [BLOCK_M]
    right_term = tl.sum(query * right_vector.to(tl.float32)[None, :], 1) * scale_log2
    return left_term, right_term


@triton.jit(
    do_not_specialize=["num_work", "stride_lse_head"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "tile_map_ptr", "lse_ptr"],
)
def _shaw_attention_fwd_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_ptr,
    v_ptr,
    distance_ptr,  # [LEFT + RIGHT + 1, HEAD_DIM]
    scratch_ptr,  # [num_programs, SCRATCH_SIZE] fp32
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    lse_ptr,  # [num_heads, num_tokens] fp32
    cu_seqlens_ptr,  # [batch + 1] int32
    tile_map_ptr,  # [num_tiles, 2] int32
    num_work,
    num_heads,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_e_row,
    stride_out_row,
    stride_out_head,
    stride_lse_head,
    HAS_POSITIONS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCRATCH_STRIDE: tl.constexpr,
    SCRATCH_PAD: tl.constexpr,
    SCRATCH_SIZE: tl.constexpr,
    FAR_STAGES: tl.constexpr,
    BAND_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), num_stages=1):
        tile = work // num_heads
        head = (work % num_heads).to(tl.int64)
        sequence = tl.load(tile_map_ptr + 2 * tile)
        if sequence >= 0:
            first_row = tl.load(tile_map_ptr + 2 * tile + 1) * BLOCK_M
            start = tl.load(cu_seqlens_ptr + sequence)
            length = tl.load(cu_seqlens_ptr + sequence + 1) - start
            start = start.to(tl.int64)
            rows = first_row + offs_m
            q_ptrs = (
                q_ptr
                + (start + first_row) * stride_q_row
                + head * stride_q_head
                + offs_m.to(tl.int64)[:, None] * stride_q_row
                + offs_d[None, :]
            )
            query = tl.load(
                q_ptrs, mask=(rows < length)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0
            )  # [BLOCK_M, BLOCK_D]
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
            k_base = k_ptr + start * stride_k_row + head * stride_k_head
            v_base = v_ptr + start * stride_v_row + head * stride_v_head
            offs_k = offs_n.to(tl.int64)[:, None] * stride_k_row + offs_d[None, :]
            offs_v = offs_n.to(tl.int64)[:, None] * stride_v_row + offs_d[None, :]
            left_term = row_sum
            right_term = row_sum
            whole = length // BLOCK_N * BLOCK_N
            band_first = 0
            band_last = 0
            scratch_base = scratch_ptr
            if HAS_POSITIONS:
                scratch_base += tl.program_id(0).to(tl.int64) * SCRATCH_SIZE
                tl.debug_barrier()
                left_term, right_term = _position_scores(
                    query,
                    distance_ptr,
                    scratch_base + SCRATCH_PAD - LEFT + offs_m * (SCRATCH_STRIDE + 1),
                    stride_e_row,
                    scale_log2,
                    LEFT,
                    RIGHT,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_P,
                    INPUT_PRECISION,
                )
                tl.debug_barrier()
                band_first = tl.maximum(first_row - LEFT + 1, 0) // BLOCK_N * BLOCK_N
                band_first = tl.minimum(band_first, whole)
                last_row = tl.minimum(first_row + BLOCK_M, length) - 1
                band_last = (last_row + RIGHT + BLOCK_N - 1) // BLOCK_N * BLOCK_N
                band_last = tl.minimum(band_last, whole)
                for key_start in tl.range(0, band_first, BLOCK_N, num_stages=FAR_STAGES):
                    acc, row_sum, row_max = _softmax_block(
                        acc, row_sum, row_max, query,
                        k_base + key_start.to(tl.int64) * stride_k_row + offs_k,
                        v_base + key_start.to(tl.int64) * stride_v_row + offs_v,
                        BLOCK_N, left_term, left_term, scale_log2,
                        HEAD_DIM, BLOCK_D, BLOCK_N, True, False, False, INPUT_PRECISION,
                    )
                for key_start in tl.range(band_first, band_last, BLOCK_N, num_stages=BAND_STAGES):
                    key_start = tl.multiple_of(key_start, BLOCK_N)
                    columns = key_start - first_row + offs_n
                    near = tl.load(
                        scratch_base + SCRATCH_PAD
                        + offs_m[:, None] * SCRATCH_STRIDE
                        + columns[None, :]
                    )
                    
                    near = tl.where(columns[None, :] <= (offs_m - LEFT)[:, None], left_term[:, None], near)
                    near = tl.where(columns[None, :] >= (offs_m + RIGHT)[:, None], right_term[:, None], near)
                    acc, row_sum, row_max = _softmax_block(
                        acc, row_sum, row_max, query,
                        k_base + key_start.to(tl.int64) * stride_k_row + offs_k,
                        v_base + key_start.to(tl.int64) * stride_v_row + offs_v,
                        BLOCK_N, left_term, near, scale_log2,
                        HEAD_DIM, BLOCK_D, BLOCK_N, False, True, False, INPUT_PRECISION,
                    )
            for key_start in tl.range(band_last, whole, BLOCK_N, num_stages=FAR_STAGES):
                acc, row_sum, row_max = _softmax_block(
                    acc, row_sum, row_max, query,
                    k_base + key_start.to(tl.int64) * stride_k_row + offs_k,
                    v_base + key_start.to(tl.int64) * stride_v_row + offs_v,
                    BLOCK_N, right_term, right_term, scale_log2,
                    HEAD_DIM, BLOCK_D, BLOCK_N, HAS_POSITIONS, False, False, INPUT_PRECISION,
                )
            for key_start in tl.range(whole, length, BLOCK_N, num_stages=1):
                near = left_term
                if HAS_POSITIONS:
                    columns = key_start - first_row + offs_n
                    
                    near = tl.load(
                        scratch_base + SCRATCH_PAD
                        + offs_m[:, None] * SCRATCH_STRIDE
                        + columns[None, :],
                        mask=(columns[None, :] > (offs_m - LEFT)[:, None]) & (columns[None, :] < (offs_m + RIGHT)[:, None]),
                        other=0.0,
                    )
                    near = tl.where(columns[None, :] <= (offs_m - LEFT)[:, None], left_term[:, None], near)
                    near = tl.where(columns[None, :] >= (offs_m + RIGHT)[:, None], right_term[:, None], near)
                acc, row_sum, row_max = _softmax_block(
                    acc, row_sum, row_max, query,
                    k_base + key_start.to(tl.int64) * stride_k_row + offs_k,
                    v_base + key_start.to(tl.int64) * stride_v_row + offs_v,
                    length - key_start, left_term, near, scale_log2,
                    HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_POSITIONS, True, INPUT_PRECISION,
                )
            out_ptrs = (
                out_ptr
                + (start + first_row) * stride_out_row
                + head * stride_out_head
                + offs_m.to(tl.int64)[:, None] * stride_out_row
                + offs_d[None, :]
            )
            output = acc / row_sum[:, None]
            tl.store(
                out_ptrs, output.to(out_ptr.dtype.element_ty),
                mask=(rows < length)[:, None] & (offs_d < HEAD_DIM)[None, :],
            )
            tl.store(
                lse_ptr + head * stride_lse_head + start + rows,
                (row_max + tl.math.log2(row_sum)) * 0.6931471805599453,
                mask=rows < length,
            )
