"""The interpreter lane: tests that run Triton kernels on the CPU, through NumPy.

Triton decides once, when a kernel is defined, whether it is interpreted or compiled. So these tests
need a process of their own, which `tests/test_interpreter_lane.py` starts; to run some of them by
hand: `TRITON_INTERPRET=1 pytest tests/kernels -k linear`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

POISON_INTEGER = -7_777_777


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a buffer with what no kernel writes: NaN, or one odd integer."""
    with torch.no_grad():
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int32, torch.int64):
            return tensor.fill_(POISON_INTEGER)
        return tensor


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory allocated without a value holds NaN, integers `POISON_INTEGER`."""

    def poisoned(allocate: Any) -> Any:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def guarded() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies a tensor to the end of memory that may be touched: the next byte ends the process.

    What a kernel reads past an end and then leaves unused cannot be seen in its output. Rows stay
    strided; their gaps hold NaN.
    """

    def copy(tensor: torch.Tensor) -> torch.Tensor:
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
