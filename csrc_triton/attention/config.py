"""Launch configurations of Shaw attention and its gradients: tiles, warps, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from csrc_triton.architectures import tiles_for

SCRATCH_LIMIT = 256 * 2**20
"""Bytes of position scores that one launch may keep."""


@dataclass(frozen=True)
class AttentionConfig:
    """How the attention kernel is launched.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a block.
        block_p: relative distances whose scores are computed at once.
        num_warps: warps in a block.
        num_stages: pipeline depth of the loop over far key blocks.
        band_stages: pipeline depth of the loop over key blocks in the band.
        max_registers: cap on a thread's registers, so that more blocks are resident, or `None`.
        blocks: resident blocks of a multiprocessor, by what the kernel with positions compiles to.
            Each keeps the position scores of one tile at a time.
        scratch_limit: bytes of scratch memory of one launch; of one program at least.
    """

    block_m: int
    block_n: int
    block_p: int
    num_warps: int
    num_stages: int
    band_stages: int = 1
    max_registers: int | None = None
    blocks: int = 1
    scratch_limit: int = SCRATCH_LIMIT


@dataclass(frozen=True)
class AttentionBackwardConfig:
    """How the kernels of the attention gradients are launched.

    Attributes:
        tile: queries, or keys, whose gradients one program writes.
        key_step: keys that a step of the kernel over queries takes.
        query_step: queries that a step of the kernel over keys takes.
        block_p: relative distances that are multiplied at once.
        query_warps: warps in a block of the kernel over queries and of the one that prepares.
        key_warps: warps in a block of the kernel over keys.
        query_stages: pipeline depth of the loop over far keys.
        key_stages: pipeline depth of the loop over far queries.
        query_registers: cap on a thread's registers in the kernel over queries with positions, for
            as many resident blocks, or `None`.
        shares: sums of the distance embedding's gradient that are kept apart at first, at most. The
            same on every device, so that the order of the sum is.
        scratch_limit: bytes of scratch memory of one launch; one head at least.
    """

    tile: int
    key_step: int
    query_step: int
    block_p: int
    query_warps: int
    key_warps: int
    query_stages: int
    key_stages: int
    query_registers: int | None = None
    shares: int = 256
    scratch_limit: int = SCRATCH_LIMIT


@dataclass(frozen=True)
class AttentionTiles:
    """The tiles of both passes; where `tile` is `block_m`, one list of tiles serves both.

    Attributes:
        forward: of attention.
        backward: of its gradients.
    """

    forward: AttentionConfig
    backward: AttentionBackwardConfig


_FP32_BACKWARD = AttentionBackwardConfig(
    tile=32,
    key_step=16,
    query_step=16,
    block_p=16,
    query_warps=8,
    key_warps=8,
    query_stages=2,
    key_stages=2,
)
_FP32 = {
    64: AttentionTiles(
        AttentionConfig(block_m=32, block_n=32, block_p=16, num_warps=8, num_stages=2),
        # Left alone, the compiler spills on sm_89 for the sake of a third block.
        replace(_FP32_BACKWARD, query_registers=128),
    ),
    128: AttentionTiles(
        AttentionConfig(block_m=32, block_n=16, block_p=16, num_warps=8, num_stages=2),
        _FP32_BACKWARD,
    ),
}
# Without asynchronous copies nothing is pipelined.
_TURING_BACKWARD = replace(_FP32_BACKWARD, query_stages=1, key_stages=1)
_TURING = {
    head_dim: AttentionTiles(replace(tiles.forward, num_stages=1), _TURING_BACKWARD)
    for head_dim, tiles in _FP32.items()
}
_HOPPER_BACKWARD = AttentionBackwardConfig(
    tile=128,
    key_step=64,
    query_step=64,
    block_p=16,
    query_warps=8,
    key_warps=8,
    query_stages=2,
    key_stages=2,
)
_HOPPER_128 = AttentionTiles(
    AttentionConfig(block_m=128, block_n=64, block_p=16, num_warps=8, num_stages=2),
    replace(_HOPPER_BACKWARD, key_step=32, query_step=32),
)
_CDNA_BACKWARD = AttentionBackwardConfig(
    tile=128,
    key_step=32,
    query_step=32,
    block_p=32,
    query_warps=4,
    key_warps=4,
    query_stages=1,
    key_stages=1,
)
_CDNA_FP32_BACKWARD = replace(_CDNA_BACKWARD, tile=32, key_step=16, query_step=16, block_p=16)
_INTERPRETER = {
    128: AttentionTiles(
        AttentionConfig(block_m=32, block_n=32, block_p=32, num_warps=1, num_stages=1),
        AttentionBackwardConfig(
            tile=32,
            key_step=32,
            query_step=32,
            block_p=32,
            query_warps=1,
            key_warps=1,
            query_stages=1,
            key_stages=1,
        ),
    )
}

# By architecture, arithmetic and head size (the first that is large enough). An architecture
# without a row takes that of the nearest.
TILES: dict[str, dict[str, dict[int, AttentionTiles]]] = {
    "sm_75": {"half": _TURING, "fp32": _TURING},
    "sm_80": {
        "half": {
            64: AttentionTiles(
                # 32 rows a warp: half the reads of keys and values from shared memory that 16 rows
                # need.
                AttentionConfig(
                    block_m=128,
                    block_n=32,
                    block_p=16,
                    num_warps=4,
                    num_stages=3,
                    band_stages=2,
                    blocks=2,
                ),
                AttentionBackwardConfig(
                    tile=128,
                    key_step=32,
                    query_step=32,
                    block_p=16,
                    query_warps=8,
                    key_warps=8,
                    query_stages=3,
                    key_stages=2,
                ),
            ),
            128: AttentionTiles(
                AttentionConfig(block_m=128, block_n=32, block_p=16, num_warps=8, num_stages=2),
                AttentionBackwardConfig(
                    tile=64,
                    key_step=32,
                    query_step=32,
                    block_p=16,
                    query_warps=4,
                    key_warps=4,
                    query_stages=2,
                    key_stages=2,
                ),
            ),
        },
        "fp32": _FP32,
    },
    "sm_90": {
        "half": {
            64: AttentionTiles(
                # 128 registers: two blocks of eight warps a multiprocessor, so that one's products
                # overlap the other's softmax.
                AttentionConfig(
                    block_m=128,
                    block_n=64,
                    block_p=16,
                    num_warps=8,
                    num_stages=3,
                    band_stages=2,
                    max_registers=128,
                    blocks=2,
                ),
                # The same of the gradients of queries, for which steps must be short.
                replace(_HOPPER_BACKWARD, key_step=32, query_registers=128),
            ),
            128: _HOPPER_128,
        },
        "fp32": _FP32,
    },
    "sm_100": {
        "half": {
            64: AttentionTiles(
                AttentionConfig(
                    block_m=128, block_n=64, block_p=16, num_warps=8, num_stages=3, blocks=2
                ),
                _HOPPER_BACKWARD,
            ),
            128: _HOPPER_128,
        },
        "fp32": _FP32,
    },
    "gfx942": {
        "half": {
            64: AttentionTiles(
                AttentionConfig(
                    block_m=128, block_n=64, block_p=32, num_warps=4, num_stages=1, blocks=2
                ),
                _CDNA_BACKWARD,
            ),
            128: AttentionTiles(
                AttentionConfig(
                    block_m=128, block_n=32, block_p=32, num_warps=4, num_stages=1, blocks=2
                ),
                _CDNA_BACKWARD,
            ),
        },
        "fp32": {
            64: AttentionTiles(
                AttentionConfig(
                    block_m=32, block_n=32, block_p=32, num_warps=4, num_stages=1, blocks=2
                ),
                _CDNA_FP32_BACKWARD,
            ),
            128: AttentionTiles(
                AttentionConfig(
                    block_m=32, block_n=16, block_p=16, num_warps=4, num_stages=1, blocks=2
                ),
                _CDNA_FP32_BACKWARD,
            ),
        },
    },
    "interpreter": {"half": _INTERPRETER, "fp32": _INTERPRETER},
}


def _tiles(head_dim: int, dtype: torch.dtype, arch: str) -> AttentionTiles:
    by_head_dim = tiles_for(TILES, arch)["fp32" if dtype == torch.float32 else "half"]
    for limit, tiles in by_head_dim.items():
        if 1 <= head_dim <= limit:
            return tiles
    raise ValueError(f"head_dim is {head_dim}; it must be 1 to {max(by_head_dim)}")


def attention_config(
    head_dim: int, dtype: torch.dtype, arch: str, *, has_dropout: bool = False
) -> AttentionConfig:
    """The launch configuration for a head size, a dtype and an architecture.

    Dropout, whose random numbers take registers, does not change the tile, so that one list of
    tiles serves both.

    Args:
        head_dim: channels D of a head, 1 to 128.
        dtype: float32, float16 or bfloat16.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
        has_dropout: whether attention weights are dropped.

    Raises:
        ValueError: no kernel for this head size or architecture.
    """
    config = _tiles(head_dim, dtype, arch).forward
    if has_dropout:
        config = replace(config, block_n=min(config.block_n, 32), max_registers=None)
    return config


def attention_backward_config(
    head_dim: int, dtype: torch.dtype, arch: str, *, has_dropout: bool = False
) -> AttentionBackwardConfig:
    """The launch configuration of the gradients; arguments and errors as of `attention_config`."""
    config = _tiles(head_dim, dtype, arch).backward
    if has_dropout:
        # Random numbers take registers.
        key_step, query_step = max(config.key_step // 2, 16), max(config.query_step // 2, 16)
        config = replace(config, query_step=query_step)
        if config.query_registers is None or dtype == torch.float32:
            config = replace(config, key_step=key_step)
        else:
            config = replace(config, query_registers=None)
    return config


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ScratchLayout:
    """Where a program keeps the position scores of its tile, counted in fp32 elements.

    The score of row i and distance d (-L to R) lies at `start + i * (row_stride + 1) + d`, so that
    the score of row i and column j = i + d, both relative to the tile's first row, lies at
    `start + i * row_stride + j`.

    Attributes:
        row_stride: a multiple of 16, so that a block of columns is an aligned tile.
        start: a multiple of 16 that leaves room for the columns left of the band.
        size: elements of a program.
        read_limit: first column of the last block that is ever read: where a block begins further
            right, all its scores are replaced, and this block is read instead.
    """

    row_stride: int
    start: int
    size: int
    read_limit: int


def scratch_layout(
    block_m: int, block_n: int, left_max_position: int, right_max_position: int
) -> ScratchLayout:
    """Scratch memory of one program.

    Args:
        block_m: query rows of a tile.
        block_n: keys of a block.
        left_max_position: L.
        right_max_position: R.
    """
    row_stride = _round_up(max(left_max_position + right_max_position, 1), 16)
    start = _round_up(left_max_position + block_n, 16)
    read_limit = _round_up(block_m + right_max_position, 16)
    size = _round_up(start + (block_m - 1) * row_stride + read_limit + block_n, 32)
    return ScratchLayout(row_stride, start, size, read_limit)


def num_programs(
    config: AttentionConfig, layout: ScratchLayout, num_work: int, multiprocessors: int
) -> int:
    """Programs of a launch with positions, of which each works on one tile after the other.

    Args:
        config: the launch configuration.
        layout: scratch memory of one program.
        num_work: tiles times heads.
        multiprocessors: of the device.
    """
    fitting = max(config.scratch_limit // (4 * layout.size), 1)
    return min(num_work, config.blocks * multiprocessors, fitting)


@dataclass(frozen=True)
class ScoresLayout:
    """Where the position scores of a packed batch lie, counted in fp32 elements of one head.

    The score of row i of utterance s and distance d (-L to R) lies at
    `front + (16 * (cu_seqlens[s] // 16 + s) + i) * (row_stride + 1) + d`.

    Attributes:
        row_stride: a multiple of 16, so that a block of columns is an aligned tile.
        front: a multiple of 16 that leaves room for the distances left of the first row.
        head_blocks: blocks of 16 rows of a head.
        head_size: elements of a head.
        back: elements after the last head, which blocks read beyond the end of an utterance.
    """

    row_stride: int
    front: int
    head_blocks: int
    head_size: int
    back: int


def scores_layout(
    config: AttentionBackwardConfig,
    batch_size: int,
    num_tokens: int,
    left_max_position: int,
    right_max_position: int,
) -> ScoresLayout:
    """Where the position scores of a packed batch lie.

    Args:
        config: the launch configuration.
        batch_size: number of utterances.
        num_tokens: frames of all utterances.
        left_max_position: L.
        right_max_position: R.
    """
    row_stride = _round_up(max(left_max_position + right_max_position, 1), 16)
    front = _round_up(left_max_position, 16)
    blocks = num_tokens // 16 + batch_size
    queries, keys = max(config.tile, config.query_step), max(config.tile, config.key_step)
    back = queries * (row_stride + 1) + keys
    return ScoresLayout(row_stride, front, blocks, 16 * blocks * (row_stride + 1), back)
