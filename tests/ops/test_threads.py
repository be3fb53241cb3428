"""Shares of operations on several threads: what runs where, and what a caller sees of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.waiting import PATIENCE
from w2vbert_fast.ops import cpu
from w2vbert_fast.ops.cpu import attention, conv, gemm, int8, norm, threads


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def test_shares_run_on_several_threads_each_alone() -> None:
    together = threading.Barrier(2)

    def share(index: int) -> tuple[int, int, bool, bool]:
        if index < 2:
            together.wait(PATIENCE)  # only two threads at once get here
        inside = threads.count(), torch.get_num_threads()
        return *inside, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert threads.run(share, range(5)) == [(1, 1, False, True)] * 5
    assert torch.get_num_threads() == threads.count() == 2
    assert not torch.is_inference_mode_enabled()
    of_new_thread: list[int] = []
    thread = threading.Thread(target=lambda: of_new_thread.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert of_new_thread == [2]


def test_what_a_share_raises_is_raised_and_the_rest_left_out() -> None:
    ran: list[int] = []

    def share(index: int) -> None:
        ran.append(index)
        if index == 1:
            raise ValueError("share 1")

    with pytest.raises(ValueError, match="share 1"):
        threads.run(share, range(1000))
    assert len(ran) < 1000
    assert threads.run(lambda index: index, range(3)) == [0, 1, 2]


def test_an_interrupt_when_all_is_done_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        """A lock whose waiter is interrupted once it has it."""

        def __init__(self, lock: Any) -> None:
            self.lock, self.release, self.has_it = lock, lock.release, False

        def acquire(self) -> None:
            if self.has_it:
                pytest.fail("it waits for what has been")
            self.has_it = self.lock.acquire()
            raise KeyboardInterrupt

    begin = threads._Divided.__init__

    def interrupted(work: Any, *arguments: Any) -> None:
        begin(work, *arguments)
        work.finished = Interrupted(work.finished)

    monkeypatch.setattr(threads._Divided, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.run(lambda index: index, range(3))


def test_no_interrupt_leaves_threads_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    ended = []

    class Interrupted:
        """A lock whose waiter is interrupted three times, the last time when shares end."""

        def __init__(self, lock: Any) -> None:
            self.lock, self.release, self.interrupts = lock, lock.release, 0

        def acquire(self) -> None:
            if self.interrupts < 3:
                assert begun.wait(PATIENCE)
                self.interrupts += 1
                if self.interrupts == 3:
                    may_end.set()
                raise KeyboardInterrupt
            self.lock.acquire()

    begin = threads._Divided.__init__

    def interrupted(work: Any, *arguments: Any) -> None:
        begin(work, *arguments)
        work.finished = Interrupted(work.finished)

    def share(index: int) -> None:
        begun.set()
        assert may_end.wait(PATIENCE)
        ended.append(index)

    monkeypatch.setattr(threads._Divided, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        threads.run(share, range(2))
    assert 1 <= len(ended) <= 2
    assert may_end.is_set()


def test_callers_on_several_threads() -> None:
    expected = [list(range(n, n + 7)) for n in range(4)]
    results: list[list[int] | None] = [None] * 4

    def caller(n: int) -> None:
        torch.set_num_threads(2)
        results[n] = threads.run(lambda index: n + index, range(7))

    callers = [threading.Thread(target=caller, args=(n,)) for n in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert results == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes fork on POSIX alone")
def test_a_forked_process_starts_threads_of_its_own() -> None:
    code = """
import os, torch
from w2vbert_fast.ops.cpu import threads
torch.set_num_threads(2)
assert threads.run(lambda i: i, range(3)) == [0, 1, 2]
child = os.fork()
if child == 0:
    os._exit(0 if threads.run(lambda i: 2 * i, range(3)) == [0, 2, 4] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_divided() -> None:
    """Rows of float32, as many as are worth it at their width, and of bfloat16, as many elements as
    are."""
    assert threads.divides(torch.empty(400, 1024))
    assert not threads.divides(torch.empty(399, 1024))
    assert threads.divides(torch.empty(1024, 512))
    assert not threads.divides(torch.empty(1023, 512))
    assert not threads.divides(torch.empty(7200, 3, 64))  # the demo's queries
    assert threads.divides(torch.empty(1024, 1024, dtype=torch.bfloat16))
    assert not threads.divides(torch.empty(1023, 1024, dtype=torch.bfloat16))
    assert not threads.divides(torch.empty(399, 4096, dtype=torch.bfloat16))
    assert not threads.divides(torch.empty(1024, 1024, dtype=torch.float16))
    assert not threads.divides(torch.empty(400, 1024, device="meta"))  # no CPU's
    assert not threads.divides(torch.empty(0, 1024))
    torch.set_num_threads(5)
    assert threads.divides(torch.empty(400, 1024))
    assert not threads.divides(torch.empty(1024, 1024, dtype=torch.bfloat16))
    torch.set_num_threads(1)
    assert not threads.divides(torch.empty(400, 1024))


@pytest.mark.parametrize("packs", [False, True])
def test_both_products_of_a_feed_forward_block_are_divided_or_none(packs: bool) -> None:
    """Where one is and one is not, PyTorch's threads still spin when these begin."""

    def divided(num_tokens: int, width: int, inner: int) -> set[bool]:
        found = set()
        for ends in ((width, inner), (inner, width)):
            weight: Any = torch.empty(ends[1], ends[0])
            if packs:
                weight = gemm.PackedWeight(weight, (ends[1], ends[0]), torch.float32)
            found.add(len(gemm._shares(torch.empty(num_tokens, ends[0]), weight)) > 1)
        return found

    assert divided(2850, 192, 640) == {False}  # 57 s of the demo's
    assert divided(1500, 1024, 4096) == {True}


def test_more_threads_than_shares_are_worth_take_parts_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "count", lambda: 64)
    x = torch.empty(1500, 1024)
    assert threads.number(x, 3.0) == 24
    assert threads.number(x, 8.0) == threads.number(x, 3.0, part=24) == 64
    assert threads.number(x, 200.0) == 192
    assert threads.number(x, 0.4) == 1
    # Half a minute at the published width: every core has a part of every product.
    weight = torch.empty(1024, 1024)
    packed = gemm.PackedWeight(weight, (1024, 1024), torch.float32)
    for of in (weight, packed):
        assert len(gemm._shares(torch.empty(1500, 1024), of)) > 60


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 400), (torch.bfloat16, 1024)])
def test_a_short_feed_forward_block_is_divided_once(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights as stored: rows, where every thread has enough to lay out both weights for."""
    x, weight = torch.zeros(rows, 1024, dtype=dtype), torch.zeros(1024, 1024, dtype=dtype)
    seen: list[Any] = []
    run = threads.run

    def noting(function: Callable[[Any], Any], shares: Any, *, divided: bool = True) -> list[Any]:
        seen.append(shares)
        return run(function, shares, divided=divided)

    monkeypatch.setattr(threads, "run", noting)
    cpu.feed_forward(x, weight, None, "swish", weight, None)
    assert seen == [[slice(0, rows // 2), slice(rows // 2, rows)]]
    torch.set_num_threads(3)
    cpu.feed_forward(x, weight, None, "swish", weight, None)
    # Columns of either product.
    assert len(seen[1:]) == (2 if gemm.onednn_linear(dtype) else 0)


def test_divided_attention_in_bfloat16_makes_few_calls() -> None:
    """Half a minute at the published width: threads wait for Python's lock at each."""
    x = torch.zeros(1500, 16, 64, dtype=torch.bfloat16)

    def blocks_of_shares() -> list[int]:
        shares = attention.shares_of(x, torch.tensor([0, 1500]), None, False)
        own = [x[:, share.heads] for share in shares]
        attends = [attention.Attend(heads, heads, heads, 1500, None, 0, 0) for heads in own]
        return [len(list(a.blocks(s))) for a, s in zip(attends, shares, strict=True)]

    assert blocks_of_shares() == [3, 3, 3, 3]
    torch.set_num_threads(1)
    assert blocks_of_shares() == [12]


def test_calls_that_pytorch_records_or_watches_stay_on_their_thread() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert threads.count() == 1
    seen: list[int] = []

    def traced(x: Tensor) -> Tensor:
        seen.append(threads.count())
        return x + 1

    torch.jit.trace(traced, torch.ones(2), check_trace=False)
    torch.func.vmap(traced)(torch.ones(2))
    assert seen == [1, 1]
    assert threads.count() == 2


@pytest.mark.parametrize("num_threads", [2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divided_operations_give_what_undivided_ones_do(
    dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation and gradient, at sizes of which none is divided by itself."""
    monkeypatch.setattr(threads, "divides", lambda x: threads.count() > 1)
    shares = [(conv, "_SHARE_ELEMENTS"), (norm, "_SHARE_ELEMENTS"), (gemm, "_SHARE")]
    for module, name in [*shares, (int8, "_SHARE"), (attention, "_SHARE_SCORES")]:
        monkeypatch.setattr(module, name, 16)
    monkeypatch.setattr(gemm, "_LEAST_ROWS", {dtype: 8})
    monkeypatch.setattr(gemm, "_SMALL_WEIGHT", 0)  # which MKL multiplies
    numbers: list[int] = []
    run = threads.run

    def counting(function: Callable[[Any], Any], shares: Any, *, divided: bool = True) -> list[Any]:
        numbers.append(len(shares) if divided else 1)
        return run(function, shares, divided=divided)

    monkeypatch.setattr(threads, "run", counting)
    for name, operation in operations(dtype).items():
        torch.set_num_threads(1)
        expected = operation()
        numbers.clear()
        torch.set_num_threads(num_threads)
        got = operation()
        assert max(numbers) > 1, name
        again = operation()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for one, other, third in zip(expected, got, again, strict=True):
            assert one.shape == other.shape
            assert not other.is_inference()
            error = (one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-9)
            assert error <= tolerance, name
            assert torch.equal(other, third), name


def operations(dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Calls of the CPU's operations and gradients, by name."""
    lengths = torch.tensor([0, 7, 7, 120, 300], dtype=torch.int32)
    used = torch.tensor([6, 0, 113, 179], dtype=torch.int32)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    x, y, grad = random(300, 128), random(300, 128), random(300, 128)
    up, down, both = random(256, 128) / 11, random(128, 256) / 16, random(256, 128) / 11
    gain, offset, taps = random(128), random(128), random(128, 31) / 6
    query, key, value = (random(300, 4, 32) for _ in range(3))
    embedding, seed = random(15, 32), torch.tensor([3, 5])
    places = (lengths, 180, embedding, 9, 5)
    needs = [True, True, True, True, True]

    def attend(dropout: float) -> tuple[Tensor, ...]:
        dropped = (None, True, dropout, seed, used)
        output, statistics = cpu.shaw_attention(query, key, value, *places, *dropped)
        behind = (output, statistics, *places, None, dropout, seed, used)
        grads = attention.shaw_attention_backward(grad.view(300, 4, 32), query, key, value, *behind)
        return output, *grads

    def convolve() -> tuple[Tensor, ...]:
        rest = (taps, gain, offset, 1e-5, "swish", lengths, used)
        return cpu.conv_norm_act(x, *rest), *conv.conv_norm_act_backward(grad, x, *rest)

    def multiply(pack: bool) -> tuple[Tensor, ...]:
        packs = pack and bool(gemm.onednn_linear(dtype))
        weights = [gemm.pack_weight(w) if packs else w for w in (up, down, both)]
        hidden = cpu.linear(x, weights[0], None, "swish")
        gated = cpu.linear_glu(x, weights[2], None)
        whole = cpu.feed_forward(x, weights[0], None, "swish", weights[1], gain)
        return hidden, gated, whole

    def differentiate_products() -> tuple[Tensor, ...]:
        grads = gemm.feed_forward_backward(grad, x, up, None, "swish", down, gain, needs)
        return tuple(g for g in grads if g is not None)

    def quantised() -> tuple[Tensor, ...]:
        packed = [int8.quantize_weight(w) for w in (up, down)]
        block = int8.feed_forward_int8(x, packed[0], None, "silu", packed[1], gain)
        return block, *int8.linears_int8(x, [(packed[0], None), (packed[0], offset.repeat(2))])

    def normalise() -> tuple[Tensor, ...]:
        one = cpu.residual_layer_norm(x, y, 0.5, gain, offset, 1e-5)
        two = cpu.residual_double_layer_norm(x, y, 0.5, gain, offset, gain, offset, 1e-5)
        return cpu.layer_norm(x, gain, offset, 1e-5), *one, *two

    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "attention": lambda: attend(0.0),
        "dropout": lambda: attend(0.25),
        "convolution": convolve,
        "norms": normalise,
    }
    if gemm.onednn_linear(dtype):
        calls |= {"products": lambda: multiply(False), "packed": lambda: multiply(True)}
    if not int8.reasons():
        calls["int8"] = quantised
    return calls


COUNT = """
import ctypes, json, sys, torch
import w2vbert_fast
from w2vbert_fast.models.optimized.int8 import quantize_encoder
from w2vbert_fast.ops.cpu import threads

torch.set_num_threads(2)
regions, runs = ctypes.CDLL(None).parallel_regions, []
regions.restype = ctypes.c_long
begin = threads._threads.run
threads._threads.run = lambda *job: (runs.append(job), begin(*job))

def count(dtype, frames, packs, trains):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    config = w2vbert_fast.Wav2Vec2BertConfig(num_hidden_layers=1, layerdrop=0.0, **sizes)
    model = w2vbert_fast.Wav2Vec2BertModel(config).train(trains)
    model.to(torch.float32 if dtype == "float32" else torch.bfloat16)
    if dtype == "int8":
        quantize_encoder(model)
    model.use_fast_kernels = True
    if packs:
        model.pack_weights()
    x = torch.randn(1, frames, 160, dtype=next(model.parameters()).dtype)
    def step():
        with torch.set_grad_enabled(trains):
            y = model(x).last_hidden_state
        if trains:
            y.backward(y.detach())
    step()
    before = regions() + len(runs)
    step()
    return regions() + len(runs) - before

print(json.dumps([count(*arguments) for arguments in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("OpenMP's regions are counted on Linux, with gcc")
    source = Path(__file__).parents[1] / "helpers" / "parallel_regions.c"
    library = tmp_path_factory.mktemp("shim") / "parallel_regions.so"
    options = ["-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run([compiler, *options], check=True)
    return library


def test_parallel_regions_of_a_layer(shim: Path) -> None:
    """OpenMP's and operations that are divided, of half a minute and of two; a layer and what is
    around it."""
    cases = [
        ("float32", 1500, False, False),
        ("float32", 1500, True, False),
        ("float32", 6000, False, False),
        ("float32", 6000, True, False),
        ("float32", 1500, False, True),
        # The width here is half of the published one, and so is the number of elements.
        ("bfloat16", 2100, False, False),
        ("bfloat16", 2100, True, False),
        ("bfloat16", 6000, False, False),
        ("bfloat16", 2100, False, True),
        ("int8", 2100, False, False),
    ]
    cases = [case for case in cases if case[0] != "bfloat16" or gemm.onednn_linear(torch.bfloat16)]
    cases = [case for case in cases if case[0] != "int8" or not int8.reasons()]
    if not gemm.onednn_linear(torch.float32):
        pytest.skip("oneDNN multiplies no float32 here")
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    command = [sys.executable, "-c", COUNT, json.dumps(cases)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    for (dtype, frames, packs, trains), count in zip(cases, json.loads(done.stdout), strict=True):
        most = 200 if trains else 60
        assert 0 < count <= most, (dtype, frames, packs, trains, count)
