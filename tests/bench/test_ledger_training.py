"""The ledger of a training step: backward costs against the launchers, by hand, and the targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ledger import __main__ as command
from bench.ledger.cost import size_of
from bench.ledger.forward import EAGER, OURS, SDPA
from bench.ledger.ours import COSTS
from bench.ledger.trace import Counter, trace_step, without_data
from bench.ledger.training import (
    KEPT_TARGET,
    MOVED_TARGET,
    adamw,
    trace_training,
    training_ledger,
    training_ratios,
)
from bench.ledger.workload import Workload
from csrc_triton import plans
from csrc_triton.attention import backward as attention_backward
from csrc_triton.conv import backward as conv_backward
from csrc_triton.gemm import backward as linear_backward
from csrc_triton.norm import backward as norm_backward
from tests.bench.test_ledger import (
    ARCH,
    ATTENTION,
    BIG,
    HEADS,
    META,
    ROWS,
    VECTOR,
    WEIGHT,
    WIDTH,
    X,
    cost_of,
    offsets,
    tensor,
)
from tools.virtual_gpu.requests import Uncompiled

ALL = (True, True, True)


GRAD, BIAS = tensor(ROWS, 48), tensor(48)
LINEAR = {"grad_output": GRAD, "x": X, "weight": WEIGHT, "bias": BIAS, "needs": ALL}
FEED_FORWARD = {
    **{"grad_output": X, "x": X, "weight1": WEIGHT, "bias1": BIAS, "activation": "silu"},
    **{"weight2": tensor(WIDTH, 48), "bias2": VECTOR},
}
CONV = {
    **{"grad_output": X, "x": X, "conv_weight": tensor(WIDTH, 7), "norm_weight": VECTOR},
    **{"norm_bias": VECTOR, "eps": 1e-5, "activation": "silu", "cu_seqlens": offsets(3)},
}
LONG = {
    **ATTENTION,
    **{"query": BIG, "key": BIG, "value": BIG, "max_seqlen": 200_000, "cu_seqlens": offsets(1)},
    **{"distance_embedding": tensor(73, 64), "left_max_position": 64, "right_max_position": 8},
}


def attention_arguments(forward: dict[str, Any]) -> dict[str, Any]:
    query = forward["query"]
    log_sum_exp = tensor(query.shape[1], query.shape[0], dtype=torch.float32)
    return {**forward, "grad_output": query, "output": query, "log_sum_exp": log_sum_exp}


def convolution(**arguments: Any) -> tuple[Tensor, ...]:
    """As the registered operation calls the launcher."""
    grads = conv_backward.conv_norm_act_backward(**arguments)
    return grads[0], grads[1].contiguous(), *grads[2:]


ROW_GRADS = {"grad_y": X, "grad_z": X, "y": X, "weight": VECTOR, "eps": 1e-5}
CALLS: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
    "layer norm": (
        "layer_norm_backward",
        norm_backward.layer_norm_backward,
        {"grad_z": X, "x": X, "weight": VECTOR, "eps": 1e-5},
    ),
    "residual": (
        "residual_layer_norm_backward",
        norm_backward.residual_layer_norm_backward,
        {**ROW_GRADS, "scale": 0.5},
    ),
    "residual, scale 1": (
        "residual_layer_norm_backward",
        norm_backward.residual_layer_norm_backward,
        {**ROW_GRADS, "scale": 1.0},
    ),
    "double": (
        "residual_double_layer_norm_backward",
        norm_backward.residual_double_layer_norm_backward,
        {
            **{"grad_z1": X, "grad_z2": X, "residual": X, "x": X, "scale": 0.5},
            **{"weight1": VECTOR, "bias1": VECTOR, "weight2": VECTOR, "eps": 1e-5},
        },
    ),
    "linear": ("linear_backward", linear_backward.linear_backward, LINEAR),
    "linear, activation": (
        "linear_backward",
        linear_backward.linear_backward,
        {**LINEAR, "activation": "silu"},
    ),
    "linear, weight frozen": (
        "linear_backward",
        linear_backward.linear_backward,
        {**LINEAR, "activation": "silu", "needs": (True, False, False)},
    ),
    "gated": (
        "linear_glu_backward",
        linear_backward.linear_glu_backward,
        {**LINEAR, "grad_output": tensor(ROWS, 24)},
    ),
    "feed-forward": (
        "feed_forward_backward",
        linear_backward.feed_forward_backward,
        {**FEED_FORWARD, "needs": (True,) * 5},
    ),
    "feed-forward, weights frozen": (
        "feed_forward_backward",
        linear_backward.feed_forward_backward,
        {**FEED_FORWARD, "needs": (True, False, False, False, False)},
    ),
    "convolution": ("conv_norm_act_backward", convolution, CONV),
    "convolution, taps in place": (
        "conv_norm_act_backward",
        convolution,
        {**CONV, "conv_weight": tensor(7, WIDTH).t()},
    ),
    "attention": (
        "shaw_attention_backward",
        attention_backward.shaw_attention_backward,
        attention_arguments(ATTENTION),
    ),
    "attention, tile map given": (
        "shaw_attention_backward",
        attention_backward.shaw_attention_backward,
        {**attention_arguments(ATTENTION), "tile_map": tensor(3, 2, dtype=torch.int32)},
    ),
    "attention, no positions": (
        "shaw_attention_backward",
        attention_backward.shaw_attention_backward,
        {**attention_arguments(ATTENTION), "distance_embedding": None},
    ),
    "attention, more scratch than one launch may have": (
        "shaw_attention_backward",
        attention_backward.shaw_attention_backward,
        attention_arguments(LONG),
    ),
}


def named(arguments: dict[str, Any]) -> dict[str, Any]:
    """The registered operation calls the gradient `grad`."""
    names = {"grad_output": "grad"}
    if "y" not in arguments and "grad_z" in arguments:  # that of the norm alone
        names["grad_z"] = "grad"
    return {names.get(name, name): value for name, value in arguments.items()}


def test_every_cost_is_compared_with_its_launcher() -> None:
    assert {name for name, _, _ in CALLS.values()} == {
        name for name in COSTS if name.endswith("_backward")
    }


@pytest.mark.parametrize("case", CALLS)
def test_launches_are_those_of_the_launcher(case: str, launched: list[Uncompiled]) -> None:
    name, launcher, arguments = CALLS[case]
    with Counter(ARCH) as counter:
        results = [result for result in launcher(**arguments) if result is not None]
    cost = cost_of(name, named(arguments), results)
    assert cost.launches == len(launched) + counter.trace.cost.launches
    assert len(launched) > 0 or case == "linear"
    if case.endswith("may have"):
        assert len(launched) > 3
    # What is done in PyTorch's operations is counted by running it: all products are vendors'.
    assert cost.matrix_flops >= counter.trace.cost.matrix_flops
    assert cost.moved >= counter.trace.cost.moved
    assert cost.moved > counter.trace.cost.moved or len(launched) == 0


@pytest.mark.parametrize("case", CALLS)
def test_memory_is_that_of_the_launcher(
    case: str, launched: list[Uncompiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of what the launcher allocates: the results and what is temporary."""
    name, launcher, arguments = CALLS[case]

    def forgotten(*args: Any, **keywords: Any) -> None:
        plans.launch(*args, **keywords)
        launched.clear()  # it holds what the kernel was given

    monkeypatch.setattr(attention_backward, "launch", forgotten)  # whose scratch comes in groups
    with Counter(ARCH) as counter:
        results = [result for result in launcher(**arguments) if result is not None]
    held = sum({r.untyped_storage()._cdata: r.untyped_storage().nbytes() for r in results}.values())
    cost = cost_of(name, named(arguments), results)
    assert counter.trace.peak_bytes <= held + cost.temporary + 70_000


def test_attention_by_hand() -> None:
    """14 C T + 6 C (L + R + 1) FLOPs a token, as the kernels' file says."""
    tokens, heads, head_dim = HEADS.shape
    arguments = named(attention_arguments(ATTENTION))
    results = [HEADS, HEADS, HEADS, tensor(8, 16, dtype=torch.float32)]
    cost = cost_of("shaw_attention_backward", arguments, results)
    width = heads * head_dim
    assert cost.matrix_flops == tokens * (14 * width * 33 + 6 * width * 8)
    # q, o, g; q, k, v, g; the same four; and what is written: dk, dv, dq.
    rows = (3 + 4 + 4 + 3) * size_of(HEADS)
    # P written, read by both kernels, each row from anywhere in a sector on; dP written.
    positions = heads * tokens * (3 * (4 * 8 + 28) + 4 * 8)
    assert rows + positions < cost.moved < rows + positions + 60_000


def test_feed_forward_by_hand() -> None:
    rows, width, inner = 1000, 64, 256
    arguments = {
        **{"grad": tensor(rows, width), "x": tensor(rows, width), "activation": "silu"},
        **{"weight1": tensor(inner, width), "bias1": tensor(inner), "bias2": tensor(width)},
        **{"weight2": tensor(width, inner), "needs": [True] * 5},
    }
    cost = cost_of("feed_forward_backward", arguments, [])
    assert cost.matrix_flops == 5 * 2 * rows * width * inner
    # Five products and one elementwise kernel, and the sum of grad.
    products = 2 * 5 * (rows * (width + inner) + width * inner)
    elementwise = 2 * 4 * rows * inner
    # 125 programs of 8 rows leave a share of the bias's gradient each, written and read.
    shares = 2 * 4 * 125 * inner
    assert 0 <= cost.moved - products - elementwise - shares - 2 * rows * width < 60_000
    assert cost.temporary == 2 * 2 * rows * inner


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
        step = trace_training(path, "none", Workload(2, 200, layers=2))
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
