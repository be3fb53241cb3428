"""`compile_for_inference`: the encoder's layers as CUDA graphs, captured and replayed.

In the interpreter the layers run again where a graph would be replayed; what only a device has is
skipped there.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.graphs import Rerun
from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, DTYPES, WITHOUT_DEVICE, choose
from tests.kernels.models import SIZES, batch, kernels, make
from tests.kernels.test_models import LARGEST_LIMIT, POOLED, answers
from tests.kernels.test_operations import no_waiting
from w2vbert_fast.models.encoder import Wav2Vec2BertEncoder
from w2vbert_fast.models.optimized.graphs import LayerGraphs

BUCKET = choose(2048, 32)
BATCHES = choose(((1500, 217, 64, 31), (1700,), (300,) * 6, (5,)), ((18, 9), (25,), (5,)))
"""All of one bucket, and with what fills it up of 16 utterances or, the last, of 64."""
needs_device = pytest.mark.skipif(WITHOUT_DEVICE, reason="only a device has graphs")


def compiled(model: nn.Module, **options: Any) -> LayerGraphs:
    """Switches kernels and graphs on; gives the graphs."""
    model.use_fast_kernels = True  # type: ignore[assignment]
    model.compile_for_inference(**{"buckets": [BUCKET], **options})
    graphs: LayerGraphs = model.base_model.encoder.layer_graphs
    if WITHOUT_DEVICE:
        graphs.device = Rerun()
    return graphs


def run(model: nn.Module, features: Tensor, mask: Tensor) -> Tensor:
    """`answers` with the graphs: the kernels stay switched on afterwards, and the graphs valid."""
    with kernels():
        return answers(model, features, mask)


def no_layers(*_: Any) -> None:
    raise AssertionError("the layers ran one by one")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["Wav2Vec2BertModel", "Wav2Vec2BertForCTC", POOLED[0]])
def test_replays_are_as_accurate_as_plain_pytorch(
    name: str, size: str, dtype: torch.dtype, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make(name, size).to(dtype)
    model, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    graphs = compiled(model)
    inputs = [batch(lengths) for lengths in BATCHES]
    inputs = [(features.to(dtype), mask) for features, mask in inputs]
    for features, mask in inputs:  # captures
        run(model, features, mask)
    assert len(graphs) <= 2
    if not WITHOUT_DEVICE:
        monkeypatch.setattr(Wav2Vec2BertEncoder, "run_layers", no_layers)
    results = [run(model, features, mask) for features, mask in inputs]
    monkeypatch.undo()
    for got, (features, mask) in zip(results, inputs, strict=True):
        judge(
            "model/graphs",
            got,
            answers(exact, features.double(), mask),
            answers(plain, features, mask),
            limit=2.0 if name in POOLED else 1.1,
            largest_limit=None if name in POOLED else LARGEST_LIMIT,
        )


@pytest.mark.parametrize("position", ["relative_key", "rotary", None])
def test_hidden_states(position: str | None, judge: Judge) -> None:
    model = make("Wav2Vec2BertModel", "tiny", position_embeddings_type=position)
    plain = copy.deepcopy(model)
    graphs = compiled(model)
    exact_model = copy.deepcopy(plain).double()
    results = []
    # A single utterance is not unpacked into other memory: it shows what a later replay overwrites.
    for lengths in BATCHES[1::-1]:
        features, mask = batch(lengths)
        with torch.no_grad():
            expected = exact_model(features.double(), mask, output_hidden_states=True)
            with kernels():
                got = model(features, mask, output_hidden_states=True)
                first = model.encode(features, mask, layer=1)
        results.append((got.hidden_states, first, expected.hidden_states))
    for states, first, expected_states in results:
        for mine, exact in zip(states, expected_states, strict=True):
            judge("model/graphs", mine, exact)
        judge("model/graphs", first, expected_states[1])
    assert len(graphs) == (1 if model.config.num_hidden_layers == 1 else 2)


def test_weights_in_place_moved_and_converted(judge: Judge) -> None:
    model = make("Wav2Vec2BertModel", "tiny")
    graphs = compiled(model)
    features, mask = batch(BATCHES[0])

    def check(captured: bool) -> None:
        before = list(graphs._graphs.values())
        got = run(model, features.to(model.dtype), mask)
        assert (list(graphs._graphs.values()) != before) == captured
        twin = copy.deepcopy(model).compile_for_inference(enabled=False)
        twin.use_fast_kernels = False
        exact = answers(copy.deepcopy(twin).double(), features.to(model.dtype).double(), mask)
        judge("model/graphs", got, exact, answers(twin, features.to(model.dtype), mask))

    check(captured=True)
    check(captured=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    check(captured=False)
    model.to(torch.float16).float()  # other memory, other values
    check(captured=True)
    state = {name: value.clone() * 0.9 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    check(captured=True)


def test_graphs_come_and_go(judge: Judge) -> None:
    """With one graph at a time the memory pool loses its last graph again and again."""
    model = make("Wav2Vec2BertModel", "tiny")
    plain = copy.deepcopy(model)
    graphs = compiled(model, buckets=choose([64, 128, 256], [16, 32]), max_graphs=1)
    for length in choose((50, 100, 200) * 3, (9, 20, 10)):
        features, mask = batch((length,))
        got = run(model, features, mask)
        assert len(graphs) == 1
        judge("model/graphs", got, answers(copy.deepcopy(plain).double(), features.double(), mask))


@needs_device
def test_replays_do_not_wait_for_the_device(judge: Judge) -> None:
    model = make("Wav2Vec2BertModel", "tiny").half()
    compiled(model)
    encoder: Any = model.encoder
    layout = model._layout(*(x.to(DEVICE) for x in batch(BATCHES[0])))
    x = torch.randn(layout.num_tokens, model.config.hidden_size, device=DEVICE).half()
    with torch.no_grad():
        encoder(x, layout, {1}, False)
        with no_waiting():
            encoder(x, layout, {1}, False)
    judge.counted("model/graphs", torch.float16)


@needs_device
def test_streams_take_turns(judge: Judge) -> None:
    """The buffers of a graph are shared, whatever stream it is replayed on."""
    model = make("Wav2Vec2BertModel", choose("model", "tiny")).half()
    compiled(model)
    inputs = [batch(BATCHES[0]), batch(BATCHES[0])]
    inputs = [(features.half(), mask) for features, mask in inputs]
    expected = [run(model, *pair) for pair in inputs]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    layout = model._layout(*inputs[0])
    encoder: Any = model.encoder
    with torch.no_grad():
        packed = [model.feature_projection(layout.pack(features))[0] for features, _ in inputs]
        torch.cuda.synchronize()
        results: list[list[Tensor]] = [[], []]
        for _ in range(20):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[index].append(encoder(packed[index], layout, set(), False)[0])
        torch.cuda.synchronize()
    for got, one in zip(results, expected, strict=True):
        assert all(torch.equal(each, one) for each in got)
    judge.counted("model/graphs", torch.float16)


@needs_device
def test_a_failing_capture_leaves_the_device_usable(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("Wav2Vec2BertModel", "tiny")
    features, mask = batch(BATCHES[0])
    exact = answers(copy.deepcopy(model).double(), features.double(), mask)
    graphs = compiled(model)
    run_layers = Wav2Vec2BertEncoder.run_layers
    captured = []

    def waiting(*arguments: Any) -> Any:
        found = run_layers(*arguments)
        captured.append(torch.cuda.is_current_stream_capturing())
        found[0].sum().item()  # no graph can wait
        return found

    monkeypatch.setattr(Wav2Vec2BertEncoder, "run_layers", waiting)
    stream = torch.cuda.current_stream()
    for _ in range(2):
        judge("model/graphs", run(model, features, mask), exact)
    assert captured == [False, False, True, False, False] and len(graphs) == 0
    assert torch.cuda.current_stream() == stream
    torch.randn(3, device=DEVICE).sum().item()
    monkeypatch.undo()
    few, few_mask = batch((7,) * 20)  # another graph
    run(model, few, few_mask)
    assert len(graphs) == 1


@needs_device
def test_memory_is_given_back(judge: Judge) -> None:
    model = make("Wav2Vec2BertModel", "tiny").half()
    features, mask = batch(BATCHES[0])
    features = features.half()
    model.use_fast_kernels = True
    run(model, features, mask)  # lays the weights end to end
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    compiled(model)
    run(model, features, mask)
    assert torch.cuda.memory_allocated() > before
    model.compile_for_inference(enabled=False)
    assert torch.cuda.memory_allocated() <= before + 2**20
    judge.counted("model/graphs", torch.float16)


@needs_device
def test_inside_another_capture_the_layers_are_captured_there(judge: Judge) -> None:
    model = make("Wav2Vec2BertModel", "tiny")
    graphs = compiled(model)
    layout = model._layout(*batch(BATCHES[0]))
    x = torch.randn(layout.num_tokens, model.config.hidden_size, device=DEVICE)
    encoder: Any = model.encoder
    with torch.no_grad():
        expected = encoder.run_layers(x, layout, set(), False, None)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = encoder(x, layout, set(), False)[0]
        graph.replay()
    assert torch.equal(output, expected) and len(graphs) == 0
    judge.counted("model/graphs", torch.float32)
