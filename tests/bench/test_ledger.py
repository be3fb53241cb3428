"""The cost ledger: counts against the launchers', against sums done by hand, and the targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

import w2vbert_fast  # noqa: F401  (registers the operations)
from bench.ledger import __main__ as command
from bench.ledger.cost import Cost, size_of, total_size
from bench.ledger.counts import roofline, seconds_on
from bench.ledger.forward import OURS, PATHS, SDPA, ledger, ratios, trace_encoder
from bench.ledger.hardware import GPUS, H100
from bench.ledger.kernels import Kernels, source_of
from bench.ledger.ours import FLOPS
from bench.ledger.predicted import LIKELY, PREDICTED, predicted_seconds, predictions
from bench.ledger.trace import Operation, on_triton, trace
from bench.ledger.workload import Workload
from csrc_triton.attention import forward as attention
from csrc_triton.gemm.config import linear_config, predicted_clocks
from csrc_triton.norm import forward as norm
from tools.virtual_gpu.requests import Uncompiled, requests
from w2vbert_fast.models.optimized.stacked import lay_end_to_end
from w2vbert_fast.ops.gemm import lie_end_to_end

META = torch.device("meta")
ARCH = "sm_90"


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def offsets(batch: int) -> Tensor:
    return tensor(batch + 1, dtype=torch.int32)


def cost_of(name: str, *arguments: Any) -> Cost:
    """Of one call of an operation, for an H100."""
    with on_triton(ARCH):
        operations = traced(lambda: getattr(torch.ops.w2vbert, name)(*arguments)).operations
    assert [operation.name for operation in operations] == [f"w2vbert.{name}"]
    cost: Cost = operations[0].cost
    return cost


ROWS, WIDTH = 65, 32
X, WEIGHT, VECTOR = tensor(ROWS, WIDTH), tensor(48, WIDTH), tensor(WIDTH)
HEADS = tensor(ROWS, 2, 16)


def attention_arguments(heads: Tensor, batch: int, longest: int, vectors: Tensor) -> list[Any]:
    return [heads, heads, heads, offsets(batch), longest, vectors, vectors.shape[0] - 9, 8]


def test_every_registered_operation_has_its_flops() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("w2vbert::")}
    assert set(FLOPS) == registered


def test_stacked_layers_are_one_launch_only_where_they_lie_end_to_end(without_rows: None) -> None:
    whole = tensor(3 * 48, WIDTH)
    apart = [tensor(48, WIDTH) for _ in range(3)]
    joined = cost_of("linear_stacked", X, list(whole.chunk(3)), [])
    separate = cost_of("linear_stacked", X, apart, [])
    assert (joined.launches, separate.launches) == (1, 3)
    assert joined.matrix_flops == separate.matrix_flops == 2 * ROWS * WIDTH * 3 * 48
    # What the ledger does to weights without data is what a model does to real ones.
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    assert lay_end_to_end([layer.weight for layer in layers])
    assert lie_end_to_end([layer.weight for layer in layers])


def test_feed_forward_is_two_products(without_rows: None) -> None:
    cost = cost_of("feed_forward", X, WEIGHT, None, "silu", tensor(WIDTH, 48), VECTOR)
    assert cost.launches == 2
    assert cost.matrix_flops == 2 * 2 * ROWS * 48 * WIDTH
    assert cost.vector_flops == 4 * ROWS * 48
    assert cost.temporary == 2 * ROWS * 48


def test_taps_are_copied_where_they_do_not_lie_as_the_kernel_reads_them(without_rows: None) -> None:
    others = (VECTOR, VECTOR, 1e-5, "silu", offsets(3))
    copied, in_place = (
        cost_of("conv_norm_act", X, weight, *others)
        for weight in (tensor(WIDTH, 7), tensor(7, WIDTH).t())
    )
    assert (copied.launches, in_place.launches) == (2, 1)
    assert (copied.read, copied.written, copied.temporary) == (2 * WIDTH * 7,) * 3
    assert (in_place.read, in_place.temporary) == (0, 0)


def test_attention_is_one_launch_whose_scratch_memory_does_not_grow(without_rows: None) -> None:
    given = [*attention_arguments(HEADS, 3, 33, tensor(8, 16))[:6], 5, 2]
    cost = cost_of("shaw_attention", *given)
    assert cost.launches == 1 + 16  # and the tile map's
    mapped = [*given, tensor(3, 2, dtype=torch.int32)]
    assert cost_of("shaw_attention", *mapped).launches == 1
    log_sum_exp = 4 * 2 * ROWS
    unwanted = cost_of("shaw_attention", *mapped, False)
    assert unwanted.temporary == cost_of("shaw_attention", *mapped).temporary + log_sum_exp
    frames = 200_000
    big = tensor(frames, 16, 64)
    cost = cost_of("shaw_attention", *attention_arguments(big, 1, frames, tensor(73, 64)))
    assert cost.launches == 1 + 16 and 0 < cost.temporary < 256 * 2**20
    assert cost.matrix_flops == 4 * 16 * frames**2 * 64 + 2 * 16 * frames * 73 * 64


def launch_of_a_norm(rows: int, width: int) -> Uncompiled:
    with requests(GPUTarget("cuda", 90, 32)) as found:
        norm.layer_norm(tensor(rows, width), tensor(width), tensor(width), 1e-5)
    (request,) = found
    return request


def test_a_launch_is_counted_once_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    request = launch_of_a_norm(100, 64)
    with pytest.raises(ValueError, match=r"norm.forward:_norm_fwd_kernel.*nobody has counted"):
        Kernels(file).cost(request)
    # Rows and both vectors; every result.
    by_hand = {"read": 2 * 100 * 64 + 2 * 2 * 64, "written": 2 * 100 * 64}
    counted = Kernels(file, (100,)).cost(request)
    assert (counted.launches, counted.read, counted.written) == (1, *by_hand.values())
    # Each program reads the vectors, which are 4 + 4 sectors.
    assert counted.again == 32 * 8 * (request.grid[0] - 1)
    assert Kernels(file).cost(request) == counted
    (row,) = json.loads(file.read_text())
    assert row["kernel"] == request.kernel and row["tensors"]["x_ptr"] == [100, 64]
    with pytest.raises(ValueError, match=r"_norm_fwd_kernel.*nobody has counted.*\[101, 64\]"):
        Kernels(file).cost(launch_of_a_norm(101, 64))
    file.write_text(json.dumps([{**row, "source": "of yesterday"}]))
    with pytest.raises(ValueError, match=r"_norm_fwd_kernel.*another since somebody counted"):
        Kernels(file).cost(request)
    assert Kernels(file, (100,)).cost(request) == counted  # counted again


def test_a_digest_is_of_a_kernel_and_of_what_it_calls() -> None:
    forward = "csrc_triton.attention.forward:"
    kernels = [
        f"{forward}shaw_attention_fwd_kernel",
        f"{forward}_attend",
        "csrc_triton.norm.forward:_norm_fwd_kernel",
    ]
    assert len({source_of(kernel) for kernel in kernels}) == 3


def test_rows_are_of_utterances_as_long_as_the_tables_of_offsets_say(tmp_path: Path) -> None:
    given = attention_arguments(tensor(40, 2, 16), 2, 20, tensor(8, 16))
    with requests(GPUTarget("cuda", 90, 32)) as found:
        attention.shaw_attention(*given[:5])
    with pytest.raises(ValueError, match=r"cu_seqlens_ptr is \[3\]; of utterances of \[20\]"):
        Kernels(tmp_path / "rows.json", (20,)).cost(found[-1])


def traced(function: Callable[[], object]) -> Any:
    with torch.no_grad():
        return trace(function, ARCH)


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
    # Written and read, fp32, by two blocks of 132 multiprocessors each, of tiles of 128 rows, which
    # begin inside a sector.
    position_scores = 2 * (4 * 73 + 28) * 2 * 132 * 128
    log_sum_exp = 4 * heads * tokens
    expected = 2 * (elements + weights + small) + position_scores + log_sum_exp
    # Left over: offsets, the tile map, the taps' copies (254 KB), and what blocks of keys at the
    # band's ends read of scratch memory besides (203 KB).
    assert 0 <= layer["bytes"] - expected < 500_000


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
