"""What is measured for a model: in Triton's interpreter by a clock that is planted, on a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from csrc_triton import gemm
from csrc_triton.gemm.config import LinearConfig
from tests.kernels.lane import DEVICE, INTERPRETED, VIRTUAL, needs_device
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.inference import batching
from w2vbert_fast.ops import tuned
from w2vbert_fast.ops.dispatch import force_triton
from w2vbert_fast.ops.tuned import PYTORCH, Case, Found, Machine
from w2vbert_fast.tuning import measure
from w2vbert_fast.tuning.choose import fastest
from w2vbert_fast.tuning.measure import Product

pytestmark = pytest.mark.skipif(VIRTUAL is not None, reason="a virtual GPU has no clock")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
HERE = Machine("a GPU", 132, "1", "3.6.0", "2.11.0")
PLAIN = Case("linear", (32, 48), "float16", 64)
TILES = tuple(LinearConfig(m, n, 16, 1, 1, group_m=2) for m, n in ((32, 32), (16, 32), (64, 16)))


def product(operation: str = "linear", dtype: str = "float16") -> Product:
    made = Product(Case(operation, (32, 48), dtype), DEVICE, 20)
    made.tiles, made.usual = TILES, "32x32"
    made.operands = made.operands[:1]
    return made


@pytest.fixture
def pytorchs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small products as well."""
    monkeypatch.setattr(tuned, "PYTORCH_FROM", 1)


@pytest.mark.parametrize("operation", ["linear", "linear silu", "linear glu"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_way_to_compute_a_product_is_right(
    operation: str, dtype: str, pytorchs_too: None
) -> None:
    made = product(operation, dtype)
    candidates = made.candidates()
    choices = [candidate.choice for candidate in candidates]
    own = [PYTORCH] if (operation, dtype) == ("linear", "float16") else []
    assert choices == ["32x32", "16x32", "64x16", *own]
    assert all(candidate.right() for candidate in candidates)


WRONG: dict[str, Callable[[torch.Tensor], object]] = {
    "a bit of everything": lambda out: out.mul_(1.01),
    "one row": lambda out: out[7].neg_(),
    "rows that are not written": lambda out: out[-1].fill_(torch.nan),
    "another bias": lambda out: out.add_(0.1),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_tile_that_computes_wrong_is_never_taken(
    how: str, pytorchs_too: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gemm.linear

    def wrong(*args: Any, out: torch.Tensor, config: LinearConfig) -> torch.Tensor:
        right(*args, out=out, config=config)
        if config == TILES[1]:
            WRONG[how](out)
        return out

    monkeypatch.setattr(gemm, "linear", wrong)
    made = product()
    seconds = {"32x32": 1.0, "16x32": 0.1, "64x16": 0.9, PYTORCH: 2.0}
    candidates = made.candidates(lambda run: run)
    order = {id(candidate.run): candidate.choice for candidate in candidates}
    found = fastest(candidates, made.usual, lambda run: seconds[str(order[id(run)])])
    assert found == Found("64x16", pytest.approx(0.9), "32x32", pytest.approx(1.0))


@interpreted
def test_what_is_usual_on_hopper_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "usually_by_pytorch", lambda device: True)
    assert Product(PLAIN, DEVICE).usual == "32x32"  # few tokens
    monkeypatch.setattr(tuned, "PYTORCH_FROM", 1)
    assert Product(PLAIN, DEVICE).usual == PYTORCH
    assert Product(Case("linear silu", (32, 48), "float16", 64), DEVICE).usual == "32x32"
    assert Product(Case("linear", (32, 48), "float32", 64), DEVICE).usual == "32x32"


@pytest.fixture
def model() -> Wav2Vec2BertForCTC:
    config = Wav2Vec2BertConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
        left_max_position_embeddings=3,
        right_max_position_embeddings=2,
    )
    torch.manual_seed(0)
    made = Wav2Vec2BertForCTC(config).to(DEVICE).eval()
    with force_triton():  # which lays query, key and value end to end
        made.use_fast_kernels = True
    return made


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if Triton's interpreter were one, whose buckets and batches are small."""
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    monkeypatch.setattr(measure, "BUCKETS", (64,))
    monkeypatch.setattr(measure, "GRAPH_LIMITS", (16, 32))
    monkeypatch.setattr(measure, "LARGEST_BUDGET", 64)
    monkeypatch.setattr(batching, "_SMALLEST_BUDGET", 16)
    monkeypatch.setattr(measure, "COLD_BYTES", 1)
    with force_triton():
        yield


class Clock:
    """One for every call; whole models take the same whatever their batch."""

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run: Callable[[], object]) -> float:
        return 1.0

    def prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        return run


@interpreted
def test_all_products_of_a_model_are_measured(
    model: Wav2Vec2BertForCTC,
    on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(measure, "GpuClock", Clock)
    file = tmp_path / "tuned.json"
    said: list[str] = []
    measure.tune(model, 600.0, lambda entries: tuned.merge(file, entries), said.append)
    entries = tuned.read(file)
    assert {machine for machine, _ in entries} == {HERE}
    found = {(case.operation, case.shape, case.bucket): f for (_, case), f in entries.items()}
    products = {
        ("linear silu", (48, 32)),  # feed-forward
        ("linear", (32, 48)),
        ("linear", (96, 32)),  # query, key and value
        ("linear", (32, 32)),
        ("linear glu", (64, 32)),
        ("linear", (32, 16)),  # the features
    }
    size = (1, 32, 48)
    assert set(found) == {(*product, 64) for product in products} | {
        ("graph limit", size, 0),
        ("frame budget", size, 0),
    }
    assert {f.choice for (name, _, _), f in found.items() if name.startswith("linear")} == {"32x32"}
    assert found[("graph limit", size, 0)].choice == 1  # nothing is gained by them
    assert found[("frame budget", size, 0)].choice == 64  # a batch is free, so the largest pays
    assert model.wav2vec2_bert.encoder.layer_graphs is None
    assert len(said) == len(found) + 1 and re.match("6 products, ", said[0])


@interpreted
def test_a_run_that_is_cut_keeps_what_it_has(
    model: Wav2Vec2BertForCTC, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "GpuClock", Clock)
    kept: dict[Any, Found] = {}

    def keep(entries: dict[Any, Found]) -> None:
        kept.update(entries)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.tune(model, 600.0, keep, lambda line: None)
    assert len(kept) == 2


@interpreted
def test_another_run_begins_with_what_is_not_known_yet(
    model: Wav2Vec2BertForCTC, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "GpuClock", Clock)
    known = {Case("linear", (96, 32), "float32", 64): Found("32x32", 1.0, "32x32", 1.0)}
    monkeypatch.setattr(tuned, "of_device", cache(lambda device: known))
    measured: list[Case] = []
    monkeypatch.setattr(measure, "fastest", lambda *_: None)
    monkeypatch.setattr(measure, "graph_limit", lambda *_: (Case("", (), ""), None))
    monkeypatch.setattr(measure, "frame_budget", lambda *_: (Case("", (), ""), None))

    class Noted(Product):
        def __init__(self, case: Case, device: torch.device, num_tokens: int | None = None) -> None:
            super().__init__(case, device, num_tokens)
            if num_tokens is None:
                measured.append(case)

    monkeypatch.setattr(measure, "Product", Noted)
    measure.tune(model, 600.0, lambda entries: None, lambda line: None)
    assert len(measured) == 6 and measured[-1] in known


@interpreted
def test_a_candidate_that_cannot_be_timed_is_left_out(pytorchs_too: None) -> None:
    def prepared(run: Callable[[], object]) -> Callable[[], object]:
        calls.append(run)
        return run if len(calls) != 2 else fail

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    calls: list[object] = []
    candidates = product().candidates(prepared)
    with pytest.raises(RuntimeError, match="capturing"):
        candidates[1].right()
    found = fastest(candidates, "32x32", lambda run: 0.1 if run is fail else 1.0)
    assert found is not None and found.choice == "32x32"


@interpreted
def test_without_time_nothing_is_measured(
    model: Wav2Vec2BertForCTC, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "GpuClock", Clock)
    said: list[str] = []
    measure.tune(model, 0.0, lambda entries: pytest.fail(f"{entries}"), said.append)
    assert "time for products is up" in said[1]


@needs_device
def test_a_gpu_is_measured_and_computes_as_before(
    model: Wav2Vec2BertForCTC, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "tuned.json"
    monkeypatch.setattr(tuned, "user_file", lambda: file)
    monkeypatch.setattr(measure, "BUCKETS", (4096, 64))
    monkeypatch.setattr(measure, "GRAPH_LIMITS", (1024,))
    monkeypatch.setattr(measure, "LARGEST_BUDGET", 4000)
    tuned.forget()
    model = model.half()
    features = torch.randn(2, 40, 16, device=DEVICE, dtype=torch.float16)
    with torch.inference_mode():
        before = model(features).logits
    measure.tune(model, 120.0, lambda entries: tuned.merge(file, entries), print)
    entries = tuned.read(file)
    names = {case.operation for _, case in entries}
    assert {machine for machine, _ in entries} == {tuned.machine(next(model.parameters()).device)}
    assert {"linear", "linear glu", "linear silu"} <= names
    assert all(found.seconds <= found.usual_seconds for found in entries.values())
    tuned.forget()
    with torch.inference_mode():
        torch.testing.assert_close(model(features).logits, before, rtol=0.05, atol=0.02)
    monkeypatch.undo()
    tuned.forget()
