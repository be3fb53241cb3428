"""Which attention weights dropout keeps: a pure function of seed, head, query and key.

Random numbers come from Philox 4x32 with 10 rounds (Salmon et al. 2011), a function of a counter
and a key, so that forward and backward find the same weights dropped whatever their tiles, and no
mask is kept. For query token t of the batch and key j of its utterance:

    key      the two halves of `seed`
    counter  (j // 4, t, head, offset)
    number   word j % 4 of the four that come out; kept where (number >> 8) * 2^-24 >= p
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import check_tensor


@triton.jit
def kept_weights(
    seed_ptr,  # int64 [2]: seed and offset
    head,
    first_token,  # of the tile's first query, in the batch
    first_key,  # of the tile's first key, in the utterance; a multiple of 4
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether each attention weight of a tile is kept, `[BLOCK_M, BLOCK_N]`."""
    tokens = first_token.to(tl.uint32) + tl.arange(0, BLOCK_M).to(tl.uint32)
    groups = (first_key // 4).to(tl.uint32) + tl.arange(0, BLOCK_N // 4).to(tl.uint32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr),
        zero + groups[None, :],
        zero + tokens[:, None],
        zero + head.to(tl.uint32),
        zero + tl.load(seed_ptr + 1).to(tl.uint32),
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [BLOCK_M, BLOCK_N / 4, 2, 2]
    words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 >= dropout_p


def check_dropout(dropout_p: float, dropout_seed: Tensor | None) -> None:
    """Checks the dropout arguments of an attention launcher.

    Raises:
        ValueError: the probability is not in [0, 1), or dropout has no seed.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be at least 0 and below 1")
    if dropout_seed is None:
        if dropout_p > 0.0:
            raise ValueError("dropout_seed is None; dropout needs int64 [2], seed and offset")
        return
    check_tensor("dropout_seed", dropout_seed, (2,), (torch.int64,))
