"""Whole models on the device: the kernels against plain PyTorch and against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, DTYPES
from tests.kernels.models import LENGTHS, SIZES, batch, fast, import_transformers, kernels, make
from tests.kernels.test_fbank import speech
from w2vbert_fast import ops
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

FRAMES = ("Wav2Vec2BertModel", "Wav2Vec2BertForCTC", "Wav2Vec2BertForAudioFrameClassification")
# Errors of a whole model are sums of many roundings, which two implementations make in different
# places. Their root mean square is the figure that compares; the largest of n such errors scatters,
# by a tenth of itself for the smallest model here.
LARGEST_LIMIT = 1.5
POOLED = ("Wav2Vec2BertForSequenceClassification", "Wav2Vec2BertForXVector")


def answers(model: Any, features: Tensor, mask: Tensor, *, on_kernels: bool = False) -> Tensor:
    """Hidden states or logits `[..., channels]` of what is valid."""
    with torch.no_grad():
        output = (fast if on_kernels else type(model).__call__)(model, features, mask)
    first: Tensor = output.last_hidden_state if "last_hidden_state" in output else output.logits
    if first.dim() == 2:
        return first
    lengths = model.valid_lengths(mask).tolist()
    return torch.cat([row[:length] for row, length in zip(first, lengths, strict=True)])


def in_three_forms(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A model's answers on the kernels, plain in `dtype`, and plain in float64.

    The float64 model has the weights as `dtype` rounds them.
    """
    features, mask = batch()
    features = features.to(dtype)
    model = model.to(dtype)
    ours = answers(model, features, mask, on_kernels=True)
    plain = answers(model, features, mask)
    exact = answers(copy.deepcopy(model).double(), features.double(), mask)
    return ours, plain, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_is_as_accurate_as_plain_pytorch(
    name: str, size: str, dtype: torch.dtype, judge: Judge
) -> None:
    ours, plain, exact = in_three_forms(make(name, size), dtype)
    judge("model/frames", ours, exact, plain, largest_limit=LARGEST_LIMIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", POOLED)
def test_an_utterance_is_as_accurate_as_plain_pytorch(
    name: str, size: str, dtype: torch.dtype, judge: Judge
) -> None:
    """Few numbers, after sums over all frames that both forms take alike: their errors are of one
    size, and their ratio scatters around 1.
    """
    ours, plain, exact = in_three_forms(make(name, size), dtype)
    judge("model/pooled", ours, exact, plain, limit=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"add_adapter": True, "output_hidden_size": 64},
        {"add_adapter": True, "use_intermediate_ffn_before_adapter": True},
        {"position_embeddings_type": "rotary"},
        {"position_embeddings_type": None},
        {"position_embeddings_type": "relative"},
        {"hidden_act": "gelu"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_variants(options: dict[str, Any], dtype: torch.dtype, judge: Judge) -> None:
    ours, plain, exact = in_three_forms(make("Wav2Vec2BertModel", "tiny", **options), dtype)
    judge("model/variants", ours, exact, plain, largest_limit=LARGEST_LIMIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_as_accurate_as_the_reference(size: str, dtype: torch.dtype, judge: Judge) -> None:
    transformers = import_transformers()
    model = make("Wav2Vec2BertModel", size).to(dtype)
    values = {**model.config.to_dict()}
    for key in ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype"):
        values.pop(key, None)
    reference = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**values))
    reference.load_state_dict(model.state_dict())
    reference = reference.eval().to(device=DEVICE, dtype=dtype)
    for length in LENGTHS[:2]:
        features, mask = batch((length,))
        features = features.to(dtype)
        with torch.no_grad():
            theirs = reference(features, attention_mask=mask).last_hidden_state[0]
            exact = copy.deepcopy(reference).double()(features.double(), attention_mask=mask)
        ours = answers(model, features, mask, on_kernels=True)
        exact_states = exact.last_hidden_state[0]
        judge("model/transformers", ours, exact_states, theirs, largest_limit=LARGEST_LIMIT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_two_runs_are_bit_equal(size: str, dtype: torch.dtype, judge: Judge) -> None:
    model = make("Wav2Vec2BertForCTC", size).to(dtype)
    features, mask = batch()
    first, second = (answers(model, features.to(dtype), mask, on_kernels=True) for _ in range(2))
    assert torch.equal(first, second)
    judge.counted("model/repeated", dtype)


def test_waveform_to_token_ids(judge: Judge) -> None:
    """Filterbank, encoder and decoding on the device against the plain path, real speech."""
    model = make("Wav2Vec2BertForCTC", "tiny")
    extractor = SeamlessM4TFeatureExtractor()
    clips = [clip.numpy() for clip in speech()]
    inputs = {name: x.to(DEVICE) for name, x in extractor(clips, return_tensors="pt").items()}
    lengths = model.valid_lengths(inputs["attention_mask"]).cpu()
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = fast(model, **inputs).logits
    packed = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
    exact = torch.cat([row[:length] for row, length in zip(expected, lengths, strict=True)])
    judge("model/speech", packed, exact.double())
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    blank = model.config.pad_token_id
    with kernels():
        ids, counts = torch.ops.w2vbert.ctc_greedy(packed, cu_seqlens, blank)
    plain = ops.greedy_decode(logits, lengths, blank=blank)
    for row, start in enumerate(cu_seqlens[:-1].tolist()):
        assert ids[start : start + int(counts[row])].tolist() == plain[row]
    assert all(plain), "the model must say something for the comparison to mean anything"
