"""Which query tile of which utterance each program of an attention kernel works on."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_triton.launch import check_tensor


def tile_bound(batch_size: int, num_tokens: int, max_seqlen: int, block_m: int) -> int:
    """Number of query tiles that utterances of these sizes have at most.

    Args:
        batch_size: number of utterances.
        num_tokens: frames of all utterances.
        max_seqlen: frames of the longest utterance, or more.
        block_m: query rows of a tile.
    """
    return min(num_tokens // block_m + batch_size, batch_size * -(-max_seqlen // block_m))


def build_tile_map(cu_seqlens: Tensor, block_m: int, *, num_tokens: int, max_seqlen: int) -> Tensor:
    """Which query tile of which utterance each program works on, longest utterance first.

    It is computed on the device without waiting for it, and serves every layer of an encoder.

    Args:
        cu_seqlens: int32 `[batch + 1]`, cumulative lengths in frames, starting at 0.
        block_m: query rows of a tile, from `attention_config`.
        num_tokens: frames of all utterances.
        max_seqlen: frames of the longest utterance.

    Returns:
        int32 `[tile_bound(...), 2]`: utterance and index of the tile within it. The rows that are
        left over hold -1.
    """
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    batch_size = cu_seqlens.numel() - 1
    bound = tile_bound(batch_size, num_tokens, max_seqlen, block_m)
    if bound == 0:
        return cu_seqlens.new_empty(0, 2)
    lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
    tiles = (lengths + (block_m - 1)) // block_m
    ends = tiles.cumsum(0)
    slots = torch.arange(bound, device=cu_seqlens.device)
    rank = torch.searchsorted(ends, slots, right=True).clamp_(max=batch_size - 1)
    entries = torch.stack((order[rank], slots - (ends - tiles)[rank]), dim=1)
    return entries.masked_fill_((slots >= ends[-1])[:, None], -1).to(torch.int32)


def check_tile_map(
    tile_map: Tensor, cu_seqlens: Tensor, block_m: int, num_tokens: int, max_seqlen: int
) -> None:
    """That a map is as `build_tile_map` makes it.

    One for another `block_m` has another number of rows, unless every utterance is one tile.
    """
    num_tiles = tile_bound(cu_seqlens.numel() - 1, num_tokens, max_seqlen, block_m)
    check_tensor("tile_map", tile_map, (num_tiles, 2), (torch.int32,))
    if num_tiles > 0 and tile_map.stride(0) != 2:
        raise ValueError(f"tile_map has strides {tile_map.stride()}; it must be contiguous")
