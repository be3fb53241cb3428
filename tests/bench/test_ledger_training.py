"""The ledger of a training step: backward costs against the launchers, by hand, and the targets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ledger import __main__ as command
from bench.ledger.forward import EAGER, OURS, SDPA
from bench.ledger.trace import trace_step, without_data
from bench.ledger.training import (
    KEPT_TARGET,
    MOVED_TARGET,
    adamw,
    trace_training,
    training_ledger,
    training_ratios,
)
from bench.ledger.workload import Workload
from tests.bench.test_ledger import (
    HEADS,
    META,
    ROWS,
    VECTOR,
    WEIGHT,
    X,
    attention_arguments,
    cost_of,
    offsets,
    tensor,
)

GRAD, BIAS = tensor(ROWS, 48), tensor(48)


def test_launches_of_gradients(without_rows: None) -> None:
    """Kernels, products of the vendor's library, and sums of shares, as their files say."""
    every = [True] * 3
    linear = [GRAD, X, WEIGHT, BIAS]
    assert cost_of("linear_backward", *linear, None, every).launches == 2 + 1  # sum of grad
    # The product again, the elementwise kernel, its shares' sum, two products.
    assert cost_of("linear_backward", *linear, "silu", every).launches == 1 + 1 + 1 + 2
    assert cost_of("linear_backward", *linear, "silu", [True, False, False]).launches == 1 + 1 + 1
    narrow = [tensor(ROWS, 24), X, WEIGHT, None]
    assert cost_of("linear_glu_backward", *narrow, every).launches == 1 + 1 + 2
    assert cost_of("layer_norm_backward", X, X, VECTOR, 1e-5).launches == 1 + 1
    heads = attention_arguments(HEADS, 3, 33, tensor(8, 16))[:5]
    log_sum_exp = tensor(2, ROWS, dtype=torch.float32)
    given = [HEADS, *heads[:3], HEADS, log_sum_exp, *heads[3:]]
    tiles = tensor(3, 2, dtype=torch.int32)
    for vectors, launches in ((None, 3), (tensor(8, 16), 3 + 2)):  # shares and their sum
        cost = cost_of("shaw_attention_backward", *given, vectors, 5, 2, tiles, 0.0, None)
        assert cost.launches == launches
    big, frames = tensor(200_000, 16, 64), 200_000
    rows = tensor(16, frames, dtype=torch.float32)
    layout = attention_arguments(big, 1, frames, tensor(73, 64))[3:]
    tiles = tensor(-(-frames // 128), 2, dtype=torch.int32)
    given = [big] * 5
    cost = cost_of("shaw_attention_backward", *given, rows, *layout, tiles, 0.0, None)
    # Position scores of some heads at a time; the sum of a group adds to that of those before.
    assert cost.launches % 5 == 0 and cost.launches > 5


def test_attention_s_arithmetic_by_hand(without_rows: None) -> None:
    """14 C T + 6 C (L + R + 1) FLOPs a token, as the kernels' file says."""
    tokens, heads, head_dim = HEADS.shape
    vectors = tensor(8, 16)
    log_sum_exp = tensor(heads, tokens, dtype=torch.float32)
    layout = [offsets(3), 33, vectors, 5, 2, tensor(3, 2, dtype=torch.int32), 0.0, None]
    given = [HEADS, HEADS, HEADS, HEADS, HEADS]
    cost = cost_of("shaw_attention_backward", *given, log_sum_exp, *layout)
    width = heads * head_dim
    assert cost.matrix_flops == tokens * (14 * width * 33 + 6 * width * 8)
    again = cost_of("shaw_attention_backward", *given, log_sum_exp[:0, :0], *layout)
    assert again.launches == cost.launches + 1
    assert again.matrix_flops - cost.matrix_flops == tokens * (4 * width * 33 + 2 * width * 8)


def test_feed_forward_s_arithmetic_by_hand(without_rows: None) -> None:
    rows, width, inner = 1000, 64, 256
    x, weight1, weight2 = tensor(rows, width), tensor(inner, width), tensor(width, inner)
    given = [x, x, weight1, tensor(inner), "silu", weight2, tensor(width), [True] * 5]
    cost = cost_of("feed_forward_backward", *given)
    assert cost.matrix_flops == 5 * 2 * rows * width * inner
    results = 2 * (rows * width + 2 * inner * width) + 4 * (inner + width)
    # The inside and its gradient; 125 programs of 8 rows leave a share of the bias's gradient each.
    assert 0 <= cost.temporary + results - 2 * 2 * rows * inner <= 4 * 125 * inner + results
    assert cost.launches == 1 + 1 + 4 + 1 + 1  # again, elementwise, products, sums of both biases


def test_bytes_of_gradients_by_hand() -> None:
    """Every tensor of each kernel and product once; shares of sums are written and read."""
    step = trace_training(OURS, "none", Workload(2, 80, layers=2))
    cost = {
        f"{o.name} {o.shape}".removeprefix("w2vbert."): o.cost for o in step.backward.operations
    }
    rows, width, inner = 160, 1024, 4096
    norm = cost["layer_norm_backward 160x1024"]
    shares = 4 * (rows // 2) * 2 * width  # of 80 programs, of weight and bias
    assert norm.read == 2 * (2 * rows * width + width) + shares
    assert norm.written == 2 * rows * width + shares + 4 * 2 * width
    feed_forward = cost["feed_forward_backward 160x1024 @ 160x1024"]
    x, h, weight = 2 * rows * width, 2 * rows * inner, 2 * width * inner
    shares = 4 * (rows // 8) * inner
    again = x + weight + 2 * inner
    products = (x + weight) + (x + h) + (h + weight) + (h + x)
    assert feed_forward.read == again + products + 2 * h + shares + x  # and the sum of grad
    products = h + weight + x + weight
    assert feed_forward.written == h + products + 2 * h + shares + 4 * (inner + width)


def test_a_step_by_hand() -> None:
    with without_data("sm_90", training=True):
        weight = torch.empty(8, 4, device=META, requires_grad=True)
        x = torch.empty(6, 4, device=META)

        def loss() -> Tensor:
            y = torch.nn.functional.linear(x, weight)  # [6, 8]
            return torch.nn.functional.dropout(torch.nn.functional.silu(y), 0.1).sum()

        step = trace_step(loss, "sm_90")
    names = [operation.name for operation in step.forward.operations]
    assert names == ["aten.mm", "aten.silu", "aten.native_dropout", "aten.sum"]
    # silu keeps y, dropout a mask of bytes; the loss is alive too.
    assert step.kept_bytes == 4 * 48 + 48 + 4
    backward = [operation.name for operation in step.backward.operations]
    assert backward[-1] == "aten.mm"
    assert "aten.native_dropout_backward" in backward and "aten.silu_backward" in backward
    assert step.backward.cost.matrix_flops == step.forward.cost.matrix_flops == 2 * 6 * 8 * 4
    assert step.peak_bytes > step.kept_bytes


@pytest.mark.parametrize("path", [OURS, SDPA])
def test_kept_is_what_autograd_saves(path: str) -> None:
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not (base.is_leaf and base.requires_grad):  # no parameter, nor a view of one
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step = trace_training(path, "none", Workload(2, 80, layers=2))
    assert step.kept_bytes == pytest.approx(sum(saved.values()), rel=0.02)


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return training_ledger(Workload(layers=3))


def test_targets(counted: dict[str, Any]) -> None:
    """B = 16, T = 1500, bf16: a quarter of the activation bytes, a third of the bytes moved."""
    for reference in (SDPA, EAGER):
        ratio = training_ratios(counted, reference)
        assert ratio["kept_bytes"] >= KEPT_TARGET == 4
        assert ratio["kept_bytes_layer"] >= KEPT_TARGET
        assert ratio["bytes"] >= MOVED_TARGET == 3


def test_our_layer_by_hand(counted: dict[str, Any]) -> None:
    """What a layer keeps, and its products, from the formulas."""
    tokens, frames, width, inner, heads = 24_000, 1500, 1024, 4096, 16
    runs = {run["policy"]: run["layer"] for run in counted["runs"] if run["path"] == OURS}
    row = 2 * tokens * width
    # Inputs of ffn1, q/k/v, out, GLU, convolution, pointwise, ffn2; sums in front of four norms,
    # and q, k, v; the mask of a dropout takes a byte, the log-sum-exp four a head.
    kept = 14 * row + row // 2 + 4 * heads * tokens
    assert runs["none"]["kept_bytes"] == kept
    # The attention's input stays: q, k, v, the output and the log-sum-exp go.
    attention = 4 * row + 4 * heads * tokens
    assert abs(runs["attention"]["kept_bytes"] - (kept - attention)) < 1000
    assert abs(runs["layer"]["kept_bytes"] - row) < 1000
    weights = 4 * width * inner + 7 * width * width
    forward = tokens * (2 * weights + 4 * frames * width + 2 * width * 73)
    assert runs["none"]["forward"]["matrix_flops"] == forward
    # A kernel is told that a result has no gradient, not given zeros for it.
    ways = [run["layer_operations"]["backward"] for run in counted["runs"] if run["path"] == OURS]
    assert not [row for rows in ways for row in rows if row["operation"] == "aten.zeros_like"]
    again = 2 * tokens * (2 * width * inner + 2 * width * width)
    backward = tokens * (4 * weights + 14 * frames * width + 6 * width * 73) + again
    assert runs["none"]["backward"]["matrix_flops"] == backward
    assert runs["layer"]["backward"]["matrix_flops"] == backward + forward
    projections = tokens * (2 * 4 * width * width + 4 * frames * width + 2 * width * 73)
    assert runs["attention"]["backward"]["matrix_flops"] == backward + projections


def test_a_step_is_all_layers_forwards_and_backwards(counted: dict[str, Any]) -> None:
    tokens, projection, layers = 24_000, 160 * 1024, counted["layers"]
    for run in counted["runs"]:
        layer, step = run["layer"], run["step"]
        of_layers = layers * sum(layer[way]["matrix_flops"] for way in ("forward", "backward"))
        # Besides the layers, the feature projection: a product forwards and at most two backwards.
        assert 0 < step["matrix_flops"] - of_layers <= 3 * 2 * tokens * projection
        assert step["bytes"] >= layers * sum(layer[w]["bytes"] for w in ("forward", "backward"))
        assert layers * layer["kept_bytes"] <= run["kept_bytes"] < run["peak_bytes"]
        for gpu in counted["gpus"]:
            seconds = run["roofline"][gpu["name"]]["seconds"]
            assert seconds >= step["matrix_flops"] / gpu["matrix"]["bf16"]
    optimizer = counted["adamw"]
    assert optimizer["parameters"] > 20_000_000 * layers
    assert optimizer["vector_flops"] == 14 * optimizer["parameters"]


def test_adamw() -> None:
    cost = adamw(10, 2)
    assert (cost.read, cost.written) == (80, 60)


def test_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ledger.json"
    arguments = ["--training", "--batch", "2", "--frames", "80", "--layers", "2"]
    assert command.main([*arguments, "--json", str(file), "--operations"]) == 0
    printed = capsys.readouterr().out
    assert "a model, not a measurement" in printed
    assert "recomputing attention" in printed and "AdamW" in printed
    written = json.loads(file.read_text())
    assert written["schema"] == "w2vbert-ledger-training/v1"
    for run in written["runs"]:
        for direction in ("forward", "backward"):
            by_kind = sum(row["bytes"] for row in run["layer_operations"][direction])
            assert by_kind == run["layer"][direction]["bytes"]
    with pytest.raises(SystemExit):
        command.main(["--training", "--frames", "0"])
    assert "frames is 0" in capsys.readouterr().err


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="policy is 'attention'; transformers sdpa has 'none'"):
        trace_training(SDPA, "attention", Workload(1, 8, layers=1))
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        Workload(dtype="int8")
