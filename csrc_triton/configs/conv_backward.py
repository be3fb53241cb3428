"""Launch configurations of `csrc_triton.conv_backward`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .conv import conv_config
from .norm import warp_size
from .norm_backward import NormBackwardConfig, norm_backward_config


@dataclass(frozen=True)
class ConvBackwardConfig:
    """How the gradients of the convolution are launched.

    Attributes:
        norm: of the kernel that goes back through norm and activation.
        rows: rows of a program that slides a window.
        unroll: taps in the body of its loop over taps.
        block_channels: channels of a program of all kernels but that of the norm.
        num_warps: warps in a block of those.
        chunk: successive rows over which a program sums up the weight's gradient, a multiple of
            `taps`.
        taps: taps whose gradients a program sums up.
        search: utterances that a program looks at together to find its own.
    """

    norm: NormBackwardConfig
    rows: int
    unroll: int
    block_channels: int
    num_warps: int
    chunk: int
    taps: int
    search: int


def conv_backward_config(
    channels: int, kernel_size: int, dtype: torch.dtype, arch: str
) -> ConvBackwardConfig:
    """The launch configuration for `channels` channels and `kernel_size` taps.

    Args:
        channels: number of channels, at most 2048.
        kernel_size: number of taps, 3 to 63.
        dtype: of the activations.
        arch: as of `runtime.architecture`.

    Raises:
        ValueError: there are too many channels, or too few or many taps.
    """
    forward = conv_config(channels, kernel_size, dtype, arch)
    norm = norm_backward_config(channels, dtype, arch)
    if arch == "interpreter":
        block = min(forward.block_channels, 32)
        return ConvBackwardConfig(norm, 16, 5, block, num_warps=1, chunk=32, taps=8, search=8)
    # Two channels a thread: 16-bit loads of 4 bytes, and window and sums fit 128 registers.
    block = min(max(forward.block_channels, 2 * warp_size(arch)), 128)
    num_warps = block // 2 // warp_size(arch)
    return ConvBackwardConfig(norm, 16, 5, block, num_warps, chunk=256, taps=8, search=128)
