"""Launch configurations of the convolution and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csrc_triton.architectures import multiprocessors, warp_size
from csrc_triton.norm.config import NormBackwardConfig, norm_backward_config

MIN_KERNEL_SIZE = 3
MAX_KERNEL_SIZE = 63
MAX_CHANNELS = 2048


@dataclass(frozen=True)
class ConvConfig:
    """How the convolution kernel is launched.

    Attributes:
        rows: output rows of one program, which are also the input rows in its window; a power of
            two of at least 2.
        block_channels: the channels, rounded up to a power of two.
        unroll: taps in the body of the loop over taps.
        num_warps: warps in a block.
    """

    rows: int
    block_channels: int
    unroll: int
    num_warps: int


# Most channels of a block -> most rows and threads of a program. A thread's window and accumulators
# take 2 x rows x (block_channels / threads) registers: 64 of the 128 that a thread of a 512-thread
# block may have. Fewer rows leave room for more channels a thread, in wider loads.
_ROWS_AND_THREADS = {64: (16, 32), 128: (16, 64), 256: (16, 128), 512: (16, 256), 1024: (16, 512)}
_WIDEST = (8, 512)
_FEWEST_ROWS = 2
# A window that has moved on as many times as it has rows is where it was: copies are few. K = 31
# takes one tap and two turns; all 31 in a row would take the compiler a minute.
_UNROLL = 15


def conv_candidates(
    channels: int, kernel_size: int, dtype: torch.dtype, arch: str
) -> tuple[ConvConfig, ...]:
    """All configurations that `conv_config` chooses from, that of most rows first.

    Args:
        channels: number of channels, at most 2048.
        kernel_size: number of taps, 3 to 63.
        dtype: of the activations.
        arch: as of `architectures.architecture`.

    Raises:
        ValueError: there are too many channels, or too few or many taps.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"channels is {channels}; it must be 1 to {MAX_CHANNELS}")
    if not MIN_KERNEL_SIZE <= kernel_size <= MAX_KERNEL_SIZE:
        raise ValueError(
            f"kernel_size is {kernel_size}; it must be {MIN_KERNEL_SIZE} to {MAX_KERNEL_SIZE}"
        )
    block_channels = max(16, 1 << (channels - 1).bit_length())
    if arch == "interpreter":
        return (ConvConfig(16, block_channels, unroll=5, num_warps=1),)
    bounds = [bound for bound in _ROWS_AND_THREADS if block_channels <= bound]
    most, threads = _ROWS_AND_THREADS[bounds[0]] if bounds else _WIDEST
    candidates = []
    rows = most
    while rows >= _FEWEST_ROWS:
        num_warps = max(1, threads // (1 if rows == most else 2) // warp_size(arch))
        candidates.append(ConvConfig(rows, block_channels, _UNROLL, num_warps))
        rows //= 2
    return tuple(candidates)


def conv_config(
    num_tokens: int,
    channels: int,
    kernel_size: int,
    dtype: torch.dtype,
    arch: str,
    num_multiprocessors: int | None = None,
) -> ConvConfig:
    """The most rows a program of which the batch has enough to give each multiprocessor one.

    Args:
        num_tokens: of the batch.
        channels: and so the others that are not named here, as of `conv_candidates`.
        num_multiprocessors: of the device; `None` for those of the architecture's usual one.

    Raises:
        ValueError: as `conv_candidates`.
    """
    candidates = conv_candidates(channels, kernel_size, dtype, arch)
    wanted = num_multiprocessors or multiprocessors(arch)
    enough = [config for config in candidates if num_tokens // config.rows >= wanted]
    return enough[0] if enough else candidates[-1]


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
    """

    norm: NormBackwardConfig
    rows: int
    unroll: int
    block_channels: int
    num_warps: int
    chunk: int
    taps: int


def conv_backward_config(
    channels: int, kernel_size: int, dtype: torch.dtype, arch: str
) -> ConvBackwardConfig:
    """The launch configuration for `channels` channels and `kernel_size` taps.

    Args:
        channels: number of channels, at most 2048.
        kernel_size: number of taps, 3 to 63.
        dtype: of the activations.
        arch: as of `architectures.architecture`.

    Raises:
        ValueError: there are too many channels, or too few or many taps.
    """
    forward = conv_candidates(channels, kernel_size, dtype, arch)[0]
    norm = norm_backward_config(channels, dtype, arch)
    if arch == "interpreter":
        block = min(forward.block_channels, 32)
        return ConvBackwardConfig(norm, 16, 5, block, num_warps=1, chunk=32, taps=8)
    # Two channels a thread: 16-bit loads of 4 bytes, and window and sums fit 128 registers.
    block = min(max(forward.block_channels, 2 * warp_size(arch)), 128)
    num_warps = block // 2 // warp_size(arch)
    return ConvBackwardConfig(norm, 16, _UNROLL, block, num_warps, chunk=256, taps=8)
