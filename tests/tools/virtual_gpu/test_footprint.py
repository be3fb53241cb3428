"""What a launch touches, without its arithmetic: by hand, and as the executor counts the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, ExecutionError, Executor
from tools.virtual_gpu.faults import UnsupportedError
from tools.virtual_gpu.footprint import footprint, sliced
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.ptx import parse
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.requests import requests

SM_80 = GPUTarget("cuda", 80, 32)


def counted(counts: Counts) -> dict[str, Any]:
    return {name: value for name, value in vars(counts).items() if name != "instructions"}


def uncounted(run: Callable[[], object]) -> Launch:
    with requests(SM_80) as found:
        run()
    (request,) = found
    return request.launch()


@triton.jit
def _sum_kernel(x_ptr, y_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + offsets, mask=offsets < length) * tl.load(y_ptr)
    tl.store(out_ptr + 2 * offsets, total, mask=offsets < length)


def test_a_large_launch_without_memory_by_hand() -> None:
    length = 500_000
    x, out = (torch.empty(n, device="meta") for n in (length, 2 * length))
    launch = uncounted(lambda: _sum_kernel[(3_907,)](x, x[8:], out, length, 128, num_warps=4))
    counts = footprint(launch)
    assert counts.stored_bytes == 4 * length and counts.first_loaded == length // 8
    # Every warp asks for the one number besides, in a sector of `x`.
    assert counts.loaded_sectors == length // 8 + 4 * 3_907
    assert counts.first_stored == counts.stored_sectors == 2 * length // 8
    assert not counts.instructions


@triton.jit
def _gather_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + tl.load(index_ptr + offsets)))


def test_elements_that_decide_need_memory() -> None:
    x, out = torch.empty(10_000, device="meta"), torch.empty(64, device="meta")
    index = (torch.arange(64) * 8).to(torch.int32)
    with requests(SM_80) as found:
        _gather_kernel[(1,)](x, index, out, 64, num_warps=1)
    assert footprint(found[0].launch()).first_loaded == 64 + 8
    launch = uncounted(lambda: _gather_kernel[(1,)](x, index.to("meta"), out, 64, num_warps=1))
    with pytest.raises(ExecutionError, match="what is loaded here decides what is touched"):
        footprint(launch)
    with requests(SM_80) as found:
        _gather_kernel[(1,)](x, index * 200, out, 64, num_warps=1)
    with pytest.raises(ExecutionError, match="an access outside of every tensor"):
        footprint(found[0].launch())


@triton.jit
def _branch_kernel(x_ptr, out_ptr, STORES: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    total = tl.sum(x, 0)
    while total > 1.0:
        total = total * 0.5
    if STORES:
        if total > 0.75:
            tl.store(out_ptr + offsets, x)
    else:
        tl.store(out_ptr + offsets, x * total)


@pytest.mark.parametrize("stores", [False, True])
def test_branches_stay_where_they_decide_what_is_touched(stores: bool) -> None:
    x, out = torch.rand(8 * 128), torch.empty(8 * 128)
    found: list[tuple[Launch, Counts]] = []
    checks = Checks(written_whole=False)
    executor = Executor(checks, lambda launch, counts: found.append((launch, counts)))
    with activated("sm_80", executor):
        _branch_kernel[(8,)](x, out, stores, 128, num_warps=4)
    ((launch, counts),) = found
    assert counted(footprint(launch)) == counted(counts)
    assert counts.first_stored < 128 if stores else counts.first_stored == 128
    kept, every = (len(p.instructions) for p in (sliced(launch.ptx), parse(launch.ptx)))
    # Which blocks store, is found out through shared memory: the sum of four warps.
    assert any("shared" in i.opcode for i in sliced(launch.ptx).instructions) == stores
    assert kept < every if stores else kept < every / 2
    launch = uncounted(
        lambda: _branch_kernel[(8,)](x.to("meta"), out.to("meta"), stores, 128, num_warps=4)
    )
    if stores:
        with pytest.raises(ExecutionError, match="its tensor needs memory"):
            footprint(launch)
    else:
        assert counted(footprint(launch)) == counted(counts)


def test_an_instruction_without_a_rule_is_an_error_though_it_touches_nothing() -> None:
    x = torch.empty(128, device="meta")
    ptx = uncounted(lambda: _sum_kernel[(1,)](x, x, x[:0], 0, 128)).ptx
    (first, *_) = (line for line in ptx.splitlines() if "mul.f32" in line)
    with pytest.raises(UnsupportedError, match=r"no rule for 'mulx\.f32"):
        sliced(ptx.replace(first, first.replace("mul.f32", "mulx.f32")))
