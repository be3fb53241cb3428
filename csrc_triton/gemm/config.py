"""Tiles of the linear layers by architecture, and how the gradient of their epilogue is launched.

Tiles are listed from large to small. A large tile moves the least data for a product; the small one
is for batches whose large tiles would leave multiprocessors without work. That choice is the only
thing here that looks at the number of tokens, so a layer is compiled at most once for each tile,
whatever lengths come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csrc_triton.architectures import multiprocessors, tiles_for, warp_size


@dataclass(frozen=True)
class LinearConfig:
    """Launch configuration of a linear kernel.

    Attributes:
        block_m: tokens in a tile.
        block_n: columns of the product in a tile (a gated unit yields half as many outputs).
        block_k: input features in a step of the loop.
        num_warps: warps in a block.
        num_stages: depth of the software pipeline over the loop's steps.
        group_m: row blocks that are numbered together, to share them in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class LinearTiles:
    """The tiles of an architecture, from large to small.

    Attributes:
        half: for fp16 and bf16.
        fp32: for fp32, which is multiplied in full precision.
    """

    half: tuple[LinearConfig, ...]
    fp32: tuple[LinearConfig, ...]


_FP32 = (
    LinearConfig(block_m=128, block_n=128, block_k=16, num_warps=8, num_stages=3),
    LinearConfig(block_m=64, block_n=64, block_k=16, num_warps=4, num_stages=3),
)
_INTERPRETER = (
    LinearConfig(block_m=32, block_n=32, block_k=32, num_warps=1, num_stages=1, group_m=2),
)

# fp16 and bf16: 128 x 256 fp32 accumulators are the most that 8 warps hold; the pipeline is as deep
# as shared memory allows.
TILES: dict[str, LinearTiles] = {
    # Without matrix instructions, operands and accumulators share the registers of a thread.
    "sm_75": LinearTiles(
        half=(LinearConfig(block_m=64, block_n=32, block_k=16, num_warps=4, num_stages=1),),
        fp32=(LinearConfig(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),),
    ),
    "sm_80": LinearTiles(
        half=(
            LinearConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4),
            LinearConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
        ),
        fp32=_FP32,
    ),
    "sm_86": LinearTiles(
        half=(
            LinearConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4),
            LinearConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
        ),
        fp32=_FP32,
    ),
    "sm_90": LinearTiles(
        half=(
            LinearConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4),
            LinearConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4),
        ),
        fp32=_FP32,
    ),
    # Accumulators of tcgen05 lie in memory of their own: more warps only share the epilogue.
    "sm_100": LinearTiles(
        half=(
            LinearConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4),
            LinearConfig(block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=4),
        ),
        fp32=_FP32,
    ),
    "gfx942": LinearTiles(
        half=(
            LinearConfig(block_m=256, block_n=128, block_k=64, num_warps=8, num_stages=2),
            LinearConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=2),
        ),
        fp32=(
            LinearConfig(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=2),
            LinearConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=2),
        ),
    ),
    "interpreter": LinearTiles(half=_INTERPRETER, fp32=_INTERPRETER),
}
"""By architecture; one that has no row takes that of the nearest."""


def linear_candidates(dtype: torch.dtype, arch: str) -> tuple[LinearConfig, ...]:
    """All configurations that `linear_config` chooses from, the largest tile first.

    Args:
        dtype: of the inputs: float16, bfloat16 or float32.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.

    Raises:
        ValueError: unknown `arch`.
    """
    tiles = tiles_for(TILES, arch)
    return tiles.fp32 if dtype == torch.float32 else tiles.half


def linear_config(
    num_tokens: int, product_columns: int, dtype: torch.dtype, arch: str
) -> LinearConfig:
    """The largest tile of which the product has enough to give each multiprocessor one.

    Args:
        num_tokens: rows of the product.
        product_columns: columns of the product: rows of the weight.
        dtype: of the inputs.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.

    Raises:
        ValueError: unknown `arch`.
    """
    candidates = linear_candidates(dtype, arch)
    wanted = multiprocessors(arch)
    for config in candidates:
        blocks_m = -(-num_tokens // config.block_m)
        blocks_n = -(-product_columns // config.block_n)
        if blocks_m * blocks_n >= wanted:
            return config
    return candidates[-1]


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
        arch: as of `linear_config`.
    """
    if arch == "interpreter":
        return EpilogueBackwardConfig(rows=16, block_columns=32, num_warps=1, programs=2)
    block = min(max(1 << (columns - 1).bit_length(), 64), 256)
    # 16 elements of a tensor a thread, in loads of 16 bytes; eight blocks a multiprocessor.
    rows = 128 * 16 // block
    blocks = 8 * multiprocessors(arch)
    return EpilogueBackwardConfig(
        rows, block, 128 // warp_size(arch), max(1, blocks // -(-columns // block))
    )
