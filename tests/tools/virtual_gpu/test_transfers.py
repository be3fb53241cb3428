"""Parameters, vectors, narrow numbers, asynchronous copies, and matrices by ones and twos."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.tools.virtual_gpu.kernels import execute, written
from tools.virtual_gpu.executor import ExecutionError
from tools.virtual_gpu.faults import UnsupportedError
from tools.virtual_gpu.record import Argument, Launch


def with_parameters(launch: Launch, *arguments: Argument, body: str, types: str) -> Launch:
    """The launch with further parameters, and what reads them in front of its own end."""
    before = len(launch.arguments)
    declared = "".join(
        f",\n.param .{kind} k_param_{before + number}" for number, kind in enumerate(types.split())
    )
    ptx = launch.ptx.replace("\n)\n", f"{declared}\n)\n").replace("ret;", f"{body}\nret;")
    return dataclasses.replace(launch, ptx=ptx, arguments=[*launch.arguments, *arguments])


def test_parameters_are_what_the_launch_was_given() -> None:
    out = torch.zeros(32, 4, dtype=torch.int64)
    body = """
    ld.param.b32 %r1, [k_param_1];
    ld.param.b64 %rd1, [k_param_2];
    ld.param.b16 %rs1, [k_param_3];
    ld.param.s8 %rs2, [k_param_4];
    mad.wide.u32 %rd20, %r0, 32, %rd0;
    cvt.u64.u32 %rd21, %r1;
    cvt.u64.u16 %rd22, %rs1;
    cvt.u64.u16 %rd23, %rs2;
    st.global.b64 [%rd20], %rd21;
    st.global.b64 [%rd20+8], %rd1;
    st.global.b64 [%rd20+16], %rd22;
    st.global.b64 [%rd20+24], %rd23;
    """
    given = [
        Argument("a", "fp32", 1.5),
        Argument("b", "i64", -(2**40)),
        Argument("c", "fp16", -2.0),
        Argument("d", "i1", True),
    ]
    launch = written("", {"out": out})
    execute(with_parameters(launch, *given, body=body, types="b32 b64 b16 b8"))
    assert out.tolist() == [[0x3FC00000, -(2**40), 0xC000, 1]] * 32


@pytest.mark.parametrize("space", ["global", "shared", "shared::cta"])
def test_vectors_and_narrow_numbers_come_and_go(space: str) -> None:
    """Each thread copies 4 bytes as two halves, then reads one of them and a byte with its sign."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(-(2**31), 2**31, (32,), generator=generator).to(torch.int32)
    copied, signed = torch.zeros(32, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32)
    at = "%rd21" if space == "global" else "%r1"
    body = f"""
    shl.b32 %r1, %r0, 2;
    mad.wide.u32 %rd20, %r0, 4, %rd0;
    mad.wide.u32 %rd21, %r0, 4, %rd1;
    ld.global.v2.b16 {{%rs1, %rs2}}, [%rd20];
    st.{space}.v2.b16 [{at}], {{%rs1, %rs2}};
    ld.{space}.s16 %r2, [{at}+2];
    ld.{space}.s8 %r3, [{at}];
    st.global.v2.b32 [%rd12], {{%r2, %r3}};
    ld.{space}.b32 %r4, [{at}];
    st.global.b32 [%rd21], %r4;
    """
    tensors = {"source": source, "copied": copied, "signed": signed}
    execute(written(body, tensors, shared=128), written_once=False)
    assert torch.equal(copied, source)
    assert torch.equal(signed[:, 0], source >> 16)
    assert torch.equal(signed[:, 1], source.view(torch.int8)[::4].int())


@pytest.mark.parametrize("width", [4, 8, 16])
def test_copies_bring_what_they_are_told_to_and_zeros(width: int) -> None:
    """PTX ISA, `cp.async`: of 16 bytes, all or, where the fourth operand is 0, none: then zeros."""
    how = "cg" if width == 16 else "ca"
    source = torch.arange(1, 32 * width + 1).to(torch.uint8)
    out = torch.zeros(32 * width, dtype=torch.uint8)
    registers = [f"%r{10 + i}" for i in range(width // 4)]
    vector = f".v{len(registers)}" if len(registers) > 1 else ""
    body = f"""
    mul.lo.s32 %r1, %r0, {width};
    mad.wide.u32 %rd20, %r0, {width}, %rd0;
    mad.wide.u32 %rd21, %r0, {width}, %rd1;
    setp.lt.u32 %p1, %r0, 20;
    selp.b32 %r2, {width}, 0, %p1;
    cp.async.{how}.shared.global [%r1], [%rd20], {width}, %r2;
    cp.async.commit_group;
    mov.u32 %r2, 3;
    cp.async.wait_group 0;
    ld.shared{vector}.b32 {{{", ".join(registers)}}}, [%r1];
    st.global{vector}.b32 [%rd21], {{{", ".join(registers)}}};
    """
    launch = written(body, {"source": source, "out": out}, shared=32 * width)
    execute(launch)
    assert torch.equal(out[: 20 * width], source[: 20 * width])
    assert not out[20 * width :].any()
    with pytest.raises(UnsupportedError, match="no rule for"):
        execute(dataclasses.replace(launch, ptx=launch.ptx.replace(f"{width}, %r2", "12, %r2")))
    part = dataclasses.replace(
        launch, ptx=launch.ptx.replace(f"{width}, 0, %p1", f"{width}, 2, %p1")
    )
    with pytest.raises(ExecutionError, match=r"cp\.async of a part of its"):
        execute(part)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_one_and_two_matrices_have_the_addresses_of_the_first_lanes(count: int, trans: str) -> None:
    """PTX ISA, "ldmatrix": lanes 0 to 7 say where the rows of the first matrix are, 8 to 15 those
    of the second; what other lanes say is not looked at."""
    rows = torch.arange(256, dtype=torch.int16).reshape(32, 8)
    out = torch.zeros(32, count, dtype=torch.int32)
    registers = ", ".join(f"%r{5 + i}" for i in range(count))
    vector = ".v2" if count == 2 else ""
    body = f"""
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    mad.wide.u32 %rd21, %r0, {4 * count}, %rd1;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd20];
    shl.b32 %r10, %r0, 4;
    st.shared.v4.b32 [%r10], {{%r1, %r2, %r3, %r4}};
    bar.sync 0;
    setp.lt.u32 %p1, %r0, {8 * count};
    selp.b32 %r11, %r10, 1000001, %p1;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r11];
    st.global{vector}.b32 [%rd21], {{{registers}}};
    """
    execute(written(body, {"rows": rows, "out": out}, shared=512))
    got, matrices = out.view(torch.int16).reshape(32, count, 2), rows.reshape(4, 8, 8)
    for lane in range(32):
        for number in range(count):
            for half in range(2):
                place = lane // 4, 2 * (lane % 4) + half
                row, column = place[::-1] if trans else place
                assert got[lane, number, half] == matrices[number, row, column]
