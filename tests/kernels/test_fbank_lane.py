"""The filterbank kernels on the device, on noise and on real speech."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from torch import Tensor

from csrc_triton.fbank import log_mel_filterbank, normalize_and_stack
from tests.kernels.judge import Judge
from tests.kernels.lane import DATA, DEVICE, Sentinels, choose, packed, random
from tests.kernels.models import import_transformers
from w2vbert_fast.ops import fbank as plain
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

RAGGED = [399, 0, 400, 559, 560, 1, 719, 720, 5000, 0]


def speech() -> list[Tensor]:
    clips = []
    for file in sorted(DATA.glob("*.wav")):
        with wave.open(str(file)) as clip:
            assert (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) == (16_000, 1, 2)
            samples = np.frombuffer(clip.readframes(clip.getnframes()), dtype="<i2")
        clips.append(torch.from_numpy(samples.astype(np.float32) / 32768.0))
    assert len(clips) == 3
    return clips if choose(True, False) else sorted(clips, key=len)[:1]


def exact_log_mel(waveforms: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The plain filterbank, whose transform is float64, on the CPU."""
    features, offsets = plain.log_mel_filterbank(waveforms.cpu(), cu_seqlens.cpu())
    return features.to(DEVICE).double(), offsets.to(DEVICE)


@pytest.mark.parametrize(
    ("compute_dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-3)], ids=str
)
def test_ragged_batch(compute_dtype: torch.dtype, tolerance: float, judge: Judge) -> None:
    for lengths in (RAGGED, choose([300 * 16_000 + 7, 401], [1200])):
        waveforms = random(sum(lengths), dtype=torch.float32, scale=0.1) + 0.3
        cu_seqlens = packed(lengths)
        exact, offsets = exact_log_mel(waveforms, cu_seqlens)
        ours, our_offsets = log_mel_filterbank(waveforms, cu_seqlens, compute_dtype=compute_dtype)
        assert torch.equal(our_offsets, offsets)
        # Logarithms: an absolute error of this size, and the largest of them is above 10.
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)
        name = "fbank" if compute_dtype == torch.float64 else "fbank/fp32_transform"
        judge(name, ours, exact, tolerance=tolerance)


def test_real_speech_equals_the_feature_extractor(judge: Judge) -> None:
    """The accuracy that is asked for: mean difference 1e-4, largest 0.02, after normalisation."""
    waveforms = speech()
    extractor = SeamlessM4TFeatureExtractor()
    expected = extractor([waveform.numpy() for waveform in waveforms], return_tensors="pt")
    compare_with_extractor(judge, waveforms, expected, "fbank/extractor")


def test_real_speech_equals_the_reference(judge: Judge) -> None:
    transformers = import_transformers()
    waveforms = speech()
    extractor = transformers.SeamlessM4TFeatureExtractor()
    arrays = [waveform.numpy() for waveform in waveforms]
    expected = extractor(arrays, sampling_rate=16_000, return_tensors="pt")
    compare_with_extractor(judge, waveforms, expected, "fbank/transformers")


def compare_with_extractor(
    judge: Judge, waveforms: list[Tensor], expected: dict[str, Tensor], name: str
) -> None:
    lengths = [waveform.numel() for waveform in waveforms]
    features, offsets = log_mel_filterbank(torch.cat(waveforms).to(DEVICE), packed(lengths))
    stacked, stack_offsets = normalize_and_stack(features, offsets)
    valid = expected["attention_mask"].bool()
    assert stack_offsets.diff().tolist() == valid.sum(1).tolist()
    wanted = expected["input_features"][valid].to(DEVICE).double()
    difference = (stacked.double() - wanted).abs()
    assert difference.mean() <= 1e-4
    assert difference.max() <= 0.02
    judge(name, stacked, wanted, tolerance=0.02)


def test_quiet_bands_beside_a_loud_tone(judge: Judge) -> None:
    time = torch.arange(1200, dtype=torch.float64)
    waveform = 0.9 * torch.sin(0.1 * time) + 3e-8 * torch.randn(1200, dtype=torch.float64)
    waveforms, cu_seqlens = waveform.float().to(DEVICE), packed([1200])
    exact, _ = exact_log_mel(waveforms, cu_seqlens)
    ours, _ = log_mel_filterbank(waveforms, cu_seqlens)
    assert exact.amax() - exact.amin() > 25.0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
    judge("fbank/quiet_bands", ours, exact)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_normalize_and_stack(stride: int, judge: Judge) -> None:
    lengths = [*choose([0, 1, 2, 31, 255, 256, 257, 30_000], [0, 1, 2, 31, 65]), 0, 3]
    cu_seqlens = packed(lengths)
    features = 3.0 * random(sum(lengths), 80, dtype=torch.float32) - 8.0
    features[:, 3] = -15.942385  # a bin at the floor
    features[:, 5] += 1e4
    stacked, offsets = normalize_and_stack(features, cu_seqlens, stride)
    assert offsets.diff().tolist() == [length // stride for length in lengths]
    normalized = plain.normalize_utterances(features.double(), cu_seqlens)
    exact = torch.cat(
        [
            utterance[: len(utterance) // stride * stride].reshape(-1, stride * 80)
            for utterance in normalized.split(lengths)
        ]
    )
    judge("normalize_and_stack", stacked, exact)


def test_writes_its_output_and_nothing_else(judge: Judge) -> None:
    waveforms, cu_seqlens = random(2000, dtype=torch.float32), packed([1100, 900])
    expected, offsets = log_mel_filterbank(waveforms, cu_seqlens)
    sentinels = Sentinels(9, 80, torch.float32)
    log_mel_filterbank(waveforms, cu_seqlens, num_frames=9, out=sentinels.out)
    assert torch.equal(sentinels.out, expected)
    assert sentinels.untouched()
    stacked, _ = normalize_and_stack(expected, offsets)
    sentinels = Sentinels(4, 160, torch.float32)
    normalize_and_stack(expected, offsets, num_stacked=4, out=sentinels.out)
    assert torch.equal(sentinels.out, stacked)
    assert sentinels.untouched()
    judge.counted("fbank/out", torch.float32)


def test_two_runs_are_bit_equal() -> None:
    waveforms, cu_seqlens = random(sum(RAGGED), dtype=torch.float32), packed(RAGGED)
    first, second = (log_mel_filterbank(waveforms, cu_seqlens) for _ in range(2))
    assert torch.equal(first[0], second[0])
    first, second = (normalize_and_stack(*first) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("lengths", [[], [0], [399, 0, 12]])
def test_no_frames(lengths: list[int]) -> None:
    waveforms = random(sum(lengths), dtype=torch.float32)
    features, offsets = log_mel_filterbank(waveforms, packed(lengths))
    assert features.shape == (0, 80)
    stacked, offsets = normalize_and_stack(features, offsets)
    assert stacked.shape == (0, 160)
    assert offsets.tolist() == [0] * (len(lengths) + 1)
