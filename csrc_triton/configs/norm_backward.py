"""Launch configurations of `csrc_triton.norm_backward`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linear import MULTIPROCESSORS, nearest_architecture
from .norm import norm_config, warp_size


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
        arch: as of `runtime.architecture`.

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
    programs = MULTIPROCESSORS[nearest_architecture(arch)] * max(1, 512 // threads)
    return NormBackwardConfig(rows, block_width, num_warps, programs)
