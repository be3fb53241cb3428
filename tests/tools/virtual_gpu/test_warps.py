"""What lanes and threads of a block do together, and how threads are numbered."""

from __future__ import annotations

import dataclasses
import functools
import operator

import pytest
import torch

from tests.tools.virtual_gpu.kernels import computed, execute, written
from tools.virtual_gpu.executor import ExecutionError
from tools.virtual_gpu.faults import UnsupportedError

REDUCTIONS = {
    "add": lambda a, b: (a + b) & 0xFFFFFFFF,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


def signed(value: int) -> int:
    return value - (value >> 31 << 32)


@pytest.mark.parametrize(
    ("how", "kind"),
    [(how, kind) for how in ("add", "min", "max") for kind in ("u32", "s32")]
    + [(how, "b32") for how in ("and", "or", "xor")],
)
def test_a_reduction_of_a_warp_is_in_all_of_its_lanes(how: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(0, 2**32, (32,), generator=generator)
    values = [signed(x) if kind == "s32" else x for x in a.tolist()]
    right = functools.reduce(REDUCTIONS[how], values) & 0xFFFFFFFF
    got = computed(f"redux.sync.{how}.{kind} %r25, %r20, -1;", a)
    assert got.tolist() == [right] * 32


def test_each_warp_reduces_and_votes_for_itself_and_whole() -> None:
    out = torch.zeros(64, dtype=torch.int64)
    store = "cvt.u64.u32 %rd20, %r1;\nst.global.b64 [%rd10], %rd20;"
    body = f"redux.sync.max.u32 %r1, %r0, -1;\n{store}"
    execute(written(body, {"out": out}, threads=64))
    assert out.tolist() == [31] * 32 + [63] * 32
    body = f"setp.lt.u32 %p0, %r0, 40;\nvote.sync.ballot.b32 %r1, %p0, -1;\n{store}"
    execute(written(body, {"out": out}, threads=64))
    assert out.tolist() == [0xFFFFFFFF] * 32 + [0xFF] * 32
    for statement in ("redux.sync.add.u32 %r1, %r0, -1;", "vote.sync.ballot.b32 %r1, %p0, -1;"):
        part = f"setp.lt.u32 %p0, %r0, 5;\n@%p0 {statement}"
        with pytest.raises(ExecutionError, match="by a part of a warp"):
            execute(written(part, {}))
    with pytest.raises(ExecutionError, match=r"vote\.sync by a part of a warp"):
        execute(written("vote.sync.any.pred %p1, %p0, 15;", {}), garbage=False)


def test_lanes_wait_for_those_whose_way_is_longer() -> None:
    """Also where ways meet in front of where they part, as in a loop that a compiler turned."""
    out = torch.zeros(32, dtype=torch.int64)
    body = """
    bra.uni $PART;
    $MEET:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    cvt.u64.u32 %rd20, %r2;
    st.global.b64 [%rd10], %rd20;
    bra.uni $END;
    $PART:
    add.s32 %r1, %r0, 100;
    setp.lt.u32 %p0, %r0, 5;
    @%p0 bra $MEET;
    add.s32 %r1, %r1, 1000;
    bra.uni $MEET;
    $END:
    """
    execute(written(body, {"out": out}))
    lanes = [lane ^ 1 for lane in range(32)]
    assert out.tolist() == [100 + lane + (1000 if lane >= 5 else 0) for lane in lanes]
    never = body.replace("add.s32 %r1, %r1, 1000;\n    bra.uni $MEET;", "bra.uni $END;")
    assert never != body
    with pytest.raises(ExecutionError, match=r"shfl\.sync by a part of a warp"):
        execute(written(never, {"out": out}))


@pytest.mark.parametrize("threshold", [0, 1, 17, 32])
def test_votes_are_those_of_the_lanes(threshold: int) -> None:
    """PTX ISA, "vote.sync": a bit for each lane; whether any, all, or all the same."""
    compare = f"setp.lt.u32 %p0, %r0, {threshold};\n"
    lanes = [lane < threshold for lane in range(32)]
    ballot = computed(f"{compare}vote.sync.ballot.b32 %r25, %p0, -1;", torch.zeros(32).long())
    assert ballot.tolist() == [sum(1 << lane for lane in range(32) if lanes[lane])] * 32
    for how, negated, right in (
        ("any", "", any(lanes)),
        ("all", "", all(lanes)),
        ("uni", "", len(set(lanes)) == 1),
        ("any", "!", not all(lanes)),
    ):
        statement = (
            f"{compare}vote.sync.{how}.pred %p1, {negated}%p0, -1;\nselp.b32 %r25, 1, 0, %p1;"
        )
        assert computed(statement, torch.zeros(32).long()).tolist() == [int(right)] * 32


def test_barriers_with_numbers_are_those_of_the_whole_block() -> None:
    def exchanged(barrier: str) -> None:
        body = f"""
        shl.b32 %r1, %r0, 2;
        xor.b32 %r2, %r1, 128;
        st.shared.b32 [%r1], %r0;
        {barrier}
        ld.shared.b32 %r4, [%r2];
        cvt.u64.u32 %rd20, %r4;
        st.global.b64 [%rd10], %rd20;
        """
        out = torch.zeros(64, dtype=torch.int64)
        execute(written(body, {"out": out}, threads=64, shared=256))
        assert out.tolist() == [thread ^ 32 for thread in range(64)]

    for barrier in ("bar.sync 3, 64;", "barrier.sync 1, 64;", "barrier.sync 2;", "bar.sync 0x0;"):
        exchanged(barrier)
    with pytest.raises(ExecutionError, match="read of what thread 32 wrote since the last barrier"):
        exchanged("")
    for barrier in ("bar.sync 1, 32;", "bar.sync %r0;", "bar.sync 16;"):
        with pytest.raises(UnsupportedError, match="of a part of the block"):
            exchanged(barrier)


def test_threads_are_numbered_along_x_then_y_then_z() -> None:
    out = torch.zeros(64, dtype=torch.int64)
    body = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %tid.y;
    mov.u32 %r3, %tid.z;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %ntid.y;
    mad.lo.s32 %r6, %r3, %r5, %r2;
    mad.lo.s32 %r6, %r6, %r4, %r1;
    mad.lo.s32 %r7, %r3, 100, %r2;
    mad.lo.s32 %r7, %r7, 100, %r1;
    mad.wide.u32 %rd20, %r6, 8, %rd0;
    cvt.u64.u32 %rd21, %r7;
    st.global.b64 [%rd20], %rd21;
    """
    launch = written(body, {"out": out}, threads=64)
    for shape, sizes in (("64", (64, 1, 1)), ("16, 2, 2", (16, 2, 2)), ("8, 8", (8, 8, 1))):
        out.zero_()
        execute(
            dataclasses.replace(launch, ptx=launch.ptx.replace("reqntid 64", f"reqntid {shape}"))
        )
        x, y, z = sizes
        assert out.tolist() == [
            (k * 100 + j) * 100 + i for k in range(z) for j in range(y) for i in range(x)
        ]
    with pytest.raises(UnsupportedError, match="whole warps"):
        execute(dataclasses.replace(launch, ptx=launch.ptx.replace("reqntid 64", "reqntid 40")))
