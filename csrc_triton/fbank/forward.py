"""Log-mel filterbank features (Kaldi's recipe) of packed waveforms, and their normalisation.

Per frame of 400 samples x[n], one every 160: mean removal, pre-emphasis by 0.97, povey window w
(zero at both ends), 512-point DFT, power, mel triangles, natural logarithm:

    y[n]  = w[n] (x[n] - 0.97 x[n - 1] - 0.03 mean(x))                        n = 1 .. 399
    mel_b = log(max(sum_k f[k, b] |DFT(y)[k]|^2, 2^-23))

The transform is a product with a constant matrix, a quarter of the size that the DFT's has: the
power does not depend on where time begins, so count it from sample 200 and fold the frame there,
and fold the bins around 128.

    e[m] = y[200 + m] + y[200 - m]     o[m] = y[200 + m] - y[200 - m]     m = 0 .. 199, e[0] halved
    A[k] = sum_{m even} e[m] cos(2 pi m k / 512)     B[k] = the same over odd m
    C[k] = sum_{m even} o[m] sin(2 pi m k / 512)     D[k] = the same over odd m
    power[k] = (A + B)^2 + (C + D)^2     power[256 - k] = (A - B)^2 + (C - D)^2       k = 1 .. 128

Bins 0 and 256 have no weight in any triangle. The transform runs in float64 unless float32 is asked
for: a float32 one leaves rounding noise 140 dB below the loudest bin of a frame, which is where the
empty bands of resampled or lossily coded speech lie.

Per frame: 51 thousand multiply-adds in the transform, 20 thousand (fp32) in the triangles, and
160 x 4 + 80 x 4 = 960 bytes through memory.

Normalisation is per utterance and mel bin, `(x - mean) / sqrt(var + 1e-7)`, the divisor of var
being n - 1. Sums are float64 and relative to the utterance's first frame, so a bin that hardly
varies keeps its precision. Two launches: sums of blocks of frames, then the normalised frames.
Stacking `stride` frames is a reshape of frames written end to end. Per frame: 3 x 320 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.fbank.config import (
    MAX_MEL_BINS,
    FbankConfig,
    NormalizeConfig,
    fbank_config,
    normalize_config,
)
from csrc_triton.fbank.tables import (
    FOLDED,
    FOLDED_PADDED,
    FRAME_LENGTH,
    PAIRS,
    block_mel,
    dft_basis,
    mel_filters,
    povey_window,
)
from csrc_triton.functions import last_not_after, locate_block
from csrc_triton.launch import check_device, check_tensor, num_blocks


@triton.jit
def _load_samples(waveforms_ptr, starts, position, mask):
    """Samples `position` [BLOCK_K] of the frames that begin at `starts` [BLOCK_F]."""
    return tl.load(waveforms_ptr + starts[:, None] + position[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_samples", "num_frames", "num_sequences"])
def _log_mel_fwd_kernel(
    waveforms_ptr,  # fp32 [num_samples]
    cu_seqlens_ptr,  # int32 [num_sequences + 1], in samples
    frame_cu_seqlens_ptr,  # int32 [num_sequences + 1], in frames
    window_ptr,  # [400]
    basis_ptr,  # [4, FOLDED_PADDED, 128]: A, B, C, D
    filters_ptr,  # fp32 [2, 128, BLOCK_M]: triangles of bins 1 .. 128, and of bins 255 .. 128
    out_ptr,  # fp32 [num_frames, NUM_MEL_BINS]
    num_samples,
    num_frames,
    num_sequences,
    stride_out_row,
    NUM_MEL_BINS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FOLDED: tl.constexpr,
    FOLDED_PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    dtype: tl.constexpr = basis_ptr.dtype.element_ty
    frames = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    is_frame = frames < num_frames
    sequences = last_not_after(frames, frame_cu_seqlens_ptr, num_sequences, BLOCK=0)
    first_frames = tl.load(frame_cu_seqlens_ptr + sequences, mask=is_frame, other=0)
    starts = tl.load(cu_seqlens_ptr + sequences, mask=is_frame, other=0).to(tl.int64)
    starts += (frames - first_frames).to(tl.int64) * 160  # [BLOCK_F]
    # A count or offsets that do not fit the waveforms must not lead outside of them.
    is_frame = is_frame & (starts + 400 <= num_samples)

    total = tl.zeros([BLOCK_F], dtype=dtype)
    for n in range(0, 400, 32):
        position = n + tl.arange(0, 32)
        mask = is_frame[:, None] & (position < 400)[None, :]
        samples = _load_samples(waveforms_ptr, starts, position, mask)  # [BLOCK_F, 32]
        total += tl.sum(samples.to(dtype), 1)
    offset = (total * (0.03 / 400))[:, None]

    mel_bins = tl.arange(0, BLOCK_M)[None, :]
    mel = tl.zeros([BLOCK_F, BLOCK_M], dtype=tl.float32)
    for n in range(0, PAIRS, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        a = tl.zeros([BLOCK_F, BLOCK_N], dtype=dtype)
        b = tl.zeros([BLOCK_F, BLOCK_N], dtype=dtype)
        c = tl.zeros([BLOCK_F, BLOCK_N], dtype=dtype)
        d = tl.zeros([BLOCK_F, BLOCK_N], dtype=dtype)
        for k in range(0, FOLDED, BLOCK_K):
            rows = k + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            is_folded = rows < FOLDED
            mask = is_frame[:, None] & is_folded[None, :]
            ahead = 200 + 2 * rows
            behind = 200 - 2 * rows
            # Around distance 2 i from the centre: for pre-emphasis and for the odd distance.
            ahead0 = _load_samples(waveforms_ptr, starts, ahead - 1, mask).to(dtype)
            ahead1 = _load_samples(waveforms_ptr, starts, ahead, mask).to(dtype)
            ahead2 = _load_samples(waveforms_ptr, starts, ahead + 1, mask).to(dtype)
            behind0 = _load_samples(waveforms_ptr, starts, behind, mask).to(dtype)
            behind1 = _load_samples(waveforms_ptr, starts, behind - 1, mask).to(dtype)
            behind2 = _load_samples(waveforms_ptr, starts, behind - 2, mask).to(dtype)
            weight = tl.load(window_ptr + ahead, mask=is_folded, other=0.0)[None, :]
            front = (ahead1 - 0.97 * ahead0 - offset) * weight  # y[200 + m], [BLOCK_F, BLOCK_K]
            weight = tl.load(window_ptr + behind, mask=is_folded, other=0.0)[None, :]
            back = (behind0 - 0.97 * behind1 - offset) * weight  # y[200 - m]
            basis_ptrs = basis_ptr + rows[:, None] * PAIRS + columns[None, :]
            size: tl.constexpr = FOLDED_PADDED * PAIRS
            basis = tl.load(basis_ptrs)  # [BLOCK_K, BLOCK_N]
            a = tl.dot(front + back, basis, a, input_precision="ieee", out_dtype=dtype)
            basis = tl.load(basis_ptrs + 2 * size)
            c = tl.dot(front - back, basis, c, input_precision="ieee", out_dtype=dtype)
            weight = tl.load(window_ptr + ahead + 1, mask=is_folded, other=0.0)[None, :]
            front = (ahead2 - 0.97 * ahead1 - offset) * weight  # y[200 + m + 1]
            weight = tl.load(window_ptr + behind - 1, mask=is_folded, other=0.0)[None, :]
            back = (behind1 - 0.97 * behind2 - offset) * weight  # y[200 - m - 1]
            basis = tl.load(basis_ptrs + size)
            b = tl.dot(front + back, basis, b, input_precision="ieee", out_dtype=dtype)
            basis = tl.load(basis_ptrs + 3 * size)
            d = tl.dot(front - back, basis, d, input_precision="ieee", out_dtype=dtype)
        filters_ptrs = filters_ptr + columns[:, None] * BLOCK_M + mel_bins
        filters = tl.load(filters_ptrs)  # [BLOCK_N, BLOCK_M]
        power = ((a + b) * (a + b) + (c + d) * (c + d)).to(tl.float32)  # [BLOCK_F, BLOCK_N]
        mel = tl.dot(power, filters, mel, input_precision="ieee")
        filters = tl.load(filters_ptrs + PAIRS * BLOCK_M)
        power = ((a - b) * (a - b) + (c - d) * (c - d)).to(tl.float32)
        mel = tl.dot(power, filters, mel, input_precision="ieee")

    # A comparison and not a maximum: NaN must stay NaN.
    floor = 1.1920928955078125e-07
    mel = tl.log(tl.where(mel < floor, floor, mel))
    out_ptrs = out_ptr + frames.to(tl.int64)[:, None] * stride_out_row + mel_bins
    tl.store(out_ptrs, mel, mask=is_frame[:, None] & (mel_bins < NUM_MEL_BINS))


@triton.jit(do_not_specialize=["num_frames", "num_sequences"])
def _sum_blocks_kernel(
    features_ptr,  # fp32 [num_frames, NUM_FEATURES]
    cu_seqlens_ptr,  # int32 [num_sequences + 1]
    scratch_sums_ptr,  # fp64 [num_blocks, 2, NUM_FEATURES]: of the deviations and of their squares
    num_frames,
    num_sequences,
    stride_features_row,
    NUM_FEATURES: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    block = tl.program_id(0)
    _, start, end, first = locate_block(block, cu_seqlens_ptr, num_sequences, num_frames, FRAMES)
    if first >= end:
        return
    columns = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    is_column = columns < NUM_FEATURES
    base_ptr = features_ptr + start.to(tl.int64) * stride_features_row
    base = tl.load(base_ptr + columns, mask=is_column, other=0.0).to(tl.float64)
    total = tl.zeros([BLOCK_M], dtype=tl.float64)
    squares = tl.zeros([BLOCK_M], dtype=tl.float64)
    for tile in range(0, FRAMES, TILE):
        rows = first + tile + tl.arange(0, TILE)  # [TILE]
        mask = (rows < end)[:, None] & is_column[None, :]
        ptrs = features_ptr + rows.to(tl.int64)[:, None] * stride_features_row + columns[None, :]
        deviation = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64) - base[None, :]
        deviation = tl.where(mask, deviation, 0.0)  # [TILE, BLOCK_M]
        total += tl.sum(deviation, 0)
        squares += tl.sum(deviation * deviation, 0)
    scratch_sums_ptr += block.to(tl.int64) * (2 * NUM_FEATURES)
    tl.store(scratch_sums_ptr + columns, total, mask=is_column)
    tl.store(scratch_sums_ptr + NUM_FEATURES + columns, squares, mask=is_column)


@triton.jit(do_not_specialize=["num_frames", "num_sequences", "num_stacked"])
def _normalize_stack_kernel(
    features_ptr,  # fp32 [num_frames, NUM_FEATURES]
    cu_seqlens_ptr,  # int32 [num_sequences + 1]
    scratch_sums_ptr,  # fp64 [num_blocks, 2, NUM_FEATURES]
    out_cu_seqlens_ptr,  # int32 [num_sequences + 1], in stacked frames
    out_ptr,  # fp32 [num_stacked, STRIDE * NUM_FEATURES]
    num_frames,
    num_sequences,
    num_stacked,
    stride_features_row,
    stride_out_row,
    NUM_FEATURES: tl.constexpr,
    STRIDE: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sequence, start, end, first = locate_block(
        tl.program_id(0), cu_seqlens_ptr, num_sequences, num_frames, FRAMES
    )
    if first >= end:
        return
    columns = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    is_column = columns < NUM_FEATURES
    length = end - start
    total = tl.zeros([BLOCK_M], dtype=tl.float64)
    squares = tl.zeros([BLOCK_M], dtype=tl.float64)
    scratch_sums_ptr += (start // FRAMES + sequence).to(tl.int64) * (2 * NUM_FEATURES)
    for _ in range(0, length, FRAMES):
        total += tl.load(scratch_sums_ptr + columns, mask=is_column, other=0.0)
        squares += tl.load(scratch_sums_ptr + NUM_FEATURES + columns, mask=is_column, other=0.0)
        scratch_sums_ptr += 2 * NUM_FEATURES
    base_ptr = features_ptr + start.to(tl.int64) * stride_features_row
    base = tl.load(base_ptr + columns, mask=is_column, other=0.0).to(tl.float64)
    deviation = total / length.to(tl.float64)
    variance = (squares - total * deviation) / tl.maximum(length - 1, 1).to(tl.float64)
    # Rounding can leave a constant bin a variance a little below zero.
    variance = tl.where(variance < 0.0, 0.0, variance)
    scale = 1.0 / tl.sqrt(variance + 1e-7)
    mean = base + deviation

    out_start = tl.load(out_cu_seqlens_ptr + sequence)
    for tile in range(0, FRAMES, TILE):
        rows = first + tile + tl.arange(0, TILE)  # [TILE]
        frames = rows - start
        stacks = out_start + frames // STRIDE
        # The frames that fill no stack are left out.
        is_stacked = (frames < length // STRIDE * STRIDE) & (stacks < num_stacked)
        mask = is_stacked[:, None] & is_column[None, :]
        ptrs = features_ptr + rows.to(tl.int64)[:, None] * stride_features_row + columns[None, :]
        features = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)  # [TILE, BLOCK_M]
        features = (features - mean[None, :]) * scale[None, :]
        out_rows = stacks.to(tl.int64) * stride_out_row
        out_rows += (frames % STRIDE) * NUM_FEATURES  # [TILE]
        out_ptrs = out_ptr + out_rows[:, None] + columns[None, :]
        tl.store(out_ptrs, features.to(tl.float32), mask=mask)


FRAME_SHIFT = 160
"""Samples from the start of a frame to the start of the next."""


def log_mel_filterbank(
    waveforms: Tensor,
    cu_seqlens: Tensor,
    *,
    num_mel_bins: int = 80,
    sampling_rate: int = 16000,
    compute_dtype: torch.dtype = torch.float64,
    num_frames: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-mel energies of every whole frame of a packed batch of waveforms, as
    `ops.log_mel_filterbank`, of at most 256 mel bins.

    Args:
        waveforms: fp32 `[num_samples]`.
        cu_seqlens: int32 `[batch + 1]`, on the device of `waveforms` or on the CPU.
        num_frames: frames in all, if known. Without it, offsets that are on a GPU are waited for.

    Returns:
        fp32 `[num_frames, num_mel_bins]`, and the offsets of the utterances in frames, int32
        `[batch + 1]`, both on the device of `waveforms`.
    """
    check_tensor("waveforms", waveforms, (None,), (torch.float32,))
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    if not 1 <= num_mel_bins <= MAX_MEL_BINS:
        raise ValueError(f"num_mel_bins is {num_mel_bins}; it must be 1 to {MAX_MEL_BINS}")
    if compute_dtype not in (torch.float64, torch.float32):
        raise ValueError(f"compute_dtype is {compute_dtype}; it must be float64 or float32")
    device = waveforms.device
    check_device(waveforms=waveforms, out=out)
    if cu_seqlens.device.type != "cpu":
        check_device(waveforms=waveforms, cu_seqlens=cu_seqlens)

    frames = (cu_seqlens.diff() - (FRAME_LENGTH - FRAME_SHIFT)).clamp(min=0) // FRAME_SHIFT
    frame_cu_seqlens = _offsets(frames)
    total = int(frame_cu_seqlens[-1]) if num_frames is None else num_frames
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    frame_cu_seqlens = frame_cu_seqlens.to(device, non_blocking=True)
    if out is None:
        out = torch.empty(total, num_mel_bins, dtype=torch.float32, device=device)
    check_tensor("out", out, (total, num_mel_bins), (torch.float32,))
    if total == 0:
        return out, frame_cu_seqlens
    config = fbank_config(compute_dtype, architecture(device))
    with torch.cuda.device_of(waveforms):
        _log_mel_fwd_kernel[(triton.cdiv(total, config.frames),)](
            waveforms,
            cu_seqlens,
            frame_cu_seqlens,
            povey_window(device, compute_dtype),
            dft_basis(device, compute_dtype),
            mel_filters(device, num_mel_bins, sampling_rate),
            out,
            waveforms.shape[0],
            total,
            cu_seqlens.shape[0] - 1,
            out.stride(0),
            **_log_mel_constants(num_mel_bins, config),
            num_warps=config.num_warps,
        )
    return out, frame_cu_seqlens


def normalize_and_stack(
    features: Tensor,
    cu_seqlens: Tensor,
    stride: int = 2,
    *,
    num_stacked: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance per utterance and feature, then `stride` frames side by side, as
    `ops.normalize_and_stack`, of at most 256 features.

    Args:
        features: fp32 `[num_frames, num_features]`.
        cu_seqlens: int32 `[batch + 1]`, on the device of `features` or on the CPU.
        num_stacked: stacks in all, if known. Without it, offsets that are on a GPU are waited for.

    Returns:
        fp32 `[num_stacked, stride * num_features]`, and the offsets of the utterances in stacks,
        int32 `[batch + 1]`, both on the device of `features`. An utterance of one frame becomes
        zeros.
    """
    check_tensor("features", features, (None, None), (torch.float32,))
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    num_frames, num_features = features.shape
    if not 1 <= num_features <= MAX_MEL_BINS:
        raise ValueError(f"features has {num_features} columns; it must have 1 to {MAX_MEL_BINS}")
    if stride < 1:
        raise ValueError(f"stride is {stride}; it must be at least 1")
    device = features.device
    check_device(features=features, out=out)
    if cu_seqlens.device.type != "cpu":
        check_device(features=features, cu_seqlens=cu_seqlens)

    out_cu_seqlens = _offsets(cu_seqlens.diff() // stride)
    total = int(out_cu_seqlens[-1]) if num_stacked is None else num_stacked
    cu_seqlens = cu_seqlens.to(device, non_blocking=True)
    out_cu_seqlens = out_cu_seqlens.to(device, non_blocking=True)
    if out is None:
        out = torch.empty(total, stride * num_features, dtype=torch.float32, device=device)
    check_tensor("out", out, (total, stride * num_features), (torch.float32,))
    if total == 0:
        return out, out_cu_seqlens
    config = normalize_config(architecture(device))
    batch = cu_seqlens.shape[0] - 1
    grid = (num_blocks(num_frames, batch, config.frames),)
    sums = torch.empty(grid[0], 2, num_features, dtype=torch.float64, device=device)
    constants = _normalize_constants(num_features, config)
    with torch.cuda.device_of(features):
        _sum_blocks_kernel[grid](
            features, cu_seqlens, sums, num_frames, batch, features.stride(0),
            **constants, num_warps=config.num_warps,
        )  # fmt: skip
        _normalize_stack_kernel[grid](
            features, cu_seqlens, sums, out_cu_seqlens, out, num_frames, batch, total,
            features.stride(0), out.stride(0), STRIDE=stride, **constants,
            num_warps=config.num_warps,
        )  # fmt: skip
    return out, out_cu_seqlens


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _log_mel_constants(num_mel_bins: int, config: FbankConfig) -> dict[str, int]:
    return {
        "NUM_MEL_BINS": num_mel_bins,
        "BLOCK_F": config.frames,
        "BLOCK_K": config.block_k,
        "BLOCK_N": config.block_n,
        "BLOCK_M": block_mel(num_mel_bins),
        "FOLDED": FOLDED,
        "FOLDED_PADDED": FOLDED_PADDED,
        "PAIRS": PAIRS,
    }


def _normalize_constants(num_features: int, config: NormalizeConfig) -> dict[str, int]:
    return {
        "NUM_FEATURES": num_features,
        "FRAMES": config.frames,
        "TILE": config.tile_frames,
        "BLOCK_M": block_mel(num_features),
    }
