"""The interpreter lane: tests that run Triton kernels on the CPU, through NumPy.

Triton decides once, when a kernel is defined, whether it is interpreted or compiled. So these tests
need a process of their own, which `tests/repository/test_interpreter_lane.py` starts; to run some
of them by hand: `TRITON_INTERPRET=1 pytest tests/kernels -k linear`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

import pytest
import torch

from tests.helpers.poison import POISON_INTEGER, poison, poison_allocations

__all__ = ["POISON_INTEGER"]

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory allocated without a value holds NaN, integers `POISON_INTEGER`."""
    poison_allocations(monkeypatch)


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
