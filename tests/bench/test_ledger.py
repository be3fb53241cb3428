"""The cost ledger: counts against the launchers', against sums done by hand, and the targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import w2vbert_fast  # noqa: F401  (registers the operations)
from bench.ledger import __main__ as command
from bench.ledger.cost import Call, Cost, size_of, total_size
from bench.ledger.counts import roofline, seconds_on
from bench.ledger.forward import OURS, PATHS, SDPA, ledger, ratios, trace_encoder
from bench.ledger.hardware import GPUS, H100
from bench.ledger.ours import COSTS
from bench.ledger.predicted import LIKELY, PREDICTED, predicted_seconds, predictions
from bench.ledger.trace import Counter, Operation, trace
from bench.ledger.workload import Workload
from csrc_triton import ctc
from csrc_triton.attention import build_tile_map, forward as attention
from csrc_triton.conv import forward as conv
from csrc_triton.fbank import forward as fbank
from csrc_triton.gemm import forward as linear
from csrc_triton.gemm.config import linear_config, predicted_clocks
from csrc_triton.norm import forward as norm
from tools.virtual_gpu.requests import Uncompiled
from w2vbert_fast.models.optimized.stacked import lay_end_to_end
from w2vbert_fast.ops.gemm import lie_end_to_end

META = torch.device("meta")
ARCH = "sm_90"


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def offsets(batch: int) -> Tensor:
    return tensor(batch + 1, dtype=torch.int32)


def cost_of(name: str, arguments: dict[str, Any], results: list[Tensor]) -> Cost:
    def count(function: Callable[[], object]) -> Cost:
        with Counter(ARCH) as counter:
            function()
        return counter.trace.cost

    return COSTS[name](Call(arguments, results, ARCH, count))


ROWS, WIDTH = 65, 32
X, WEIGHT, VECTOR = tensor(ROWS, WIDTH), tensor(48, WIDTH), tensor(WIDTH)
HEADS = tensor(ROWS, 2, 16)
ATTENTION = {
    "query": HEADS,
    "key": HEADS,
    "value": HEADS,
    "cu_seqlens": offsets(3),
    "max_seqlen": 33,
    "distance_embedding": tensor(8, 16),
    "left_max_position": 5,
    "right_max_position": 2,
}
BIG = tensor(200_000, 16, 64)
LAUNCHER_CALLS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "layer_norm": (
        "layer_norm",
        norm.layer_norm,
        {"x": X, "weight": VECTOR, "bias": VECTOR, "eps": 1e-5},
    ),
    "residual": (
        "residual_layer_norm",
        norm.residual_layer_norm,
        {"residual": X, "x": X, "scale": 0.5, "weight": VECTOR, "bias": VECTOR, "eps": 1e-5},
    ),
    "double": (
        "residual_double_layer_norm",
        norm.residual_double_layer_norm,
        {
            **{"residual": X, "x": X, "scale": 0.5, "weight1": VECTOR, "bias1": VECTOR},
            **{"weight2": VECTOR, "bias2": VECTOR, "eps": 1e-5},
        },
    ),
    "linear": ("linear", linear.linear, {"x": X, "weight": WEIGHT, "bias": None}),
    "linear_glu": ("linear_glu", linear.linear_glu, {"x": X, "weight": WEIGHT, "bias": None}),
    "conv, taps copied": (
        "conv_norm_act",
        conv.conv_norm_act,
        {
            **{"x": X, "conv_weight": tensor(WIDTH, 7), "norm_weight": VECTOR},
            **{"norm_bias": VECTOR, "eps": 1e-5, "activation": "silu", "cu_seqlens": offsets(3)},
        },
    ),
    "conv, taps in place": (
        "conv_norm_act",
        conv.conv_norm_act,
        {
            **{"x": X, "conv_weight": tensor(7, WIDTH).t(), "norm_weight": VECTOR},
            **{"norm_bias": VECTOR, "eps": 1e-5, "activation": "silu", "cu_seqlens": offsets(3)},
        },
    ),
    "attention, own tile map": ("shaw_attention", attention.shaw_attention, ATTENTION),
    "attention, tile map given": (
        "shaw_attention",
        attention.shaw_attention,
        {**ATTENTION, "tile_map": tensor(3, 2, dtype=torch.int32)},
    ),
    "attention, no positions": (
        "shaw_attention",
        attention.shaw_attention,
        {**ATTENTION, "distance_embedding": None},
    ),
    "attention, more tiles than programs": (
        "shaw_attention",
        attention.shaw_attention,
        {
            **ATTENTION,
            **{"query": BIG, "key": BIG, "value": BIG, "max_seqlen": 200_000},
            **{"cu_seqlens": offsets(1), "distance_embedding": tensor(73, 64)},
            **{"left_max_position": 64, "right_max_position": 8},
        },
    ),
    "tile map": (
        "attention_tile_map",
        lambda x, head_size, cu_seqlens, max_seqlen: build_tile_map(
            cu_seqlens, 128, num_tokens=x.shape[0], max_seqlen=max_seqlen
        ),
        {"x": X, "head_size": 16, "cu_seqlens": offsets(3), "max_seqlen": 33},
    ),
    "filterbank": (
        "log_mel_filterbank",
        lambda **a: fbank.log_mel_filterbank(**a, num_frames=98),
        {
            "waveforms": tensor(16_000, dtype=torch.float32),
            "cu_seqlens": offsets(1),
            "num_mel_bins": 80,
            "sampling_rate": 16_000,
        },
    ),
    "normalisation": (
        "normalize_and_stack",
        lambda **a: fbank.normalize_and_stack(**a, num_stacked=49),
        {"features": tensor(98, 80, dtype=torch.float32), "cu_seqlens": offsets(1), "stride": 2},
    ),
    "ctc": (
        "ctc_greedy",
        ctc.ctc_greedy,
        {"logits": tensor(98, 32), "cu_seqlens": offsets(3), "blank": 0},
    ),
}


def test_every_registered_operation_has_a_cost() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("w2vbert::")}
    assert set(COSTS) == registered
    forward = {name for name in registered if not name.endswith("_backward")}
    stacked = {"linear_stacked", "feed_forward"}  # no launchers of their own: see below
    assert {name for name, _, _ in LAUNCHER_CALLS.values()} == forward - stacked


@pytest.mark.parametrize("case", LAUNCHER_CALLS)
def test_launches_are_those_of_the_launcher(case: str, launched: list[Uncompiled]) -> None:
    name, launcher, arguments = LAUNCHER_CALLS[case]
    if case == "filterbank":  # its tables are made once and kept
        launcher(**arguments)
        launched.clear()
    with Counter(ARCH) as counter:
        results = launcher(**arguments)
    results = list(results) if isinstance(results, tuple) else [results]
    launches = len(launched) + counter.trace.cost.launches
    assert cost_of(name, arguments, results).launches == launches
    # What the launcher allocates beyond its results, as far as tensors without data show it.
    cost = cost_of(name, arguments, results)
    if name in ("shaw_attention", "ctc_greedy", "normalize_and_stack"):
        held = sum(result.untyped_storage().nbytes() for result in results)
        # Tables of offsets come and go besides.
        maps = 65536 if "tile_map" not in arguments and name != "ctc_greedy" else 0
        assert held + cost.temporary <= counter.trace.peak_bytes <= held + cost.temporary + maps


def test_stacked_layers_are_one_launch_only_where_they_lie_end_to_end() -> None:
    whole = tensor(3 * 48, WIDTH)
    apart = [tensor(48, WIDTH) for _ in range(3)]
    y = tensor(ROWS, 3 * 48)
    joined = cost_of("linear_stacked", {"x": X, "weights": whole.chunk(3), "biases": []}, [y])
    separate = cost_of("linear_stacked", {"x": X, "weights": apart, "biases": []}, [y])
    assert (joined.launches, separate.launches) == (1, 3)
    assert separate.read - joined.read == 2 * size_of(X)
    assert joined.matrix_flops == separate.matrix_flops == 2 * ROWS * WIDTH * 3 * 48
    # What the ledger does to weights without data is what a model does to real ones.
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    assert lay_end_to_end([layer.weight for layer in layers])
    assert lie_end_to_end([layer.weight for layer in layers])


def test_feed_forward_is_two_products() -> None:
    first, second = tensor(48, WIDTH), tensor(WIDTH, 48)
    arguments = {"x": X, "weight1": first, "bias1": None, "weight2": second, "bias2": VECTOR}
    cost = cost_of("feed_forward", {**arguments, "activation": "silu"}, [tensor(ROWS, WIDTH)])
    assert cost.launches == 2
    assert cost.matrix_flops == 2 * 2 * ROWS * 48 * WIDTH
    assert cost.temporary == 2 * ROWS * 48
    inner = 2 * ROWS * 48  # written, and read again
    assert cost.moved == 2 * inner + 2 * (2 * ROWS * WIDTH + 2 * 48 * WIDTH + WIDTH)


def traced(function: Callable[[], object]) -> Any:
    with torch.no_grad():
        return trace(function, "sm_90")


def test_bytes_and_flops_of_pytorch_operations() -> None:
    def run() -> Tensor:
        x = torch.empty(6, 8, device=META)
        w = torch.empty(8, 4, device=META)
        y = (x @ w).relu_()  # [6, 4]
        z = y.t().reshape(2, 12)  # a copy
        return z + torch.empty(12, device=META).expand(2, 12)

    operations = traced(run).operations
    assert [operation.name for operation in operations] == [
        "aten.mm",
        "aten.relu_",
        "aten.clone",
        "aten.add",
    ]
    moved = [(operation.cost.read, operation.cost.written) for operation in operations]
    assert moved == [((48 + 32) * 4, 24 * 4), (96, 96), (96, 96), (96 + 12 * 4, 96)]
    assert [operation.cost.matrix_flops for operation in operations] == [2 * 6 * 8 * 4, 0, 0, 0]
    assert [operation.cost.vector_flops for operation in operations] == [0, 24, 0, 24]


def test_a_gather_reads_what_it_returns_and_a_copy_does_not_read_its_target() -> None:
    table = torch.empty(1000, 16, device=META)
    few = torch.empty(5, dtype=torch.int64, device=META)
    many = torch.empty(5000, dtype=torch.int64, device=META)
    target = torch.empty(5, 16, device=META)

    def run() -> None:
        target.copy_(torch.nn.functional.embedding(few, table))
        table.index_select(0, many)

    cost = [operation.cost for operation in traced(run).operations]
    assert cost[0].read == 5 * 16 * 4 + 5 * 8
    assert (cost[1].read, cost[1].written) == (320, 320)
    assert cost[2].read == 1000 * 16 * 4 + 5000 * 8


def test_views_and_memory_without_work_are_no_launches() -> None:
    x = torch.empty(4, 6, device=META)
    nothing = traced(
        lambda: (x.view(6, 4), x.t(), x[1:, None], torch.empty_like(x), x.expand(3, 4, 6))
    )
    assert nothing.operations == []
    assert size_of(x.expand(3, 4, 6)) == size_of(x) == 96
    assert size_of(x[:1].expand(4, 6)) == 24
    assert total_size([x, x, x[:2], None]) == 96 + 48


def test_an_equal_tensor_twice_is_read_once() -> None:
    x = torch.empty(100, device=META)
    assert traced(lambda: x * x).operations[0].cost.read == 400


def test_peak_counts_what_is_alive_at_once() -> None:
    x = torch.empty(1000, device=META)  # given, so no activation

    def run() -> Tensor:
        a = x + 1  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b + 1  # 8000
        d = c + b  # 12000
        del b, c
        return d.view(10, 100) * 2  # 8000

    assert traced(run).peak_bytes == 12_000
    assert traced(lambda: torch.nn.functional.relu(x.view(10, 100))).peak_bytes == 4000


@pytest.fixture
def unknown_operation() -> Iterator[None]:
    library = torch.library.Library("w2vbert", "FRAGMENT")
    library.define("without_a_cost(Tensor x) -> Tensor")
    library.impl("without_a_cost", lambda x: x.clone(), "CompositeExplicitAutograd")
    yield
    library._destroy()


def test_an_operation_without_a_cost_is_an_error(unknown_operation: None) -> None:
    x = torch.empty(3, device=META)
    with pytest.raises(NotImplementedError, match=r"w2vbert\.without_a_cost"):
        traced(lambda: torch.ops.w2vbert.without_a_cost(x))


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return ledger(Workload(16, 1500, "bf16", layers=3))


def test_targets(counted: dict[str, Any]) -> None:
    """A third of the launches and a fifth of the bytes of the reference's sdpa path, a layer."""
    ours, reference = (counted["paths"][path]["layer"] for path in (OURS, SDPA))
    assert ours["launches"] == 14
    assert 3 * ours["launches"] <= reference["launches"]
    assert 5 * ours["bytes"] <= reference["bytes"]
    ratio = ratios(counted)
    assert ratio["bytes"] == reference["bytes"] / ours["bytes"]


def test_targets_at_a_smaller_batch() -> None:
    small = ledger(Workload(4, 1500, "bf16", layers=2), paths=(OURS, SDPA))
    ratio = ratios(small)
    assert ratio["launches"] >= 3
    assert ratio["bytes"] >= 5


def test_a_layer_by_hand(counted: dict[str, Any]) -> None:
    """The width-1024 layer's products, and its activations in bf16, from the formulas."""
    tokens, frames, width, inner, heads = 24_000, 1500, 1024, 4096, 16
    layer = counted["paths"][OURS]["layer"]
    weights = 4 * width * inner + (3 + 1 + 2 + 1) * width * width
    attention_flops = 4 * frames * width + 2 * width * 73
    assert layer["matrix_flops"] == tokens * (2 * weights + attention_flops)
    # In and out of: 4 norms (4 each), 2 x feed-forward, QKV, attention, out, GLU, conv, pointwise.
    elements = tokens * (4 * 4 * width + 4 * (width + inner) + (1 + 3 + 4 + 2 + 2 + 2 + 2) * width)
    vectors = 5 * 2 * width + 2 * (width + inner) + 4 * width + 2 * width  # norms and biases
    small = 73 * (width // heads) + 31 * width + vectors
    # Written and read, fp32, of whole tiles of 128 rows, each of which begins inside a sector.
    position_scores = 2 * (4 * 73 + 28) * heads * 16 * 12 * 128
    log_sum_exp = 4 * heads * tokens
    expected = 2 * (elements + weights + small) + position_scores + log_sum_exp
    # Left over: offsets and the tile map, and the taps' copy.
    assert 0 <= layer["bytes"] - expected < 300_000


def test_reference_without_mask_is_cheaper() -> None:
    with_mask, without = (
        trace_encoder(SDPA, Workload(2, 100, layers=2, mask=mask)) for mask in (True, False)
    )
    assert without.cost.launches < with_mask.cost.launches
    assert without.cost.moved < with_mask.cost.moved
    names = [operation.name for operation in without.operations]
    assert names.count("aten._scaled_dot_product_efficient_attention") == 2


def test_mask_rows_that_are_multiples_of_16_are_not_padded() -> None:
    def padded(frames: int) -> int:
        operations = trace_encoder(SDPA, Workload(1, frames, layers=1, mask=False)).operations
        return sum(operation.name == "aten.constant_pad_nd" for operation in operations)

    assert (padded(96), padded(100)) == (1, 2)  # one is the convolution's


def test_roofline_takes_the_slower_of_memory_and_arithmetic() -> None:
    memory = Cost(1, read=3_350_000_000, matrix_flops=10)
    arithmetic = Cost(1, read=10, matrix_flops=int(989.4e9))
    assert seconds_on(H100, memory, "bf16") == pytest.approx(1e-3)
    assert seconds_on(H100, arithmetic, "bf16") == pytest.approx(1e-3)
    assert seconds_on(H100, Cost(1, vector_flops=int(66.9e9)), "bf16") == pytest.approx(1e-3)
    operations = [
        Operation("a", "", memory),
        Operation("b", "", arithmetic),
        Operation("a", "", memory),
    ]
    term = roofline(H100, operations, "bf16")
    assert term["seconds"] == pytest.approx(3e-3)
    assert (term["largest_term"], term["largest_bound"]) == ("a", "bandwidth")
    assert term["largest_share"] == pytest.approx(2 / 3)
    assert term["share_bandwidth_bound"] == pytest.approx(2 / 3)


def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ledger.json"
    arguments = ["--batch", "2", "--frames", "80", "--layers", "2", "--json", str(file)]
    assert command.main([*arguments, "--operations"]) == 0
    printed = capsys.readouterr().out
    assert "a model, not a measurement" in printed
    assert all(gpu.name in printed for gpu in GPUS)
    written = json.loads(file.read_text())
    assert written["schema"] == "w2vbert-ledger/v1"
    assert set(written["paths"]) == set(PATHS)
    for counts in written["paths"].values():
        by_kind = sum(row["bytes"] for row in counts["layer_operations"])
        assert by_kind == counts["layer"]["bytes"]


def test_predictions_lie_between_their_range_and_above_the_bound() -> None:
    found = predictions(Workload(2, 80, layers=2))
    for gpu in PREDICTED:
        kernels = [times[gpu.name] for times in found["kernels"].values()]
        for times in (*kernels, found[OURS][gpu.name], found[SDPA][gpu.name]):
            assert 0 <= times["bound"] < times["best"] < times["likely"] < times["worst"]
        for name, whole in found[OURS][gpu.name].items():
            assert sum(times[name] for times in kernels) == pytest.approx(whole)


def test_a_predicted_product_takes_the_clocks_of_its_tile() -> None:
    operation = Operation("w2vbert.linear", "24000x1024 @ 4096x1024", _product(24_000, 4096, 1024))
    size = (24_000, 4096, 1024, torch.bfloat16, "sm_90", 132)
    clock = 989.4e12 / (2 * 2048 * 132)
    assert 1.8e9 < clock < 1.9e9
    exact = replace(LIKELY, tiles=0.5, between=1e-6)
    seconds = predicted_clocks(linear_config(*size), *size) / (clock * 0.5) + 1e-6
    assert predicted_seconds(H100, operation, "bf16", exact) == pytest.approx(seconds)
    slow = replace(H100, bandwidth=1e9)  # so slow that it alone counts
    moving = operation.cost.moved / (1e9 * exact.bandwidth) + 1e-6
    assert predicted_seconds(slow, operation, "bf16", exact) == pytest.approx(moving)


def _product(tokens: int, columns: int, inner: int) -> Cost:
    moved = 2 * (tokens * inner + columns * inner)
    return Cost(1, moved, 2 * tokens * columns, matrix_flops=2 * tokens * columns * inner)


def test_the_command_says_that_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--batch", "2", "--frames", "80", "--layers", "2", "--predicted"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTED, not measured: 2 utterances x 80 frames")
    assert all(gpu.name in printed for gpu in PREDICTED)
    with pytest.raises(SystemExit):
        command.main(["--predicted", "--training"])
    assert "--predicted is of a forward pass" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch is 0"),
        (["--frames", "-1"], "frames is -1"),
        (["--layers", "0"], "layers is 0"),
        (["--arch", "pentium"], "arch is 'pentium'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
