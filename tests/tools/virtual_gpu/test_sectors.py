"""Sectors of global memory: first touches, and what warps ask for in all."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tools.virtual_gpu.count import Table
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, Executor
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.record import Launch


@triton.jit
def _sum_kernel(x_ptr, y_ptr, out_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + offsets * STRIDE) + tl.load(y_ptr + offsets * STRIDE)
    tl.store(out_ptr + offsets, total)


@pytest.mark.parametrize(
    ("stride", "shift", "first", "loaded"),
    [
        (1, 0, 32, 64),  # 2 blocks of 128 words are 2 x 16 sectors, and both operands one tensor
        # From the middle of a sector on each of 2 x 4 warps reaches into a sector more, of which
        # all but the last are the next warp's first.
        (1, 4, 33, 80),
        (8, 0, 256, 512),
        (2, 0, 64, 128),
    ],
)
def test_sectors(stride: int, shift: int, first: int, loaded: int) -> None:
    x, out = torch.zeros(256 * stride + shift)[shift:], torch.empty(256)
    assert (x.data_ptr() - 4 * shift) % 32 == out.data_ptr() % 32 == 0
    found: list[tuple[Launch, Counts]] = []
    executor = Executor(Checks(), lambda launch, counts: found.append((launch, counts)))
    with activated("sm_80", executor):
        _sum_kernel[(2,)](x, x, out, stride, 128, num_warps=4)
    ((launch, counts),) = found
    assert (counts.first_loaded, counts.loaded_sectors) == (first, loaded)
    assert (counts.first_stored, counts.stored_sectors) == (32, 32)
    assert counts.loaded_bytes == 2048
    table = Table()
    table.add(launch, counts)
    table.add(launch, counts)
    assert f"| {2 * first}, {2 * loaded} | 64, 64 |" in table.text()
