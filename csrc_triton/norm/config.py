"""Launch configurations of the norms and their gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csrc_triton.architectures import multiprocessors, warp_size

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
        arch: as of `architectures.architecture`.

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


@dataclass(frozen=True)
class NormBackwardConfig:
    """How the gradient of a norm is launched.

    Attributes:
        rows: rows that a program takes at once.
        block_width: the width, rounded up to a power of two.
        num_warps: warps in a block.
        programs: most programs of a launch; each leaves one share of the parameters' gradients.
    """

    rows: int
    block_width: int
    num_warps: int
    programs: int


def norm_backward_config(width: int, dtype: torch.dtype, arch: str) -> NormBackwardConfig:
    """The launch configuration for rows of `width` elements.

    Args:
        width: elements in a row, at most 8192.
        dtype: of the rows.
        arch: as of `architectures.architecture`.

    Raises:
        ValueError: the rows are too wide.
    """
    forward = norm_config(width, dtype, arch)
    block_width, num_warps = forward.block_width, forward.num_warps
    if arch == "interpreter":
        return NormBackwardConfig(forward.rows, block_width, num_warps, programs=3)
    # At most 16 elements of a tensor a thread, half of what the forward kernel holds: up to four
    # tensors and four sums of them fit its registers.
    rows = max(1, forward.rows // 2)
    # Enough threads to hide memory's latency, and few shares to add up.
    threads = num_warps * warp_size(arch)
    programs = multiprocessors(arch) * max(1, 512 // threads)
    return NormBackwardConfig(rows, block_width, num_warps, programs)
