"""Tiles of the linear layers by architecture, and how the gradient of their epilogue is launched.

A large tile moves the least data for a product; a small one is for batches whose large tiles would
leave multiprocessors without work. Which is best is predicted. A multiprocessor runs its programs
in rounds of as many as are resident at once, which share its matrix units and its way to L2; what
lies in front of and behind the loop over K counts as if nothing overlapped it:

    round(r) = steps * max(r * step, latency / steps in flight) + outside
    step     = max(multiply-adds / rate, bytes of both operands / bytes from L2)   a clock
    outside  = instructions of all warps / 4 schedulers + latency of the first loads

A product takes as long as the multiprocessor that has the most programs. It is a model: rates are
the vendors', the way to L2 is of public measurements, and device memory, for which all tiles wait
alike, is left out. Tests hold its instructions and resident programs against the machine code.

That choice is the only thing here that looks at the number of tokens, so a layer is compiled at
most once for each tile, whatever lengths come.

K is not split over programs. Partial sums that are added up in a fixed order need a second launch,
or counters that someone has cleared, and only products of a few hundred tokens, which wait for the
host, would gain.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from csrc_triton.architectures import (
    ARCHITECTURES,
    INTERPRETER,
    listed_architecture,
    multiprocessors,
    tiles_for,
    warp_size,
)


@dataclass(frozen=True)
class LinearConfig:
    """Launch configuration of a linear kernel.

    Attributes:
        block_m: tokens in a tile.
        block_n: columns of the product in a tile (a gated unit yields half as many outputs).
        block_k: input features in a step of the loop.
        num_warps: warps in a block.
        num_stages: depth of the software pipeline over the loop's steps.
        blocks: programs that a multiprocessor holds at once, by registers and shared memory.
        group_m: row blocks that are numbered together, to share them in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks: int = 1
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


def _tile(
    block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, blocks: int = 1
) -> LinearConfig:
    return LinearConfig(block_m, block_n, block_k, num_warps, num_stages, blocks)


_FP32 = (_tile(128, 128, 16, 8, 3), _tile(64, 64, 16, 4, 3, blocks=4))
_INTERPRETER = (LinearConfig(32, 32, 32, num_warps=1, num_stages=1, group_m=2),)

# fp16 and bf16: 128 x 256 fp32 accumulators are the most that 8 warps hold; the pipeline of the
# largest tile is as deep as shared memory allows, and the others leave it to more blocks.
TILES: dict[str, LinearTiles] = {
    # Without matrix instructions, operands and accumulators share the registers of a thread.
    "sm_75": LinearTiles(half=(_tile(64, 32, 16, 4, 1),), fp32=(_tile(64, 64, 16, 8, 2),)),
    "sm_80": LinearTiles(
        half=(
            _tile(128, 256, 64, 8, 4),
            _tile(128, 128, 64, 4, 3, blocks=2),
            _tile(64, 128, 64, 4, 3, blocks=3),
            _tile(64, 64, 64, 4, 4, blocks=3),
        ),
        fp32=_FP32,
    ),
    "sm_86": LinearTiles(
        half=(
            _tile(128, 128, 64, 8, 4),
            _tile(64, 128, 64, 4, 3, blocks=2),
            _tile(64, 64, 64, 4, 3, blocks=3),
        ),
        fp32=_FP32,
    ),
    "sm_90": LinearTiles(
        half=(
            _tile(128, 256, 64, 8, 4),
            _tile(128, 128, 64, 8, 3, blocks=2),
            _tile(64, 128, 64, 4, 3, blocks=3),
            _tile(64, 64, 64, 4, 4, blocks=3),
        ),
        fp32=_FP32,
    ),
    # Accumulators of tcgen05 lie in memory of their own: more warps only share the epilogue.
    "sm_100": LinearTiles(
        half=(
            _tile(128, 256, 64, 8, 4),
            _tile(128, 128, 64, 8, 3, blocks=2),
            _tile(64, 64, 64, 8, 4, blocks=3),
        ),
        fp32=_FP32,
    ),
    "gfx942": LinearTiles(
        half=(_tile(256, 128, 64, 8, 2), _tile(64, 64, 64, 4, 2, blocks=3)),
        fp32=(_tile(128, 128, 32, 8, 2), _tile(64, 64, 32, 4, 2, blocks=3)),
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


LATENCY = 900
"""Clocks from asking for a step's operands to having them."""
_SCHEDULERS = 4


def instructions_outside(config: LinearConfig, arch: str) -> int:
    """Instructions of a warp in front of and behind the loop over K.

    They are those of bias and SiLU in 16 bits; other epilogues have fewer.
    """
    outputs = config.block_m * config.block_n // (warp_size(arch) * config.num_warps)
    return 400 + 8 * outputs  # of a thread


def instructions_of_multiply_add(config: LinearConfig, arch: str) -> float:
    """Instructions of the loop over K, where there are no matrix units, by its multiply-adds."""
    outputs = config.block_m * config.block_n // (warp_size(arch) * config.num_warps)
    return 1 + 0.92 / math.sqrt(outputs)  # of a thread, whose operands are as many as its sides


def predicted_clocks(
    config: LinearConfig,
    num_tokens: int,
    product_columns: int,
    in_features: int,
    dtype: torch.dtype,
    arch: str,
    num_multiprocessors: int,
) -> float:
    """Clocks until a product is done with a tile, as this file predicts them.

    Args:
        config: the tile.
        num_tokens: rows of the product.
        product_columns: columns of the product: rows of the weight.
        in_features: columns of the inputs, K.
        dtype: of the inputs.
        arch: such as `"sm_90"` or `"gfx942"`; the interpreter has no clock.
        num_multiprocessors: of the device.

    Raises:
        ValueError: unknown `arch`.
    """
    limits = ARCHITECTURES[listed_architecture(arch)]
    tiles = -(-num_tokens // config.block_m) * -(-product_columns // config.block_n)
    programs = -(-tiles // num_multiprocessors)
    in_matrix_units = str(dtype).removeprefix("torch.") in limits.matrix_types
    if in_matrix_units and dtype.itemsize == 2:
        rate = float(limits.matrix_rate)
    else:
        rate = limits.vector_rate / instructions_of_multiply_add(config, arch)
    step = max(
        config.block_m * config.block_n * config.block_k / rate,
        (config.block_m + config.block_n) * config.block_k * dtype.itemsize / limits.l2_rate,
    )
    steps = -(-in_features // config.block_k)
    alone = LATENCY / max(config.num_stages - 1, 1)
    issued = instructions_outside(config, arch) * config.num_warps / _SCHEDULERS

    def clocks_of_round(resident: int) -> float:
        return steps * max(resident * step, alone) + issued + LATENCY

    rounds, left = divmod(programs, config.blocks)
    return rounds * clocks_of_round(config.blocks) + (clocks_of_round(left) if left else 0.0)


@functools.lru_cache(maxsize=4096)
def linear_config(
    num_tokens: int,
    product_columns: int,
    in_features: int,
    dtype: torch.dtype,
    arch: str,
    num_multiprocessors: int | None = None,
) -> LinearConfig:
    """The tile of which the product is predicted to be done first, of equals the largest.

    Args:
        num_tokens: rows of the product.
        product_columns: columns of the product: rows of the weight.
        in_features: columns of the inputs.
        dtype: of the inputs.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
        num_multiprocessors: of the device; `None` for those of the architecture's usual one.

    Raises:
        ValueError: unknown `arch`.
    """
    candidates = linear_candidates(dtype, arch)
    if arch == INTERPRETER:
        return candidates[0]
    count = num_multiprocessors or multiprocessors(arch)
    size = (num_tokens, product_columns, in_features, dtype, arch, count)
    return min(candidates, key=lambda config: predicted_clocks(config, *size))


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
