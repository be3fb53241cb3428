"""A program made ready to run: what executes each instruction, and which go in one go."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from .block import LANES, Blocks, Mask, Step, predicate
from .ptx import Instruction, Program
from .rules import compiled

BARRIERS = frozenset({"bar.sync", "barrier.sync"})
CONTROL = frozenset({"bra", "bra.uni", "ret"}) | BARRIERS
ATOMIC = ("atom.", "red.")
# What a block does as a whole: where a guard lets some blocks alone do it, they part before.
_TOGETHER = ("cp.async.commit", "cp.async.wait", "wgmma.", "fence.proxy.async")


@dataclass(frozen=True)
class Run:
    """Instructions that all threads execute one after another.

    Attributes:
        steps: each with where it stands.
        end: where it goes on.
        opcodes: how often which is executed, those under a guard left out: they count themselves.
        registers, written: of all of them, as `Program.bits` has it.
    """

    steps: list[tuple[int, Step]]
    end: int
    opcodes: Counter[str]
    registers: int
    written: int


class Code:
    """Of a program.

    Raises:
        UnsupportedError: there is no rule for one of its instructions.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.instructions = program.instructions
        # Whether anything reads shared memory through the asynchronous proxy.
        self.asynchronous = any(
            i.opcode.startswith(("wgmma.", "cp.async.bulk.tensor")) for i in self.instructions
        )
        self.atomic = any(
            i.opcode.startswith(ATOMIC) and ".shared" not in i.opcode for i in self.instructions
        )
        self.guards = [
            None if i.guard is None else predicate(i, i.guard, program) for i in self.instructions
        ]
        self.steps: list[Step | None] = [
            None if i.opcode in CONTROL else compiled(self._as_meant(at), program)
            for at, i in enumerate(self.instructions)
        ]
        self.granules = {space: self._granule(space) for space in ("shared", "global")}
        self._runs: dict[int, Run | None] = {}

    def _as_meant(self, at: int) -> Instruction:
        """An instruction, but for what LLVM makes of an atomic one that the target lacks: a loop
        of `cas`, and a load in front of it, of what is only compared by that. It stands for an
        atomic load (newer ones say so), and reads what is there whatever others do."""
        i = self.instructions[at]
        if not self.atomic or i.opcode not in ("ld.global.b32", "ld.relaxed.gpu.global.b32"):
            return i
        behind = self.instructions[at + 1 :]
        branch = next((n for n, other in enumerate(behind) if other.opcode in CONTROL), None)
        if branch is None or self.program.labels.get("".join(behind[branch].operands)) != at + 1:
            return i
        loop = [other for other in behind[:branch] if i.operands[0] in other.registers]
        swaps = [other for other in loop if re.search(r"^atom\..*\.cas\.b32$", other.opcode)]
        if [other.operands[1:3] for other in swaps] != [i.operands[1::-1]]:
            return i
        return replace(i, opcode="atom.global.relaxed.gpu.or.b32", operands=(*i.operands, "0"))

    def _granule(self, space: str) -> int:
        """Bytes of the narrowest access to a memory."""
        widths = [16]
        for i in self.instructions:
            parts = re.sub("::c(ta|luster)", "", i.opcode).split(".")
            if space not in parts[1:]:
                continue
            if i.opcode.startswith("cp.async.bulk"):
                widths.append(1 if space == "global" else 16)  # its map says how wide elements are
            elif parts[0] in ("mbarrier", "tensormap"):
                widths.append(8 if parts[0] == "mbarrier" else 4)
            elif parts[0] in ("ld", "st"):
                count = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
                widths.append(count * int(parts[-1][1:]) // 8)
            elif parts[0] in ("atom", "red"):  # f16x2: each element by itself
                widths.append(int(re.findall(r"\d+", parts[-1])[0]) // 8)
            elif parts[0] == "cp":
                widths.append(int(i.operands[2], 0))
        return min(widths)

    def run(self, start: int) -> Run | None:
        """What can be executed from there on without a decision; None: nothing."""
        if start not in self._runs:
            self._runs[start] = self._found(start)
        return self._runs[start]

    def _decides(self, i: Instruction) -> bool:
        return i.opcode in CONTROL or (i.guard is not None and i.opcode.startswith(_TOGETHER))

    def _found(self, start: int) -> Run | None:
        steps, opcodes, registers, written = [], Counter[str](), 0, 0
        at = start
        while at < len(self.instructions) and not self._decides(i := self.instructions[at]):
            # Products under way own their registers: what comes between two is looked at by itself.
            product = i.opcode.startswith("wgmma.")
            if product and at > start:
                break
            step = self.steps[at]
            assert step is not None
            if i.guard is None:
                opcodes[i.opcode] += 1
                steps.append((at, step))
            else:
                steps.append((at, self._guarded(at, step)))
            at += 1
            if product:
                break
            if self.asynchronous:
                registers |= self.program.bits(i.registers)
                written |= self.program.bits(i.written)
        return Run(steps, at, opcodes, registers, written) if steps else None

    def going(self, at: int, b: Blocks, mask: Mask) -> Mask:
        """Of the threads at an instruction, those that execute it."""
        read = self.guards[at]
        if read is None:
            return mask
        guard = read(b)
        if self.instructions[at].negated:
            guard = ~guard
        if mask is not None:
            return mask & guard
        return None if guard.all() else guard.copy()

    def _guarded(self, at: int, step: Step) -> Step:
        opcode = self.instructions[at].opcode

        def execute(b: Blocks, mask: Mask) -> None:
            going = self.going(at, b, mask)
            b.counts[opcode] += warps(b, going)
            if going is None or going.any():
                step(b, going)

        return execute


def warps(b: Blocks, mask: Mask) -> int:
    """How many have a thread that takes part."""
    if mask is None:
        return b.threads.size // LANES
    return int(np.count_nonzero(mask.reshape(-1, LANES).any(1)))
