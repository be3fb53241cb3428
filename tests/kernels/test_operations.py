"""The registered operations: every one against float64, forward and backward; opcheck, compilation,
no waiting for the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

from tests.helpers.operations import (
    OF_WAVEFORMS,
    SMALL,
    WITH_KERNELS,
    answers,
    arguments,
    leaves,
)
from tests.kernels.judge import Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    VIRTUAL,
    WIDTH,
    WITHOUT_DEVICE,
    choose,
    random,
)
from tests.kernels.models import SIZES, batch, fast, kernels, make
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.operation import OPERATIONS

LENGTHS = choose([5, 0, 300, 64], [5, 0, 7])
EXAMPLES = replace(SMALL, lengths=tuple(LENGTHS), width=WIDTH, inner=2 * WIDTH)
COMPARED = {
    "small": SMALL,
    "published": replace(
        SMALL,
        lengths=choose((64, 0, 1500, 217), SMALL.lengths),
        width=1024,
        inner=choose(4096, 1024),
        heads=16,
        head_size=64,
    ),
}
if INTERPRETED:  # a minute for each
    del COMPARED["published"]
FAR = replace(SMALL, lengths=(5, 0, 19, 260), heads=1, left=8)
"""Of attention instead of `SMALL`: blocks left and right of the band, by all tiles."""
DTYPES_OF = {name: DTYPES[:1] if name in OF_WAVEFORMS else DTYPES for name in WITH_KERNELS}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, dtypes in DTYPES_OF.items() for dtype in dtypes],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("size", COMPARED)
def test_every_operation(size: str, name: str, dtype: torch.dtype, judge: Judge) -> None:
    sizes = FAR if size == "small" and "attention" in name else COMPARED[size]
    with dispatch.force_triton():
        given = arguments(name, sizes, dtype, DEVICE)
    plain, exact = answers(name, given)
    with torch.no_grad(), dispatch.force_triton():
        ours = leaves(getattr(torch.ops.w2vbert, name)(*given))
    assert judge.row.launches or VIRTUAL is None
    judge.operation(name, dtype, ours, plain, exact)


# Those of gradients have a lane of their own.
NAMES = sorted(name for name in OPERATIONS if not name.endswith("_backward"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype, judge: Judge) -> None:
    operation = getattr(torch.ops.w2vbert, name).default
    with kernels():
        result = torch.library.opcheck(operation, arguments(name, EXAMPLES, dtype, DEVICE))
    assert set(result.values()) == {"SUCCESS"}
    judge.counted(f"opcheck/{name}", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_bit_equal(name: str, dtype: torch.dtype, judge: Judge) -> None:
    operation, inputs = getattr(torch.ops.w2vbert, name), arguments(name, EXAMPLES, dtype, DEVICE)
    with kernels():
        first, second = (torch.utils._pytree.tree_leaves(operation(*inputs)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    judge.counted(f"repeated/{name}", dtype)


def test_every_registered_operation_is_checked() -> None:
    registered = {
        schema.name.removeprefix("w2vbert::")
        for schema in torch._C._jit_get_all_schemas()
        # Gradients are not in this lane yet.
        if schema.name.startswith("w2vbert::") and not schema.name.endswith("_backward")
    }
    assert registered == set(NAMES)


def layer_and_inputs(
    dtype: torch.dtype, *batches: tuple[int, ...]
) -> tuple[Any, list[tuple[Tensor, PackedBatch]]]:
    """An encoder layer, and packed batches for it."""
    model = make("Wav2Vec2BertModel", list(SIZES)[-1]).to(dtype)
    model.use_fast_kernels = True  # type: ignore[assignment]
    inputs = []
    for lengths in batches:
        layout = PackedBatch.from_lengths(lengths, max(lengths), DEVICE)
        inputs.append((random(sum(lengths), model.config.hidden_size, dtype=dtype), layout))
    return model.encoder.layers[0], inputs


@pytest.mark.parametrize("dtype", DTYPES[-1:], ids=str)
def test_a_layer_compiles_without_a_graph_break(dtype: torch.dtype, judge: Judge) -> None:
    layer, inputs = layer_and_inputs(dtype, *choose([(300, 17), (64, 217, 1)], [(5, 7), (3, 9)]))

    def run(x: Tensor, layout: PackedBatch) -> Tensor:
        return layer(x, layout)[0]

    backend = "eager" if WITHOUT_DEVICE else "inductor"
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    exact_layer = make("Wav2Vec2BertModel", list(SIZES)[-1]).to(dtype).double().encoder.layers[0]
    with torch.no_grad(), kernels():
        for x, layout in inputs:
            eager = run(x, layout)
            exact = exact_layer(x.double(), layout)[0]
            # The same kernels: what the compiler may change are copies and views.
            judge("compiled_layer", compiled(x, layout), exact, eager)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton compiles meanwhile, or takes from its cache on disk."""
    compiled: list[str] = []

    def compiles(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = compiles
    try:
        yield compiled
    finally:
        knobs.runtime.jit_cache_hook = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_length_compiles_nothing(dtype: torch.dtype) -> None:
    """tests/tools/test_recompilation.py counts the same without a GPU, for every launcher."""
    first = choose([(300, 17), (20_000,)], [(5, 7)])
    others = choose([(1,), (16,), (1500, 0, 3), (19_999, 1)], [(1,), (16,)])
    layer, inputs = layer_and_inputs(dtype, *first, *others)
    with torch.no_grad(), kernels():
        with compilations() as seen:
            for x, layout in inputs[: len(first)]:
                layer(x, layout)
        assert seen or WITHOUT_DEVICE or dtype != DTYPES[0]
        with compilations() as seen:
            for x, layout in inputs[len(first) :]:
                layer(x, layout)
        assert not seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_does_not_wait_for_the_device(dtype: torch.dtype) -> None:
    layer, inputs = layer_and_inputs(dtype, *choose([(300, 17)], [(5, 7)]))
    with torch.no_grad(), kernels():
        layer(*inputs[0])  # compiles
        with no_waiting():
            layer(*inputs[0])


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """PyTorch raises where an operation would make the host wait for the device."""
    if WITHOUT_DEVICE:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_seen() -> None:
    if WITHOUT_DEVICE:
        pytest.skip("the interpreter has no device to wait for")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        random(3, dtype=torch.float32).sum().item()


def test_the_layer_is_on_the_kernels(judge: Judge) -> None:
    """No comparison here means anything if the operations quietly ran plain PyTorch."""
    model = make("Wav2Vec2BertModel", "tiny")
    with torch.profiler.profile() as profile, torch.no_grad():
        fast(model, *batch(choose((40, 3), (9, 3))))
    calls = {event.key: event.count for event in profile.key_averages()}
    layers = model.config.num_hidden_layers
    assert calls["w2vbert::shaw_attention"] == calls["w2vbert::conv_norm_act"] == layers
    plain = ("aten::conv1d", "aten::native_layer_norm", "aten::addmm", "aten::_softmax")
    assert not {name: calls[name] for name in plain if name in calls}
    judge.counted("model/kernels", torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_launches_go_to_the_device_of_the_tensors(name: str) -> None:
    if WITHOUT_DEVICE or torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    operation = getattr(torch.ops.w2vbert, name)
    inputs = arguments(name, EXAMPLES, torch.float32, DEVICE)
    expected = torch.utils._pytree.tree_leaves(operation(*inputs))
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to("cuda:1"), inputs)
    got = torch.utils._pytree.tree_leaves(operation(*moved))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.cpu(), other.cpu())
