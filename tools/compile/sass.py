"""Reads NVIDIA machine code: disassembles a cubin, finds its loops and counts what is in them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

TENSOR_CORE_OPCODES = frozenset({"HMMA", "HGMMA", "IMMA", "DMMA", "QGMMA", "UTCHMMA", "UTCQMMA"})
SPILL_LOADS = "LDL"
SPILL_STORES = "STL"

_LABEL = re.compile(r"^\.(L_\S+?):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_TARGET = re.compile(r"`\(\.(L_\w+)\)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: bytes from the kernel's first instruction.
        opcode: with its modifiers, such as `"LDG.E.128"`; without predicate and operands.
        target: index of the instruction that a branch goes to; `None` for other instructions.
    """

    address: int
    opcode: str
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """Instructions between a backward branch and its target, both included.

    Attributes:
        start: index of the first instruction.
        end: index of the branch.
        opcodes: how often each opcode, with its modifiers, occurs.
        innermost: whether no other loop lies inside.
    """

    start: int
    end: int
    opcodes: Mapping[str, int]
    innermost: bool

    def __len__(self) -> int:
        return self.end - self.start + 1

    @property
    def tensor_core(self) -> int:
        """Number of tensor-core instructions."""
        return count(self.opcodes, TENSOR_CORE_OPCODES)


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text, by the `nvdisasm` that comes with Triton.

    Raises:
        RuntimeError: the disassembler failed; the message holds what it said.
    """
    return _run(knobs.nvidia.nvdisasm.path, "--print-code", cubin)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack (where spills go) of a cubin with one kernel.

    Raises:
        RuntimeError: `cuobjdump` failed, or named no kernel.
    """
    text = _run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    found = _RESOURCES.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump named no kernel's resources: {text.strip()}")
    return int(found[1]), int(found[2])


def _run(program: str, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([program, option, str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(program).name} failed: {done.stderr.strip()}")
    return done.stdout


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one kernel's disassembly, in order."""
    labels: dict[str, int] = {}
    parsed: list[tuple[int, str, str | None]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(parsed)
        elif found := _INSTRUCTION.match(line):
            target = _TARGET.search(found[3])
            parsed.append((int(found[1], 16), found[2], target[1] if target else None))
    return [
        Instruction(address, opcode, labels.get(target) if target else None)
        for address, opcode, target in parsed
    ]


def count(opcodes: Mapping[str, int], names: str | Iterable[str]) -> int:
    """How many instructions have one of these names, whatever their modifiers."""
    wanted = {names} if isinstance(names, str) else set(names)
    return sum(number for opcode, number in opcodes.items() if opcode.split(".")[0] in wanted)


def opcode_counts(sass: str) -> Counter[str]:
    """How often each opcode, with its modifiers, occurs in a kernel."""
    return Counter(instruction.opcode for instruction in instructions(sass))


def global_load_widths(opcodes: Mapping[str, int]) -> Counter[int]:
    """Loads from global memory, to registers (LDG) or shared memory (LDGSTS), by bits a thread."""
    widths: Counter[int] = Counter()
    for opcode, number in opcodes.items():
        name, *modifiers = opcode.split(".")
        if name in ("LDG", "LDGSTS"):
            sizes = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
            given = [sizes[modifier] for modifier in modifiers if modifier in sizes]
            widths[given[0] if given else 32] += number
    return widths


def loops(sass: str) -> list[Loop]:
    """The loops of a kernel in the order of their first instructions, outer before inner.

    A loop is what lies between a branch and an earlier target of it; several branches to one target
    are one loop. The padding after a kernel, a branch to itself, is none.
    """
    code = instructions(sass)
    ends: dict[int, int] = {}
    for index, instruction in enumerate(code):
        start = instruction.target
        if start is not None and instruction.name == "BRA" and start < index:
            ends[start] = max(index, ends.get(start, index))
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
    return [
        Loop(
            start,
            end,
            Counter(instruction.opcode for instruction in code[start : end + 1]),
            not any(
                start <= other[0] and other[1] <= end for other in spans if other != (start, end)
            ),
        )
        for start, end in spans
    ]


def hot_loop(sass: str) -> Loop | None:
    """The innermost loop with the most tensor-core instructions, and of these the shortest.

    In attention it is the loop over far key blocks: the band's does the same products and more
    besides. Where no loop has such an instruction it is the longest innermost one.
    """
    innermost = [loop for loop in loops(sass) if loop.innermost]
    if not innermost:
        return None
    if not any(loop.tensor_core for loop in innermost):
        return max(innermost, key=len)
    return max(innermost, key=lambda loop: (loop.tensor_core, -len(loop)))
