"""Launch configurations of `csrc_triton.linear_backward`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linear import MULTIPROCESSORS, nearest_architecture
from .norm import warp_size


@dataclass(frozen=True)
class EpilogueBackwardConfig:
    """How the gradient of an epilogue is launched.

    Attributes:
        rows: rows that a program takes at once.
        block_columns: columns of a program.
        num_warps: warps in a block.
        programs: most programs that share a block of columns; each leaves one share of the bias's
            gradient.
    """

    rows: int
    block_columns: int
    num_warps: int
    programs: int


def epilogue_backward_config(columns: int, dtype: torch.dtype, arch: str) -> EpilogueBackwardConfig:
    """The launch configuration for an epilogue with `columns` outputs.

    Args:
        columns: outputs of a row, at least 1.
        dtype: of the activations.
        arch: as of `runtime.architecture`.
    """
    if arch == "interpreter":
        return EpilogueBackwardConfig(rows=16, block_columns=32, num_warps=1, programs=2)
    block = min(max(1 << (columns - 1).bit_length(), 64), 256)
    # 16 elements of a tensor a thread, in loads of 16 bytes; eight blocks a multiprocessor.
    rows = 128 * 16 // block
    blocks = 8 * MULTIPROCESSORS[nearest_architecture(arch)]
    return EpilogueBackwardConfig(
        rows, block, 128 // warp_size(arch), max(1, blocks // -(-columns // block))
    )
