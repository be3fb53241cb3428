"""Launch configurations of the filterbank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csrc_triton.architectures import warp_size

MAX_MEL_BINS = 256
"""Most mel bins of a program."""


@dataclass(frozen=True)
class FbankConfig:
    """How the filterbank kernel is launched.

    Attributes:
        frames: frames of one program.
        block_k: samples of a folded frame that a step of the transform's loop takes.
        block_n: pairs of DFT bins that are accumulated together; divides 128.
        num_warps: warps in a block.
    """

    frames: int
    block_k: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class NormalizeConfig:
    """How the kernels that normalise utterances are launched.

    Attributes:
        frames: frames of one program.
        tile_frames: frames that it reads at once; divides `frames`.
        num_warps: warps in a block.
    """

    frames: int
    tile_frames: int
    num_warps: int


# Dtype of the transform -> frames, block_k, block_n, threads. A thread holds 4 accumulators of
# frames x block_n / threads elements (32 registers in float64, 16 in float32), and the product with
# the mel triangles, which unrolls over block_n, takes most of the rest: wider blocks spill.
_TILES = {
    torch.float64: (16, 16, 32, 128),
    torch.float32: (32, 16, 32, 256),
}


def fbank_config(dtype: torch.dtype, arch: str) -> FbankConfig:
    """The launch configuration of the filterbank.

    Args:
        dtype: of the transform, float64 or float32.
        arch: as of `architectures.architecture`.
    """
    if arch == "interpreter":
        return FbankConfig(frames=64, block_k=64, block_n=64, num_warps=1)
    frames, block_k, block_n, threads = _TILES[dtype]
    return FbankConfig(frames, block_k, block_n, num_warps=threads // warp_size(arch))


def normalize_config(arch: str) -> NormalizeConfig:
    """The launch configuration of the normalisation.

    Args:
        arch: as of `architectures.architecture`.
    """
    if arch == "interpreter":
        return NormalizeConfig(frames=32, tile_frames=16, num_warps=1)
    return NormalizeConfig(frames=256, tile_frames=16, num_warps=128 // warp_size(arch))
