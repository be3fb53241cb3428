"""The filterbank kernels against the plain operations in float64, on noise and on real speech."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from torch import Tensor

from csrc_triton.fbank import log_mel_filterbank, normalize_and_stack
from tests.kernels.judge import Judge
from tests.kernels.lane import DATA, DEVICE, VIRTUAL, Sentinels, choose, packed, random, strided
from tests.kernels.models import import_transformers
from w2vbert_fast.ops import fbank as plain
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

# Around the lengths at which a frame is gained, and utterances without any.
RAGGED = [399, 0, 400, 559, 560, 1, 719, 720, 5000, 0]

OUTSIDE = -77.0


def speech() -> list[Tensor]:
    clips = []
    for file in sorted(DATA.glob("*.wav")):
        with wave.open(str(file)) as clip:
            assert (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) == (16_000, 1, 2)
            samples = np.frombuffer(clip.readframes(clip.getnframes()), dtype="<i2")
        clips.append(torch.from_numpy(samples.astype(np.float32) / 32768.0))
    assert len(clips) == 3
    return clips if VIRTUAL is None else sorted(clips, key=len)[:1]


def normalized_and_stacked(features: Tensor, cu_seqlens: Tensor, stride: int) -> Tensor:
    """What `normalize_and_stack` is to give, from the plain normalisation."""
    normalized = plain.normalize_utterances(features, cu_seqlens)
    stacks = []
    for utterance in normalized.split(cu_seqlens.diff().tolist()):
        whole = utterance.shape[0] // stride
        stacks.append(utterance[: whole * stride].reshape(whole, stride * features.shape[1]))
    return torch.cat(stacks)


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
        assert torch.equal(our_offsets, offsets) and our_offsets.dtype == torch.int32
        # Logarithms: an absolute error of this size, and the largest of them is above 10.
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance)
        name = "fbank" if compute_dtype == torch.float64 else "fbank/fp32_transform"
        judge(name, ours, exact, tolerance=tolerance)


def test_real_speech_equals_the_feature_extractor(judge: Judge) -> None:
    """The accuracy that is asked for: mean difference 1e-4, largest 0.02, after normalisation."""
    waveforms = speech()
    extractor = SeamlessM4TFeatureExtractor()
    expected = extractor([waveform.numpy() for waveform in waveforms], return_tensors="pt")
    # A hundredth of what is asked for, and less.
    compare_with_extractor(judge, waveforms, expected, "fbank/extractor", mean=1e-6, largest=1e-4)


def test_real_speech_equals_the_reference(judge: Judge) -> None:
    transformers = import_transformers()
    waveforms = speech()
    extractor = transformers.SeamlessM4TFeatureExtractor()
    arrays = [waveform.numpy() for waveform in waveforms]
    expected = extractor(arrays, sampling_rate=16_000, return_tensors="pt")
    compare_with_extractor(judge, waveforms, expected, "fbank/transformers")


def compare_with_extractor(
    judge: Judge,
    waveforms: list[Tensor],
    expected: dict[str, Tensor],
    name: str,
    *,
    mean: float = 1e-4,
    largest: float = 0.02,
) -> None:
    lengths = [waveform.numel() for waveform in waveforms]
    features, offsets = log_mel_filterbank(torch.cat(waveforms).to(DEVICE), packed(lengths))
    stacked, stack_offsets = normalize_and_stack(features, offsets)
    valid = expected["attention_mask"].bool()
    assert stack_offsets.diff().tolist() == valid.sum(1).tolist()
    wanted = expected["input_features"][valid].to(DEVICE).double()
    difference = (stacked.double() - wanted).abs()
    assert difference.mean() <= mean
    assert difference.max() <= largest
    judge(name, stacked, wanted, tolerance=0.02)


def test_quiet_bands_beside_a_loud_tone(judge: Judge) -> None:
    # The noise lies 150 dB below the tone: only a float64 transform sees it.
    time = torch.arange(1200, dtype=torch.float64)
    waveform = 0.9 * torch.sin(0.1 * time) + 3e-8 * torch.randn(1200, dtype=torch.float64)
    waveforms, cu_seqlens = waveform.float().to(DEVICE), packed([1200])
    exact, _ = exact_log_mel(waveforms, cu_seqlens)
    ours, _ = log_mel_filterbank(waveforms, cu_seqlens)
    assert exact.amax() - exact.amin() > 25.0  # natural logarithm of power
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
    judge("fbank/quiet_bands", ours, exact)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_normalize_and_stack(stride: int, judge: Judge) -> None:
    lengths = [*choose([0, 1, 2, 31, 255, 256, 257, 30_000], [0, 1, 2, 31, 63, 64, 65]), 0, 3]
    cu_seqlens = packed(lengths)
    features = 3.0 * random(sum(lengths), 80, dtype=torch.float32) - 8.0
    features[:, 3] = -15.942385  # a bin at the floor
    features[len(features) // 3 :, 4] = -15.942385  # and one that leaves it for a while
    features[:, 5] += 1e4
    stacked, offsets = normalize_and_stack(features, cu_seqlens, stride)
    assert offsets.diff().tolist() == [length // stride for length in lengths]
    assert offsets.dtype == torch.int32
    exact = normalized_and_stacked(features.double(), cu_seqlens, stride)
    judge("normalize_and_stack", stacked, exact)
    expected = normalized_and_stacked(features, cu_seqlens, stride)
    torch.testing.assert_close(stacked, expected, rtol=choose(1e-5, 1e-6), atol=choose(1e-5, 1e-6))


def test_writes_its_output_and_nothing_else(judge: Judge) -> None:
    waveforms, cu_seqlens = random(2000, dtype=torch.float32), packed([1100, 900])
    expected, offsets = log_mel_filterbank(waveforms, cu_seqlens)
    sentinels = Sentinels(9, 80, torch.float32)
    log_mel_filterbank(waveforms, cu_seqlens, num_frames=9, out=sentinels.out)
    assert torch.equal(sentinels.out, expected)
    assert sentinels.untouched()
    stacked, _ = normalize_and_stack(strided(expected), offsets)
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
    assert offsets.tolist() == [0] * (len(lengths) + 1)
    stacked, offsets = normalize_and_stack(features, offsets)
    assert stacked.shape == (0, 160)
    assert offsets.tolist() == [0] * (len(lengths) + 1)


@pytest.mark.parametrize(("num_mel_bins", "sampling_rate"), [(23, 8000), (128, 16000), (80, 22051)])
def test_other_filters(num_mel_bins: int, sampling_rate: int) -> None:
    waveforms, cu_seqlens = random(2000, dtype=torch.float32, scale=0.1), packed([1200, 800])
    arguments = {"num_mel_bins": num_mel_bins, "sampling_rate": sampling_rate}
    features, _ = log_mel_filterbank(waveforms, cu_seqlens, **arguments)
    expected, _ = plain.log_mel_filterbank(waveforms.cpu(), cu_seqlens.cpu(), **arguments)
    torch.testing.assert_close(features.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_constant_samples(value: float) -> None:
    waveforms = torch.full((900,), value, device=DEVICE)
    features, _ = log_mel_filterbank(waveforms, packed([900]))
    # Nothing is left but the rounding of the mean, far below the floor.
    floor = torch.full((4, 80), 2.0**-23, device=DEVICE).log()
    torch.testing.assert_close(features, floor, rtol=0, atol=0)


def test_real_speech_in_float32() -> None:
    waveform = min(speech(), key=torch.Tensor.numel).to(DEVICE)
    cu_seqlens = packed([waveform.numel()])
    features, offsets = log_mel_filterbank(waveform, cu_seqlens, compute_dtype=torch.float32)
    expected, _ = exact_log_mel(waveform, cu_seqlens)
    difference = normalized_and_stacked(features.double(), offsets, 1)
    difference = (difference - normalized_and_stacked(expected, offsets, 1)).abs()
    assert difference.mean() <= 1e-5
    assert difference.max() <= 2e-3


def test_nan_stays_in_its_frames() -> None:
    waveforms, cu_seqlens = random(2400, dtype=torch.float32), packed([1200, 1200])
    waveforms[1199] = float("nan")
    features, offsets = log_mel_filterbank(waveforms, cu_seqlens)
    assert offsets.tolist() == [0, 6, 12]
    assert features.isnan().any(1).tolist() == [row == 5 for row in range(12)]


def test_bins_that_hardly_vary() -> None:
    # Deviations of a few units in the last place, whose square is far below the variance's floor.
    features = torch.full((70, 16), 13.0) + 1e-6 * torch.randint(-2, 3, (70, 16))
    features = features.to(DEVICE)
    stacked, offsets = normalize_and_stack(features, packed([70]))
    expected = normalized_and_stacked(features, offsets * 2, 2)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(stacked, expected, rtol=1e-6, atol=0)


def test_long_utterance() -> None:
    features, cu_seqlens = random(300 + 217, 80, dtype=torch.float32), packed([300, 217])
    stacked, _ = normalize_and_stack(features, cu_seqlens)
    expected = normalized_and_stacked(features, cu_seqlens, 2)
    torch.testing.assert_close(stacked, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("in_parts")
def test_wrong_counts_and_offsets_stay_inside_the_buffers() -> None:
    waveforms, cu_seqlens = random(1200, dtype=torch.float32), packed([1200])
    expected, offsets = log_mel_filterbank(waveforms, cu_seqlens)
    buffer = torch.full((9, 80), OUTSIDE, device=DEVICE)
    log_mel_filterbank(waveforms, cu_seqlens, num_frames=9, out=buffer)
    assert torch.equal(buffer[:6], expected)
    assert (buffer[6:] == OUTSIDE).all()
    log_mel_filterbank(waveforms, packed([1680]), num_frames=9, out=buffer.fill_(OUTSIDE))
    assert torch.equal(buffer[:6], expected)
    assert (buffer[6:] == OUTSIDE).all()

    stacked, _ = normalize_and_stack(expected, offsets)
    buffer = torch.full((5, 160), OUTSIDE, device=DEVICE)
    normalize_and_stack(expected, offsets, num_stacked=2, out=buffer[:2])
    assert torch.equal(buffer[:2], stacked[:2])
    assert (buffer[2:] == OUTSIDE).all()
    # A frame that fills no stack is not written, not even where there is room for it.
    normalize_and_stack(expected[:5], packed([5]), num_stacked=5, out=buffer.fill_(OUTSIDE))
    assert not (buffer[:2] == OUTSIDE).any()
    assert (buffer[2:] == OUTSIDE).all()


def test_arguments_that_do_not_fit() -> None:
    waveforms, cu_seqlens = random(900, dtype=torch.float32), packed([900])
    with pytest.raises(ValueError, match=r"waveforms is torch\.float64; it must be float32"):
        log_mel_filterbank(waveforms.double(), cu_seqlens)
    with pytest.raises(ValueError, match="waveforms has strides"):
        log_mel_filterbank(waveforms[::2], packed([450]))
    with pytest.raises(ValueError, match=r"cu_seqlens is torch\.int64; it must be int32"):
        log_mel_filterbank(waveforms, cu_seqlens.long())
    with pytest.raises(ValueError, match="num_mel_bins is 257"):
        log_mel_filterbank(waveforms, cu_seqlens, num_mel_bins=257)
    with pytest.raises(ValueError, match=r"compute_dtype is torch\.float16"):
        log_mel_filterbank(waveforms, cu_seqlens, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"out has shape \(3, 80\); it must be \(4, 80\)"):
        log_mel_filterbank(waveforms, cu_seqlens, out=torch.empty(3, 80, device=DEVICE))
    with pytest.raises(ValueError, match=r"features is torch\.float16"):
        normalize_and_stack(torch.zeros(4, 80, device=DEVICE).half(), packed([4]))
    with pytest.raises(ValueError, match="stride is 0"):
        normalize_and_stack(torch.zeros(4, 80, device=DEVICE), packed([4]), 0)
    with pytest.raises(ValueError, match="features has 300 columns"):
        normalize_and_stack(torch.zeros(4, 300, device=DEVICE), packed([4]))
