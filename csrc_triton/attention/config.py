"""Launch configurations of Shaw attention and its gradients: tiles, warps, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..architectures import tiles_for

SCRATCH_LIMIT = 256 * 2**20
"""Bytes of position scores that one launch may keep; more work is split into several launches."""


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
        scratch_limit: bytes of scratch memory of one launch.
    """

    block_m: int
    block_n: int
    block_p: int
    num_warps: int
    num_stages: int
    band_stages: int = 1
    max_registers: int | None = None
    scratch_limit: int = SCRATCH_LIMIT


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


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


# By architecture, bytes of an element and head size (the first that is large enough).
_CONFIGS: dict[str, dict[int, dict[int, AttentionConfig]]] = {
    "sm_75": {
        2: {64: AttentionConfig(32, 32, 16, 8, 1), 128: AttentionConfig(32, 16, 16, 8, 1)},
        4: {64: AttentionConfig(32, 32, 16, 8, 1), 128: AttentionConfig(32, 16, 16, 8, 1)},
    },
    "sm_80": {
        # 32 rows a warp: half the reads of keys and values from shared memory that 16 rows need.
        2: {64: AttentionConfig(128, 32, 16, 4, 3), 128: AttentionConfig(128, 32, 16, 8, 2)},
        4: {64: AttentionConfig(32, 32, 16, 8, 2), 128: AttentionConfig(32, 16, 16, 8, 2)},
    },
    "sm_90": {
        # 128 registers: two blocks of eight warps a multiprocessor, so that one's products overlap
        # the other's softmax.
        2: {
            64: AttentionConfig(128, 64, 16, 8, 3, max_registers=128),
            128: AttentionConfig(128, 64, 16, 8, 2),
        },
        4: {64: AttentionConfig(32, 32, 16, 8, 2), 128: AttentionConfig(32, 16, 16, 8, 2)},
    },
    "sm_100": {
        2: {64: AttentionConfig(128, 64, 16, 8, 3), 128: AttentionConfig(128, 64, 16, 8, 2)},
        4: {64: AttentionConfig(32, 32, 16, 8, 2), 128: AttentionConfig(32, 16, 16, 8, 2)},
    },
    "gfx942": {
        2: {64: AttentionConfig(128, 64, 32, 4, 1), 128: AttentionConfig(128, 32, 32, 4, 1)},
        4: {64: AttentionConfig(32, 32, 32, 4, 1), 128: AttentionConfig(32, 16, 16, 4, 1)},
    },
    "interpreter": {
        2: {128: AttentionConfig(32, 32, 32, 1, 1)},
        4: {128: AttentionConfig(32, 32, 32, 1, 1)},
    },
}


def attention_config(head_dim: int, dtype: torch.dtype, arch: str) -> AttentionConfig:
    """The launch configuration for a head size, a dtype and an architecture.

    Args:
        head_dim: channels D of a head, 1 to 128.
        dtype: float32, float16 or bfloat16.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.

    Raises:
        ValueError: no kernel for this head size or architecture.
    """
    by_head_dim = tiles_for(_CONFIGS, arch)[dtype.itemsize]
    for limit, config in by_head_dim.items():
        if 1 <= head_dim <= limit:
            return config
    raise ValueError(f"head_dim is {head_dim}; it must be 1 to {max(by_head_dim)}")


def with_dropout(config: AttentionConfig) -> AttentionConfig:
    """The configuration for attention with dropout, whose random numbers take registers.

    The tile stays, so that one tile map serves both.
    """
    return replace(config, block_n=min(config.block_n, 32), max_registers=None)


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
    scratch_limit: int = SCRATCH_LIMIT


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


_FULL = {128: AttentionBackwardConfig(32, 16, 16, 16, 8, 8, 2, 2)}
# Each operand is held twice, as its tf32 value and as what that value leaves.
_TF32X3 = {128: AttentionBackwardConfig(16, 32, 32, 16, 4, 4, 2, 1)}

# By architecture, arithmetic and head size (the first that is large enough).
_BACKWARD: dict[str, dict[str, dict[int, AttentionBackwardConfig]]] = {
    "sm_75": {
        "half": {128: AttentionBackwardConfig(32, 16, 16, 16, 8, 8, 1, 1)},
        "ieee": {128: AttentionBackwardConfig(32, 16, 16, 16, 8, 8, 1, 1)},
    },
    "sm_80": {
        "half": {
            64: AttentionBackwardConfig(128, 32, 32, 16, 8, 8, 3, 2),
            128: AttentionBackwardConfig(64, 32, 32, 16, 4, 4, 2, 2),
        },
        "ieee": _FULL,
        "tf32x3": _TF32X3,
    },
    "sm_90": {
        "half": {
            64: AttentionBackwardConfig(128, 64, 64, 16, 8, 8, 2, 2),
            128: AttentionBackwardConfig(128, 32, 32, 16, 8, 8, 2, 2),
        },
        "ieee": _FULL,
        "tf32x3": _TF32X3,
    },
    "gfx942": {
        "half": {128: AttentionBackwardConfig(128, 32, 32, 32, 4, 4, 1, 1)},
        "ieee": {128: AttentionBackwardConfig(32, 16, 16, 16, 4, 4, 1, 1)},
    },
    "interpreter": {
        "half": {128: AttentionBackwardConfig(32, 32, 32, 32, 1, 1, 1, 1)},
        "ieee": {128: AttentionBackwardConfig(32, 32, 32, 32, 1, 1, 1, 1)},
        "tf32x3": {128: AttentionBackwardConfig(32, 32, 32, 32, 1, 1, 1, 1)},
    },
}


_STEPS = ("key_step", "query_step")


def attention_backward_config(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    precision: str = "ieee",
    has_dropout: bool = False,
) -> AttentionBackwardConfig:
    """The launch configuration for a head size, a dtype and an architecture.

    Dropout changes the steps and not the tile, so one tile map serves both.

    Args:
        head_dim: channels D of a head, 1 to 128.
        dtype: float32, float16 or bfloat16.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
        precision: of float32 products, "ieee" or "tf32x3"; without effect on the others.
        has_dropout: whether attention weights were dropped.

    Raises:
        ValueError: no kernel for this head size, architecture or precision.
    """
    rows = tiles_for(_BACKWARD, arch)
    arithmetic = precision if dtype == torch.float32 else "half"
    if arithmetic not in rows:
        raise ValueError(f"precision is {precision!r}; on {arch} it must be 'ieee'")
    by_head_dim = rows[arithmetic]
    for limit, config in by_head_dim.items():
        if 1 <= head_dim <= limit:
            if has_dropout:  # a step's random numbers take registers of their own
                halves = {name: max(getattr(config, name) // 2, 16) for name in _STEPS}
                config = replace(config, **halves)
            return config
    raise ValueError(f"head_dim is {head_dim}; it must be 1 to {max(by_head_dim)}")
