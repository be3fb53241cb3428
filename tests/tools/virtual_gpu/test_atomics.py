"""Atomics: what they compute, and in which order blocks are that use them."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import warnings
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.tools.virtual_gpu.kernels import caught, changed, execute, written
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import ExecutionError, Executor, OrderWarning
from tools.virtual_gpu.faults import UnsupportedError
from tools.virtual_gpu.footprint import footprint
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.trace import traced

DTYPES = {
    "u32": torch.int32,
    "s32": torch.int32,
    "b32": torch.int32,
    "u64": torch.int64,
    "s64": torch.int64,
    "b64": torch.int64,
    "b16": torch.int16,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
}


def of_blocks(launch: Launch, blocks: int) -> Launch:
    return dataclasses.replace(launch, grid=(blocks, 1, 1))


def one_after_another(how: str, kind: str, start: list, given: list) -> tuple[list, list]:
    """In Python: what is in the end at each place, and what each lane finds. Lane t goes to place
    t % len(start); floating point numbers are rounded to their type after each sum."""
    bits = int(kind.lstrip("bsuf"))
    there, found = list(start), []
    for lane, value in enumerate(given):
        at = lane % len(start)
        old = there[at]
        found.append(old)
        if how == "add" and "f" in kind:
            both = torch.tensor([old, value], dtype=torch.float64)
            new = float(both.sum().to(DTYPES[kind]))
        elif how == "add":
            new = old + value
        elif how in ("min", "max"):
            signed = kind[0] == "s"
            key = (lambda n: n) if signed else (lambda n: n % 2**bits)
            new = {"min": min, "max": max}[how](old, value, key=key)
        elif how == "exch":
            new = value
        elif how == "cas":
            new = value if old == start[at] else old
        else:
            new = {"and": old & value, "or": old | value, "xor": old ^ value}[how]
        if "f" not in kind:
            new = (new + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        there[at] = new
    return there, found


@pytest.mark.parametrize(
    "how, kind",
    [
        *(("add", kind) for kind in ("u32", "s32", "u64", "f16", "bf16", "f32", "f64")),
        *((how, kind) for how in ("min", "max") for kind in ("s32", "u32", "s64", "u64")),
        *((how, kind) for how in ("and", "or", "xor", "exch") for kind in ("b32", "b64")),
        *(("cas", kind) for kind in ("b16", "b32", "b64")),
    ],
)
def test_each_lane_once_in_their_order(how: str, kind: str) -> None:
    """48 lanes of 64 go to 3 places."""
    dtype, places = DTYPES[kind], 3
    size = dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        values = torch.randn(64, generator=generator).to(dtype)
        start = torch.randn(places, generator=generator).to(dtype)
    else:
        most = torch.iinfo(dtype).max
        values = torch.randint(-most, most, (64,), generator=generator).to(dtype)
        start = torch.randint(-most, most, (places,), generator=generator).to(dtype)
    there, found = start.clone(), torch.zeros(64, dtype=dtype)
    register = {2: "%rs", 4: "%r1", 8: "%rd2"}[size]
    noftz = ".noftz" if kind in ("f16", "bf16") else ""
    given = f"{register}1"
    if how == "cas":
        given = f"{register}2, {register}1"
    body = f"""
    rem.u32 %r2, %r0, {places};
    mad.wide.u32 %rd7, %r2, {size}, %rd0;
    mad.wide.u32 %rd8, %r0, {size}, %rd1;
    mad.wide.u32 %rd9, %r0, {size}, %rd2;
    mad.wide.u32 %rd6, %r2, {size}, %rd3;
    ld.global.b{8 * size} {register}1, [%rd8];
    ld.global.b{8 * size} {register}2, [%rd6];
    setp.lt.u32 %p1, %r0, 48;
    @%p1 atom.global.gpu.acq_rel.{how}{noftz}.{kind} {register}3, [%rd7], {given};
    @%p1 st.global.b{8 * size} [%rd9], {register}3;
    """
    tensors = {"there": there, "values": values, "found": found, "start": start.clone()}
    execute(written(body, tensors, threads=64), written_whole=False, garbage=False)
    last, seen = one_after_another(how, kind, start.tolist(), values[:48].tolist())
    assert there.tolist() == last
    assert found[:48].tolist() == seen and not found[48:].any()
    assert last != start.tolist()


@triton.jit
def locked_sum_kernel(sum_ptr, x_ptr, lock_ptr, LOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds rows up, one block after another."""
    columns = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * BLOCK + columns)
    lock = lock_ptr + row % LOCKS
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(sum_ptr + columns, tl.load(sum_ptr + columns) + x)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


def locked(rows: int = 20, locks: int = 1, target: str = "sm_80") -> Launch:
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0))
    lock = torch.zeros(locks, dtype=torch.int32)
    total = torch.zeros(128)
    (launch,) = caught(
        target, lambda: locked_sum_kernel[(rows,)](total, x, lock, LOCKS=locks, BLOCK=128)
    )
    return launch


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_a_lock_lets_one_block_go_on_after_another(target: str) -> None:
    """The sums are rounded in the order of the blocks: that is told, and no fault."""
    launch = locked(target=target)
    total, x, lock = (a.value for a in launch.arguments)
    with pytest.warns(OrderWarning, match="locked_sum_kernel: the last bits of sum_ptr depend on"):
        execute(launch)
    expected = torch.zeros(128)
    for row in x:
        expected += row
    # 8 blocks run side by side, and of those that wait the first is served first.
    assert torch.equal(total, expected) and not lock.any()


@pytest.mark.parametrize(
    "old, new",
    [
        (".acq_rel.gpu.cas", ".relaxed.gpu.cas"),
        (".acq_rel.gpu.cas", ".release.gpu.cas"),
        (".gpu.acq_rel.exch", ".gpu.relaxed.exch"),
        (".gpu.acq_rel.exch", ".gpu.acquire.exch"),
    ],
)
def test_a_lock_without_its_order_is_a_race(old: str, new: str) -> None:
    launch = locked()
    which = launch.ptx.count(old) - 1
    with pytest.raises(ExecutionError, match=r"race of blocks: sum_ptr\[\d+\] is read after"):
        execute(changed(launch, old, new, which))


def unordered(launch: Launch, atomic: str) -> Launch:
    """Without the barriers between the first store and an atomic, Triton's own as well."""
    start, end = launch.ptx.index("st.global"), launch.ptx.index(atomic)
    between = launch.ptx[start:end]
    assert "bar.sync" in between
    ptx = launch.ptx[:start] + between.replace("bar.sync", "//") + launch.ptx[end:]
    return dataclasses.replace(launch, ptx=ptx)


def test_a_lock_that_is_freed_with_no_barrier_before_is_a_race() -> None:
    with pytest.raises(ExecutionError, match=r"race of blocks: sum_ptr\[\d+\] is read after"):
        execute(unordered(locked(), ".exch."))


def test_two_locks_for_one_sum_are_a_race() -> None:
    with pytest.raises(ExecutionError, match=r"race of blocks: sum_ptr\[0\]"):
        execute(locked(locks=2))


def test_a_lock_that_is_never_freed_does_not_end() -> None:
    launch = locked(rows=2)
    (freed,) = [line for line in launch.ptx.splitlines() if ".exch." in line]
    with pytest.raises(ExecutionError, match="the kernel does not end: it waits, and") as raised:
        execute(changed(launch, freed, ""))
    assert "bra" in str(raised.value) and "test_atomics.py:" in str(raised.value)


@triton.jit
def wait_for_the_next_kernel(out_ptr, flag_ptr, BLOCKS: tl.constexpr):
    """A block waits for the one behind it, which has not begun."""
    block = tl.program_id(0)
    if block < BLOCKS - 1:
        while tl.atomic_cas(flag_ptr + block + 1, 1, 1) == 0:
            pass
    before = tl.load(out_ptr + block + 1)
    tl.store(out_ptr + block, before + 1)
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr + block, 1)


def test_blocks_that_wait_for_others_have_these_begin() -> None:
    out, flags = torch.zeros(6), torch.zeros(5, dtype=torch.int32)
    with activated("sm_80", Executor(Checks(written_whole=False))):
        wait_for_the_next_kernel[(5,)](out, flags, BLOCKS=5, num_warps=32)
    assert out.tolist() == [5, 4, 3, 2, 1, 0] and flags.all()


@triton.jit
def last_adds_up_kernel(out_ptr, part_ptr, count_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    block, blocks = tl.program_id(0), tl.num_programs(0)
    tl.store(part_ptr + block * BLOCK + columns, (columns + block).to(tl.float32))
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1) == blocks - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for other in range(blocks):
            total += tl.load(part_ptr + other * BLOCK + columns)
        tl.store(out_ptr + columns, total)
        tl.store(count_ptr, 0)


def test_the_last_block_sees_what_the_others_released_behind_a_barrier() -> None:
    """An atomic access by one thread publishes nothing that others did since the last barrier."""
    out, parts = torch.zeros(128), torch.zeros(10, 128)
    count = torch.zeros(1, dtype=torch.int32)
    kernel = last_adds_up_kernel[(10,)]
    (launch,) = caught("sm_90", lambda: kernel(out, parts, count, BLOCK=128))
    execute(launch)
    assert torch.equal(out, 10 * torch.arange(128.0) + 45) and not count.any()
    with pytest.raises(ExecutionError, match=r"part_ptr\[\d, \d+\] is read after block number"):
        execute(unordered(launch, ".add.u32"))


# Written PTX, of 32 threads: what two blocks do to `x`.
BLOCK = "mov.u32 %r1, %ctaid.x;\nsetp.eq.b32 %p1, %r1, 0;\n"
FIRST = "setp.eq.b32 %p2, %r0, 0;\nand.pred %p3, %p1, %p2;\n"


@pytest.mark.parametrize("plain", ["ld.global.b64 %rd20, [%rd10];", "st.global.b64 [%rd10], 7;"])
@pytest.mark.parametrize("first", [True, False])
def test_a_plain_access_and_an_atomic_one_of_two_blocks_are_a_race(plain: str, first: bool) -> None:
    change = "red.global.gpu.relaxed.add.u64 [%rd10], 1;"
    here, there = (change, plain) if first else (plain, change)
    x = torch.zeros(32, dtype=torch.int64)
    launch = of_blocks(written(f"{BLOCK}@%p1 {here}\n@!%p1 {there}", {"x": x}), 2)
    with pytest.raises(ExecutionError, match=r"race of blocks: x\[0\] is .*no release and acquire"):
        execute(launch)


@pytest.mark.parametrize("scope, fails", [("cta", True), ("gpu", False), ("sys", False)])
def test_what_is_atomic_for_a_block_is_not_for_two(scope: str, fails: bool) -> None:
    x = torch.zeros(32, dtype=torch.int64)
    launch = of_blocks(written(f"red.global.{scope}.relaxed.add.u64 [%rd10], 1;", {"x": x}), 2)
    if fails:
        with pytest.raises(ExecutionError, match=r"race of blocks: x\[0\] is changed at once"):
            execute(launch)
    else:
        execute(launch)
        assert x.tolist() == [2] * 32


def test_an_order_by_luck_is_seen_in_the_run_backwards() -> None:
    """Block 1 acquires what block 0 released, if that was first: it does not look."""
    body = f"""{BLOCK}
    @%p1 st.global.b64 [%rd10], 7;
    bar.sync 0;
    @%p1 atom.global.gpu.release.add.u64 %rd21, [%rd11], 1;
    @!%p1 atom.global.gpu.acquire.add.u64 %rd21, [%rd11], 0;
    bar.sync 0;
    @!%p1 ld.global.b64 %rd20, [%rd10];
    """
    x, flag = torch.zeros(32, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
    launch = of_blocks(written(body, {"x": x, "flag": flag}), 2)
    execute(launch, garbage=False)
    with pytest.raises(ExecutionError, match=r"race of blocks: x\[0\] is written after another"):
        execute(launch)


def test_the_thread_that_releases_publishes_what_it_did_without_a_barrier() -> None:
    body = f"""{BLOCK}
    @%p1 st.global.b64 [%rd10], 7;
    @%p1 red.global.gpu.release.add.u64 [%rd11], 1;
    @%p1 bra $end;
    $again:
    atom.global.gpu.acquire.add.u64 %rd21, [%rd11], 0;
    setp.eq.b64 %p3, %rd21, 0;
    @%p3 bra $again;
    bar.sync 0;
    ld.global.b64 %rd20, [%rd10AT];
    st.global.b64 [%rd12], %rd20;
    $end:
    """
    tensors = {name: torch.zeros(32, dtype=torch.int64) for name in ("x", "flag", "out")}
    launch = of_blocks(written(body.replace("AT", ""), tensors), 2)
    execute(launch)
    assert tensors["out"].tolist() == [7] * 32
    # What it does afterwards is not.
    tensors = {name: torch.zeros(32, dtype=torch.int64) for name in tensors}
    late = "@%p1 st.global.b64 [%rd10], 7;"
    release = "@%p1 red.global.gpu.release.add.u64 [%rd11], 1;"
    body = body.replace("AT", "").replace(late, "").replace(release, f"{release}\n{late}")
    with pytest.raises(ExecutionError, match=r"race of blocks: x\[0\]"):
        execute(of_blocks(written(body, tensors), 2))


# Block 1 waits for what block 0 adds to a flag, and reads what that wrote before. Fences and the
# addition are the first threads'.
FENCED = f"""{BLOCK}{FIRST}
xor.b32 %r3, %r0, 1;
mad.wide.u32 %rd20, %r3, 8, %rd0;
@%p1 st.global.b64 [%rd10], 7;
bar.sync 0;
@%p2 fence.acq_rel.gpu;
@%p3 red.global.gpu.relaxed.add.u64 [%rd1], 1;
@%p1 bra $end;
$again:
atom.global.gpu.relaxed.add.u64 %rd21, [%rd1], 0;
setp.eq.b64 %p4, %rd21, 0;
@%p4 bra $again;
@%p2 fence.acq_rel.gpu;
bar.sync 0;
ld.global.b64 %rd22, [%rd20];
st.global.b64 [%rd12], %rd22;
$end:
"""


def fenced() -> Launch:
    tensors = {name: torch.zeros(32, dtype=torch.int64) for name in ("x", "flag", "out")}
    return of_blocks(written(FENCED, tensors), 2)


def test_fences_make_releases_and_acquires_of_relaxed_atomics() -> None:
    """PTX ISA, "Release and Acquire Patterns": a fence and a write, a read and a fence."""
    for which in ([], [0], [0, 1]):
        launch = fenced()
        for place in reversed(which):
            launch = changed(launch, "fence.acq_rel", "fence.sc", place)
        execute(launch)
        assert launch.tensors["out"].tolist() == [7] * 32


FENCE = "@%p2 fence.acq_rel.gpu;"


@pytest.mark.parametrize(
    "old, new, which",
    [
        (FENCE, "", 0),
        (FENCE, "", 1),
        (FENCE, FENCE.replace("gpu", "cta"), 0),
        (FENCE, FENCE.replace("gpu", "cta"), 1),
        ("bar.sync 0;", "", 0),
        ("bar.sync 0;", "", 1),
        (f"bar.sync 0;\n{FENCE}", f"{FENCE}\nbar.sync 0;", 0),
        (f"{FENCE}\nbar.sync 0;", f"bar.sync 0;\n{FENCE}", 0),
    ],
)
def test_without_a_fence_or_its_barrier_relaxed_atomics_order_nothing(
    old: str, new: str, which: int
) -> None:
    """A barrier in front of the fence of who publishes, and one behind that of who reads."""
    with pytest.raises(ExecutionError, match=r"race of blocks: x\[\d+\]"):
        execute(changed(fenced(), old, new, which))


@pytest.mark.parametrize(
    "first, second, said",
    [
        ("st.global.b64 [%rd0], %rd20;", "CHANGE", "change of what thread 1 of the block wrote"),
        ("CHANGE", "st.global.b64 [%rd0], %rd20;", "write of what thread 0 of the block changed"),
        ("CHANGE", "ld.global.b64 %rd20, [%rd0];", "read of what thread 0 of the block changed"),
    ],
)
def test_threads_of_a_block_are_not_ordered_by_atomics(first: str, second: str, said: str) -> None:
    change = "red.global.gpu.acq_rel.add.u64 [%rd0], 1;"
    parts = [
        part.replace("CHANGE", f"@%p1 {change}") if part == "CHANGE" else f"@%p2 {part}"
        for part in (first, second)
    ]
    x = torch.zeros(32, dtype=torch.int64)
    start = "setp.eq.b32 %p1, %r0, 0;\nsetp.eq.b32 %p2, %r0, 1;\nmov.b64 %rd20, 3;\n"
    for between, fails in (("", True), ("\nbar.sync 0;\n", False)):
        launch = written(start + parts[0] + between + parts[1], {"x": x})
        if fails:
            with pytest.raises(ExecutionError, match=said):
                execute(launch)
        else:
            execute(launch, written_whole=False)


def test_a_read_before_an_atomic_access_of_the_block_is_told() -> None:
    x = torch.zeros(32, dtype=torch.int64)
    body = """setp.eq.b32 %p1, %r0, 0;
    ld.global.b64 %rd20, [%rd0];
    @%p1 red.global.gpu.acq_rel.add.u64 [%rd0], 1;
    """
    with pytest.warns(OrderWarning, match=r"change of what thread \d+ of the block read since the"):
        execute(written(body, {"x": x}))


@pytest.mark.parametrize(
    "how, fails", [("exch.b64", True), ("add.u64", False), ("max.u64", False), ("add.f64", False)]
)
def test_results_depend_on_the_order_of_blocks_by_rounding_at_most(how: str, fails: bool) -> None:
    kind = torch.float64 if "f64" in how else torch.int64
    x, values = torch.zeros(1, dtype=kind), torch.arange(1, 33)
    if kind == torch.float64:
        values = torch.randn(32, dtype=kind, generator=torch.Generator().manual_seed(2))
        forwards = 3 * values.tolist()
        assert functools.reduce(operator.add, forwards) != functools.reduce(
            operator.add, forwards[::-1]
        )
    body = f"ld.global.b64 %rd20, [%rd11];\nred.global.gpu.relaxed.{how} [%rd0], %rd20;"
    launch = of_blocks(written(body, {"x": x, "values": values}), 3)
    if fails:
        with pytest.raises(
            ExecutionError, match=r"x\[0\] depends on the order of blocks.*no round"
        ):
            execute(launch)
        execute(launch, order=False)
    elif kind == torch.float64:
        with pytest.warns(OrderWarning, match="last bits of x depend on the order of blocks: 1 of"):
            execute(launch)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            execute(launch)


def test_garbage_that_is_added_is_a_fault_and_no_matter_of_order() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    launch = written("red.global.gpu.relaxed.add.f64 [%rd0], %rd20;", {"x": x})
    with pytest.raises(ExecutionError, match="or on what registers, shared memory or outputs held"):
        execute(launch, order=False)


@triton.jit
def scattered_kernel(out_ptr, x_ptr, n, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.atomic_add(out_ptr + at % PLACES, x, mask=at < n)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("places", [256, 30])
def test_sums_by_atomics_as_compiled(target: str, dtype: torch.dtype, places: int) -> None:
    """Small integers, whose sums are exact in every dtype: nothing depends on an order. Of 256
    places vectors and pairs are added; in bfloat16 for sm_80 a loop compares and swaps."""
    n = 500
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (n,), generator=generator).to(dtype)
    out = torch.zeros(places, dtype=dtype)
    with activated(target, Executor()), warnings.catch_warnings():
        warnings.simplefilter("error")
        scattered_kernel[(4,)](out, x, n, BLOCK=128, PLACES=places)
    expected = [sum(x[at::places].tolist()) for at in range(places)]
    assert out.tolist() == expected


@triton.jit
def histogram_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr, BINS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BINS), tl.histogram(x, BINS))


def test_a_histogram_is_counted_in_shared_memory() -> None:
    x = torch.randint(0, 16, (512,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    out = torch.zeros(16, dtype=torch.int32)
    (launch,) = caught("sm_80", lambda: histogram_kernel[(1,)](out, x, BLOCK=512, BINS=16))
    assert re.search(r"\batom\.(relaxed\.sys\.)?shared\.add\.u32\b", launch.ptx)
    execute(launch)
    assert torch.equal(out.long(), torch.bincount(x.long(), minlength=16))
    # The barriers between zeros, sums and what reads them.
    behind = launch.ptx.rindex("shared.add.u32")
    last = launch.ptx[:behind].count("bar.sync")
    for which, said in ((last - 1, "write of what"), (last, "read of what another thread")):
        with pytest.raises(ExecutionError, match=f"race in shared memory: {said}"):
            execute(changed(launch, "bar.sync \t0;", "", which))


@pytest.mark.parametrize("space", ["shared", "global"])
def test_subnormal_numbers_are_added_in_shared_memory_and_flushed_in_global(space: str) -> None:
    """PTX ISA, "atom"."""
    there = torch.zeros(1, dtype=torch.float32)
    out, tiny = torch.zeros(64, dtype=torch.float32), 2.0**-140
    place = "[%r31]" if space == "shared" else "[%rd1]"
    body = f"""
    mov.b32 %r31, 0;
    setp.eq.b32 %p1, %r0, 0;
    @%p1 st.shared.b32 [%r31], 0;
    bar.sync 0;
    mov.b32 %r2, 512;
    mad.wide.u32 %rd20, %r0, 4, %rd0;
    atom.{space}.add.f32 %r3, {place}, %r2;
    red.{space}.add.u32 {place}, 0;
    st.global.b32 [%rd20], %r3;
    """
    tensors = {"out": out, "there": there}
    execute(written(body, tensors, threads=64, shared=4), garbage=False)
    assert out.tolist() == [lane * tiny * (space == "shared") for lane in range(64)]


def test_what_there_is_not_is_named() -> None:
    x = torch.zeros(32, dtype=torch.int64)
    for statement in (
        "atom.global.gpu.relaxed.inc.u32 %r1, [%rd0], 1;",
        "red.global.cluster.relaxed.add.u64 [%rd0], 1;",
        "atom.global.gpu.relaxed.add.b32 %r1, [%rd0], 1;",
    ):
        with pytest.raises(UnsupportedError, match="no rule for"):
            execute(written(statement, {"x": x}))
    both = "red.global.gpu.relaxed.add.u64 [%rd0], 1;\nred.global.gpu.relaxed.add.u32 [%rd0], 1;"
    with pytest.raises(UnsupportedError, match="atomics of several widths on the same bytes"):
        execute(written(both, {"x": x}))
    launch = written("red.global.gpu.relaxed.add.u64 [%rd0], 1;", {"x": x})
    with pytest.raises(UnsupportedError, match="no footprint of atomics"):
        footprint(launch)
    with traced() as trace, pytest.raises(UnsupportedError, match="a trace has no rule for"):
        trace.launch(launch)
    odd = "add.s64 %rd1, %rd0, 4;\nred.global.gpu.relaxed.add.u64 [%rd1], 1;"
    with pytest.raises(ExecutionError, match="atomic access that is not aligned to its width"):
        execute(written(odd, {"x": x}))
    out = "add.s64 %rd1, %rd0, 256;\nred.global.gpu.relaxed.add.u64 [%rd1], 1;"
    with pytest.raises(ExecutionError, match="atomic access outside of every tensor"):
        execute(written(out, {"x": x}))


def test_no_kernel_of_this_project_has_atomics() -> None:
    """What `written once` excepts."""
    sources = list((Path(__file__).parents[3] / "csrc_triton").rglob("*.py"))
    assert sources and not [path for path in sources if "atomic_" in path.read_text()]
