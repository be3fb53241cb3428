"""Reads AMD machine code, in the assembler text that Triton keeps of a compiled kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_BLOCK = re.compile(r"^(?:\.L(BB\w+):|; %bb\.\d+:)")
_INSTRUCTION = re.compile(r"^\s+([a-z]+_\w+)")
_MEMBER = re.compile(r"in Loop: Header=(BB\w+)")
_HEADER = "This Inner Loop Header"
_LOAD = re.compile(r"^(?:global|buffer|flat)_load_(?:lds_)?(?:format_)?(\w+?)(?:_d16\w*)?$")
_LOAD_BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
    "ubyte": 8,
    "sbyte": 8,
}


def _number(asm: str, name: str) -> int:
    found = re.search(rf"^\s*\.{name}:?\s+(\d+)", asm, re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembler text does not say its .{name}")
    return int(found[1])


def resource_usage(asm: str) -> tuple[int, int]:
    """Vector registers of a thread, accumulators included, and how many of them were spilled.

    Raises:
        ValueError: the text does not say.
    """
    return _number(asm, "amdhsa_next_free_vgpr"), _number(asm, "vgpr_spill_count")


def instructions(asm: str) -> list[tuple[str, str | None]]:
    """The opcodes of a kernel in order, each with its loop, if it lies in one without inner loops.

    The loops are those that the compiler names in comments at the start of each block. Backward
    branches would not do: rarely used blocks lie behind the kernel's end and branch back.
    """
    found: list[tuple[str, str | None]] = []
    innermost: set[str | None] = set()
    block: str | None = None
    loop: str | None = None
    code, _, _ = asm.partition(".amdhsa_kernel")
    for line in code.splitlines():
        if start := _BLOCK.match(line):
            block, loop = start[1], None
        if member := _MEMBER.search(line):
            loop = member[1]
        elif _HEADER in line:
            loop = block
            innermost.add(loop)
        elif instruction := _INSTRUCTION.match(line):
            found.append((instruction[1], loop))
    return [(opcode, loop if loop in innermost else None) for opcode, loop in found]


def matrix_instructions(opcodes: Mapping[str, int]) -> int:
    """How many instructions run on the matrix cores."""
    return sum(number for name, number in opcodes.items() if name.startswith(("v_mfma", "v_smfma")))


def global_load_widths(opcodes: Mapping[str, int]) -> Counter[int]:
    """Loads from global memory by bits a thread."""
    widths: Counter[int] = Counter()
    for name, number in opcodes.items():
        if (found := _LOAD.match(name)) and found[1] in _LOAD_BITS:
            widths[_LOAD_BITS[found[1]]] += number
    return widths


def hot_loop(asm: str) -> int | None:
    """Instructions of the innermost loop with the most matrix instructions; `None` without loops.

    Of several such loops it is the shortest; where no loop has any, it is the longest.
    """
    loops: dict[str, Counter[str]] = {}
    for opcode, loop in instructions(asm):
        if loop is not None:
            loops.setdefault(loop, Counter())[opcode] += 1
    sizes = [(matrix_instructions(opcodes), sum(opcodes.values())) for opcodes in loops.values()]
    if not sizes:
        return None
    most = max(matrices for matrices, _ in sizes)
    lengths = [length for matrices, length in sizes if matrices == most]
    return min(lengths) if most else max(lengths)
