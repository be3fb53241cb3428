"""Mutants of PTX, what is watched while they run, and what a trace says of barriers and waits."""

from __future__ import annotations

import pytest
import torch

from tests.tools.virtual_gpu.kernels import caught, execute, written
from tests.tools.virtual_gpu.scripts import matrix_product
from tools.virtual_gpu.executor import ExecutionError, Executor
from tools.virtual_gpu.faults import UnsupportedError
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.mutants import SYNCHRONISATION, Mutant, Watched, mutants, watched
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.trace import ORDERS, Trace, traced


def of(body: str, threads: int = 32, shared: int = 0) -> Launch:
    out = torch.zeros(threads, dtype=torch.int64)
    return written(body, {"out": out}, threads=threads, shared=shared)


def changes(statement: str) -> set[tuple[str, str]]:
    """Operator and statement of the mutants of one statement, each with single spaces."""
    launch = of(f"{statement};")
    line = next(n for n, text in enumerate(launch.ptx.splitlines(), 1) if text == f"{statement};")
    return {
        (mutant.operator, " ".join(mutant.after.split()))
        for mutant in mutants(launch.ptx)
        if mutant.line == line
    }


@pytest.mark.parametrize(
    ("statement", "operator", "after"),
    [
        ("bar.sync 0", "barrier dropped", ""),
        ("bar.warp.sync -1", "barrier of a warp dropped", ""),
        ("fence.proxy.async.shared::cta", "fence dropped", ""),
        ("wgmma.fence.sync.aligned", "fence dropped", ""),
        ("cp.async.commit_group", "commit dropped", ""),
        ("wgmma.commit_group.sync.aligned", "commit dropped", ""),
        ("@%p1 st.global.b64 [%rd10], %rd1", "mask dropped", "st.global.b64 [%rd10], %rd1"),
        ("@!%p1 bra $end;\n$end:\nmov.b32 %r1, %r2", "mask dropped", "bra $end"),
        ("sub.s32 %r1, %r2, %r3", "operands swapped", "sub.s32 %r1, %r3, %r2"),
        ("selp.b32 %r1, 4, %r3, %p1", "operands swapped", "selp.b32 %r1, %r3, 4, %p1"),
        ("fma.rn.f32 %r1, %r2, %r3, %r4", "operands swapped", "fma.rn.f32 %r1, %r2, %r4, %r3"),
        ("mov.b32 {%rs1, %rs2}, %r1", "operands swapped", "mov.b32 {%rs2, %rs1}, %r1"),
        ("add.f32 %r1, %r2, 0f3F800000", "constant changed", "add.f32 %r1, %r2, 0f40000000"),
        ("add.f32 %r1, %r2, 0f00000000", "constant changed", "add.f32 %r1, %r2, 0f3F800000"),
        ("mov.pred %p1, 0", "constant changed", "mov.pred %p1, -1"),
    ],
)
def test_a_statement_has_the_mutant(statement: str, operator: str, after: str) -> None:
    launch = of(f"{statement};")
    found = {(m.operator, " ".join(m.after.split())) for m in mutants(launch.ptx)}
    assert (operator, after) in found


def test_a_wait_is_left_out_or_waits_for_one_group_less() -> None:
    assert changes("cp.async.wait_group 1") == {
        ("wait dropped", ""),
        ("wait for one group less", "cp.async.wait_group 2"),
    }


@pytest.mark.parametrize(
    "statement",
    [
        "add.s32 %r1, %r2, %r3",  # commutative
        "setp.eq.b32 %p1, %r1, %r2",
        "selp.b32 %r1, %r2, %r2, %p1",  # the same swapped
        "mad.wide.u32 %rd20, %r1, %r2, %rd21",  # of different widths
        "ret",
    ],
)
def test_what_would_be_the_same_or_cannot_be_is_no_mutant(statement: str) -> None:
    assert not changes(statement)


def test_what_there_is_no_rule_for_is_no_mutant() -> None:
    # A shuffle's mode and its operands are fine; a descriptor's flags that have no rule are not.
    statement = (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, "
        "%rd20, %rd21, %p1, 1, 1, 0, 0"
    )
    afters = {after for operator, after in changes(statement) if operator == "constant changed"}
    assert all(", 1, 1, " in after for after in afters)


@pytest.mark.parametrize(
    ("following", "is_mutant"),
    [
        ("ld.global.b32 {%r1}, [%rd10];", False),
        ("mov.u32 %r2, 7;\nld.global.v2.b32 {%r1, %r2}, [%rd10];", False),
        ("mov.u32 %r2, %r1;\nld.global.v2.b32 {%r1, %r2}, [%rd10];", True),
        ("@%p1 bra $end;\nmov.u32 %r1, 8;\n$end:", True),
        ("@%p1 ld.global.b32 {%r1}, [%rd10];", True),
        ("add.s32 %r1, %r1, %r0;", True),
        ("st.shared.b32 [%r1], %r0;", True),
    ],
)
def test_what_is_overwritten_before_it_is_read_is_no_mutant(
    following: str, is_mutant: bool
) -> None:
    found = {m.before for m in mutants(of(f"mov.u32 %r1, 7;\n{following}").ptx)}
    assert ("mov.u32 %r1, 7" in found) is is_mutant


def ran(launch: Launch, mutant: Mutant, **checks: bool) -> Watched:
    with watched(mutant, most_rounds=100) as one:
        execute(one.launch(launch), **checks)
    return one


def only(launch: Launch, operator: str, before: str) -> Mutant:
    (mutant,) = (m for m in mutants(launch.ptx) if m.operator == operator and before in m.before)
    return mutant


STORE = "cvt.u64.u32 %rd20, %r2;\nst.global.b64 [%rd10], %rd20;"


def test_a_mutant_does_what_it_says_and_lines_stay_where_they_were() -> None:
    launch = of(f"sub.s32 %r2, 100, %r0;\n{STORE}")
    mutant = only(launch, "operands swapped", "sub.s32")
    with watched(mutant, most_rounds=100) as one:
        changed = one.launch(launch)
        assert len(changed.ptx.splitlines()) == len(launch.ptx.splitlines())
        execute(changed)
    wanted = [(thread - 100) & 0xFFFFFFFF for thread in range(32)]
    assert launch.tensors["out"].tolist() == wanted
    assert one.reached and one.differs


@pytest.mark.parametrize(
    ("body", "operator", "before", "reached", "differs"),
    [
        ("max.s32 %r2, %r0, -5;", "constant changed", "max", True, False),
        ("max.s32 %r2, %r0, 12;", "constant changed", "max", True, True),
        ("setp.lt.u32 %p1, %r0, 99;\nmov.b32 %r2, 0;", "constant changed", "setp", True, False),
        ("bra.uni $end;\nsub.s32 %r2, 1, %r0;\n$end:", "operands swapped", "sub", False, False),
    ],
)
def test_whether_it_was_reached_and_did_something_else(
    body: str, operator: str, before: str, reached: bool, differs: bool
) -> None:
    launch = of(f"mov.b32 %r2, 3;\n{body}\n{STORE}")
    one = ran(launch, only(launch, operator, before))
    assert (one.reached, one.differs) == (reached, differs)


@pytest.mark.parametrize(("limit", "differs"), [(32, False), (31, True)])
def test_a_mask_that_is_never_off_is_equal(limit: int, differs: bool) -> None:
    launch = of(
        f"setp.lt.u32 %p1, %r0, {limit};\ncvt.u64.u32 %rd20, %r0;\n"
        "@%p1 st.global.b64 [%rd10], %rd20;"
    )
    assert ran(launch, only(launch, "mask dropped", "st.global"), garbage=False).differs is differs


@pytest.mark.parametrize(
    ("value", "to", "differs"),
    [("%r3", "%r4", False), ("%r0", "%r4", True), ("%r3", "%r1", True)],
)
def test_a_store_of_what_another_thread_stores_there_is_equal(
    value: str, to: str, differs: bool
) -> None:
    """One lane of each warp stores; without the mask all do, the same to one place or not."""
    launch = of(
        "and.b32 %r2, %r0, 31;\nsetp.eq.u32 %p1, %r2, 0;\nshr.u32 %r3, %r0, 5;\n"
        f"shl.b32 %r4, %r3, 2;\nshl.b32 %r1, %r0, 2;\n@%p1 st.shared.b32 [{to}], {value};",
        threads=64,
        shared=256,
    )
    mutant = only(launch, "mask dropped", "st.shared")
    assert ran(launch, mutant, races=False, garbage=False).differs is differs


def test_a_kernel_that_does_not_end_is_a_fault() -> None:
    launch = of(
        f"mov.b32 %r2, 0;\n$again:\nadd.s32 %r2, %r2, 1;\nsetp.lt.s32 %p1, %r2, 5;\n"
        f"@%p1 bra $again;\n{STORE}"
    )
    with pytest.raises(ExecutionError, match="the kernel does not end"):
        ran(launch, only(launch, "mask dropped", "bra"))


def of_trace(launch: Launch) -> Trace:
    with traced() as trace:
        Executor(Checks(False, False, False, False))(trace.launch(launch))
    return trace


EXCHANGE = """
shl.b32 %r1, %r0, 2;
xor.b32 %r2, %r1, {by};
st.shared.b32 [%r1], %r0;
bar.sync 0;
ld.shared.b32 %r2, [%r2];
"""


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize(("by", "needed"), [(4, True), (128, True), (0, False)])
def test_a_barrier_is_needed_where_two_threads_share_a_byte(
    by: int, needed: bool, space: str
) -> None:
    exchange = EXCHANGE.format(by=by).replace("st.shared", f"st.{space}")
    launch = of(exchange + STORE, threads=64, shared=256)
    line = only(launch, "barrier dropped", "bar").line
    assert of_trace(launch).needs("bar", line) is needed


def test_an_access_that_a_trace_cannot_write_down_is_named() -> None:
    for statement in ("ld.local.b32 %r1, [%r2]", "st.shared::cluster.b32 [%r2], %r1"):
        with traced() as trace, pytest.raises(UnsupportedError, match=r"no rule for '(ld|st)"):
            trace.launch(of(f"{statement};"))


def test_a_barrier_orders_what_lies_beside_it_and_not_beyond_the_next() -> None:
    launch = of(
        EXCHANGE.format(by=4).replace("bar.sync 0;", "bar.sync 0;\nbar.sync 0;") + STORE,
        threads=64,
        shared=256,
    )
    lines = [n for n, text in enumerate(launch.ptx.splitlines(), 1) if text == "bar.sync 0;"]
    trace = of_trace(launch)
    assert not any(trace.needs("bar", line) for line in lines)


def test_global_memory_is_ordered_by_barriers_too() -> None:
    body = "cvt.u64.u32 %rd20, %r0;\nst.global.b64 [%rd10], %rd20;\nbar.sync 0;\n"
    launch = of(f"{body}ld.global.b64 %rd21, [%rd0];")
    assert of_trace(launch).needs("bar", only(launch, "barrier dropped", "bar").line)
    launch = of(f"{body}ld.global.b64 %rd21, [%rd10];")
    assert not of_trace(launch).needs("bar", only(launch, "barrier dropped", "bar").line)


COPIES = """
shl.b32 %r1, %r0, 3;
cp.async.ca.shared.global [%r1], [%rd10], 8;
cp.async.commit_group;
cp.async.ca.shared.global [%r1+256], [%rd10], 8;
cp.async.commit_group;
cp.async.wait_group {left};
{between}
ld.shared.b64 %rd20, [%r1+{at}];
cp.async.wait_group 0;
"""


@pytest.mark.parametrize(
    ("left", "between", "at", "needed"),
    [
        (1, "", 0, (True, True)),
        (0, "", 256, (True, True)),
        (1, "", 256, (False, False)),  # what the second wait waits for: a fault without the mutant
        (1, "bar.sync 0;", 256, (True, True)),  # others may read what arrived before the barrier
        (2, "", 256, (False, False)),  # for nothing
    ],
)
def test_a_wait_is_needed_where_a_copy_would_be_late(
    left: int, between: str, at: int, needed: tuple[bool, bool]
) -> None:
    launch = of(COPIES.format(left=left, between=between, at=at), shared=512)
    trace = of_trace(launch)
    line = next(
        n for n, text in enumerate(launch.ptx.splitlines(), 1) if f"wait_group {left};" in text
    )
    assert (trace.needs("cp.wait", line), trace.needs("cp.wait", line, left + 1)) == needed


def test_the_trace_and_the_checks_say_the_same_of_a_product() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 200).to(torch.bfloat16).unbind()
    for target in ("sm_80", "sm_90"):
        (launch,) = caught(target, lambda: matrix_product.matmul(a, b.T.contiguous()))
        trace, needed = of_trace(launch), 0
        for mutant in mutants(launch.ptx):
            if mutant.operator not in SYNCHRONISATION:
                continue
            what = ORDERS.get(mutant.before.split()[0])
            if what is None:
                continue
            try:
                ran(launch, mutant, garbage=False)
                faults = False
            except ExecutionError:
                faults = True
            left = int(mutant.after.split()[1]) if mutant.after else None
            assert trace.needs(what, mutant.line, left) or not faults, mutant
            needed += faults
        assert needed > 5
