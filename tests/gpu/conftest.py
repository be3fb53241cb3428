"""Fixtures of the GPU lane, its share of several processes, and its table.

`make gpu-test` (`python -m tests.gpu`) is the usual way in; `pytest tests/gpu` works as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.lane import DEVICE, INTERPRETED, VIRTUAL, Judge, table
from tests.helpers.poison import poison_allocations

if INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("W2VBERT_GPU_TESTS=interpret needs TRITON_INTERPRET=1")

_judge = Judge()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps every n-th test of this folder where several processes share them.

    The tests of `test_large.py`, which take much memory, stay in one process.
    """
    number, _, count = os.environ.get("W2VBERT_GPU_SHARE", "0/1").partition("/")
    folder = Path(__file__).parent
    mine: list[pytest.Item] = []
    others: list[pytest.Item] = []
    place = 0
    for item in items:
        if folder not in item.path.parents:
            mine.append(item)
            continue
        one_process = item.path.stem == "test_large"
        share = 0 if one_process else place % int(count)
        place += not one_process
        (mine if share == int(number) else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = mine


@pytest.fixture(scope="session", autouse=True)
def virtual_gpu() -> Iterator[None]:
    """Kernels are compiled for `VIRTUAL` and executed in NumPy, with every check."""
    if VIRTUAL is None:
        yield
        return
    from tools.virtual_gpu.driver import activated
    from tools.virtual_gpu.executor import Executor

    with activated(VIRTUAL, Executor()):
        yield


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

    Not with `W2VBERT_GPU_POISON=0`: a tool that looks for memory that was never written must find
    it as it is.
    """
    if os.environ.get("W2VBERT_GPU_POISON") != "0":
        poison_allocations(monkeypatch)


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    _judge.test = request.node.nodeid
    return _judge


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    _judge.seconds[item.nodeid] = _judge.seconds.get(item.nodeid, 0.0) + report.duration
    if report.when == "call" or report.outcome != "passed":
        _judge.outcomes[item.nodeid] = report.outcome
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    folder = Path(__file__).parent
    _judge.planned = [item.nodeid for item in session.items if folder in item.path.parents]
    _write_results()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Keeps the results after every test, and starts none after the deadline."""
    result = yield
    _write_results()
    if time.time() > float(os.environ.get("W2VBERT_GPU_DEADLINE", "inf")):
        item.session.shouldstop = "the time limit of the GPU lane"
    return result


def _write_results() -> None:
    if path := os.environ.get("W2VBERT_GPU_RESULTS"):
        file = Path(path)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(_judge.results()))
        temporary.replace(file)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # `python -m tests.gpu` prints one table for all its processes.
    if _judge.records and "W2VBERT_GPU_RESULTS" not in os.environ:
        terminalreporter.section(
            "GPU lane" + (" (interpreted)" if INTERPRETED else f" ({VIRTUAL})" if VIRTUAL else "")
        )
        terminalreporter.write_line(table(_judge.results()))
