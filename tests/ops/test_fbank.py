"""The filterbank operation, against a direct float64 calculation and against itself in packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from w2vbert_fast.ops.fbank import log_mel_filterbank, mel_filters, normalize_utterances, num_frames


def direct_log_mel(
    waveform: NDArray[np.float32], num_mel_bins: int, sampling_rate: int
) -> NDArray[np.float64]:
    """The recipe step by step, the DFT as a matrix and the triangles as interpolation."""
    samples = waveform.astype(np.float64) * 32768
    n, k = np.arange(400), np.arange(257)
    window = (0.5 * (1 - np.cos(2 * np.pi * n / 399))) ** 0.85
    dft = np.exp(-2j * np.pi * np.outer(n, k) / 512)
    mel_of_bin = 1127 * np.log(1 + k * sampling_rate / 512 / 700)
    lowest, highest = (1127 * np.log(1 + hz / 700) for hz in (20, sampling_rate // 2))
    corners = np.linspace(lowest, highest, num_mel_bins + 2)
    triangles = np.stack(
        [np.interp(mel_of_bin, corners[b : b + 3], [0, 1, 0]) for b in range(num_mel_bins)], axis=1
    )
    rows = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400]
        frame = frame - frame.mean()
        emphasised = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs((emphasised * window) @ dft) ** 2
        rows.append(np.log(np.maximum(power @ triangles, 1.1920929e-07)))
    return np.stack(rows)


def noise(num_samples: int, seed: int = 0, amplitude: float = 0.1) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (amplitude * rng.standard_normal(num_samples)).astype(np.float32)


def pack(waveforms: list[NDArray[np.float32]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [0, *(len(waveform) for waveform in waveforms)]
    return (
        torch.from_numpy(np.concatenate(waveforms)),
        torch.tensor(np.cumsum(lengths), dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("num_mel_bins", "sampling_rate"), [(80, 16000), (40, 16000), (23, 8000), (80, 22050)]
)
def test_follows_the_recipe(num_mel_bins: int, sampling_rate: int) -> None:
    waveform = noise(2000) + 0.2
    packed, cu_seqlens = pack([waveform])
    features, _ = log_mel_filterbank(
        packed, cu_seqlens, num_mel_bins=num_mel_bins, sampling_rate=sampling_rate
    )
    wanted = direct_log_mel(waveform, num_mel_bins, sampling_rate)
    assert features.shape == wanted.shape
    np.testing.assert_allclose(features, wanted, rtol=0, atol=3e-6)


def test_filters_do_not_depend_on_earlier_calls() -> None:
    first = mel_filters(80, 16000).copy()
    mel_filters(40, 8000)
    np.testing.assert_array_equal(mel_filters(80, 16000), first)


@pytest.mark.parametrize("num_samples", [1, 399, 400, 559, 560, 719, 720, 41360, 41361, 90007])
def test_number_of_frames(num_samples: int) -> None:
    packed, cu_seqlens = pack([noise(num_samples)])
    features, frame_offsets = log_mel_filterbank(packed, cu_seqlens)
    starts = len(range(0, num_samples - 399, 160))
    assert features.shape == (starts, 80)
    assert frame_offsets.tolist() == [0, starts]
    assert frame_offsets.dtype == torch.int32
    assert num_frames(num_samples) == starts


def test_utterances_do_not_see_each_other() -> None:
    lengths = [401, 560, 3, 4000, 399, 50001, 0, 720]
    waveforms = [noise(n, seed, 10.0 ** -(seed % 4)) for seed, n in enumerate(lengths)]
    features, offsets = log_mel_filterbank(*pack(waveforms))
    normalized = normalize_utterances(features, offsets)
    assert offsets.diff().tolist() == [num_frames(n) for n in lengths]
    for index, waveform in enumerate(waveforms):
        alone, alone_offsets = log_mel_filterbank(*pack([waveform]))
        begin, end = offsets[index], offsets[index + 1]
        torch.testing.assert_close(features[begin:end], alone, rtol=0, atol=2e-6)
        torch.testing.assert_close(
            normalized[begin:end],
            normalize_utterances(alone, alone_offsets),
            rtol=0,
            atol=2e-5,
        )


def test_blocks_of_frames_join(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, cu_seqlens = pack([noise(5000), noise(7777, seed=1)])
    whole, _ = log_mel_filterbank(packed, cu_seqlens)
    monkeypatch.setattr("w2vbert_fast.ops.fbank._FRAMES_PER_BLOCK_CPU", 7)
    blocks, _ = log_mel_filterbank(packed, cu_seqlens)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=2e-6)


def test_empty_batch() -> None:
    features, offsets = log_mel_filterbank(torch.empty(0), torch.zeros(1, dtype=torch.int32))
    assert features.shape == (0, 80)
    assert offsets.tolist() == [0]
    assert normalize_utterances(features, offsets).shape == (0, 80)


def test_float32_computation_is_close_where_there_is_energy() -> None:
    packed, cu_seqlens = pack([noise(5000)])
    single, _ = log_mel_filterbank(packed, cu_seqlens, compute_dtype=torch.float32)
    double, _ = log_mel_filterbank(packed, cu_seqlens)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-3)


def test_reduced_precision_of_products_does_not_reach_the_features() -> None:
    packed, cu_seqlens = pack([noise(5000)])
    wanted, _ = log_mel_filterbank(packed, cu_seqlens)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        features, _ = log_mel_filterbank(packed, cu_seqlens)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(features, wanted)


def test_more_filters_than_the_dft_resolves() -> None:
    """A triangle between two DFT bins holds no energy."""
    packed, cu_seqlens = pack([noise(1000)])
    features, _ = log_mel_filterbank(packed, cu_seqlens, num_mel_bins=400)
    assert features.shape == (4, 400)
    np.testing.assert_allclose(features, direct_log_mel(noise(1000), 400, 16000), rtol=0, atol=3e-6)
    assert (features == np.log(2.0**-23)).any()


def test_normalisation() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(-4, 3, (13, 5)).astype(np.float32))
    features[5:7, 2] = 1.5
    normalized = normalize_utterances(features, torch.tensor([0, 5, 7, 8, 8, 13]))
    x = features.double().numpy()
    for begin, end in ((0, 5), (5, 7), (8, 13)):
        part = x[begin:end]
        wanted = (part - part.mean(0)) / np.sqrt(part.var(0, ddof=1) + 1e-7)
        np.testing.assert_allclose(normalized[begin:end], wanted, rtol=0, atol=2e-7)
    assert normalized[5:7, 2].tolist() == [0, 0]
    assert normalized[7].tolist() == [0] * 5


def test_bad_arguments_are_named() -> None:
    good, offsets = pack([noise(1000)])
    with pytest.raises(ValueError, match=r"waveforms must be float32.*float64"):
        log_mel_filterbank(good.double(), offsets)
    with pytest.raises(ValueError, match=r"waveforms must be float32.*\[1, 1000\]"):
        log_mel_filterbank(good[None], offsets)
    with pytest.raises(ValueError, match="cu_seqlens must be an integer tensor"):
        log_mel_filterbank(good, offsets.float())
    with pytest.raises(ValueError, match=r"cu_seqlens must .* \[0\]"):
        log_mel_filterbank(good, offsets[:0])
    with pytest.raises(ValueError, match="compute_dtype must be float64 or float32"):
        log_mel_filterbank(good, offsets, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"features must be floating point"):
        normalize_utterances(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"features must .* \[3\]"):
        normalize_utterances(torch.zeros(3), torch.tensor([0, 3]))


@pytest.mark.gpu
def test_same_on_a_gpu() -> None:
    packed, cu_seqlens = pack([noise(n, n) for n in (400, 560, 20000, 161)])
    wanted, wanted_offsets = log_mel_filterbank(packed, cu_seqlens)
    features, offsets = log_mel_filterbank(packed.cuda(), cu_seqlens.cuda())
    assert features.is_cuda and offsets.is_cuda
    assert offsets.tolist() == wanted_offsets.tolist()
    torch.testing.assert_close(features.cpu(), wanted, rtol=0, atol=5e-6)
    torch.testing.assert_close(
        normalize_utterances(features, offsets).cpu(),
        normalize_utterances(wanted, wanted_offsets),
        rtol=0,
        atol=2e-5,
    )
