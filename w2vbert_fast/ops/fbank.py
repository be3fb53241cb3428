"""Log-mel filterbank features over a packed batch of waveforms (Kaldi's recipe).

Samples are scaled to the 16-bit range and cut into frames of 400 samples every 160 (25 ms and
10 ms at 16 kHz), without centring, so the tail that fills no frame is dropped. Per frame: remove
the mean, pre-emphasise by 0.97, apply the povey window (a symmetric Hann window to the power
0.85), take the 512-point DFT and its power, sum it under triangles that are equally spaced on the
mel scale between 20 Hz and half the sampling rate, and take the natural logarithm of at least
2^-23. Source: Povey et al. 2011 (Kaldi), as `SeamlessM4TFeatureExtractor` of transformers
parametrises it.

A batch is ragged: `waveforms` holds the samples of all utterances end to end and `cu_seqlens`
(int32 ``[batch + 1]``) where each begins and ends. No frame crosses from one utterance to the next.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vbert_fast.ops.dispatch import takes_fast_path
from w2vbert_fast.ops.operation import operation

FRAME_LENGTH = 400
"""Samples in a frame."""
FRAME_SHIFT = 160
"""Samples from the start of a frame to the start of the next."""
FFT_LENGTH = 512
"""Points of the DFT; frames are zero-padded to it."""
PREEMPHASIS = 0.97
"""How much of the sample before it is subtracted from each sample of a frame."""
MEL_FLOOR = 2.0**-23
"""The least energy of a mel bin, before the logarithm."""
VARIANCE_FLOOR = 1e-7
"""What normalisation adds to a feature's variance over an utterance."""

SAMPLE_SCALE = 2.0**15
"""From samples with a full scale of 1.0 to the 16-bit range."""
_LOWEST_FREQUENCY = 20.0

# A block's frames and their spectra stay in a core's L2 cache on a CPU; elsewhere the block only
# bounds the memory for the spectra (12 KB a frame).
_FRAMES_PER_BLOCK_CPU = 256
_FRAMES_PER_BLOCK = 8192
_FILTERS_PER_GROUP = 16

MAX_TRITON_FEATURES = 256
"""The Triton kernels have at most so many features in a frame; more run in plain PyTorch."""


def num_frames(num_samples: int) -> int:
    """Number of whole frames in an utterance of `num_samples` samples (0 below 400)."""
    return 0 if num_samples < FRAME_LENGTH else 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT


def _to_mel(hertz: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(1127.0 * np.log1p(hertz / 700.0), dtype=np.float64)


@functools.lru_cache(maxsize=8)
def mel_filters(num_mel_bins: int, sampling_rate: int) -> NDArray[np.float64]:
    """Triangular mel filters.

    Args:
        num_mel_bins: Number of triangles.
        sampling_rate: Samples per second; the triangles span 20 Hz to half of it.

    Returns:
        float64 array ``[257, num_mel_bins]``: the weight of each DFT bin in each mel bin. The array
        is shared between callers and must not be written to.
    """

    hertz = np.arange(FFT_LENGTH // 2 + 1) * (sampling_rate / FFT_LENGTH)
    bins = _to_mel(hertz)[:, None]
    lowest, highest = _to_mel(np.array([_LOWEST_FREQUENCY, sampling_rate // 2]))
    corners = np.linspace(lowest, highest, num_mel_bins + 2)
    width = np.diff(corners)
    rising = (bins - corners[:-2]) / width[:-1]
    falling = (corners[2:] - bins) / width[1:]
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return filters


@functools.lru_cache(maxsize=8)
def _filter_groups(
    num_mel_bins: int, sampling_rate: int
) -> tuple[tuple[int, int, NDArray[np.float64]], ...]:
    """The filters in groups of neighbours: first DFT bin, end, and ``[end - first, group]``.

    A group leaves out the DFT bins where all its triangles are zero, so that the groups hold about
    a quarter of the whole matrix.
    """
    filters = mel_filters(num_mel_bins, sampling_rate)
    groups: list[tuple[int, int, NDArray[np.float64]]] = []
    for start in range(0, num_mel_bins, _FILTERS_PER_GROUP):
        group = filters[:, start : start + _FILTERS_PER_GROUP]
        used = np.flatnonzero(group.any(axis=1))
        first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        groups.append((first, end, np.ascontiguousarray(group[first:end])))
    return tuple(groups)


@functools.lru_cache(maxsize=1)
def scaled_window() -> NDArray[np.float64]:
    """Povey window times 2^15, the sample scale.

    Returns:
        float64 array ``[400]``; its first and last weights are zero. The array is shared between
        callers and must not be written to.
    """
    phase = 2.0 * np.pi * np.arange(FRAME_LENGTH) / (FRAME_LENGTH - 1)
    window = (0.5 - 0.5 * np.cos(phase)).clip(min=0.0) ** 0.85
    window[0] = window[-1] = 0.0
    scaled: NDArray[np.float64] = window * SAMPLE_SCALE
    return scaled


def log_mel_filterbank(
    waveforms: Tensor,
    cu_seqlens: Tensor,
    *,
    num_mel_bins: int = 80,
    sampling_rate: int = 16000,
    compute_dtype: torch.dtype = torch.float64,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-mel energies of every frame of a packed batch of waveforms.

    The DFT runs in float64 by default: a float32 one leaves rounding noise 140 dB below the loudest
    bin of a frame, which is where the empty bands of resampled or lossily coded speech and the
    leftovers of digital silence lie, so their logarithms would be noise. Nor do the settings that
    let float32 products run in TF32 or bfloat16 touch a float64 one.

    Args:
        waveforms: float32 ``[num_samples]``, the samples of all utterances end to end, full scale
            being 1.0; any device.
        cu_seqlens: int32 or int64 ``[batch + 1]``, offsets of the utterances in `waveforms`.
        num_mel_bins: Number of mel bins.
        sampling_rate: Samples per second. Frames keep their length in samples.
        compute_dtype: Precision up to the spectrum, float64 or float32 (for devices without
            float64).
        fast: Use the device's fast implementation, `torch.ops.w2vbert.log_mel_filterbank`, which
            computes in float64.

    Returns:
        float32 ``[num_frames, num_mel_bins]`` on the device of `waveforms`, and the frame offsets,
        int32 ``[batch + 1]`` on the device of `cu_seqlens`. An utterance of fewer than 400 samples
        has no frames.

    Raises:
        ValueError: An argument has the wrong shape or dtype.
    """
    if waveforms.dim() != 1 or waveforms.dtype != torch.float32:
        raise ValueError(
            "waveforms must be float32 of shape [num_samples], got "
            f"{waveforms.dtype} of shape {list(waveforms.shape)}"
        )
    _check_cu_seqlens(cu_seqlens)
    if compute_dtype not in (torch.float64, torch.float32):
        raise ValueError(f"compute_dtype must be float64 or float32, got {compute_dtype}")
    if takes_fast_path(fast, waveforms) and compute_dtype == torch.float64:
        return _log_mel_filterbank_op(waveforms, cu_seqlens, num_mel_bins, sampling_rate)

    device = waveforms.device
    offsets = cu_seqlens.to(device=device, dtype=torch.int64)
    lengths = offsets.diff()
    counts = torch.where(
        lengths < FRAME_LENGTH,
        0,
        torch.div(lengths - FRAME_LENGTH, FRAME_SHIFT, rounding_mode="floor") + 1,
    )
    frame_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    total = int(frame_offsets[-1])
    features = torch.empty(total, num_mel_bins, dtype=torch.float32, device=device)
    if total > 0:
        first_sample = offsets[:-1] - frame_offsets[:-1] * FRAME_SHIFT
        starts = first_sample.repeat_interleave(counts, output_size=total)
        starts += torch.arange(total, device=device) * FRAME_SHIFT
        _write_log_mel(waveforms, starts, features, sampling_rate, compute_dtype)
    return features, frame_offsets.to(device=cu_seqlens.device, dtype=torch.int32)


def _write_log_mel(
    waveforms: Tensor,
    starts: Tensor,
    features: Tensor,
    sampling_rate: int,
    compute_dtype: torch.dtype,
) -> None:
    """Fills `features` ``[num_frames, num_mel_bins]`` for the frames that begin at `starts`."""
    device = waveforms.device
    window = torch.from_numpy(scaled_window()).to(device=device, dtype=compute_dtype)
    groups = [
        (first, end, torch.from_numpy(weights).to(device=device, dtype=compute_dtype))
        for first, end, weights in _filter_groups(features.shape[1], sampling_rate)
    ]

    total = starts.numel()
    size = min(total, _FRAMES_PER_BLOCK_CPU if device.type == "cpu" else _FRAMES_PER_BLOCK)
    candidates = waveforms.unfold(0, FRAME_LENGTH, 1)  # a view: every possible frame
    buffer = torch.zeros(size, FFT_LENGTH, dtype=compute_dtype, device=device)
    for begin in range(0, total, size):
        end = min(begin + size, total)
        samples = candidates.index_select(0, starts[begin:end]).to(compute_dtype)
        block = buffer[: end - begin]  # [frames, 512], columns 400 and on stay zero
        frames = block[:, :FRAME_LENGTH]
        # Pre-emphasis is linear and the window is zero at a frame's first sample, so removing the
        # mean first is the same as subtracting 0.03 of the mean afterwards.
        torch.sub(samples[:, 1:], samples[:, :-1], alpha=PREEMPHASIS, out=frames[:, 1:])
        frames -= samples.mean(dim=1, keepdim=True) * (1.0 - PREEMPHASIS)
        frames *= window
        spectrum = torch.fft.rfft(block)  # [frames, 257]
        power = torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag)
        mel = [power[:, first:last] @ weights for first, last, weights in groups]
        features[begin:end].copy_(torch.cat(mel, dim=1)).clamp_(min=MEL_FLOOR).log_()


def normalize_utterances(features: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Zero mean and unit variance over time, per utterance and feature.

    ``(x - mean) / sqrt(var + 1e-7)`` with the unbiased variance (divisor n - 1).

    Args:
        features: Floating point ``[num_frames, num_features]``, the frames of all utterances end to
            end.
        cu_seqlens: int32 or int64 ``[batch + 1]``, offsets of the utterances in `features`.

    Returns:
        Same shape, dtype and device as `features`. An utterance of one frame, which has no
        variance, becomes zeros.

    Raises:
        ValueError: An argument has the wrong shape or dtype.
    """
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            "features must be floating point of shape [num_frames, num_features], got "
            f"{features.dtype} of shape {list(features.shape)}"
        )
    _check_cu_seqlens(cu_seqlens)
    normalized = torch.empty_like(features)
    offsets = cu_seqlens.tolist()
    # Where a bin hardly varies, as in silence, its deviations are of the size of float32 rounding.
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    for begin, end in itertools.pairwise(offsets):
        if end == begin:
            continue
        centered = features[begin:end].to(wide, copy=True)
        centered -= centered.mean(dim=0)
        variance = torch.linalg.vector_norm(centered, dim=0).square() / max(end - begin - 1, 1)
        centered /= (variance + VARIANCE_FLOOR).sqrt()
        normalized[begin:end] = centered
    return normalized


def _check_cu_seqlens(cu_seqlens: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be an integer tensor of shape [batch + 1], got "
            f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )


def normalize_and_stack(
    features: Tensor, cu_seqlens: Tensor, stride: int = 2, *, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """`normalize_utterances`, then `stride` successive frames of an utterance side by side.

    Args:
        features: float32 ``[num_frames, num_features]``, packed.
        cu_seqlens: int32 or int64 ``[batch + 1]``, offsets of the utterances in `features`.
        stride: Frames in a stack. An utterance's last frames that fill no stack count for its mean
            and variance and are left out.
        fast: Use the device's fast implementation, `torch.ops.w2vbert.normalize_and_stack`.

    Returns:
        float32 ``[num_stacks, stride * num_features]``, and the offsets of the utterances in
        stacks, int32 ``[batch + 1]`` on the device of `cu_seqlens`.

    Raises:
        ValueError: An argument has the wrong shape or dtype, or `stride` is below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if takes_fast_path(fast, features):
        return _normalize_and_stack_op(features, cu_seqlens, stride)
    normalized = normalize_utterances(features, cu_seqlens)
    if stride == 1:
        return normalized, cu_seqlens.to(torch.int32, copy=True)
    lengths = cu_seqlens.diff()
    counts = torch.div(lengths, stride, rounding_mode="floor")
    rows = [
        utterance[: len(utterance) // stride * stride].reshape(-1, stride * features.shape[1])
        for utterance in torch.split(normalized, lengths.tolist())
    ]
    stacked = torch.cat(rows) if rows else features.new_empty(0, stride * features.shape[1])
    return stacked, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _dynamic_rows(like: Tensor, columns: int) -> Tensor:
    # How many rows there are depends on the lengths, which are data.
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), columns)


def _log_mel_fits(waveforms: Tensor, cu_seqlens: Tensor, num_mel_bins: int, _: int) -> bool:
    return num_mel_bins <= MAX_TRITON_FEATURES and waveforms.shape[0] < 2**31


def _log_mel_on_triton(
    waveforms: Tensor, cu_seqlens: Tensor, num_mel_bins: int, sampling_rate: int
) -> tuple[Tensor, Tensor]:
    from csrc_triton.fbank import log_mel_filterbank as kernel

    features, offsets = kernel(
        waveforms,
        cu_seqlens.to(torch.int32),
        num_mel_bins=num_mel_bins,
        sampling_rate=sampling_rate,
    )
    return features, offsets.to(cu_seqlens.device)


_log_mel_filterbank_op = operation(
    "log_mel_filterbank(Tensor waveforms, Tensor cu_seqlens, SymInt num_mel_bins, "
    "SymInt sampling_rate) -> (Tensor features, Tensor offsets)",
    lambda waveforms, cu_seqlens, num_mel_bins, sampling_rate: log_mel_filterbank(
        waveforms, cu_seqlens, num_mel_bins=num_mel_bins, sampling_rate=sampling_rate
    ),
    fake=lambda waveforms, cu_seqlens, num_mel_bins, _: (
        _dynamic_rows(waveforms, num_mel_bins),
        cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32),
    ),
    triton=_log_mel_on_triton,
    takes=_log_mel_fits,
)


def _stacks_fit(features: Tensor, *_: Any) -> bool:
    return features.dtype == torch.float32 and features.shape[1] <= MAX_TRITON_FEATURES


def _stacks_on_triton(features: Tensor, cu_seqlens: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    from csrc_triton.fbank import normalize_and_stack as kernel

    stacks, offsets = kernel(features, cu_seqlens.to(torch.int32), stride)
    return stacks, offsets.to(cu_seqlens.device)


_normalize_and_stack_op = operation(
    "normalize_and_stack(Tensor features, Tensor cu_seqlens, SymInt stride) "
    "-> (Tensor stacks, Tensor offsets)",
    normalize_and_stack,
    fake=lambda features, cu_seqlens, stride: (
        _dynamic_rows(features, stride * features.shape[1]),
        cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32),
    ),
    triton=_stacks_on_triton,
    takes=_stacks_fit,
)
