"""Launch configurations of `csrc_triton.norm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_WIDTH = 8192
"""Widest row that a program holds in registers."""


@dataclass(frozen=True)
class NormConfig:
    """How a norm kernel is launched.

    Attributes:
        rows: rows of one program; more of them share one read of the norm's weights.
        block_width: the width, rounded up to a power of two.
        num_warps: warps in a block.
    """

    rows: int
    block_width: int
    num_warps: int


# Widest block -> rows and threads of a program. Each thread then holds at most 32 elements of a
# tensor, in loads of 16 bytes: enough in flight to hide memory's latency, few enough not to spill.
_ROWS_AND_THREADS = {
    128: (16, 64),
    256: (8, 64),
    512: (4, 64),
    1024: (4, 128),
    2048: (2, 128),
    4096: (2, 256),
    8192: (1, 512),
}


def norm_config(width: int, dtype: torch.dtype, arch: str) -> NormConfig:
    """The launch configuration for rows of `width` elements.

    Args:
        width: elements in a row, at most 8192.
        dtype: of the rows.
        arch: as of `runtime.architecture`.

    Raises:
        ValueError: the rows are too wide.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width is {width}; it must be 1 to {MAX_WIDTH}")
    block_width = max(16, 1 << (width - 1).bit_length())
    if arch == "interpreter":
        return NormConfig(rows=4, block_width=block_width, num_warps=1)
    bound = next(bound for bound in _ROWS_AND_THREADS if block_width <= bound)
    rows, threads = _ROWS_AND_THREADS[bound]
    return NormConfig(rows, block_width, num_warps=threads // warp_size(arch))


def warp_size(arch: str) -> int:
    """Threads in a warp: 64 on AMD's data-centre GPUs, else 32."""
    return 64 if arch.startswith("gfx9") else 32
