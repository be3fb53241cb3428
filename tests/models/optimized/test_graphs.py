"""`compile_for_inference`: when a graph runs, and that no answer changes.

There is no CUDA here: `Rerun` stands in for capture and replay. `tests/kernels/test_graphs.py` has
the real ones, `test_stale_graphs.py` what makes a graph invalid.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import w2vbert_fast
from csrc_triton.attention import build_tile_map
from tests.helpers.graph_models import FEATURES, RAGGED, encoder_of, graphed, same
from tests.helpers.reference import CLASSES, TINY, padded_batch
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.optimized import graphs as graphs_module
from w2vbert_fast.models.optimized.graphs import LayerGraphs, default_buckets, filled
from w2vbert_fast.models.positions import Wav2Vec2BertRotaryPositionalEmbedding


def test_buckets_are_fine_for_small_batches_and_a_quarter_apart_at_most() -> None:
    assert default_buckets(2048) == (
        *range(64, 513, 64),
        *(640, 768, 896, 1024, 1280, 1536, 1792, 2048),
    )
    assert default_buckets(100) == (64, 100)
    assert default_buckets(1) == (1,)
    sizes = default_buckets(100_000)
    assert all(64 <= b - a <= max(64, a / 4) for a, b in itertools.pairwise(sizes[:-1]))


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ((64,), 64),
        ((1,), 64),
        ((1025,), 1280),
        ((65,) * 16, 1280),
        ((0, 3, 0), 2048),
        ((1,) * 500, 512),
        ((0,) * 17 + (5,), 64),
    ],
)
def test_what_fills_a_bucket_is_no_longer_than_it_must_be(
    lengths: tuple[int, ...], size: int
) -> None:
    every = filled(lengths, size)
    assert sum(every) == size
    assert tuple(every[: len(lengths)]) == lengths
    assert max(every[len(lengths) :]) <= max(*lengths, 128)
    assert len(every) in (16, 64, 256, 1024)
    assert len(filled(lengths, size + 1)) == len(every), "few numbers of utterances, few graphs"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": True}, TypeError, "max_tokens is True; it must be an integer"),
        ({"max_tokens": 64.0}, TypeError, r"max_tokens is 64\.0; it must be an integer"),
        ({"max_graphs": 0}, ValueError, "max_graphs is 0; it must be at least 1"),
        ({"max_graphs": None}, TypeError, "max_graphs is None; it must be an integer"),
        ({"max_bytes": 0}, ValueError, "max_bytes is 0; it must be at least 1"),
        ({"buckets": [64, "a"]}, TypeError, r"buckets\[1\] is 'a'; it must be an integer"),
        ({"buckets": [0, 64]}, ValueError, r"buckets\[0\] is 0; it must be at least 1"),
        ({"buckets": []}, ValueError, r"buckets is \(\); it must be one or more rising"),
        ({"buckets": [64, 64]}, ValueError, r"buckets is \(64, 64\); it must be one or more"),
        ({"buckets": [64, 32]}, ValueError, r"buckets is \(64, 32\); it must be one or more"),
        (
            {"buckets": [64], "max_tokens": 65},
            ValueError,
            "the largest of buckets is 64; it must be at least max_tokens, 65",
        ),
    ],
)
def test_impossible_settings(options: dict[str, Any], error: type, message: str) -> None:
    model = w2vbert_fast.Wav2Vec2BertModel(w2vbert_fast.Wav2Vec2BertConfig(**TINY))
    with pytest.raises(error, match=message):
        model.compile_for_inference(**options)
    assert model.encoder.layer_graphs is None


def test_settings() -> None:
    assert LayerGraphs().max_tokens == 8192 and LayerGraphs().max_graphs == 64
    assert LayerGraphs(buckets=[10, 30]).max_tokens == 30
    both = LayerGraphs(20, [10, 30])
    assert (both.max_tokens, both.buckets) == (20, (10, 30))
    bare = w2vbert_fast.models.pretrained.Wav2Vec2BertPreTrainedModel(
        w2vbert_fast.Wav2Vec2BertConfig(**TINY)
    )
    with pytest.raises(ValueError, match="Wav2Vec2BertPreTrainedModel has no encoder layers"):
        bare.compile_for_inference()


@pytest.mark.parametrize("position", ["relative_key", "rotary", None])
@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        *((name, {}) for name in CLASSES),
        ("Wav2Vec2BertForCTC", {"add_adapter": True, "output_hidden_size": 24}),
        ("Wav2Vec2BertForSequenceClassification", {"use_weighted_layer_sum": True}),
        ("Wav2Vec2BertModel", {"num_hidden_layers": 1}),
    ],
)
def test_answers_are_those_of_the_layers_one_by_one(
    class_name: str, config: dict[str, Any], position: str | None
) -> None:
    plain, ours, device = graphed(class_name, position_embeddings_type=position, **config)
    with torch.no_grad():
        for lengths in (RAGGED, (40,), (9, 0, 30, 9), (3,) * 20):
            if class_name.endswith("XVector"):  # its TDNN needs some frames
                lengths = tuple(max(length, 9) for length in lengths)
            features, mask = padded_batch(lengths, FEATURES)
            expected = plain(features, mask, output_hidden_states=True)
            got = ours(features, mask, output_hidden_states=True)
            same(got[0], expected[0])
            for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
                same(mine, theirs)
            same(ours(features, mask)[0], expected[0])
    # Three sizes, each with and without hidden states between the first and the last.
    always_the_same = config.keys() & {"use_weighted_layer_sum", "num_hidden_layers"}
    assert device.captures == (3 if always_the_same else 6)
    assert device.replays == 8


def test_hidden_states_and_layers_by_choice() -> None:
    plain, ours, device = graphed(num_hidden_layers=3)
    features, mask = padded_batch(RAGGED, FEATURES)
    with torch.no_grad():
        for wanted in ([2], [0, -1], [1, 3], 0):
            expected = plain(features, mask, output_hidden_states=wanted).hidden_states
            got = ours(features, mask, output_hidden_states=wanted).hidden_states
            assert [state is None for state in got] == [state is None for state in expected]
            for mine, theirs in zip(got, expected, strict=True):
                if mine is not None:
                    same(mine, theirs)
        # [0, -1] and [0] need nothing that is not there anyway.
        assert device.captures == 3
        for layer in range(4):
            same(
                ours.encode(features, mask, layer=layer), plain.encode(features, mask, layer=layer)
            )
            same(
                ours.encode(features, mask, layer=layer, pool="mean"),
                plain.encode(features, mask, layer=layer, pool="mean"),
            )
    # Layer 0 needs no graph, and 3 is the graph of `forward` without hidden states.
    assert device.captures == 5


def test_one_graph_serves_all_batches_of_its_size_and_results_outlive_it() -> None:
    plain, ours, device = graphed()
    batches = [(RAGGED, 1), ((60, 9), 2), ((7,) * 10, 3), ((128,), 4)]
    results = []
    with torch.no_grad():
        for lengths, seed in batches:
            features, mask = padded_batch(lengths, FEATURES, seed)
            results.append(ours(features, mask, output_hidden_states=True).hidden_states)
        assert (device.captures, device.replays, len(encoder_of(ours).layer_graphs)) == (1, 4, 1)
        for (lengths, seed), got in zip(batches, results, strict=True):
            features, mask = padded_batch(lengths, FEATURES, seed)
            expected = plain(features, mask, output_hidden_states=True).hidden_states
            for mine, theirs in zip(got, expected, strict=True):
                same(mine, theirs)


def test_nothing_of_an_earlier_batch_stays_behind() -> None:
    plain, ours, _ = graphed()
    features, mask = padded_batch((128,), FEATURES)
    with torch.no_grad():
        assert ours(features * float("nan"), mask)[0].isnan().all()
        features, mask = padded_batch(RAGGED, FEATURES)
        same(ours(features, mask)[0], plain(features, mask)[0])
    (graph,) = encoder_of(ours).layer_graphs._graphs.values()
    assert not graph.x[sum(RAGGED) :].any()


def test_the_graph_not_used_for_longest_goes_first() -> None:
    _, ours, device = graphed(options={"max_graphs": 2})
    graphs = encoder_of(ours).layer_graphs

    def run(num_tokens: int) -> int:
        before = device.captures
        with torch.no_grad():
            ours(*padded_batch((num_tokens,), FEATURES))
        assert len(graphs) <= 2
        return device.captures - before

    sizes = (50, 100, 50, 150, 50, 100, 150)
    assert [run(size) for size in sizes] == [1, 1, 0, 1, 0, 1, 1]


def test_the_memory_of_graphs_is_bounded_and_told(caplog: pytest.LogCaptureFixture) -> None:
    row = 2 * TINY["hidden_size"] * 4  # bytes of a token's input and output
    plain, ours, device = graphed(options={"buckets": [64, 128, 256], "max_bytes": 200 * row})
    graphs = encoder_of(ours).layer_graphs

    def run(num_tokens: int) -> tuple[int, int]:
        features, mask = padded_batch((num_tokens,), FEATURES)
        with torch.no_grad(), caplog.at_level("INFO"):
            same(ours(features, mask)[0], plain(features, mask)[0])
        return device.captures, graphs.nbytes // row

    assert [run(size) for size in (60, 120, 60)] == [(1, 64), (2, 192), (2, 192)]
    assert "the buffers of 2 graphs take" in caplog.text
    # With half the room for the smaller one, the larger one, used longer ago, goes.
    graphs.max_bytes = 191 * row
    features, mask = padded_batch((30, 20), FEATURES)
    with torch.no_grad():
        ours(features, mask, output_hidden_states=True)
    assert graphs.nbytes <= 191 * row and device.captures == 3
    assert run(200)[0] == 3 and "would take" in caplog.text
    assert graphs.nbytes == sum(
        tensor.nbytes for graph in graphs._graphs.values() for tensor in (graph.x, *graph.outputs)
    )


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "shaw_attention" in func.name()
        return func(*args, **(kwargs or {}))


def test_what_no_graph_can_do_runs_one_by_one() -> None:
    plain, ours, device = graphed(options={"max_tokens": 69})
    features, mask = padded_batch(RAGGED, FEATURES)

    def check(**options: Any) -> Any:
        got, expected = ours(features, mask, **options), plain(features, mask, **options)
        same(got[0], expected[0])
        return got

    assert check()[0].requires_grad
    with torch.no_grad():
        assert len(check(output_attentions=True).attentions) == TINY["num_hidden_layers"]
        with torch.autocast("cpu", torch.bfloat16):
            check()
        with Watching() as watching:
            check()
        assert watching.calls == 2 * TINY["num_hidden_layers"]
        device.reason = "another graph is being captured"
        check()
        device.reason = None
        ours.train()
        ours(features, mask)
        ours.eval()
        features, mask = features[:, :0], mask[:, :0]
        check()
        features, mask = padded_batch((70,), FEATURES)
        check()
        assert device.captures == 0
        features, mask = padded_batch((69,), FEATURES)
        check()
        assert device.captures == 1


def test_relative_positions_and_wide_heads_have_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    options = (
        {"position_embeddings_type": "relative"},
        {"hidden_size": 260, "num_attention_heads": 2},
    )
    with torch.no_grad(), caplog.at_level("INFO", logger=graphs_module.__name__):
        for config in options:
            plain, ours, device = graphed(**config)
            features, mask = padded_batch(RAGGED, FEATURES)
            for _ in range(2):
                same(ours(features, mask)[0], plain(features, mask)[0])
            assert device.captures == 0
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        'position_embeddings_type "relative" has no kernel',
        "attention heads of 130 channels have no kernel",
    ]


def test_a_cpu_runs_the_layers_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    plain, _, _ = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    with torch.no_grad(), caplog.at_level("INFO", logger=graphs_module.__name__):
        expected = plain(features, mask)[0]
        ours = plain.compile_for_inference()
        assert ours is plain
        for _ in range(2):
            # Not to the bit: graphs would fill batches by themselves, so `sizes` does not.
            same(ours(features, mask)[0], expected)
    assert [record.getMessage() for record in caplog.records] == [
        "the encoder's layers run without CUDA graphs: the tensors are on cpu; graphs need a CUDA "
        "device"
    ]


def test_compiled_code_does_not_see_the_graphs() -> None:
    plain, ours, device = graphed()
    layout = PackedBatch.from_lengths((5, 7), 7, "cpu")
    x = torch.randn(12, TINY["hidden_size"])
    compiled = torch.compile(
        lambda x: ours.encoder(x, layout, {1}, False)[0], fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        same(compiled(x), plain.encoder(x, layout, {1}, False)[0])
    assert device.captures == 0


def test_a_size_that_cannot_be_captured_runs_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    with torch.no_grad(), caplog.at_level("INFO", logger=graphs_module.__name__):
        device.error = RuntimeError("operation not permitted when stream is capturing")
        for _ in range(3):
            same(ours(features, mask)[0], plain(features, mask)[0])
        assert (device.captures, len(encoder_of(ours).layer_graphs)) == (1, 0)
        device.error = None
        same(ours(features, mask)[0], plain(features, mask)[0])
        assert device.captures == 1, "what failed once is not tried again"
        few = padded_batch((9,), FEATURES)
        same(ours(*few)[0], plain(*few)[0])
        assert (device.captures, device.replays) == (2, 1)
        for model in (plain, ours):
            model.double().float()
        same(ours(features, mask)[0], plain(features, mask)[0])
        assert (device.captures, device.replays) == (3, 2)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage() == (
        "the encoder's layers run without a CUDA graph for 128 tokens in 16 utterances of "
        "torch.float32: RuntimeError: operation not permitted when stream is capturing"
    )


def test_another_precision_is_another_graph() -> None:
    _, ours, device = graphed()
    matmul = torch.backends.cuda.matmul
    features, mask = padded_batch(RAGGED, FEATURES)
    before = matmul.fp32_precision
    with torch.no_grad():
        try:
            for precision, captures in (("ieee", 1), ("tf32", 2), ("ieee", 2)):
                matmul.fp32_precision = precision
                ours(features, mask)
                assert device.captures == captures
        finally:
            matmul.fp32_precision = before


def test_inference_mode_and_no_grad_share_a_graph() -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    for first, second in (
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
    ):
        ours.compile_for_inference()
        encoder_of(ours).layer_graphs.device = device
        for mode in (first, second, first):
            with mode():
                same(ours(features, mask)[0], plain(features, mask)[0])
    assert (device.captures, device.replays) == (2, 6)


def test_threads_take_turns() -> None:
    plain, ours, device = graphed()
    batches = [padded_batch((20 + 3 * i, 9), FEATURES, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [plain(*batch)[0] for batch in batches]
    wrong: list[BaseException] = []
    start = threading.Barrier(len(batches))

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(10):
                with torch.no_grad():
                    same(ours(*batches[index])[0], expected[index])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (device.captures, device.replays) == (1, 80)


@pytest.mark.parametrize("position", ["relative_key", None])
def test_the_captured_part_asks_no_value_of_the_device(position: str | None) -> None:
    """Tensors without memory raise at `.item()`, `.tolist()` and sizes that depend on values."""
    config = w2vbert_fast.Wav2Vec2BertConfig(**{**TINY, "position_embeddings_type": position})
    model = w2vbert_fast.Wav2Vec2BertModel(config).eval()
    model.use_fast_kernels = True
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16)
                setattr(module, name, nn.Parameter(fake))
        x = torch.empty(64, TINY["hidden_size"], dtype=torch.bfloat16)
        cu_seqlens = torch.empty(17, dtype=torch.int32)
        layout = PackedBatch(cu_seqlens, (64, *[0] * 15), 64, None)
        output, kept, _ = model.encoder.run_layers(x, layout, {1}, False, None)
        assert output.shape == kept[1].shape == x.shape
        # Indexing by tensors initialises CUDA, even for tensors without memory: on the CPU.
        x, cu_seqlens = x.cpu(), cu_seqlens.cpu()
        build_tile_map(cu_seqlens, 128, num_tokens=64, max_seqlen=64)
        rotary = Wav2Vec2BertRotaryPositionalEmbedding(config)
        layout = PackedBatch(cu_seqlens, (64, *[0] * 15), 64, None)
        with torch.device("cpu"):
            assert rotary(x, layout)[0].shape == (64, rotary.dim)
