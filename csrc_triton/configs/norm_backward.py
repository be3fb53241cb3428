"""Launch configurations of `csrc_triton.norm_backward`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linear import MULTIPROCESSORS, nearest_architecture
from .norm import MAX_WIDTH, warp_size


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


# Widest block -> rows and threads of a program. A thread then holds at most 16 elements of a
# tensor: up to four tensors and four sums of them fit its registers.
_ROWS_AND_THREADS = {
    128: (8, 64),
    256: (4, 64),
    512: (2, 64),
    1024: (2, 128),
    2048: (1, 128),
    4096: (1, 256),
    8192: (1, 512),
}


def norm_backward_config(width: int, dtype: torch.dtype, arch: str) -> NormBackwardConfig:
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
        return NormBackwardConfig(rows=4, block_width=block_width, num_warps=1, programs=3)
    bound = next(bound for bound in _ROWS_AND_THREADS if block_width <= bound)
    rows, threads = _ROWS_AND_THREADS[bound]
    # Enough threads to hide memory's latency, and few shares to add up.
    programs = MULTIPROCESSORS[nearest_architecture(arch)] * max(1, 512 // threads)
    return NormBackwardConfig(rows, block_width, threads // warp_size(arch), programs)
