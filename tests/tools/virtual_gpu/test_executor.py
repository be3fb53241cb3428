"""Kernels as compiled, against PyTorch; and every check, shown by the fault that it is for."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tests.tools.virtual_gpu.kernels import LACKS_FENCE, caught, changed, execute, written
from tests.tools.virtual_gpu.scripts import fused_softmax, vector_addition
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import ExecutionError, Executor
from tools.virtual_gpu.faults import UnsupportedError
from tools.virtual_gpu.record import Argument, Launch

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("script", ["vector_addition", "fused_softmax", "layer_norm"])
def test_kernels_without_tensor_cores(
    script: str, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    with activated(target, Executor()):
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert capsys.readouterr().out == "the same as PyTorch\n"


@pytest.mark.parametrize(
    "case",
    [
        "matrix_product bfloat16",
        "matrix_product float16",
        "matrix_product float32",
        "fused_attention bfloat16",
        "fused_attention float16",
        "described_product bfloat16",
        "described_product float32 host",
    ],
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_kernels_with_tensor_cores(
    target: str, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = case.split()[0]
    monkeypatch.setattr(sys, "argv", case.split())
    pipelined = script == "fused_attention" or case == "matrix_product float32"
    faulty = LACKS_FENCE and target == "sm_90" and pipelined
    expected = pytest.raises(ExecutionError, match=r"wgmma of .* with no fence\.proxy\.async")
    with activated(target, Executor()), expected if faulty else contextlib.nullcontext():
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert capsys.readouterr().out == ("" if faulty else "the same as PyTorch\n")


def addition(n: int = 1000, claimed: int | None = None):
    x, y = torch.randn(2, n).unbind()
    x, y, out = x.clone(), y.clone(), torch.zeros(n)
    kernel = vector_addition.add_kernel[(triton.cdiv(n, 256),)]
    (launch,) = caught("sm_80", lambda: kernel(x, y, out, claimed or n, BLOCK=256))
    return launch


def softmax():
    (launch,) = caught("sm_80", lambda: fused_softmax.softmax(torch.randn(5, 217)))
    execute(launch)
    return launch


def test_an_access_outside_of_every_tensor_is_a_fault_with_its_place() -> None:
    with pytest.raises(ExecutionError) as raised:
        execute(addition(1000, claimed=1001))
    said = str(raised.value)
    assert "kernel add_kernel, block (3, 0, 0): global load outside of every tensor" in said
    assert "4 bytes at byte 4000 of the 4000 of x_ptr" in said
    # Two neighbours for each of 128 threads: element 232 of the block is the 116th's.
    assert "threads 116 (1 of 128)" in said
    source = Path(vector_addition.__file__).read_text().splitlines()
    (line,) = (n for n, text in enumerate(source, 1) if "tl.load(x_ptr" in text)
    assert f"vector_addition.py:{line}\n" in said + "\n"
    number = int(said.partition("PTX line ")[2].partition(":")[0])
    statement = said.partition(f"PTX line {number}: ")[2].splitlines()[0]
    assert statement.partition("ld.global")[2] in addition().ptx.splitlines()[number - 1]


def test_an_access_that_is_not_aligned_is_a_fault() -> None:
    body = "st.global.b32 [%rd0+2], %r0;"
    with pytest.raises(ExecutionError, match="store of 4 bytes that is not aligned"):
        execute(written(body, {"out": torch.zeros(64)}))
    with pytest.raises(ExecutionError, match="shared load of 8 bytes that is not aligned"):
        execute(written("ld.shared.v2.b32 {%r1, %r2}, [4];", {}, shared=64))
    with pytest.raises(ExecutionError, match="shared store at byte 64 of the 64"):
        execute(written("st.shared.b32 [64], 0;", {}, shared=64))


def test_what_depends_on_garbage_is_a_fault() -> None:
    launch = addition()
    adds = [line for line in launch.ptx.splitlines() if line.strip().startswith("add.f32")]
    wrong = changed(launch, adds[0], "")
    with pytest.raises(
        ExecutionError, match=r"out_ptr\[\d+\] depends on the order of blocks, or on what reg"
    ):
        execute(wrong)
    execute(wrong, garbage=False)
    body = "shl.b32 %r1, %r0, 2;\nld.shared.b32 %r2, [%r1];\nst.global.b32 [%rd10], %r2;"
    memory = {"out": torch.zeros(32, 2, dtype=torch.int32)[:, 0]}
    with pytest.raises(
        ExecutionError, match=r"out\[0\] depends on the order of blocks, or on what reg"
    ):
        execute(written(body, memory, shared=128))


def test_a_store_that_garbage_decides_is_a_fault() -> None:
    """What is stored was there before: only garbage in what is merely written tells."""
    body = "cvt.u64.u32 %rd20, %r0;\n@%p5 st.global.b64 [%rd10], %rd20;"
    with pytest.raises(
        ExecutionError, match=r"out\[\d+\] depends on the order of blocks, or on what reg"
    ):
        execute(written(body, {"out": torch.arange(32)}), written_whole=False)


@triton.jit
def twice_kernel(out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, offsets)


@triton.jit
def shift_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets + BLOCK))


def test_an_output_written_twice_or_in_part_is_a_fault() -> None:
    out = torch.zeros(4, 64, dtype=torch.int32)
    (launch,) = caught("sm_80", lambda: twice_kernel[(2,)](out[1], BLOCK=64))
    with pytest.raises(ExecutionError, match=r"out_ptr\[0\] is written twice, first by block nu"):
        execute(launch)
    execute(launch, written_once=False)
    body = "st.global.b64 [%rd0], 5;"
    with pytest.raises(ExecutionError, match=r"out\[0\] is written twice, by two threads at once"):
        execute(written(body, {"out": torch.zeros(1, dtype=torch.int64)}))
    with pytest.raises(ExecutionError, match=r"1 of 1000 elements of out_ptr are never written, "):
        execute(addition(1000, claimed=999))
    execute(addition(1000, claimed=999), written_whole=False)


@triton.jit
def shift_back_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets + BLOCK, offsets)
    tl.debug_barrier()
    tl.store(x_ptr + offsets + 8 * BLOCK, tl.load(x_ptr + offsets))


def test_a_block_that_reads_what_another_wrote_is_a_fault() -> None:
    x = torch.zeros(1024, dtype=torch.int32)
    (launch,) = caught("sm_80", lambda: shift_back_kernel[(3,)](x, BLOCK=64))
    said = r"race of blocks: x_ptr\[64\] is read after block number 0 wrote it"
    with pytest.raises(ExecutionError, match=said):
        execute(launch, written_whole=False)


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_a_fault_names_its_block_however_many_are_executed_side_by_side(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.virtual_gpu.executor.SIDE_BY_SIDE", 128 * at_once)
    with pytest.raises(ExecutionError, match=r"block \(3, 0, 0\): global load outside") as raised:
        execute(addition(1000, claimed=1001))
    assert "threads 116 (1 of 128)" in str(raised.value)


def test_blocks_that_part_go_on_each_by_itself() -> None:
    """Loops of different lengths, copies under way, a barrier, threads that part: in 5 blocks."""
    body = """
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 64, %r0;
    mad.wide.u32 %rd20, %r2, 8, %rd0;
    mad.wide.u32 %rd21, %r2, 8, %rd1;
    shl.b32 %r3, %r0, 3;
    xor.b32 %r4, %r3, 256;
    cp.async.ca.shared.global [%r3], [%rd20], 8;
    cp.async.commit_group;
    mov.b32 %r5, 0;
    $again:
    add.s32 %r5, %r5, 3;
    setp.lt.u32 %p0, %r5, %r1;
    @%p0 bra $again;
    setp.lt.u32 %p1, %r0, %r1;
    @%p1 bra $few;
    add.s32 %r5, %r5, 1000;
    $few:
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b64 %rd22, [%r4];
    cvt.u64.u32 %rd23, %r5;
    add.s64 %rd22, %rd22, %rd23;
    st.global.b64 [%rd21], %rd22;
    """
    x, out = torch.randint(0, 2**40, (320,)), torch.zeros(320, dtype=torch.int64)
    launch = written(body, {"x": x, "out": out}, threads=64, shared=512)
    execute(dataclasses.replace(launch, grid=(5, 1, 1)))
    for block in range(5):
        for thread in range(64):
            rounds = 3 * max(1, -(-block // 3))
            more = rounds + (0 if thread < block else 1000)
            assert out[block * 64 + thread] == x[block * 64 + (thread ^ 32)] + more


def test_blocks_that_read_what_others_write_are_a_fault() -> None:
    x = torch.zeros(256)
    (launch,) = caught("sm_80", lambda: shift_kernel[(3,)](x, BLOCK=64))
    with pytest.raises(ExecutionError, match=r"race of blocks: x_ptr\[64\] is written after anot"):
        execute(launch, written_whole=False)


@triton.jit
def neighbour_kernel(scratch_ptr, out_ptr, BLOCK: tl.constexpr, USES: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    own = scratch_ptr + tl.program_id(0) * BLOCK
    tl.store(own + offsets, offsets + 5)
    tl.debug_barrier()
    found = tl.load(own + offsets + 1)
    tl.debug_barrier()
    tl.store(own + offsets, 2 * offsets + 9, mask=offsets < BLOCK // 2)
    found = tl.where((offsets + 1 < BLOCK) | USES, found, 0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offsets, found)


def test_scratch_memory_is_no_result_and_what_blocks_leave_in_it_must_not_matter() -> None:
    scratch, out = torch.zeros(257, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)

    def launch(uses: bool) -> Launch:
        scratch.zero_()
        (one,) = caught("sm_80", lambda: neighbour_kernel[(4,)](scratch, out, BLOCK=64, USES=uses))
        return one

    execute(launch(uses=False))
    assert out.tolist() == 4 * [*range(6, 69), 0]
    with pytest.raises(ExecutionError, match=r"out_ptr\[\d+\] depends on the order of blocks"):
        execute(launch(uses=True))
    changed_name = dataclasses.replace(
        launch(uses=False),
        arguments=[
            dataclasses.replace(a, name="x_ptr") if a.name == "scratch_ptr" else a
            for a in launch(uses=False).arguments
        ],
    )
    with pytest.raises(ExecutionError, match=r"race of blocks: x_ptr\[64\] is read after"):
        execute(changed_name)
    # Of two blocks that write one byte the one that comes last decides.
    with pytest.raises(ExecutionError, match=r"scratch_ptr\[0\] is written twice, first by block"):
        (both,) = caught("sm_80", lambda: shared_scratch_kernel[(2,)](scratch, out, BLOCK=64))
        execute(both)


@triton.jit
def shared_scratch_kernel(scratch_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(scratch_ptr + offsets, tl.program_id(0))
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offsets, offsets)


def test_every_barrier_and_wait_of_the_softmax_is_needed() -> None:
    launch = softmax()
    barriers = launch.ptx.count("bar.sync")
    assert barriers >= 5
    noticed = 0
    for which in range(barriers):
        try:
            execute(changed(launch, "bar.sync", "//", which), garbage=False)
        except ExecutionError as fault:
            assert "race in shared memory" in str(fault)
            noticed += 1
    # One lies between two that no thread touches shared memory between.
    assert noticed >= barriers - 1
    waits = launch.ptx.count("cp.async.wait_group")
    assert waits
    for which in range(waits):
        with pytest.raises(ExecutionError, match=r"still copies|ends before a cp.async"):
            execute(changed(launch, "cp.async.wait_group", "//", which), garbage=False)


def shared_race(between: str, threads: int = 64, to: str = "%r3") -> None:
    """Each thread writes its word, and reads its neighbour's."""
    body = f"""
    shl.b32 %r1, %r0, 2;
    xor.b32 %r2, %r0, 1;
    shl.b32 %r3, %r2, 2;
    st.shared.b32 [%r1], %r0;
    {between}
    ld.shared.b32 %r4, [{to}];
    cvt.u64.u32 %rd20, %r4;
    st.global.b64 [%rd10], %rd20;
    """
    out = torch.zeros(threads, dtype=torch.int64)
    execute(written(body, {"out": out}, threads=threads, shared=4 * threads))
    assert to != "%r3" or out.tolist() == [thread ^ 1 for thread in range(threads)]


def test_threads_are_ordered_by_barriers_and_lanes_by_those_of_their_warp() -> None:
    shared_race("bar.sync 0;")
    shared_race("bar.warp.sync -1;")
    shared_race("", to="%r1")
    with pytest.raises(ExecutionError, match="read of what thread 1 wrote since the last barrier"):
        shared_race("")
    with pytest.raises(ExecutionError, match="race in shared memory: read of what thread 32 wrote"):
        shared_race("xor.b32 %r3, %r1, 128;\nbar.warp.sync -1;")
    with pytest.raises(ExecutionError, match="write of what thread 1 wrote since the last barrier"):
        shared_race("st.shared.b32 [%r3], %r0;", to="%r1")
    with pytest.raises(ExecutionError, match="write of what thread 1 read since the last barrier"):
        shared_race("bar.sync 0;\nld.shared.b32 %r4, [%r1];\nst.shared.b32 [%r3], 99;")
    with pytest.raises(ExecutionError, match="race in shared memory: two values for one byte"):
        shared_race("bar.sync 0;\nst.shared.b32 [0], %r0;")


def test_a_write_of_what_is_there_is_a_race_with_who_reads_it() -> None:
    """That it changes nothing is a matter of these values; two writers of one value are usual."""
    shared_race("bar.sync 0;\nst.shared.b32 [%r3], %r2;", to="%r3")
    with pytest.raises(ExecutionError, match="write of what thread 1 read since the last barrier"):
        shared_race("bar.sync 0;\nld.shared.b32 %r4, [%r1];\nst.shared.b32 [%r3], %r2;", to="%r3")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            "st.global.b64 [%rd10], %rd20;",
            "ld.global.b64 %rd21, [%rd22];",
            "read of .* 32 .* wrote",
        ),
        (
            "ld.global.b64 %rd21, [%rd22];",
            "st.global.b64 [%rd10], %rd20;",
            "write of .* 32 .* read",
        ),
        (
            "st.global.b64 [%rd10], %rd20;",
            "st.global.b64 [%rd22], %rd20;",
            "write of .* 32 .* wrote",
        ),
    ],
)
def test_threads_of_a_block_are_ordered_in_global_memory_too(
    first: str, second: str, said: str
) -> None:
    address = "xor.b32 %r1, %r0, {by};\ncvt.u64.u32 %rd20, %r0;\nmad.wide.u32 %rd22, %r1, 8, %rd0;"

    def run(between: str, by: int = 32) -> None:
        scratch = torch.zeros(64, dtype=torch.int64)
        body = f"{address.format(by=by)}\n{first}\n{between}\n{second}"
        execute(written(body, {"scratch": scratch}, threads=64))

    run("bar.sync 0;")
    run("", by=0)
    run("bar.warp.sync -1;", by=1)
    for between, by in (("", 32), ("bar.warp.sync -1;", 32), ("", 1)):
        with pytest.raises(ExecutionError, match="race in global memory: ") as raised:
            run(between, by)
        if by == 32:
            assert re.search(said, str(raised.value))


def test_a_barrier_that_not_all_threads_reach_is_a_fault() -> None:
    compare = "setp.lt.u32 %p0, %r0, 40;\n"
    for body in ("@%p0 bar.sync 0;", "@%p0 ret;\nbar.sync 0;", "@%p0 bra $L;\nbar.sync 0;\n$L:\n"):
        with pytest.raises(ExecutionError, match="a barrier that not all threads reach") as raised:
            execute(written(compare + body, {}, threads=64))
        assert "bar.sync 0" in str(raised.value)


def test_threads_go_their_own_ways_and_meet_again() -> None:
    body = """
    mov.b32 %r1, 0;
    setp.lt.u32 %p0, %r0, 5;
    @%p0 bra $small;
    $again:
    add.s32 %r1, %r1, 2;
    setp.lt.u32 %p1, %r1, %r0;
    @%p1 bra $again;
    bra.uni $end;
    $small:
    mov.b32 %r1, 100;
    $end:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    bar.sync 0;
    cvt.u64.u32 %rd20, %r2;
    st.global.b64 [%rd10], %rd20;
    """
    out = torch.zeros(64, dtype=torch.int64)
    execute(written(body, {"out": out}, threads=64))
    assert out.tolist() == [100 if t ^ 1 < 5 else (t ^ 1) + (t ^ 1) % 2 for t in range(64)]


def shuffled_by_the_manual(mode: str, a: list[int], by: int, bound: int) -> list[int]:
    """PTX ISA, "shfl.sync": its pseudo code for one lane."""
    out = []
    for lane in range(32):
        bval, cval, mask = by & 0x1F, bound & 0x1F, bound >> 8 & 0x1F
        highest, lowest = (lane & mask) | (cval & ~mask & 0x1F), lane & mask
        source = {
            "up": lane - bval,
            "down": lane + bval,
            "bfly": lane ^ bval,
            "idx": lowest | (bval & ~mask & 0x1F),
        }[mode]
        inside = source >= highest if mode == "up" else source <= highest
        out.append(a[source if inside else lane])
    return out


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_lanes_hand_each_other_what_the_manual_says(mode: str) -> None:
    for by, segment in ((1, 0), (5, 0), (3, 24)):
        bound = segment << 8 | (0 if mode == "up" else 31)
        out = torch.zeros(32, dtype=torch.int64)
        body = f"""
        add.s32 %r1, %r0, 100;
        shfl.sync.{mode}.b32 %r2, %r1, {by}, {bound}, -1;
        cvt.u64.u32 %rd20, %r2;
        st.global.b64 [%rd10], %rd20;
        """
        execute(written(body, {"out": out}))
        assert out.tolist() == shuffled_by_the_manual(mode, list(range(100, 132)), by, bound)
    with pytest.raises(ExecutionError, match=r"shfl\.sync by a part of a warp"):
        execute(
            written("setp.lt.u32 %p0, %r0, 5;\n@%p0 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", {})
        )


@pytest.mark.parametrize(
    "statement",
    [
        "frobnicate.b32 %r1, %r0;",
        "add.sat.s32 %r1, %r0, %r0;",
        "not.b32.wide %r1, %r0;",
        "mov.u32 %r1, %clock;",
    ],
)
def test_an_instruction_without_a_rule_is_named_before_anything_runs(statement: str) -> None:
    out = torch.zeros(32, dtype=torch.int64)
    launch = written(
        f"st.global.b64 [%rd10], 7;\nbra.uni $end;\n{statement}\n$end:\n", {"out": out}
    )
    with pytest.raises(UnsupportedError, match=rf"PTX line \d+: no rule for '{statement[:-1]}'"):
        execute(launch)
    assert not out.any()


def test_inputs_and_outputs_are_as_after_one_run() -> None:
    """The second run, for garbage, starts from what the first did: x is doubled once."""
    x = torch.arange(32, dtype=torch.int64)
    body = (
        "ld.global.b64 %rd20, [%rd10];\nadd.s64 %rd20, %rd20, %rd20;\nst.global.b64 [%rd10], %rd20;"
    )
    execute(written(body, {"x": x}))
    assert x.tolist() == [2 * t for t in range(32)]


def test_a_bfloat16_number_is_cut_off_as_triton_s_launcher_cuts_it_off() -> None:
    out = torch.zeros(32, dtype=torch.int64)
    body = """
    ld.param.b16 %rs0, [k_param_1];
    cvt.u64.u16 %rd20, %rs0;
    st.global.b64 [%rd10], %rd20;
    """
    launch = written(body, {"out": out})
    ptx = launch.ptx.replace("k_param_0\n", "k_param_0,\n.param .b16 k_param_1\n")
    number = Argument("x", "bf16", 1.99999)  # the nearest would be 2
    execute(dataclasses.replace(launch, ptx=ptx, arguments=[*launch.arguments, number]))
    assert out.to(torch.int16).view(torch.bfloat16).tolist() == [1.9921875] * 32
