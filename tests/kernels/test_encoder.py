"""A whole tiny model on the kernels: waveform to text, against the plain path."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import w2vbert_fast
from tests.helpers.reference import TINY, padded_batch, pair, relative_error
from tests.helpers.signals import speech_like
from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.dispatch import force_triton
from w2vbert_fast.recordings.audio import load_audio

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

CLIP = Path(__file__).resolve().parent.parent / "data" / "digits_5.flac"
LENGTHS = (33, 1, 18)
SHORT = (5, 3)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls of each launcher, and copies of a depthwise weight inside one."""
    counts: Counter[str] = Counter()

    def counted(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(launcher)
        def launch(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return launcher(*args, **kwargs)

        return launch

    for module, name in (
        ("gemm", "linear"),
        ("gemm", "linear_glu"),
        ("norm", "layer_norm"),
        ("norm", "residual_layer_norm"),
        ("norm", "residual_double_layer_norm"),
        ("attention", "shaw_attention"),
        ("attention", "build_tile_map"),
        ("conv", "conv_norm_act"),
    ):
        owner = importlib.import_module(f"csrc_triton.{module}")
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    conv = importlib.import_module("csrc_triton.conv")
    launch_conv = conv.conv_norm_act

    def watch_layout(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["copies of taps"] += weight.stride(0) != 1
        return launch_conv(x, weight, *args, **kwargs)

    monkeypatch.setattr(conv, "conv_norm_act", watch_layout)
    yield counts


@pytest.mark.parametrize("position", ["relative_key", "rotary", "relative", None])
def test_encoder_on_kernels_equals_the_plain_path(position: str | None) -> None:
    _, ours = pair("Wav2Vec2BertModel", position_embeddings_type=position, add_adapter=True)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    with torch.no_grad():
        expected = ours(features, mask, output_hidden_states=True)
        ours.use_fast_kernels = True
        with force_triton():
            got = ours(features, mask, output_hidden_states=True)
    assert relative_error(got.last_hidden_state, expected.last_hidden_state) <= 1e-5
    for mine, plain in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(mine, plain) <= 1e-5


def test_fourteen_launches_a_layer(launches: Counter[str]) -> None:
    by_depth = []
    for depth in (1, 2):
        _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=depth)
        features, mask = padded_batch(SHORT, TINY["feature_projection_input_dim"])
        with force_triton(), torch.no_grad():
            ours.use_fast_kernels = True  # query, key and value are laid end to end
            launches.clear()
            ours(features, mask)
        by_depth.append(launches.copy())
    assert by_depth[1]["build_tile_map"] == 1
    assert by_depth[1]["copies of taps"] == 0
    by_depth[1].subtract(by_depth[0])
    assert +by_depth[1] == Counter(
        {
            "linear": 7,  # query, key and value are one
            "linear_glu": 1,
            "shaw_attention": 1,
            "conv_norm_act": 1,
            "residual_layer_norm": 3,
            "residual_double_layer_norm": 1,
        }
    )
    assert sum(by_depth[1].values()) == 14


def run(ours: nn.Module, triton: bool = True) -> Tensor:
    features, mask = padded_batch(SHORT, TINY["feature_projection_input_dim"])
    ours.use_fast_kernels = True
    with torch.no_grad(), force_triton() if triton else dispatch.force("plain"):
        output: Tensor = ours(features, mask)[0]
    return output


@pytest.mark.parametrize("part", ["linear_k", "depthwise_conv"])
def test_changed_weights_count_at_once(part: str) -> None:
    """What the kernels read besides the parameter; `models/optimized/test_stacked.py` has more."""
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=1)
    before = run(ours)
    layer = ours.encoder.layers[0]
    module = getattr(layer.conv_module if part == "depthwise_conv" else layer.self_attn, part)
    module.weight.data.copy_(torch.randn(module.weight.shape))
    got = run(ours)
    assert relative_error(got, run(ours, triton=False)) <= 1e-5
    assert relative_error(got, before) > 1e-3


def test_waveform_to_token_ids() -> None:
    _, ours = pair("Wav2Vec2BertForCTC", feature_projection_input_dim=160)
    extractor = w2vbert_fast.SeamlessM4TFeatureExtractor(padding_value=1)
    speech = [speech_like(seconds, 16_000, seed) for seed, seconds in enumerate((0.6, 0.31))]
    ours.use_fast_kernels = True
    outputs = []
    for context in (dispatch.force("plain"), force_triton()):
        with torch.no_grad(), context:
            inputs = extractor(speech, sampling_rate=16_000, return_tensors="pt")
            lengths = ours.valid_lengths(inputs["attention_mask"])
            logits = ours(**inputs).logits
            ids = w2vbert_fast.ops.greedy_decode(logits, lengths, blank=ours.config.pad_token_id)
        outputs.append((inputs, logits, ids))
    (plain_inputs, expected, plain_ids), (inputs, logits, ids) = outputs
    assert torch.equal(inputs["attention_mask"], plain_inputs["attention_mask"])
    assert relative_error(inputs["input_features"], plain_inputs["input_features"]) <= 1e-5
    assert relative_error(logits, expected) <= 1e-5
    assert ids == plain_ids
    assert all(ids), "the model must say something for the comparison to mean anything"


def test_greedy_decoding_on_kernels() -> None:
    logits = torch.randn(4, 9, 5)
    lengths = torch.tensor([5, 0, 1, 9])
    expected = w2vbert_fast.ops.greedy_decode(logits, lengths, blank=2)
    with force_triton():
        assert w2vbert_fast.ops.greedy_decode(logits, lengths, blank=2) == expected


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_features_of_real_speech(normalize: bool, side: str) -> None:
    speech = load_audio(CLIP, sampling_rate=16_000).samples
    extractor = w2vbert_fast.SeamlessM4TFeatureExtractor(padding_value=1, padding_side=side)
    utterances = [speech[:16_000], speech[4000 : 4000 + 8080]]  # 98 frames and an odd number, 49

    def features() -> Any:
        return extractor(
            utterances,
            sampling_rate=16_000,
            return_tensors="pt",
            do_normalize_per_mel_bins=normalize,
        )

    expected = features()
    with force_triton():
        got = features()
        extractor.use_fast_kernels = False
        assert torch.equal(features()["input_features"], expected["input_features"])
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert not torch.equal(got["input_features"], expected["input_features"]), "the same path"
    difference = (got["input_features"] - expected["input_features"]).abs()
    assert float(difference.mean()) <= 1e-4
    assert float(difference.max()) <= 0.02
