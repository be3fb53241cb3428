"""What is measured for a model is read where it is needed, and its kernels are compiled."""

from __future__ import annotations

import pytest
import torch

from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.inference import batching
from w2vbert_fast.ops import tuned
from w2vbert_fast.ops.tuned import Case


@pytest.fixture
def model() -> Wav2Vec2BertForCTC:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return Wav2Vec2BertForCTC(
        Wav2Vec2BertConfig(**size, num_attention_heads=2, vocab_size=8)
    ).eval()


def test_limit_and_budget_of_a_model_are_read(
    model: Wav2Vec2BertForCTC, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that says that it is a GPU; the parameter is all that is asked."""
    numbers = {tuned.GRAPH_LIMIT: 2048, tuned.FRAME_BUDGET: 64_000}
    asked: list[Case] = []

    def number(device: torch.device, case: Case) -> int | None:
        asked.append(case)
        return numbers[case.operation]

    monkeypatch.setattr(tuned, "number", number)
    model.compile_for_inference()
    assert model.wav2vec2_bert.encoder.layer_graphs.max_tokens == 8192 and not asked
    assert batching.usual_budget(model) == batching.USUAL_BUDGET["cpu"] and not asked
    monkeypatch.setattr(type(model), "parameters", lambda self: iter([_OnAGpu()]))
    model.compile_for_inference()
    assert model.wav2vec2_bert.encoder.layer_graphs.max_tokens == 2048
    assert batching.usual_budget(model) == 64_000
    assert {case.shape for case in asked} == {(1, 32, 48)}
    model.compile_for_inference(max_tokens=512)
    assert model.wav2vec2_bert.encoder.layer_graphs.max_tokens == 512


class _OnAGpu:
    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.bfloat16
