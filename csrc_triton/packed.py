"""Where a block of a packed batch lies, found on the device.

A grid over blocks of `BLOCK` rows, none of which holds rows of two utterances, needs no table: give
utterance s the blocks from `cu_seqlens[s] // BLOCK + s` up to where utterance s + 1 begins. That is
at least `ceil(length / BLOCK)` blocks, and `num_rows // BLOCK + batch` of them in all, which the
host knows without reading a length. At most one block an utterance is empty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import check_tensor


def check_offsets(cu_seqlens: Tensor, seqused_k: Tensor | None) -> None:
    """`cu_seqlens` is int32 `[batch + 1]`, and `seqused_k`, where it is given, int32 `[batch]`.

    Raises:
        ValueError: one is not; the message names it.
    """
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens has no elements; it must have batch + 1")
    if seqused_k is not None:
        check_tensor("seqused_k", seqused_k, (cu_seqlens.numel() - 1,), (torch.int32,))


def num_blocks(num_rows: int, batch: int, block: int) -> int:
    """Number of blocks of `block` rows over a packed batch of `num_rows` rows."""
    return num_rows // block + batch


@triton.jit
def locate_block(
    block, cu_seqlens_ptr, num_sequences, num_rows, BLOCK: tl.constexpr, SEARCH: tl.constexpr
):
    """The utterance of a block: its number, first row, end, and the block's first row.

    The block is empty when its first row is not before the utterance's end. `num_rows` bounds the
    end, so that offsets beyond the data cannot lead outside of it.
    """
    sequence = -1
    for first in range(0, num_sequences, SEARCH):
        candidates = first + tl.arange(0, SEARCH)  # [SEARCH]
        is_sequence = candidates < num_sequences
        offsets = tl.load(cu_seqlens_ptr + candidates, mask=is_sequence, other=0)
        begins = is_sequence & (offsets // BLOCK + candidates <= block)
        sequence += tl.sum(begins.to(tl.int32), 0)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_rows)
    row = start + (block - (start // BLOCK + sequence)) * BLOCK
    return sequence, start, end, row


@triton.jit
def used_end(sequence, start, end, seqused_k_ptr, HAS_SEQUSED: tl.constexpr):
    """Where the rows of an utterance end that others may read: `start + seqused_k[sequence]`."""
    if HAS_SEQUSED:
        end = tl.minimum(start + tl.load(seqused_k_ptr + sequence), end)
    return end
