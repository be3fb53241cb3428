"""Micro-benchmarks against the reference: `make bench`, or `python -m pytest bench -q`.

Each group runs ours and transformers' on the same input and checks first that the answers agree.
Widths are those of `facebook/w2v-bert-2.0`; four layers stand for its 24.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import w2vbert_fast

SAMPLING_RATE = 16_000


def noise(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * SAMPLING_RATE))).astype(np.float32)


@pytest.mark.benchmark(group="features, 8 x 30 s")
@pytest.mark.parametrize("library", ["transformers", "w2vbert_fast"])
def test_features(benchmark, library: str) -> None:
    speech = [noise(30, seed) for seed in range(8)]
    extractors = {
        "transformers": transformers.SeamlessM4TFeatureExtractor(),
        "w2vbert_fast": w2vbert_fast.SeamlessM4TFeatureExtractor(),
    }
    results = {
        name: extractor(speech[0], sampling_rate=SAMPLING_RATE, return_tensors="np")
        for name, extractor in extractors.items()
    }
    difference = results["transformers"].input_features - results["w2vbert_fast"].input_features
    assert np.abs(difference).max() < 0.02
    extractor = extractors[library]
    benchmark.pedantic(
        lambda: extractor(speech, sampling_rate=SAMPLING_RATE, return_tensors="pt"),
        rounds=5,
        warmup_rounds=1,
    )


@pytest.mark.parametrize(
    "lengths",
    [pytest.param((500,), id="1 x 10 s"), pytest.param((500, 400, 250, 100, 60), id="5 mixed")],
)
@pytest.mark.parametrize("library", ["transformers", "w2vbert_fast"])
def test_encoder(benchmark, library: str, lengths: tuple[int, ...]) -> None:
    benchmark.group = f"encoder, 4 layers of width 1024, fp32, {len(lengths)} utterance(s)"
    torch.manual_seed(0)
    values = {"num_hidden_layers": 4, "apply_spec_augment": False}
    reference = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**values)).eval()
    ours = w2vbert_fast.Wav2Vec2BertModel(w2vbert_fast.Wav2Vec2BertConfig(**values)).eval()
    ours.load_state_dict(reference.state_dict())
    features = torch.randn(len(lengths), max(lengths), 160)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    model = {"transformers": reference, "w2vbert_fast": ours}[library]
    with torch.inference_mode():
        expected = reference(features, attention_mask=mask).last_hidden_state[0]
        got = ours(features, attention_mask=mask).last_hidden_state[0]
        assert (got - expected).norm() / expected.norm() < 1e-5
        benchmark.pedantic(lambda: model(features, attention_mask=mask), rounds=5, warmup_rounds=1)
