"""The constant factors of the filterbank, made in float64 once for each device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FRAME_LENGTH = 400
"""Samples in a frame."""
_FFT_LENGTH = 512
PAIRS = 128
"""Pairs of DFT bins k and 256 - k, k = 1 .. 128."""
FOLDED = 100
"""Even (and odd) distances from a frame's centre."""
FOLDED_PADDED = 128


@functools.lru_cache(maxsize=16)
def povey_window(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Povey window times the scale of 16-bit samples, `[400]`."""
    phase = torch.arange(FRAME_LENGTH, dtype=torch.float64) * (2.0 * math.pi / (FRAME_LENGTH - 1))
    window = (0.5 - 0.5 * phase.cos()).clamp(min=0.0).pow(0.85)
    window[0] = window[-1] = 0.0
    return (window * 2.0**15).to(device, dtype)


@functools.lru_cache(maxsize=16)
def dft_basis(device: torch.device, dtype: torch.dtype) -> Tensor:
    """cos of even and odd distances, then sin of both, `[4, FOLDED_PADDED, 128]`."""
    distance = torch.arange(2 * FOLDED)[:, None]
    bins = torch.arange(1, PAIRS + 1)[None, :]
    # Reduced as integers, the angle keeps its precision.
    angle = (distance * bins % _FFT_LENGTH).to(torch.float64) * (2.0 * math.pi / _FFT_LENGTH)
    cos, sin = angle.cos(), angle.sin()
    cos[0] *= 0.5  # the centre's sample is folded onto itself
    basis = torch.zeros(4, FOLDED_PADDED, PAIRS, dtype=torch.float64)
    for part, values in enumerate((cos[0::2], cos[1::2], sin[0::2], sin[1::2])):
        basis[part, :FOLDED] = values
    return basis.to(device, dtype)


@functools.lru_cache(maxsize=16)
def mel_filters(device: torch.device, num_mel_bins: int, sampling_rate: int) -> Tensor:
    """Mel triangles over the two bins of each pair, fp32 `[2, 128, BLOCK_M]`."""
    hertz = torch.arange(_FFT_LENGTH // 2 + 1, dtype=torch.float64) * (sampling_rate / _FFT_LENGTH)
    limits = torch.tensor([20.0, sampling_rate // 2], dtype=torch.float64)
    bins, ends = (1127.0 * torch.log1p(frequency / 700.0) for frequency in (hertz, limits))
    corners = torch.linspace(float(ends[0]), float(ends[1]), num_mel_bins + 2, dtype=torch.float64)
    width = corners.diff()
    rising = (bins[:, None] - corners[:-2]) / width[:-1]
    falling = (corners[2:] - bins[:, None]) / width[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0.0)  # [257, num_mel_bins]
    filters = torch.zeros(2, PAIRS, block_mel(num_mel_bins))
    filters[0, :, :num_mel_bins] = triangles[1 : PAIRS + 1]
    filters[1, : PAIRS - 1, :num_mel_bins] = triangles[PAIRS + 1 : -1].flip(0)
    return filters.to(device)


def block_mel(num_mel_bins: int) -> int:
    """Columns of the triangles' matrix: a power of two that a matrix product can take."""
    return max(16, 1 << (num_mel_bins - 1).bit_length())
