"""Tiles of the linear kernels, by architecture and arithmetic.

Each entry of the table lists tiles from large to small. A large tile moves the least data for a
product; the small one is for batches whose large tiles would leave multiprocessors without work.
That choice is the only thing here that looks at the number of tokens, so a layer is compiled at
most once for each tile of its entry, whatever lengths come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..architectures import listed_architecture, multiprocessors, warp_size

PRECISIONS = ("ieee", "tf32x3")
"""How fp32 is multiplied: by fp32 multiply-adds, or as three tf32 products on tensor cores."""


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


# fp16 and bf16. 128 x 256 fp32 accumulators are the most that 8 warps hold; the pipeline is as deep
# as shared memory allows (227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, sm_89, sm_120).
_HALF_LARGE = (LinearConfig(128, 256, 64, 8, 4), LinearConfig(64, 64, 64, 4, 4))
# Accumulators of tcgen05 lie in memory of their own: more warps only share the epilogue.
_HALF_TCGEN05 = (LinearConfig(128, 256, 64, 8, 4), LinearConfig(64, 64, 64, 8, 4))
_HALF_SMALL = (LinearConfig(128, 128, 64, 8, 4), LinearConfig(64, 64, 64, 4, 3))
_HALF_AMD = (LinearConfig(256, 128, 64, 8, 2), LinearConfig(64, 64, 64, 4, 2))
# Without matrix instructions, operands and accumulators share the registers of a thread.
_NO_MATRIX_UNIT = (LinearConfig(64, 32, 16, 4, 1),)
_IEEE = (LinearConfig(128, 128, 16, 8, 3), LinearConfig(64, 64, 16, 4, 3))
_IEEE_AMD = (LinearConfig(128, 128, 32, 8, 2), LinearConfig(64, 64, 32, 4, 2))
# Each operand is held twice, as its tf32 value and as what that value leaves.
_TF32X3 = (LinearConfig(64, 128, 32, 8, 3), LinearConfig(64, 64, 32, 4, 3))
# With 4 warps the small tile spills two registers on sm_89.
_TF32X3_ADA = (LinearConfig(64, 128, 32, 8, 3), LinearConfig(64, 64, 32, 8, 3))
_TF32X3_WGMMA = (LinearConfig(128, 128, 32, 8, 3), LinearConfig(64, 64, 32, 4, 3))
_INTERPRETER = (LinearConfig(32, 32, 32, 1, 1, group_m=2),)

TILES: dict[tuple[str, str], tuple[LinearConfig, ...]] = {
    ("sm_75", "half"): _NO_MATRIX_UNIT,
    ("sm_75", "ieee"): (LinearConfig(64, 64, 16, 8, 2),),
    ("sm_80", "half"): _HALF_LARGE,
    ("sm_80", "ieee"): _IEEE,
    ("sm_80", "tf32x3"): _TF32X3,
    ("sm_86", "half"): _HALF_SMALL,
    ("sm_86", "ieee"): _IEEE,
    ("sm_86", "tf32x3"): _TF32X3,
    ("sm_89", "half"): _HALF_SMALL,
    ("sm_89", "ieee"): _IEEE,
    ("sm_89", "tf32x3"): _TF32X3_ADA,
    ("sm_90", "half"): _HALF_LARGE,
    ("sm_90", "ieee"): _IEEE,
    ("sm_90", "tf32x3"): _TF32X3_WGMMA,
    ("sm_100", "half"): _HALF_TCGEN05,
    ("sm_100", "ieee"): _IEEE,
    ("sm_100", "tf32x3"): _TF32X3,
    ("sm_120", "half"): _HALF_SMALL,
    ("sm_120", "ieee"): _IEEE,
    ("sm_120", "tf32x3"): _TF32X3,
    ("gfx942", "half"): _HALF_AMD,
    ("gfx942", "ieee"): _IEEE_AMD,
    ("gfx950", "half"): _HALF_AMD,
    ("gfx950", "ieee"): _IEEE_AMD,
    ("interpreter", "half"): _INTERPRETER,
    ("interpreter", "ieee"): _INTERPRETER,
    ("interpreter", "tf32x3"): _INTERPRETER,
}
"""Tiles from large to small, by (architecture, "half" or the precision of fp32)."""


def linear_candidates(
    dtype: torch.dtype, arch: str, precision: str = "ieee"
) -> tuple[LinearConfig, ...]:
    """All configurations that `linear_config` chooses from, the largest tile first.

    Args:
        dtype: of the inputs: float16, bfloat16 or float32.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
        precision: `"ieee"` or `"tf32x3"`, for float32; without effect on the others.

    Raises:
        ValueError: unknown `arch`, or a `precision` that it does not have.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {PRECISIONS}")
    arch = listed_architecture(arch)
    arithmetic = precision if dtype == torch.float32 else "half"
    if (arch, arithmetic) not in TILES:
        raise ValueError(f'precision is "{precision}", which {arch} does not have; use "ieee"')
    return TILES[arch, arithmetic]


def linear_config(
    num_tokens: int,
    product_columns: int,
    dtype: torch.dtype,
    arch: str,
    precision: str = "ieee",
) -> LinearConfig:
    """The largest tile of which the product has enough to give each multiprocessor one.

    Args:
        num_tokens: rows of the product.
        product_columns: columns of the product: rows of the weight.
        dtype: of the inputs.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
        precision: `"ieee"` or `"tf32x3"`, for float32; without effect on the others.

    Raises:
        ValueError: unknown `arch`, or a `precision` that it does not have.
    """
    candidates = linear_candidates(dtype, arch, precision)
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
        arch: as of `architectures.architecture`.
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
