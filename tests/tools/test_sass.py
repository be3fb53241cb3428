"""Reading machine code: a hand-written kernel whose loops and instructions are known."""

from __future__ import annotations

import pytest

from tools.compile import sass

KERNEL = """
	.headerflags	@"EF_CUDA_SM90"
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_0:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/               @P1 LDGSTS.E.BYPASS.128 [R9], desc[UR18][R24.64], P0 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/               @P3 BRA `(.L_x_0) ;
        /*00a0*/             @!UP0 STL.64 [R1], R2 ;
        /*00b0*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
.L_x_3:
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""


def test_instructions_have_addresses_opcodes_and_targets() -> None:
    code = sass.instructions(KERNEL)
    assert [instruction.address for instruction in code] == list(range(0, 0xF0, 0x10))
    assert code[2].opcode == "LDG.E.128.CONSTANT" and code[2].name == "LDG"
    assert code[3].opcode == "LDGSTS.E.BYPASS.128"  # without its predicate
    assert (code[1].target, code[6].target, code[0].target) == (12, 3, None)


def test_loops_are_backward_branches() -> None:
    loops = sass.loops(KERNEL)
    assert [(loop.start, loop.end, loop.innermost) for loop in loops] == [
        (2, 9, False),
        (3, 6, True),
        (7, 8, True),
    ]
    assert [len(loop) for loop in loops] == [8, 4, 2]
    assert [loop.tensor_core for loop in loops] == [2, 1, 1]


def test_hot_loop_is_the_shortest_of_those_with_most_products() -> None:
    hot = sass.hot_loop(KERNEL)
    assert hot is not None and (hot.start, hot.end) == (7, 8)
    more = KERNEL.replace("LDG.E R4,", "HGMMA.64x64x16.F32.BF16 R24,")
    hot = sass.hot_loop(more)
    assert hot is not None and (hot.start, hot.end) == (3, 6)
    none = KERNEL.replace("HGMMA", "FFMA")
    hot = sass.hot_loop(none)
    assert hot is not None and (hot.start, hot.end) == (3, 6)
    assert sass.hot_loop("        /*0000*/                   EXIT ;") is None


def test_counts() -> None:
    opcodes = sass.opcode_counts(KERNEL)
    assert sass.count(opcodes, sass.TENSOR_CORE_OPCODES) == 2
    assert sass.count(opcodes, sass.SPILL_STORES) == 1
    assert sass.count(opcodes, sass.SPILL_LOADS) == 0
    assert sass.count(opcodes, ("LDG", "LDGSTS")) == 4
    assert sass.global_load_widths(opcodes) == {128: 2, 32: 1, 16: 1}


def test_what_is_no_cubin_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nvdisasm failed"):
        sass.disassemble(b"not a cubin")
    with pytest.raises(RuntimeError, match="cuobjdump"):
        sass.resource_usage(b"not a cubin")
