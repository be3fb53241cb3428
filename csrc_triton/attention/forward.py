"""Self-attention with Shaw relative keys over packed utterances, forward.

For queries i and keys j of one utterance, with D channels a head (Shaw et al. 2018; the online
softmax is Dao 2023's):

    score(i, j) = (q_i . k_j + q_i . E[clip(j - i, -L, R) + L]) / sqrt(D)
    output(i) = sum_j softmax_j(score(i, j)) v_j
    log_sum_exp(i) = log sum_j exp(score(i, j))

A tile is `BLOCK_M` queries of one head. Only L + R + 1 distinct position vectors exist, so its
position scores are a `[BLOCK_M, L + R + 1]` product P = q E^T, computed once and kept in scratch
memory. The key blocks of an utterance then fall into three groups:

    keys     0 ................ i - L ........... i + R ................ T
             far: adds P[i, 0]  | band: P[i, j-i+L] | far: adds P[i, L+R]

A far block is plain flash attention, because a number that is constant along a row only shifts that
row's maximum. One loop runs over the far blocks of both sides and jumps over the band, so that its
pipeline fills once. A band block starts its product q k^T from P instead of zero. Key j's score is
`P[i, j - i + L]`; with rows `SCRATCH_STRIDE + 1` apart it lies at `i * SCRATCH_STRIDE + j + L`: the
block's scores are an aligned strided tile, not a gather. What it holds left or right of the
band is other rows' data, and is replaced. Keys that do not fill a block are the last step of the
band loop, wherever the band is.

Scratch memory belongs to a program, not to a tile, so that it stays in the L2 cache: there are as
many programs as are resident at once, and each works on one tile after the other. Tiles are sorted,
those of the longest utterance first; each program takes one of each round, the first of one round
the last of the next. Without positions a program has one tile.

Where `seqused_k` says how many tokens of an utterance are keys, the loops over keys end there, and
the queries behind them find their keys on the left.

With dropout the sums of a row run over all keys, and the values are added up over the kept ones
(`functions.kept_weights`), divided by 1 - p.

Per token and layer, with C channels in H heads, T frames and 16-bit elements: 8 C bytes of q, k, v
and output, 4 H (L + R + 1) bytes written to scratch and read back (mostly in the L2 cache), and
4 C T + 2 C (L + R + 1) FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture, device_multiprocessors
from csrc_triton.attention.config import (
    AttentionConfig,
    ScratchLayout,
    attention_config,
    num_programs,
    scratch_layout,
)
from csrc_triton.attention.tile_map import build_tile_map, check_tile_map
from csrc_triton.functions import kept_weights
from csrc_triton.launch import check_device, check_offsets, check_tensor
from csrc_triton.plans import empty, launch, planned

LOG2_E = 1.4426950408889634
"""Scores are scaled by it, so that the softmax needs powers of two only."""


@triton.jit
def _position_scores(
    query,  # [BLOCK_M, BLOCK_D]
    distance_ptr,
    row_ptrs,  # [BLOCK_M], where each row's first score goes
    stride_e_row,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Writes `query E^T` to scratch; returns its first and its last column."""
    offs_d = tl.arange(0, BLOCK_D)
    left_term = tl.zeros([BLOCK_M], tl.float32)
    right_term = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, LEFT + RIGHT + 1, BLOCK_P, num_stages=1):
        offs_p = first + tl.arange(0, BLOCK_P)
        vectors = tl.load(
            distance_ptr + offs_p.to(tl.int64)[:, None] * stride_e_row + offs_d[None, :],
            mask=(offs_p <= LEFT + RIGHT)[:, None] & (offs_d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_P, BLOCK_D]
        scores = tl.dot(query, tl.trans(vectors), input_precision="ieee")
        # Picked from the product, not computed apart, so that they lie in registers as the
        # far loop's rows do.
        left_term += tl.sum(tl.where((offs_p == 0)[None, :], scores, 0.0), 1)
        right_term += tl.sum(tl.where((offs_p == LEFT + RIGHT)[None, :], scores, 0.0), 1)
        tl.store(
            row_ptrs[:, None] + offs_p[None, :], scores, mask=(offs_p <= LEFT + RIGHT)[None, :]
        )
    return left_term, right_term


@triton.jit
def band_blocks(first, last, BEFORE: tl.constexpr, AFTER: tl.constexpr, whole, BLOCK: tl.constexpr):
    """Where the blocks of the other side begin and end that touch the band of a tile.

    The band of element x is what lies at x - BEFORE < y < x + AFTER: keys of a query, with BEFORE
    and AFTER = L and R, or queries of a key, with R and L. A block lies before it when its last
    element does, as seen from `first`; behind it when its first does, as seen from `last`. Both
    results are multiples of BLOCK, and at most `whole`.
    """
    begin = tl.maximum(first - BEFORE + 1, 0) // BLOCK * BLOCK
    end = (last + AFTER + BLOCK - 1) // BLOCK * BLOCK
    return tl.minimum(begin, whole), tl.minimum(end, whole)


@triton.jit
def _near_scores(
    row_ptrs,  # [BLOCK_M], where column 0 of the utterance's first key block would be
    rows,  # [BLOCK_M], positions relative to the tile's first
    columns,  # [BLOCK_N], the same for keys
    read_columns,  # [BLOCK_N], columns, or others inside the scratch where no score is used
    num_keys,  # end of the utterance's keys, relative to the tile's first row
    left_term,  # [BLOCK_M]
    right_term,  # [BLOCK_M]
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """Position scores of a block that touches the band, minus infinity after the keys."""
    near = tl.load(row_ptrs[:, None] + read_columns[None, :])  # [BLOCK_M, BLOCK_N]
    near = tl.where(columns[None, :] <= (rows - LEFT)[:, None], left_term[:, None], near)
    near = tl.where(columns[None, :] >= (rows + RIGHT)[:, None], right_term[:, None], near)
    return tl.where((columns < num_keys)[None, :], near, -float("inf"))


@triton.jit
def _attend(
    acc,  # [BLOCK_M, BLOCK_D] fp32, sum of exp2(score - row_max) * value
    row_sum,  # [BLOCK_M] fp32, sum of exp2(score - row_max)
    row_max,  # [BLOCK_M] fp32
    scores,  # [BLOCK_M, BLOCK_N] fp32, not scaled
    row_term,  # [BLOCK_M] fp32, belongs to every score of a row, not scaled
    value,  # [BLOCK_N, BLOCK_D]
    scale_log2,
    seed_ptr,
    dropout_p,
    head,
    first_token,  # of the tile, in the batch
    first_key,  # of the block, in the utterance
    HAS_ROW_TERM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """One step of the online softmax; maxima are of scores in units of log 2."""
    block_max = tl.max(scores, 1)
    if HAS_ROW_TERM:
        block_max += row_term
    new_max = tl.maximum(row_max, block_max * scale_log2)
    shift = new_max
    if HAS_ROW_TERM:
        shift -= row_term * scale_log2
    probabilities = tl.math.exp2(scores * scale_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
    correction = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(probabilities, 1)
    if HAS_DROPOUT:
        kept = kept_weights(
            seed_ptr, head, first_token, first_key, dropout_p, acc.shape[0], value.shape[0]
        )
        probabilities = tl.where(kept, probabilities, 0.0)
    acc = acc * correction[:, None]
    acc = tl.dot(probabilities.to(value.dtype), value, acc, input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit(
    do_not_specialize=["num_work", "stride_lse_head"],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr",
        "seqused_k_ptr",
        "tile_map_ptr",
        "lse_ptr",
        "seed_ptr",
    ],
)
def shaw_attention_fwd_kernel(
    q_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    k_ptr,
    v_ptr,
    distance_ptr,  # [LEFT + RIGHT + 1, HEAD_DIM]
    scratch_ptr,  # [programs, SCRATCH_SIZE] fp32, HAS_POSITIONS
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    lse_ptr,  # [num_heads, num_tokens] fp32
    cu_seqlens_ptr,  # [batch + 1] int32
    seqused_k_ptr,  # [batch] int32, HAS_SEQUSED
    tile_map_ptr,  # [num_tiles, 2] int32
    num_work,  # tiles times heads
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
    seed_ptr,  # int64 [2], HAS_DROPOUT
    dropout_p,
    HAS_POSITIONS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SAME_ROW_STRIDE: tl.constexpr,  # k and v have one row stride, as views of a fused product do
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCRATCH_STRIDE: tl.constexpr,
    SCRATCH_START: tl.constexpr,
    SCRATCH_SIZE: tl.constexpr,
    READ_LIMIT: tl.constexpr,
    FAR_STAGES: tl.constexpr,
    BAND_STAGES: tl.constexpr,
):
    if SAME_ROW_STRIDE:
        stride_v_row = stride_k_row
    programs = tl.num_programs(0)
    # Of what does not depend on the tile nothing is computed ahead of the loop: it would lie in
    # registers that the loops over keys need.
    for first_work in tl.range(0, num_work, programs, num_stages=1, disable_licm=True):
        place = tl.program_id(0)
        if first_work // programs % 2 == 1:  # who had the longest of one round has the last
            place = programs - 1 - place
        work = first_work + place
        tile = work // num_heads
        head = (work % num_heads).to(tl.int64)
        # The map is as long as it could be, not as long as it is.
        sequence = tl.load(tile_map_ptr + 2 * tile, mask=work < num_work, other=-1)
        if sequence >= 0:
            first_row = tl.load(tile_map_ptr + 2 * tile + 1) * BLOCK_M
            start = tl.load(cu_seqlens_ptr + sequence)
            length = tl.load(cu_seqlens_ptr + sequence + 1) - start
            start = start.to(tl.int64)
            num_keys = length
            if HAS_SEQUSED:
                num_keys = tl.load(seqused_k_ptr + sequence)

            offs_m = tl.arange(0, BLOCK_M)
            offs_n = tl.arange(0, BLOCK_N)
            offs_d = tl.arange(0, BLOCK_D)
            row_mask = first_row + offs_m < length
            tile_mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
            q_base = q_ptr + (start + first_row) * stride_q_row + head * stride_q_head
            query = tl.load(
                q_base + offs_m.to(tl.int64)[:, None] * stride_q_row + offs_d[None, :],
                mask=tile_mask,
                other=0.0,
            )  # [BLOCK_M, BLOCK_D]
            k_base = k_ptr + start * stride_k_row + head * stride_k_head
            v_base = v_ptr + start * stride_v_row + head * stride_v_head
            # [BLOCK_N, BLOCK_D]
            offs_k = offs_n.to(tl.int64)[:, None] * stride_k_row + offs_d[None, :]
            offs_v = offs_n.to(tl.int64)[:, None] * stride_v_row + offs_d[None, :]

            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
            left_term = row_sum
            right_term = row_sum
            scratch_base = scratch_ptr
            whole = num_keys // BLOCK_N * BLOCK_N  # keys in whole blocks
            band_first = whole
            band_end = whole
            if HAS_POSITIONS:
                scratch_base += tl.program_id(0).to(tl.int64) * SCRATCH_SIZE + SCRATCH_START
                tl.debug_barrier()  # other threads may still read the scores of the tile before
                left_term, right_term = _position_scores(
                    query,
                    distance_ptr,
                    scratch_base + offs_m * (SCRATCH_STRIDE + 1) - LEFT,
                    stride_e_row,
                    LEFT,
                    RIGHT,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_M,
                    BLOCK_P,
                )
                tl.debug_barrier()  # other threads will read the scores than those that wrote them
                last_row = tl.minimum(first_row + BLOCK_M, length) - 1
                band_first, band_end = band_blocks(first_row, last_row, LEFT, RIGHT, whole, BLOCK_N)

            band_keys = band_end - band_first
            for far_start in tl.range(0, whole - band_keys, BLOCK_N, num_stages=FAR_STAGES):
                key_start = far_start
                row_term = left_term
                if HAS_POSITIONS:
                    key_start = tl.where(far_start < band_first, far_start, far_start + band_keys)
                    row_term = tl.where(far_start < band_first, left_term, right_term)
                key_start = key_start.to(tl.int64)
                key_ptrs = k_base + key_start * stride_k_row + offs_k
                value_ptrs = v_base + key_start * stride_v_row + offs_v
                if HEAD_DIM == BLOCK_D:
                    key = tl.load(key_ptrs)
                    value = tl.load(value_ptrs)
                else:
                    key = tl.load(key_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
                    value = tl.load(value_ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee")
                acc, row_sum, row_max = _attend(
                    acc,
                    row_sum,
                    row_max,
                    scores,
                    row_term,
                    value,
                    scale_log2,
                    seed_ptr,
                    dropout_p,
                    head,
                    start + first_row,
                    key_start,
                    HAS_POSITIONS,
                    HAS_DROPOUT,
                )

            # The keys after the last whole block, wherever the band is, are the last step.
            last_start = tl.where(whole < num_keys, whole, band_end - BLOCK_N)
            band_end = tl.where(whole < num_keys, band_end + BLOCK_N, band_end)
            for band_start in tl.range(band_first, band_end, BLOCK_N, num_stages=BAND_STAGES):
                key_start = tl.where(band_start == band_end - BLOCK_N, last_start, band_start)
                key_start = tl.multiple_of(key_start, BLOCK_N)
                key_mask = (offs_n < num_keys - key_start)[:, None] & (offs_d < HEAD_DIM)[None, :]
                key_offset = key_start.to(tl.int64)
                key = tl.load(k_base + key_offset * stride_k_row + offs_k, mask=key_mask, other=0.0)
                value = tl.load(
                    v_base + key_offset * stride_v_row + offs_v, mask=key_mask, other=0.0
                )
                if HAS_POSITIONS:
                    read_start = tl.minimum(key_start - first_row, READ_LIMIT)
                    if HAS_SEQUSED:  # the last keys may be far left of a tile behind them
                        read_start = tl.maximum(read_start, -SCRATCH_START)
                    near = _near_scores(
                        scratch_base + offs_m * SCRATCH_STRIDE,
                        offs_m,
                        key_start - first_row + offs_n,
                        read_start + offs_n,
                        num_keys - first_row,
                        left_term,
                        right_term,
                        LEFT,
                        RIGHT,
                    )
                    scores = tl.dot(query, tl.trans(key), near, input_precision="ieee")
                else:
                    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
                    scores = tl.where(
                        (offs_n < num_keys - key_start)[None, :], scores, -float("inf")
                    )
                acc, row_sum, row_max = _attend(
                    acc,
                    row_sum,
                    row_max,
                    scores,
                    left_term,
                    value,
                    scale_log2,
                    seed_ptr,
                    dropout_p,
                    head,
                    start + first_row,
                    key_start,
                    False,
                    HAS_DROPOUT,
                )

            # Computed again, not kept in registers through the loops.
            row_mask = offs_m < tl.minimum(length - first_row, BLOCK_M)
            tile_mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
            weight = 1.0 / row_sum
            if HAS_DROPOUT:
                weight *= 1.0 / (1.0 - dropout_p)
            out_base = out_ptr + (start + first_row) * stride_out_row + head * stride_out_head
            tl.store(
                out_base + offs_m.to(tl.int64)[:, None] * stride_out_row + offs_d[None, :],
                (acc * weight[:, None]).to(out_ptr.dtype.element_ty),
                mask=tile_mask,
            )
            tl.store(
                lse_ptr + head * stride_lse_head + (start + first_row) + offs_m,
                (row_max + tl.math.log2(row_sum)) * 0.6931471805599453,  # log 2
                mask=row_mask,
            )


def _constants(
    config: AttentionConfig,
    layout: ScratchLayout,
    head_dim: int,
    left: int,
    right: int,
    same_row_stride: bool,
    *,
    has_positions: bool,
    has_dropout: bool,
    has_seqused: bool,
) -> dict[str, bool | int | str]:
    return {
        "HAS_DROPOUT": has_dropout,
        "HAS_SEQUSED": has_seqused,
        "HAS_POSITIONS": has_positions,
        "LEFT": left,
        "RIGHT": right,
        "HEAD_DIM": head_dim,
        "SAME_ROW_STRIDE": same_row_stride,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_P": config.block_p,
        "SCRATCH_STRIDE": layout.row_stride,
        "SCRATCH_START": layout.start,
        "SCRATCH_SIZE": layout.size,
        "READ_LIMIT": layout.read_limit,
        "FAR_STAGES": config.num_stages,
        "BAND_STAGES": config.band_stages,
    }


def _options(config: AttentionConfig) -> dict[str, int]:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def check_attention(
    query: Tensor,
    like_query: Mapping[str, Tensor],
    log_sum_exp: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tile_map: Tensor | None,
    seqused_k: Tensor | None,
) -> str:
    """The checks that `shaw_attention` and its gradient share, but for the shape of the tile map.

    `like_query` are, by name, the tensors of the shape and dtype of `query`; `log_sum_exp` is
    `None` where it is no argument. Returns the architecture.
    """
    check_tensor("query", query, (None, None, None))
    for name, tensor in like_query.items():
        check_tensor(name, tensor, query.shape, (query.dtype,))
    if log_sum_exp is not None:
        shape = (query.shape[1], query.shape[0])
        check_tensor("log_sum_exp", log_sum_exp, shape, (torch.float32,))
    check_offsets(cu_seqlens, seqused_k)
    if left < 0 or right < 0:
        raise ValueError(
            f"left_max_position is {left} and right_max_position is {right}; both must be 0 or more"
        )
    if distance_embedding is not None:
        shape = (left + right + 1, query.shape[2])
        check_tensor("distance_embedding", distance_embedding, shape, (query.dtype,))
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    if dropout_seed is not None:
        check_tensor("dropout_seed", dropout_seed, (2,), (torch.int64,))
    elif dropout_p > 0.0:
        raise ValueError("dropout_seed is None; dropout needs int64 [2], seed and offset")
    check_device(
        query=query,
        **like_query,
        log_sum_exp=log_sum_exp,
        cu_seqlens=cu_seqlens,
        distance_embedding=distance_embedding,
        dropout_seed=dropout_seed,
        tile_map=tile_map,
        seqused_k=seqused_k,
    )
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}; it must be 0 or more")
    return architecture(query.device)


def shaw_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    out: Tensor | None = None,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within each utterance, with Shaw relative keys or without positions.

    D is 1 to 128, and float32 is multiplied in full precision. Other arguments as of
    `ops.shaw_attention`.

    Args:
        dropout_seed: int64 `[2]`, seed and offset of dropout's random numbers; needed where
            `dropout_p` is not 0.
        tile_map: of `build_tile_map` with the configuration's `block_m`; computed when `None`.
        out: where the output goes, like `query`.
        config: that of `attention_config` when `None`.

    Returns:
        The output `[num_tokens, num_heads, D]` in the dtype of `query`, and the log-sum-exp of each
        query's scores, float32 `[num_heads, num_tokens]`.
    """
    if tile_map is None:
        left, right = left_max_position, right_max_position
        given = (cu_seqlens, max_seqlen, distance_embedding, left, right, dropout_p, dropout_seed)
        arch = check_attention(query, {}, None, *given, None, seqused_k)
        if config is None:
            config_of = (query.shape[2], query.dtype, arch)
            block_m = attention_config(*config_of, has_dropout=dropout_p > 0.0).block_m
        else:
            block_m = config.block_m
        tile_map = build_tile_map(
            cu_seqlens, block_m, num_tokens=query.shape[0], max_seqlen=max_seqlen
        )
    return _launch(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        distance_embedding,
        left_max_position,
        right_max_position,
        dropout_p,
        dropout_seed,
        tile_map,
        seqused_k,
        out,
        config,
    )


@planned
def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tile_map: Tensor,
    seqused_k: Tensor | None,
    out: Tensor | None,
    config: AttentionConfig | None,
) -> tuple[Tensor, Tensor]:
    if out is None:
        out = empty(query.shape, query.dtype, query.device)
    arch = check_attention(
        query,
        {"key": key, "value": value, "out": out},
        None,
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
        config = attention_config(head_dim, query.dtype, arch, has_dropout=has_dropout)
    check_tile_map(tile_map, cu_seqlens, config.block_m, num_tokens, max_seqlen)
    log_sum_exp = empty((num_heads, num_tokens), torch.float32, query.device)

    if not has_positions:
        left, right = 0, 0
    layout = scratch_layout(config.block_m, config.block_n, left, right)
    num_work = tile_map.shape[0] * num_heads
    programs = num_work
    scratch = log_sum_exp  # not touched without positions
    if has_positions:
        count = device_multiprocessors(query.device)
        programs = num_programs(config, layout, num_work, count)
        scratch = empty((programs * layout.size,), torch.float32, query.device)
    vectors = distance_embedding if distance_embedding is not None else query
    constants = _constants(
        config,
        layout,
        head_dim,
        left,
        right,
        key.stride(0) == value.stride(0),
        has_positions=has_positions,
        has_dropout=has_dropout,
        has_seqused=seqused_k is not None,
    )
    dropout = (dropout_seed, dropout_p) if has_dropout else (None, None)
    if num_work > 0:
        launch(
            shaw_attention_fwd_kernel,
            (programs,),
            query,
            key,
            value,
            vectors,
            scratch,
            out,
            log_sum_exp,
            cu_seqlens,
            seqused_k,
            tile_map,
            num_work,
            num_heads,
            head_dim**-0.5 * LOG2_E,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            vectors.stride(0),
            out.stride(0),
            out.stride(1),
            num_tokens,
            *dropout,
            **constants,
            **_options(config),
        )
    return out, log_sum_exp
