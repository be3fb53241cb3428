"""Mutants of compiled kernels: PTX with one statement changed, to see whether a check notices.

A mutant of synchronisation leaves out a barrier, a wait, a commit or a fence, or waits for one
group less; one of values leaves out a mask, swaps two operands or two registers of a vector, or
changes a constant. Operands of what is commutative are not swapped, no value is changed that is
overwritten before it is read, and what there is no rule for is no mutant.

While a mutant runs it is watched whether the changed statement was reached, and whether it ever did
something else than the one that stood there. The watching statements are PTX of this file's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .block import Blocks, Mask, Read, Step, address, predicate, reader, unsigned, vector, writer
from .faults import Fault, UnsupportedError
from .ptx import Instruction, Program, parse, split_operands, statement
from .record import Launch
from .rules import compiled, rule

SYNCHRONISATION = (
    "barrier dropped",
    "barrier of a warp dropped",
    "wait dropped",
    "wait for one group less",
    "commit dropped",
    "fence dropped",
)
VALUES = ("mask dropped", "operands swapped", "constant changed")

_DROPPED = {
    r"bar\.sync": "barrier dropped",
    r"bar\.warp\.sync": "barrier of a warp dropped",
    r"(cp\.async(\.bulk)?|wgmma)\.wait_group.*": "wait dropped",
    r"(cp\.async(\.bulk)?|wgmma)\.commit_group.*": "commit dropped",
    r"(wgmma\.)?fence\..*": "fence dropped",
}
_CONSTANT = re.compile(r"(?<![%\w.$])(?:0[fF][0-9A-Fa-f]{8}|0[xX][0-9A-Fa-f]+|-?\d+)(?!\w)")
# Operands whose order matters, by opcode; of a fused multiplication a factor and what is added.
_ORDERED = {
    r"(sub|div|rem|shl|shr|bfe|prmt)\..*|setp\.[lg][te].*|selp\..*|cvt\..*x2\.f32": (1, 2),
    r"(fma|mad)\..*": (2, 3),
}
# What writes registers alone, of what it reads of registers.
_COMPARED = re.compile(
    r"(add|sub|mul|mad|fma|div|rem|min|max|neg|abs|and|or|xor|not|sh[lr]|popc|clz|brev|prmt|bfe"
    r"|selp|setp|ex2|lg2|sqrt|rsqrt|rcp|sin|cos|tanh|mov|cvt|mma|shfl|redux)\."
)
_STEPS = (1, -1, 2, 8, 16, -16)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One statement of a kernel's PTX, changed.

    Attributes:
        operator: one of `SYNCHRONISATION` or `VALUES`.
        line: of the PTX, from 1.
        before, after: the statement; the empty text where it was left out.
        source: its line of source, as in `Instruction`.
    """

    operator: str
    line: int
    before: str
    after: str
    source: str


def mutants(ptx: str, seed: int = 0) -> Iterator[Mutant]:
    """All mutants of a kernel: of each constant one, by a step that the seed decides."""
    program = parse(ptx)
    choice = random.Random(seed)
    for at, i in enumerate(program.instructions):
        is_lost = _is_lost(i, program.instructions[at + 1 : at + 17])
        for operator, after in _changes(i, program, choice):
            if operator in VALUES and is_lost:
                continue
            if after == i.text or (operator in VALUES and not _valid(after, i, program)):
                continue
            yield Mutant(operator, i.line, i.text, after, i.source)


def _is_lost(i: Instruction, following: Sequence[Instruction]) -> bool:
    """Whether what a `mov` writes is overwritten before anything reads it."""
    if not i.opcode.startswith("mov."):
        return False
    for other in following:
        # What a product adds to is what it writes.
        read = other.operands[1:] if other.written else other.operands
        if other.opcode.startswith(("bra", "ret", "wgmma.")) or i.written & frozenset(
            re.findall(r"%\w+", " ".join(read))
        ):
            return False
        if other.guard is None and i.written <= other.written:
            return True
    return False


def _valid(text: str, i: Instruction, program: Program) -> bool:
    changed = statement(text, i.line, i.source)
    if changed.opcode.startswith(("bra", "ret")):
        return True
    try:
        compiled(changed, program)
    except UnsupportedError:
        return False
    return True


def _changes(i: Instruction, program: Program, choice: random.Random) -> Iterator[tuple[str, str]]:
    for pattern, operator in _DROPPED.items():
        if re.fullmatch(pattern, i.opcode):
            yield operator, ""
            if operator == "wait dropped":
                (groups,) = i.operands
                yield "wait for one group less", f"{i.opcode} {int(groups, 0) + 1}"
            return
    if i.guard is not None:
        yield "mask dropped", i.text.partition(" ")[2].strip()
    guard = i.text[: i.text.index(i.opcode)]

    def made(operands: list[str]) -> str:
        return f"{guard}{i.opcode} {', '.join(operands)}"

    for pattern, (first, second) in _ORDERED.items():
        if not re.fullmatch(pattern, i.opcode):
            continue
        operands = list(i.operands)
        widths = [program.registers.get(operands[at]) for at in (first, second)]
        if None in widths or widths[0] == widths[1]:
            operands[first], operands[second] = operands[second], operands[first]
            yield "operands swapped", made(operands)
    for at, operand in enumerate(i.operands):
        operands = list(i.operands)
        if operand.startswith("{"):
            names = list(split_operands(operand[1:-1]))
            if len(names) > 1:
                one = choice.randrange(len(names) - 1)
                names[one], names[one + 1] = names[one + 1], names[one]
                operands[at] = f"{{{', '.join(names)}}}"
                yield "operands swapped", made(operands)
        else:
            for found in _CONSTANT.finditer(operand):
                number = _other(found[0], i.opcode, choice)
                operands[at] = operand[: found.start()] + number + operand[found.end() :]
                yield "constant changed", made(operands)


def _other(constant: str, opcode: str, choice: random.Random) -> str:
    """Of a float twice as much, and 1 in place of 0; of an integer some more or less."""
    if constant[:2] in ("0f", "0F"):
        bits = int(constant[2:], 16)
        return f"0f{(bits + (1 << 23)) & 0xFFFFFFFF if bits << 1 & 0xFFFFFFFF else 0x3F800000:08X}"
    if opcode.endswith(".pred"):
        return "-1" if constant == "0" else "0"
    return str(int(constant, 0) + choice.choice(_STEPS))


class Watched:
    """A mutant that runs, in place of the kernel in any number of launches.

    Attributes:
        reached: the changed statement was executed by some thread.
        differs: it wrote another value than the one that stood there, or went on where the mask
            would not have let it (of a store: and stored what no other thread stored there). None:
            of such statements (stores, waits, ...) it is not known.
    """

    def __init__(self, mutant: Mutant, most_rounds: int) -> None:
        self.mutant = mutant
        self.most_rounds = most_rounds
        self.reached = False
        self.differs: bool | None = None
        self._rounds = 0
        self._number = next(_NUMBERS)
        self._values: list[tuple[Read, np.ndarray]] = []

    def launch(self, launch: Launch) -> Launch:
        """The launch with the mutant's PTX, whose lines are where they were."""
        lines = launch.ptx.splitlines()
        for i in parse(launch.ptx).instructions:
            here = i.line == self.mutant.line
            parts = [self.mutant.after if here else i.text]
            if i.opcode.startswith("bra"):
                parts.insert(0, f"mutant.round.n{self._number}")
            if here:
                mine = (f"mutant.before.n{self._number}", f"mutant.after.n{self._number}")
                parts = [mine[0], *filter(None, parts), mine[1]]
            if len(parts) > 1:
                lines[i.line - 1] = "; ".join(parts) + ";"
        return dataclasses.replace(launch, ptx="\n".join(lines))

    def _round(self, b: Blocks, mask: Mask) -> None:
        self._rounds += 1
        if self._rounds > self.most_rounds:
            raise Fault("the kernel does not end")

    def _before(self, program: Program) -> Step:
        mutant = self.mutant
        original = statement(mutant.before, mutant.line, mutant.source)
        guard = original.guard and predicate(original, original.guard, program)
        step, registers = None, []
        if guard is None and _COMPARED.match(original.opcode):
            step = compiled(original, program)
            registers = [
                (
                    predicate(original, name, program)
                    if program.registers[name] == 1
                    else reader(original, name, unsigned(program.registers[name]), program),
                    writer(original, name, program),
                )
                for name in sorted(original.written)
            ]
        if step is not None or mutant.operator == "mask dropped":
            self.differs = bool(self.differs)
        stored = _stored(original, program)

        def before(b: Blocks, mask: Mask) -> None:
            going = np.ones(b.threads.size, bool) if mask is None else mask
            if guard:
                on = guard(b) != original.negated
                if mutant.operator == "mask dropped":
                    off = going & ~on
                    if stored is not None and off.any():
                        off[off] = ~np.isin(stored(b, off), stored(b, going & on))
                    self.differs = bool(self.differs or off.any())
                else:
                    going = going & on
            self.reached = bool(self.reached or going.any())
            if step is not None:
                held = [read(b).copy() for read, _ in registers]
                step(b, mask)
                self._values = [(read, read(b).copy()) for read, _ in registers]
                for (_, put), values in zip(registers, held, strict=True):
                    put(b, values, mask)

        return before

    def _after(self, b: Blocks, mask: Mask) -> None:
        for read, values in self._values:
            wrong = read(b) != values
            self.differs = bool(self.differs or (wrong if mask is None else wrong & mask).any())


def _stored(i: Instruction, program: Program) -> Callable[[Blocks, np.ndarray], np.ndarray] | None:
    """What some threads store where, in which block, as rows of bytes; None: it is no store."""
    found = re.fullmatch(r"st\.(shared|global)(?:::cta)?(?:\.v\d)?\.b(\d+)", i.opcode)
    if found is None:
        return None
    where = address(i, i.operands[0], 32 if found[1] == "shared" else 64, program)
    reads = [reader(i, name, unsigned(int(found[2])), program) for name in vector(i.operands[1])]

    def rows(b: Blocks, threads: np.ndarray) -> np.ndarray:
        columns = [b.block_of, where(b), *(read(b) for read in reads)]
        table = np.stack([column[threads].astype(np.uint64) for column in columns], 1)
        return table.view(f"V{8 * len(columns)}")[:, 0]

    return rows


_NUMBERS = itertools.count()
_WATCHED: dict[int, Watched] = {}


@contextlib.contextmanager
def watched(mutant: Mutant, most_rounds: int) -> Iterator[Watched]:
    """Launches that it makes may be executed inside the block.

    Args:
        most_rounds: when more branches were reached, the kernel is said not to end.
    """
    one = Watched(mutant, most_rounds)
    _WATCHED[one._number] = one
    try:
        yield one
    finally:
        del _WATCHED[one._number]


@rule(r"mutant\.(?P<what>round|before|after)\.n(?P<number>\d+)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    one = _WATCHED[int(m["number"])]
    if m["what"] == "before":
        return one._before(program)
    return one._round if m["what"] == "round" else one._after
