"""Greedy CTC decoding (best path, Graves et al. 2006) of packed utterances.

    best[t] = argmax_v logits[t, v], the lowest v of equals
    tokens  = best[t] of the frames t with best[t] != blank and best[t] != best[t - 1]

Two launches. The argmax reads each of the V logits of a frame once and does nothing but compare. It
compares integers that sort like the numbers, so that equals, infinities and NaN come out as in
`torch.argmax`: NaN counts as the largest. The collapse runs one program an utterance over its
frames (8 bytes read and 4 written a frame), with a running count and a prefix sum in place of a
list. Token ids and counts are all that has to leave the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.launch import check_device, check_tensor

NO_TOKEN = -1
"""What stands in `token_ids` after the last token of an utterance."""


@dataclass(frozen=True)
class CtcConfig:
    """Launch configuration of greedy CTC decoding.

    Attributes:
        block_frames: frames that a program of the argmax owns.
        block_vocabulary: logits of each frame that it compares in a step.
        block_collapse: frames that a program of the collapse takes in a step.
        num_warps: warps in a block, of both.
    """

    block_frames: int
    block_vocabulary: int
    block_collapse: int
    num_warps: int


def ctc_config(vocabulary: int, arch: str) -> CtcConfig:
    """16 logits a thread in flight, of as many frames as that takes.

    Args:
        vocabulary: logits of a frame, at least 1.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
    """
    block_vocabulary = min(triton.next_power_of_2(vocabulary), 1024)
    if arch == "interpreter":
        return CtcConfig(32, block_vocabulary, 64, 1)
    return CtcConfig(max(1, 2048 // block_vocabulary), block_vocabulary, 1024, 4)


@triton.jit(do_not_specialize=["num_frames"])
def _ctc_argmax_kernel(
    logits_ptr,  # [num_frames, vocabulary]
    best_ptr,  # [num_frames]
    num_frames,
    vocabulary,
    stride_logits_row,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    LOWEST: tl.constexpr = -2147483648
    HIGHEST: tl.constexpr = 2147483647

    frames = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    in_batch = frames < num_frames
    row_ptrs = logits_ptr + frames.to(tl.int64)[:, None] * stride_logits_row
    columns = tl.arange(0, BLOCK_V)[None, :]  # [1, BLOCK_V]

    # Each lane keeps the best of its own columns, the first of equals; lanes meet after the loop.
    best_key = tl.full([BLOCK_T, BLOCK_V], LOWEST, tl.int32)
    best_column = tl.zeros([BLOCK_T, BLOCK_V], tl.int32) + columns
    for start in range(0, vocabulary, BLOCK_V):
        column = start + columns
        inside = in_batch[:, None] & (column < vocabulary)
        # What lies past the last column ties with -inf at most, and loses as the higher column.
        logits = tl.load(row_ptrs + column, mask=inside, other=float("-inf")).to(tl.float32)
        bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 equals 0
        key = tl.where(bits < 0, bits ^ HIGHEST, bits)
        key = tl.where(logits != logits, HIGHEST, key)
        better = key > best_key
        best_key = tl.where(better, key, best_key)
        best_column = tl.where(better, column, best_column)

    row_key = tl.max(best_key, axis=1)  # [BLOCK_T]
    winners = tl.where(best_key == row_key[:, None], best_column, HIGHEST)
    tl.store(best_ptr + frames, tl.min(winners, axis=1), mask=in_batch)


@triton.jit(do_not_specialize=["blank"])
def _ctc_collapse_kernel(
    best_ptr,  # [num_frames]
    cu_seqlens_ptr,  # [batch + 1]
    token_ids_ptr,  # [num_frames]
    counts_ptr,  # [batch]
    blank,
    NO_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    utterance = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + utterance)
    length = tl.load(cu_seqlens_ptr + utterance + 1) - start
    best_ptr += start
    token_ids_ptr += start
    lane = tl.arange(0, BLOCK_T)  # [BLOCK_T]

    count = tl.zeros([], tl.int32)
    for first in range(0, length, BLOCK_T):
        frame = first + lane
        inside = frame < length
        best = tl.load(best_ptr + frame, mask=inside, other=blank)
        previous = tl.load(best_ptr + frame - 1, mask=inside & (frame > 0), other=-1)
        keep = inside & (best != blank) & (best != previous)
        places = count + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(token_ids_ptr + places, best, mask=keep)
        count += tl.sum(keep.to(tl.int32), axis=0)
    tl.store(counts_ptr + utterance, count)
    for first in range(count, length, BLOCK_T):
        rest = first + lane
        tl.store(token_ids_ptr + rest, tl.full([BLOCK_T], NO_TOKEN, tl.int32), mask=rest < length)


def ctc_greedy(
    logits: Tensor, cu_seqlens: Tensor, blank: int, *, config: CtcConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Best path: the argmax of every frame, repeats collapsed, blanks dropped, as `ops.ctc_greedy`.

    `config` is that of `ctc_config` when `None`.
    """
    check_tensor("logits", logits, (None, None))
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    check_device(logits=logits, cu_seqlens=cu_seqlens)
    num_frames, vocabulary = logits.shape
    batch = cu_seqlens.shape[0] - 1
    if vocabulary == 0:
        raise ValueError("logits has no columns; a frame needs at least one")
    if batch < 0:
        raise ValueError("cu_seqlens is empty; it must have batch + 1 elements")
    best = torch.empty(num_frames, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty_like(best)
    counts = torch.empty(batch, dtype=torch.int32, device=logits.device)
    if config is None:
        config = ctc_config(vocabulary, architecture(logits.device))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(logits):
        if num_frames > 0:
            _ctc_argmax_kernel[(triton.cdiv(num_frames, config.block_frames),)](
                logits,
                best,
                num_frames,
                vocabulary,
                logits.stride(0),
                BLOCK_T=config.block_frames,
                BLOCK_V=config.block_vocabulary,
                num_warps=config.num_warps,
            )
        if batch > 0:
            _ctc_collapse_kernel[(batch,)](
                best,
                cu_seqlens,
                token_ids,
                counts,
                blank,
                NO_TOKEN=NO_TOKEN,
                BLOCK_T=config.block_collapse,
                num_warps=config.num_warps,
            )
    return token_ids, counts
