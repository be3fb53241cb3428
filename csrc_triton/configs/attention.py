"""Launch configurations of the Shaw attention kernel: tiles, warps, registers, scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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


def _nearest(arch: str) -> str:
    """The table's architecture whose configurations an architecture takes."""
    if arch in _CONFIGS:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    if arch.startswith("sm_") and arch[3:].isdigit():
        version = int(arch[3:])
        if version >= 120:  # shared memory and tensor cores as before Hopper's
            return "sm_80"
        known = [int(name[3:]) for name in _CONFIGS if name.startswith("sm_")]
        older = [number for number in known if number <= version]
        if older:
            return f"sm_{max(older)}"
    raise ValueError(
        f"arch is {arch!r}; it must be sm_75 or newer, gfx942 or newer, or interpreter"
    )


def attention_config(head_dim: int, dtype: torch.dtype, arch: str) -> AttentionConfig:
    """The launch configuration for a head size, a dtype and an architecture.

    Args:
        head_dim: channels D of a head, 1 to 128.
        dtype: float32, float16 or bfloat16.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.

    Raises:
        ValueError: no kernel for this head size or architecture.
    """
    by_head_dim = _CONFIGS[_nearest(arch)][dtype.itemsize]
    for limit, config in by_head_dim.items():
        if 1 <= head_dim <= limit:
            return config
    raise ValueError(f"head_dim is {head_dim}; it must be 1 to {max(by_head_dim)}")


def with_dropout(config: AttentionConfig) -> AttentionConfig:
    """The configuration for attention with dropout, whose random numbers take registers.

    The tile stays, so that one tile map serves both.
    """
    return replace(config, block_n=min(config.block_n, 32), max_registers=None)
