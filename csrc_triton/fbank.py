"""Launches the log-mel filterbank and its normalisation: argument checks, offsets and tables.

The kernels, their formulas and their cost are in `fbank_kernel`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .configs.fbank import (
    MAX_MEL_BINS,
    FbankConfig,
    NormalizeConfig,
    fbank_config,
    normalize_config,
)
from .fbank_kernel import _log_mel_fwd_kernel, _normalize_stack_kernel, _sum_blocks_kernel
from .fbank_tables import (
    FOLDED,
    FOLDED_PADDED,
    FRAME_LENGTH,
    PAIRS,
    block_mel,
    dft_basis,
    mel_filters,
    povey_window,
)
from .packed import num_blocks
from .runtime import architecture, check_device, check_tensor
from .specs import KernelSpec, ProofLaunch

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
    """Log-mel energies of every whole frame of a packed batch of waveforms.

    Args:
        waveforms: fp32 `[num_samples]`, utterances end to end, full scale being 1.0.
        cu_seqlens: int32 `[batch + 1]`, offsets of the utterances in samples; on the device of
            `waveforms` or on the CPU.
        num_mel_bins: number of mel bins, at most 256.
        sampling_rate: samples per second. Frames keep their length in samples.
        compute_dtype: precision up to the spectrum, float64 or float32.
        num_frames: frames in all, if known. Without it, offsets that are on a GPU are waited for.
        out: where to write, fp32 `[num_frames, num_mel_bins]`.

    Returns:
        fp32 `[num_frames, num_mel_bins]`, and the offsets of the utterances in frames, int32
        `[batch + 1]` on the device of `waveforms`. An utterance of fewer than 400 samples has no
        frames.

    Raises:
        ValueError: an argument does not fit; the message names it.
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
    """Zero mean and unit variance per utterance and feature, then `stride` frames side by side.

    Args:
        features: fp32 `[num_frames, num_features]`, packed; at most 256 features, rows at any
            stride.
        cu_seqlens: int32 `[batch + 1]`, offsets of the utterances in frames; on the device of
            `features` or on the CPU.
        stride: frames in a stack. An utterance's last frames that fill no stack count for its mean
            and variance and are left out.
        num_stacked: stacks in all, if known. Without it, offsets that are on a GPU are waited for.
        out: where to write, fp32 `[num_stacked, stride * num_features]`.

    Returns:
        fp32 `[num_stacked, stride * num_features]`, and the offsets of the utterances in stacks,
        int32 `[batch + 1]` on the device of `features`. An utterance of one frame becomes zeros.

    Raises:
        ValueError: an argument does not fit; the message names it.
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
        "SEARCH": config.search,
    }


def _normalize_constants(num_features: int, config: NormalizeConfig) -> dict[str, int]:
    return {
        "NUM_FEATURES": num_features,
        "FRAMES": config.frames,
        "TILE": config.tile_frames,
        "BLOCK_M": block_mel(num_features),
        "SEARCH": config.search,
    }


def kernel_specs(arch: str, dtype: str) -> list[KernelSpec]:
    """The kernels as they ship for 80 mel bins, for the compiler lane.

    They run in fp32 and fp64 whatever the model's dtype, so only "float32" has any.
    """
    if dtype != "float32":
        return []
    specs = []
    for compute_dtype, name in ((torch.float64, "fp64"), (torch.float32, "fp32")):
        config = fbank_config(compute_dtype, arch)
        types = {
            "window_ptr": "*" + name,
            "basis_ptr": "*" + name,
            "num_samples": "i32",
        }
        constants = _log_mel_constants(80, config)
        specs.append(_spec(f"log_mel_fwd/{name}", _log_mel_fwd_kernel, types, constants, config))
    normalize = normalize_config(arch)
    constants = _normalize_constants(80, normalize)
    types = {"sums_ptr": "*fp64"}
    specs.append(_spec("sum_blocks", _sum_blocks_kernel, types, constants, normalize))
    constants["STRIDE"] = 2
    types["num_stacked"] = "i32"
    specs.append(_spec("normalize_stack", _normalize_stack_kernel, types, constants, normalize))
    return specs


def _spec(
    name: str,
    kernel: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, int],
    config: FbankConfig | NormalizeConfig,
) -> KernelSpec:
    pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    strides = [argument for argument in kernel.arg_names if argument.startswith("stride_")]
    offsets = [argument for argument in pointers if "cu_seqlens" in argument]
    return KernelSpec(
        name=name,
        kernel=kernel,
        signature={
            **dict.fromkeys(pointers, "*fp32"),
            **types,
            **dict.fromkeys(offsets, "*i32"),
            **dict.fromkeys(strides, "i32"),
            "num_frames": "i32",
            "num_sequences": "i32",
        },
        constants=dict(constants),
        kind="pointwise",
        dtype="float32",
        num_warps=config.num_warps,
        num_stages=1,
        divisible_by_16=frozenset(pointers + strides),
        proof=_proof_launch(kernel, types, strides, config.frames),
    )


def _proof_launch(
    kernel: triton.JITFunction, types: dict[str, str], strides: list[str], block: int
) -> ProofLaunch:
    """An utterance of 3 frames and one that ends 5 frames into a block of its own."""
    frames: tuple[int, ...] = (0, 3, 2 * block + 5)
    samples: tuple[int, ...] = (0, 1000, 1000 + FRAME_LENGTH + (2 * block + 1) * FRAME_SHIFT)
    scalars = {"num_frames": frames[-1], "num_sequences": 2, **dict.fromkeys(strides, 80)}
    if kernel is _log_mel_fwd_kernel:
        offsets = {"cu_seqlens_ptr": samples, "frame_cu_seqlens_ptr": frames}
        scalars["num_samples"] = samples[-1]
        return ProofLaunch(triton.cdiv(frames[-1], block), scalars, offsets)
    offsets = {"cu_seqlens_ptr": frames}
    if "num_stacked" in types:
        scalars |= {"num_stacked": 2 + block, "stride_out_row": 160}
        offsets["out_cu_seqlens_ptr"] = (0, 1, 2 + block)
    return ProofLaunch(num_blocks(frames[-1], 2, block), scalars, offsets)
