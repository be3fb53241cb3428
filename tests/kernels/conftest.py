"""The lane's fixtures, its share of several processes, and what is kept of every test."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.poison import poison, poison_allocations
from tests.kernels import results
from tests.kernels.judge import Judge, Row
from tests.kernels.lane import DEVICE, LANE, VIRTUAL

if DEVICE.type == "cuda" and LANE is not None:
    # They compare with models of transformers, which may not be there; of a device's own are
    # test_models.py and test_gradients.py.
    collect_ignore = ["test_encoder.py", "test_training.py"]

FOLDER = Path(__file__).parent
_ROWS = os.environ.get("W2VBERT_LANE_ROWS")
_judge = Judge()
_TELLING = ("test_operations", "test_models", "test_gradients", "test_graphs")
_rows: dict[str, Row] = {}
_passed_before: list[str] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Skipped here and not by a mark, so that the summary has one line for all of them.
    if LANE is None:
        pytest.skip("no lane: no GPU, neither TRITON_INTERPRET=1 nor W2VBERT_LANE=sm_80")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps every n-th test of this folder where several processes share them, and on a virtual GPU
    those that have not passed yet.

    The tests of `test_large.py`, which take much memory, stay in one process. Those of every
    operation come first: after them each kernel has run once; on a GPU, which may be taken away,
    then whole models.
    """
    number, _, count = os.environ.get("W2VBERT_LANE_SHARE", "0/1").partition("/")
    done: set[str] = set()
    if VIRTUAL is not None and _ROWS:
        path = Path(_ROWS)
        rows, _ = results.read(path.parent.glob(f"{VIRTUAL}.*{path.suffix}"))
        done = {test for test, row in rows.items() if row["outcome"] != "failed"}
    mine: list[pytest.Item] = []
    others: list[pytest.Item] = []
    place = 0
    for item in items:
        if FOLDER not in item.path.parents:
            mine.append(item)
            continue
        one_process = item.path.stem == "test_large"
        share = 0 if one_process else place % int(count)
        place += not one_process
        if share == int(number) and item.nodeid in done:
            _passed_before.append(item.nodeid)
        (mine if share == int(number) and item.nodeid not in done else others).append(item)
    first = _TELLING[: 1 if DEVICE.type == "cpu" else None]
    mine.sort(
        key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first)
    )
    if others:
        config.hook.pytest_deselected(items=others)
    items[:] = mine


_executors: list[Any] = []


@pytest.fixture(scope="session", autouse=True)
def virtual_gpu() -> Iterator[None]:
    """Kernels are compiled for `VIRTUAL` and executed in NumPy, with every check."""
    if VIRTUAL is None:
        yield
        return
    from tools.virtual_gpu.driver import activated
    from tools.virtual_gpu.executor import Executor

    executor = Executor(counted=_judge.launched)
    _executors.append(executor)
    with activated(VIRTUAL, executor):
        yield


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of this test may leave elements of a tensor to others, or as they were."""
    for executor in _executors:
        checks = dataclasses.replace(executor.checks, written_whole=False)
        monkeypatch.setattr(executor, "checks", checks)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """PyTorch's fp32 products are fp32 products, and its sums of fp16 and bf16 are fp32 sums."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = (
        (matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
    )
    before = [getattr(owner, name) for owner, name in settings]
    for owner, name in settings:
        setattr(owner, name, False)
    yield
    for (owner, name), value in zip(settings, before, strict=True):
        setattr(owner, name, value)


@pytest.fixture(autouse=True)
def memory_returned() -> Iterator[None]:
    """Other processes share the device: what a test took goes back."""
    yield
    if DEVICE.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory allocated without a value holds NaN, integers `POISON_INTEGER`.

    Not with `W2VBERT_LANE_POISON=0`: a tool that looks for memory that was never written must find
    it as it is.
    """
    if os.environ.get("W2VBERT_LANE_POISON") != "0":
        poison_allocations(monkeypatch)


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor to the end of memory that may be touched: the next byte ends the process.

    What a kernel reads past an end and then leaves unused cannot be seen in its output. Rows stay
    strided; their gaps hold NaN. On a device it is a copy, and left to compute-sanitizer.
    """

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if DEVICE.type != "cpu":
            return tensor.clone()
        strides = tensor.stride()
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
        size = span * tensor.element_size()
        usable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, usable + mmap.PAGESIZE)
        last_page = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + usable
        forbidden = ctypes.CDLL(None, use_errno=True).mprotect(
            ctypes.c_void_p(last_page), ctypes.c_size_t(mmap.PAGESIZE), 0
        )
        assert forbidden == 0, os.strerror(ctypes.get_errno())
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=usable - size)
        return poison(flat).as_strided(tensor.shape, strides).copy_(tensor)

    return copy


@pytest.fixture
def judge() -> Judge:
    return _judge


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    _judge.row.seconds += report.duration
    if report.when == "call" or report.outcome != "passed":
        _judge.row.outcome = report.outcome
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    if _ROWS:
        planned = [item.nodeid for item in session.items if FOLDER in item.path.parents]
        results.write(Path(_ROWS), {"planned": planned})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Keeps each test's row, and starts no test after the deadline."""
    _judge.start()
    result = yield
    row = _rows[item.nodeid] = _judge.row
    if _ROWS:
        sources = results.sources(kernel for kernel, _ in row.launches)
        line = {"test": item.nodeid, "sources": sources, **row.described()}
        results.write(Path(_ROWS), line)
    if time.time() > float(os.environ.get("W2VBERT_LANE_DEADLINE", "inf")):
        item.session.shouldstop = "the time limit of the GPU lane"
    return result


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """That all that was asked for had passed before is no failure."""
    if _passed_before and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # `python -m tests.kernels` prints one table for all its processes.
    if not _ROWS and any(row.records for row in _rows.values()):
        terminalreporter.section(f"kernels, lane: {LANE}")
        rows = {test: row.described() for test, row in _rows.items()}
        terminalreporter.write_line(results.table(rows))
