"""The feature extractor against the reference, and the inputs that the reference mistreats."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from numpy.typing import NDArray

from w2vbert_fast import SeamlessM4TFeatureExtractor
from w2vbert_fast.recordings.waveforms import to_waveform

DATA = Path(__file__).parents[1] / "data"
CLIPS = [json.loads(line) for line in (DATA / "manifest.jsonl").read_text().splitlines()]
Reference = transformers.SeamlessM4TFeatureExtractor


def clip(index: int) -> NDArray[np.float32]:
    samples, sampling_rate = soundfile.read(DATA / CLIPS[index]["file"], dtype="float32")
    assert sampling_rate == 16000
    return np.asarray(samples)


def noise(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(num_samples)).astype(np.float32)


def both(raw: Any, config: dict[str, Any] | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """Our output and the reference's, after comparing names, shapes, dtypes and masks."""
    kwargs = {"sampling_rate": 16000, **kwargs}
    ours = SeamlessM4TFeatureExtractor(**(config or {}))(raw, **kwargs)
    wanted = Reference(**(config or {}))(raw, **kwargs)
    assert sorted(ours) == sorted(wanted)
    for name, value in wanted.items():
        assert type(ours[name]) is type(value)
        assert ours[name].shape == value.shape
        assert ours[name].dtype == value.dtype
    if "attention_mask" in wanted:
        np.testing.assert_array_equal(ours["attention_mask"], wanted["attention_mask"])
    return ours, wanted


def difference(ours: Any, wanted: Any) -> NDArray[np.float64]:
    ours, wanted = (np.asarray(x["input_features"], dtype=np.float64) for x in (ours, wanted))
    return np.abs(ours - wanted)


@pytest.mark.parametrize("normalize", [True, False])
def test_speech_one_by_one(normalize: bool) -> None:
    distances = []
    for index in range(len(CLIPS)):
        ours, wanted = both(clip(index), do_normalize_per_mel_bins=normalize)
        distances.append(difference(ours, wanted).ravel())
    distance = np.concatenate(distances)
    assert distance.mean() <= 1e-6
    assert distance.max() <= 2e-5


def test_speech_in_a_batch() -> None:
    ours, wanted = both(
        [clip(index) for index in range(len(CLIPS))], {"padding_value": 1}, return_tensors="pt"
    )
    assert difference(ours, wanted).max() <= 2e-5
    assert ours["attention_mask"].sum(1).tolist() == [
        (1 + (len(clip(index)) - 400) // 160) // 2 for index in range(len(CLIPS))
    ]


def upsampled(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every other sample thrown away and put back by an ideal low-pass: nothing above 4 kHz."""
    spectrum = np.fft.rfft(waveform)
    spectrum[len(spectrum) // 2 :] = 0
    return np.fft.irfft(spectrum, len(waveform)).astype(np.float32)


def with_gap(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Digital silence in the middle."""
    waveform = waveform.copy()
    waveform[5000:12000] = 0
    return waveform


@pytest.mark.parametrize(
    "change",
    [upsampled, with_gap, lambda x: x + np.float32(0.4), lambda x: x * np.float32(1e-4)],
    ids=["nothing above 4 kHz", "digital silence", "offset", "quiet"],
)
def test_where_there_is_no_energy(change: Any) -> None:
    ours, wanted = both(change(clip(3)))
    distance = difference(ours, wanted)
    assert distance.mean() <= 1e-5
    assert distance.max() <= 1e-3


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_silence_is_zero(value: float) -> None:
    silence = np.full(16000, value, dtype=np.float32)
    features = SeamlessM4TFeatureExtractor()(silence, sampling_rate=16000)["input_features"]
    np.testing.assert_array_equal(features, 0)


LENGTHS = range(560, 4001, 7)
PADDINGS: dict[str, dict[str, Any]] = {
    "longest": {},
    "no multiple": {"pad_to_multiple_of": None},
    "multiple of 7": {"pad_to_multiple_of": 7},
    "max_length": {"padding": "max_length", "max_length": 29},
    "max_length, cut": {"padding": "max_length", "max_length": 11, "truncation": True},
    "longest, cut": {"max_length": 13, "truncation": True, "pad_to_multiple_of": None},
}


@pytest.mark.parametrize("kwargs", PADDINGS.values(), ids=PADDINGS)
def test_lengths_in_batches(kwargs: dict[str, Any]) -> None:
    waveform = noise(4000)
    lengths = np.random.default_rng(0).permutation(LENGTHS)
    for start in range(0, len(lengths), 12):
        batch = [waveform[:n] for n in lengths[start : start + 12]]
        ours, wanted = both(batch, {"padding_value": 1}, **kwargs)
        assert difference(ours, wanted).max() <= 1e-3


@pytest.mark.parametrize("kwargs", [{}, {"padding": False}, {"padding": "do_not_pad"}], ids=str)
def test_lengths_one_by_one(kwargs: dict[str, Any]) -> None:
    waveform = noise(4000)
    for length in LENGTHS:
        ours, wanted = both(waveform[:length], **kwargs)
        assert difference(ours, wanted).max() <= 1e-3


@pytest.mark.parametrize(
    "config",
    [
        {"padding_side": "left", "padding_value": 1},
        {"num_mel_bins": 40, "feature_size": 40, "padding_value": -2.5},
        {"stride": 4},
        {"stride": 3},
        {"return_attention_mask": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_configurations(config: dict[str, Any], tensors: str | None) -> None:
    batch = [noise(n, n) for n in (560, 4000, 2345, 721)]
    ours, wanted = both(batch, config, return_tensors=tensors)
    assert difference(ours, wanted).max() <= 1e-3


def test_another_sampling_rate() -> None:
    ours, wanted = both(noise(4000), {"sampling_rate": 22050}, sampling_rate=22050)
    assert difference(ours, wanted).max() <= 1e-4


def test_without_stacking_every_frame_has_its_mask() -> None:
    batch = [noise(560), noise(1000)]
    ours = SeamlessM4TFeatureExtractor(stride=1)(batch, sampling_rate=16000)
    wanted = Reference(stride=1)(batch, sampling_rate=16000)
    assert difference(ours, wanted).max() <= 1e-4
    assert ours["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_mask_only_when_wanted() -> None:
    extractor = SeamlessM4TFeatureExtractor()
    assert "attention_mask" not in extractor(
        noise(800), sampling_rate=16000, return_attention_mask=False
    )
    silent = SeamlessM4TFeatureExtractor(return_attention_mask=False)
    assert "attention_mask" in silent(noise(800), sampling_rate=16000, return_attention_mask=True)


@pytest.mark.parametrize("kwargs", [{"padding": False}, {"padding": "max_length", "max_length": 5}])
def test_rows_of_different_lengths_are_a_list(kwargs: dict[str, Any]) -> None:
    batch = [noise(2000), noise(1040)]
    extractor = SeamlessM4TFeatureExtractor()
    output = extractor(batch, sampling_rate=16000, **kwargs)
    for waveform, features, mask in zip(batch, *output.values(), strict=True):
        alone = extractor(waveform, sampling_rate=16000, **kwargs)
        np.testing.assert_allclose(features, alone["input_features"][0], atol=1e-5)
        np.testing.assert_array_equal(mask, alone["attention_mask"][0])
    with pytest.raises(ValueError, match=r"input_features has rows of different lengths"):
        extractor(batch, sampling_rate=16000, return_tensors="pt", **kwargs)


# What a caller may hand over


def features_of(raw: Any, **kwargs: Any) -> NDArray[np.float32]:
    output = SeamlessM4TFeatureExtractor()(raw, sampling_rate=16000, **kwargs)
    return np.asarray(output["input_features"])


A, B = noise(2000, 1), noise(2000, 2)


@pytest.mark.parametrize(
    "raw",
    [
        A,
        A.astype(np.float64),
        A[::-1][::-1],
        np.repeat(A, 2)[::2],
        A.astype(">f4"),
        A.tolist(),
        tuple(A.tolist()),
        torch.from_numpy(A),
        torch.from_numpy(A).double().requires_grad_(),
        [A],
        [A.tolist()],
        [torch.from_numpy(A)],
        torch.from_numpy(A)[None],
        np.stack([A, B])[None],
        [np.stack([A, B])],
        [torch.from_numpy(np.stack([A, B]))],
        [[A.tolist(), B.tolist()]],
        list(A),
        list(torch.from_numpy(A)),
    ],
)
def test_one_utterance_in_any_form(raw: Any) -> None:
    wanted = Reference()(A, sampling_rate=16000)["input_features"]
    np.testing.assert_allclose(features_of(raw), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "raw",
    [
        np.stack([A, B]),
        torch.from_numpy(np.stack([A, B])),
        [A.tolist(), torch.from_numpy(B)],
        (torch.from_numpy(A), B),
        np.stack([np.stack([A, B]), np.stack([B, A])]),
        torch.from_numpy(np.stack([np.stack([A, B]), np.stack([B, A])])),
        [np.stack([A, B]), B],
    ],
)
def test_a_batch_in_any_form(raw: Any) -> None:
    wanted = Reference()([A, B], sampling_rate=16000)["input_features"]
    np.testing.assert_allclose(features_of(raw), wanted, rtol=0, atol=2e-4)


def test_callers_data_is_left_alone() -> None:
    array, tensor = A.copy(), torch.from_numpy(A.copy())
    features_of([array, tensor])
    np.testing.assert_array_equal(array, A)
    np.testing.assert_array_equal(tensor, A)
    read_only = A.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features_of(read_only)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input(dtype: torch.dtype) -> None:
    half = torch.from_numpy(A).to(dtype)
    np.testing.assert_array_equal(features_of(half), features_of(half.float()))


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [(np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.int8, 2**7, 0), (np.uint8, 2**7, 2**7)],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_integer_pcm_is_scaled(dtype: Any, scale: int, offset: int, as_tensor: bool) -> None:
    floats = np.round(noise(2000).astype(np.float64) * scale)
    pcm = (floats + offset).astype(dtype)
    raw = torch.from_numpy(pcm) if as_tensor else pcm
    wanted = features_of((floats / scale).astype(np.float32), do_normalize_per_mel_bins=False)
    np.testing.assert_array_equal(features_of(raw, do_normalize_per_mel_bins=False), wanted)
    # An offset does not show in the features, which have none.
    np.testing.assert_array_equal(to_waveform(raw, 0), (floats / scale).astype(np.float32))


def test_integers_without_a_scale() -> None:
    np.testing.assert_array_equal(features_of([0] * 1000), features_of(np.zeros(1000, np.float32)))
    np.testing.assert_array_equal(features_of([0, 1] * 500), features_of([0.0, 1.0] * 500))
    with pytest.raises(ValueError, match=r"utterance 1 are torch.int64, which has no full scale"):
        features_of([A, np.arange(1000)])
    with pytest.raises(ValueError, match="uint16"):
        features_of(np.arange(1000, dtype=np.uint16))


@pytest.mark.parametrize("num_samples", [0, 1, 399])
def test_too_short_for_a_frame(num_samples: int) -> None:
    for normalize in (True, False):
        with pytest.raises(ValueError, match=rf"utterance 1 has {num_samples} samples; at least"):
            features_of([A, A[:num_samples]], do_normalize_per_mel_bins=normalize)


@pytest.mark.parametrize("num_samples", [400, 559])
def test_too_short_to_normalise(num_samples: int) -> None:
    with pytest.raises(ValueError, match=rf"utterance 0 has {num_samples} samples; .* 560"):
        features_of(A[:num_samples])
    ours, wanted = both(A[:num_samples], do_normalize_per_mel_bins=False)
    assert difference(ours, wanted).max() <= 1e-5
    assert ours["attention_mask"].tolist() == [[0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("position", [0, 777, 1999])
def test_samples_that_are_no_audio(value: float, position: int) -> None:
    broken = B.copy()
    broken[position] = value
    with pytest.raises(ValueError, match=rf"utterance 2 has a sample of .* at position {position}"):
        features_of([A, A, broken, A])


@pytest.mark.parametrize("raw", [[], (), np.empty((0, 16000)), torch.empty(0, 16000)])
def test_empty_batch(raw: Any) -> None:
    with pytest.raises(ValueError, match="at least one utterance"):
        features_of(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("speech.wav", "raw_speech must be a NumPy array.*got str"),
        (None, "got NoneType"),
        ({"array": A}, "got dict"),
        (["a.wav", "b.wav"], "utterance 0 must be floating point or integer"),
        ([A, None], "utterance 1 must be floating point or integer"),
        (A > 0, "got bool"),
        (torch.from_numpy(A) > 0, "got torch.bool"),
        (A.astype(np.complex64), "got complex64"),
        (torch.from_numpy(A).cfloat(), "got torch.complex64"),
    ],
)
def test_no_samples_at_all(raw: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        features_of(raw)


def test_impossible_shapes() -> None:
    with pytest.raises(ValueError, match=r"raw_speech must be .* got shape \[1, 1, 1, 2000\]"):
        features_of(A[None, None, None])
    with pytest.raises(ValueError, match=r"utterance 0 .* got shape \[1, 1, 2000\]"):
        features_of([A[None, None]])
    with pytest.raises(ValueError, match=r"utterance 1 .*\[2000, 2\].* transpose"):
        features_of([A, np.stack([A, B], axis=1)])
    with pytest.raises(ValueError, match=r"utterance 0 .* got shape \[\]"):
        features_of(torch.tensor(1.0))


def test_sampling_rate(caplog: pytest.LogCaptureFixture) -> None:
    extractor = SeamlessM4TFeatureExtractor()
    with pytest.raises(ValueError, match=r"must be 16000 Hz.*got 44100 Hz"):
        extractor(A, sampling_rate=44100)
    with caplog.at_level(logging.WARNING, logger="w2vbert_fast"):
        extractor(A, sampling_rate=16000)
        assert not caplog.records
        extractor(A)
        extractor(A)
    assert len(caplog.records) == 1
    assert "16000" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"padding": "left"}, "padding must be"),
        ({"padding": None}, "padding must be"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"truncation": True}, "needs max_length"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1"),
        ({"return_tensors": "tf"}, "return_tensors must be"),
    ],
)
def test_impossible_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features_of(A, **kwargs)


def test_misspelled_argument() -> None:
    with pytest.raises(TypeError, match="samplingrate"):
        SeamlessM4TFeatureExtractor()(A, samplingrate=16000)


def test_device_argument() -> None:
    extractor = SeamlessM4TFeatureExtractor()
    output = extractor(A, sampling_rate=16000, return_tensors="pt", device="cpu")
    assert {value.device.type for value in output.values()} == {"cpu"}


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    batch = [clip(index) for index in range(len(CLIPS))]
    extractor = SeamlessM4TFeatureExtractor(padding_value=1)
    wanted = extractor(batch, sampling_rate=16000, return_tensors="pt")
    tensors = [torch.from_numpy(waveform).cuda() for waveform in batch]
    for raw, device in ((batch, "cuda"), (tensors, None)):
        output = extractor(raw, sampling_rate=16000, return_tensors="pt", device=device)
        for name, value in output.items():
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), wanted[name], rtol=0, atol=2e-5)
    arrays = extractor(tensors, sampling_rate=16000)
    np.testing.assert_allclose(arrays["input_features"], wanted["input_features"], atol=2e-5)
