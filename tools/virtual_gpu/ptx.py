"""Reads the PTX that Triton writes: one entry, its registers, instructions and line table."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .faults import UnsupportedError

# Directives that say nothing about what is computed.
_SILENT = re.compile(
    r"\.(version|target|address_size|extern|visible|param|pragma|maxntid|minnctapersm|maxnreg"
    r"|global)\b"  # a constant: where an operand names it, that has no rule
)


_WITHOUT_RESULT = (
    "st",
    "cp.",
    "bar",
    "bra",
    "red.",
    "mbarrier.i",
    "mbarrier.a",
    "tensormap.",
    "fence.",
)


@dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
        line: its line in the PTX, from 1.
        opcode: with all modifiers, such as `ld.global.v4.b32`.
        operands: as written; a vector `{%r1, %r2}` and an address `[%rd1+4]` are one operand each.
        guard: predicate register, or None. It is executed where the guard is not `negated`.
        source: `file.py:12`, from the line table; where the line was inlined, into which.
    """

    line: int
    text: str
    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    source: str

    @functools.cached_property
    def registers(self) -> frozenset[str]:
        """All that it names."""
        return frozenset(re.findall(r"%\w+", self.text))

    @functools.cached_property
    def written(self) -> frozenset[str]:
        """Those that it writes."""
        if not self.operands or self.opcode.startswith(_WITHOUT_RESULT):
            return frozenset()
        return frozenset(re.findall(r"%\w+", self.operands[0]))


@dataclass
class Program:
    """An entry of PTX.

    Attributes:
        registers: by name, their width in bits (predicates: 1).
        by_address: parameters that a kernel takes the address of: tensor maps.
        shape: threads of a block in x, y and z.
        slots: operands and the types that rules want of them, numbered (`block.slot`).
    """

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    by_address: set[str] = field(default_factory=set)
    shape: tuple[int, int, int] = (0, 1, 1)
    slots: dict[tuple[str, np.dtype], int] = field(default_factory=dict)

    @functools.cached_property
    def threads(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """By name: a register's width, and which of those of that width it is."""
        count: Counter[int] = Counter()
        found = {}
        for name, width in self.registers.items():
            found[name] = width, count[width]
            count[width] += 1
        return found

    @functools.cached_property
    def _bit(self) -> dict[str, int]:
        return {name: 1 << number for number, name in enumerate(self.registers)}

    def bits(self, names: Iterable[str]) -> int:
        """A set of registers as an integer, a bit for each."""
        found = 0
        for name in names:
            found |= self._bit.get(name, 0)
        return found


def split_operands(text: str) -> tuple[str, ...]:
    """Splits at commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{(") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return tuple(part.strip() for part in parts if part.strip())


def statement(text: str, line: int, source: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", text, re.DOTALL)
    if found is None:
        raise UnsupportedError(f"PTX line {line}: no rule for {text!r}")
    negated, guard, opcode, operands = found.groups()
    return Instruction(
        line, text, opcode, split_operands(operands or ""), guard, negated == "!", source
    )


def _unscoped(lines: list[str]) -> list[str]:
    """The lines with names of inner scopes made the program's: of `complete` and `waitLoop:` in a
    scope that opens on line 12, `%complete_12` and `$waitLoop_12:`."""
    lines, opened = list(lines), []
    for at, line in enumerate(lines):
        if line.strip() == "{":
            opened.append(at)
        elif line.strip() == "}" and opened:
            start = opened.pop()
            for inner in lines[start:at]:
                if found := re.match(r"\s*(?:\.reg\s+\.\w+\s+(\w+);|(\w+):)$", inner):
                    old, mark = (found[1], "%") if found[1] else (found[2], "$")
                    new = f"{mark}{old}_{start + 1}"
                    for one in range(start, at):
                        lines[one] = re.sub(rf"(?<![\w$%.]){old}\b", new, lines[one])
        elif line.startswith("\t.section"):
            break
    return lines


def parse(ptx: str) -> Program:
    """The entry of a PTX module that has one.

    Raises:
        UnsupportedError: a directive or a statement that is not one of those Triton writes.
    """
    program = Program()
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.MULTILINE))
    source, text, first = "", "", 0
    for number, raw in enumerate(_unscoped(ptx.splitlines()), 1):
        line, _, comment = raw.partition("//")
        line = line.strip()
        if line.startswith((".section", ".file")):
            break  # debug information to the end
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            if found[2] != "0":  # line 0: the compiler's own
                source = f"{files.get(found[1], '?')}:{found[2]}"
                if "@[" in comment:
                    source += " inlined at " + comment.partition("@[")[2].replace("]", "").strip()
        elif found := re.match(r"\.param\s+\.\w+.*?(\w+_param_\d+),?$", line):
            program.parameters.append(found[1])
        elif found := re.match(r"\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[128\],?$", line):
            program.parameters.append(found[1])
            program.by_address.add(found[1])
        elif found := re.match(r"\.reqntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?$", line):
            x, y, z = (int(size or 1) for size in found.groups())
            program.shape = x, y, z
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)(?:<(\d+)>)?;", line):
            width = 1 if found[1] == "pred" else int(re.sub(r"\D", "", found[1]))
            numbers = range(int(found[3])) if found[3] else ("",)
            program.registers |= {f"{found[2]}{i}": width for i in numbers}
        elif found := re.match(r"(\$\w+):$", line):
            program.labels[found[1]] = len(program.instructions)
        elif line.startswith("."):
            if not _SILENT.match(line):
                raise UnsupportedError(f"PTX line {number}: no rule for {line!r}")
        elif line.strip("{}()"):
            # A brace alone in its statement opens or closes a scope.
            for piece in re.split(r"(;)", line):
                if piece == ";":
                    program.instructions.append(statement(text, first, source))
                    text = ""
                elif piece.strip() and not (not text and piece.strip() in "{}"):
                    first = number if not text else first
                    text += " " * bool(text) + piece.strip()
    if not program.threads or program.threads % 32:
        raise UnsupportedError("no .reqntid with whole warps: how many threads a block has")
    return program
