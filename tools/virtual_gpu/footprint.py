"""The sectors of memory that a launch touches, found without its arithmetic.

Of a kernel's instructions those are executed that addresses, guards and branches depend on: no
product, no load whose values go nowhere else. All blocks of a large launch take seconds so, and its
tensors need no memory ("meta"), except those whose elements say where a kernel goes, such as
offsets. The counts are those that the executor makes of the whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from .block import LANES, Blocks, Mask, Step, address, reader, unsigned
from .code import ATOMIC, BARRIERS, CONTROL, Code
from .executor import Counts, Course, bits_of
from .faults import Fault, UnsupportedError
from .global_memory import SECTOR, Checks, GlobalMemory
from .global_order import Interval
from .ptx import Instruction, Program, parse, statement
from .record import Launch
from .rules import compiled, rule
from .shared_memory import SharedMemory
from .transfers import chosen

_ACCESS = re.compile(r"(ld|st)\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[busf](\d+)")
_COPY = re.compile(r"cp\.async\.c[ag]\..*")
# What reads shared memory, and what must then be done too.
_SHARED = re.compile(r"ld\.shared|ldmatrix")
_SHARING = re.compile(r"st\.shared|stmatrix|cp\.async|bar")
_WAYS = CONTROL - BARRIERS
_BASE = 1 << 20
_APART = 1 << 12
"""Tensors lie so far apart, at multiples of it, that no access reaches from one to the next."""
_THREADS = 1 << 15
"""About so many are executed at once: their registers stay in cache."""


def _touches(i: Instruction) -> Instruction:
    """Of an access to global memory, only that: `touch.ld.16 [address]`."""
    guard = "" if i.guard is None else f"@{'!' * i.negated}{i.guard} "
    if found := _ACCESS.fullmatch(i.opcode):
        width = int(found[2] or 1) * int(found[3]) // 8
        text = f"{guard}touch.{found[1]}.{width} {i.operands[found[1] == 'ld']}"
    else:  # a copy, whose last operand may say that there is nothing to read
        _, source, copied, *given = i.operands
        text = f"{guard}touch.ld.{int(copied, 0)} {', '.join((source, *given))}"
    return statement(text, i.line, i.source)


def _read(i: Instruction) -> set[str]:
    """The registers that an instruction reads."""
    operands = i.operands[1:] if i.written else i.operands
    return set(re.findall(r"%\w+", " ".join((*operands, i.guard or ""))))


class _Flow:
    """Which way a program may go from one instruction to the next, and what is executed on one way
    of a branch and not on the other (Ferrante, Ottenstein and Warren 1987)."""

    def __init__(self, program: Program) -> None:
        instructions, labels = program.instructions, program.labels
        self.end = len(instructions)
        # Stretches without a decision begin at labels and behind branches.
        branches = [at for at, i in enumerate(instructions) if i.opcode.startswith(("bra", "ret"))]
        starts = {0, *labels.values(), *(at + 1 for at in branches)} - {self.end}
        self.starts = sorted(starts)
        self.stretch = np.searchsorted(self.starts, np.arange(self.end), "right") - 1
        number = {start: n for n, start in enumerate((*self.starts, self.end))}
        self.after: list[set[int]] = []
        for behind in (*self.starts[1:], self.end):
            last = instructions[behind - 1]
            after = {number[behind]}
            if behind - 1 in branches:
                to = labels[last.operands[0]] if last.operands else self.end
                after = {number[to]} | (after if last.guard is not None else set())
            self.after.append(after)
        # What is passed in any case, from each stretch on: sets of bits.
        every = (2 << len(self.starts)) - 1
        self.passed = [every] * len(self.starts) + [1 << len(self.starts)]
        changed = True
        while changed:
            changed = False
            for n in reversed(range(len(self.starts))):
                found = functools.reduce(int.__and__, (self.passed[m] for m in self.after[n]))
                changed |= found | 1 << n != self.passed[n]
                self.passed[n] = found | 1 << n

    def decided(self, at: int) -> int:
        """The stretches whose execution a branch decides, as a set of bits."""
        n = int(self.stretch[at])
        some = functools.reduce(int.__or__, (self.passed[m] for m in self.after[n]))
        return some & ~(self.passed[n] & ~(1 << n))

    def meeting(self, at: int) -> int:
        """Where both ways of a branch are one again: an instruction, or the end."""
        n = int(self.stretch[at])
        behind = [m for m in range(len(self.passed)) if m != n and self.passed[n] >> m & 1]
        first = next(m for m in behind if all(self.passed[m] >> other & 1 for other in behind))
        return (*self.starts, self.end)[first]


def sliced(ptx: str) -> Program:
    """A module of PTX without what says nothing about the memory that it touches.

    Raises:
        UnsupportedError: there is no rule for an instruction, whether it stays or not; or what is
            touched depends on what is in shared memory.
    """
    program = parse(ptx)
    flow = _Flow(program)
    touches: dict[int, Instruction] = {}
    kept: dict[int, Instruction] = {}
    for at, i in enumerate(program.instructions):
        if i.opcode.startswith(ATOMIC):
            raise UnsupportedError(f"PTX line {i.line}: {i.text!r}: no footprint of atomics")
        if i.opcode not in CONTROL:
            compiled(i, program)
        if i.opcode.startswith("cp.async.bulk.tensor"):
            raise UnsupportedError(f"PTX line {i.line}: no sectors are known of {i.text!r}")
        if _ACCESS.fullmatch(i.opcode) or _COPY.fullmatch(i.opcode):
            touches[at] = kept[at] = _touches(i)
        elif i.opcode in _WAYS and i.guard is None:
            kept[at] = i
    # What each stretch needs of those in front of it.
    needs: list[frozenset[str]] = [frozenset()] * (len(flow.starts) + 1)
    before = None
    while before != (len(kept), needs):
        before = len(kept), list(needs)
        stretches = 0
        for at, i in kept.items():
            if i.opcode not in CONTROL or i.guard is not None:
                stretches |= 1 << int(flow.stretch[at])
        shares = any(_SHARED.match(i.opcode) for i in kept.values())
        for n in reversed(range(len(flow.starts))):
            needed = set().union(*(needs[m] for m in flow.after[n]))
            for at in reversed(range(flow.starts[n], (*flow.starts, flow.end)[n + 1])):
                i = program.instructions[at]
                if i.opcode in _WAYS:
                    wanted = i.guard is not None and bool(flow.decided(at) & stretches)
                else:
                    wanted = bool(i.written & needed or (shares and _SHARING.match(i.opcode)))
                if wanted:
                    if _COPY.fullmatch(i.opcode):
                        raise UnsupportedError(f"PTX line {i.line}: {i.text!r} decides an address")
                    kept[at] = i
                    if i.guard is None:
                        needed -= i.written
                    needed |= _read(i)
                elif at in touches:
                    needed |= touches[at].registers
            needs[n] = frozenset(needed)
    place: list[int] = []
    instructions: list[Instruction] = []
    labels = dict(program.labels)
    for at, i in enumerate(program.instructions):
        place.append(len(instructions))
        if at not in kept and i.opcode in _WAYS:  # which way makes no difference
            labels[f"$meeting{at}"] = flow.meeting(at)
            kept[at] = statement(f"bra.uni $meeting{at}", i.line, i.source)
        if at in kept:
            instructions.append(kept[at])
    place.append(len(instructions))
    named = set().union(*(i.registers for i in instructions))
    return dataclasses.replace(
        program,
        instructions=instructions,
        labels={label: place[at] for label, at in labels.items()},
        registers={name: width for name, width in program.registers.items() if name in named},
        slots={},
    )


def footprint(launch: Launch) -> Counts:
    """Bytes and sectors that a launch loads and stores; it counts no instructions.

    Args:
        launch: its tensors may be on "meta", but for those whose elements decide what is touched.

    Raises:
        ExecutionError: an access outside of every tensor; elements that decide and are not there.
        UnsupportedError: as `sliced`.
    """
    program = sliced(launch.ptx)
    code = Code(program)
    memory = Sectors(launch.tensors)
    bits = [
        memory.of(a.value) if isinstance(a.value, torch.Tensor) else bits_of(a)
        for a in launch.arguments
    ]
    bits += [0] * (len(program.parameters) - len(bits))
    numbers = np.arange(math.prod(launch.grid))
    at_once = max(1, _THREADS // program.threads)
    garbage = np.random.default_rng(0)
    widths = Counter(program.registers.values())
    for start in range(0, numbers.size, at_once):
        some = numbers[start : start + at_once]
        threads = some.size * program.threads
        blocks = Blocks(
            numbers=some,
            grid=launch.grid,
            program=program,
            files={
                width: np.zeros((number, threads), bool if width == 1 else unsigned(width))
                for width, number in widths.items()
            },
            parameters=dict(zip(program.parameters, bits, strict=True)),
            memory=memory,
            shared=SharedMemory(
                launch.shared_bytes, program.threads, some.size, garbage, False, 1, False
            ),
            interval=Interval(program.threads),
            counts=Counter(),
        )
        waiting = [(0, blocks)]
        with np.errstate(all="ignore"):
            while waiting:
                at, blocks = waiting.pop()
                waiting += Course(launch.name, code, blocks, Counter()).go(at)
    return Counts(
        loaded_bytes=memory.bytes["ld"],
        stored_bytes=memory.bytes["st"],
        loaded_sectors=memory.asked["ld"],
        stored_sectors=memory.asked["st"],
        first_loaded=int(memory.first["ld"].sum()),
        first_stored=int(memory.first["st"].sum()),
    )


@rule(r"touch\.(?P<way>ld|st)\.(?P<width>\d+)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    where = address(i, i.operands[0], 64, program)
    given = reader(i, i.operands[1], unsigned(32), program) if len(i.operands) == 2 else None
    width = int(m["width"])

    def touch(b: Blocks, mask: Mask) -> None:
        if given is not None:
            some = given(b) != 0
            mask = some if mask is None else mask & some
        memory = b.memory
        assert isinstance(memory, Sectors)
        memory.touch(m["way"], chosen(where, b, mask), width, b.active(mask))

    return touch


class Sectors(GlobalMemory):
    """Which sectors were touched, of tensors that lie one behind the other at addresses of their
    own."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.checks = Checks(races=False, written_once=False, written_whole=False, garbage=False)
        self.begins: dict[int, int] = {}
        self.contents: list[tuple[int, np.ndarray]] = []
        end = _BASE
        inside = []
        for tensor in tensors.values():
            storage = tensor.untyped_storage()
            if storage._cdata in self.begins:
                continue
            self.begins[storage._cdata] = end
            size = storage.nbytes()
            inside.append(((end - _BASE) // SECTOR, -(-(end + size - _BASE) // SECTOR)))
            if tensor.device.type != "meta":
                data = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.contents.append((end, data.numpy()))
            end += (size // _APART + 2) * _APART
        self.inside = np.zeros((end - _BASE) // SECTOR, bool)
        for first, behind in inside:
            self.inside[first:behind] = True
        self.first = {way: np.zeros(self.inside.size, bool) for way in ("ld", "st")}
        self.asked, self.bytes = Counter[str](), Counter[str]()

    def of(self, tensor: torch.Tensor) -> int:
        """Where a tensor begins."""
        base = self.begins[tensor.untyped_storage()._cdata]
        return base + int(tensor.storage_offset()) * tensor.element_size()

    def touch(self, way: str, at: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Loads ("ld") or stores ("st") of so many bytes each, by threads in their order."""
        if not at.size:
            return
        sectors = (at.astype(np.int64) - _BASE) // SECTOR
        if sectors.min() < 0 or sectors.max() >= self.inside.size or not self.inside[sectors].all():
            raise Fault("an access outside of every tensor", threads)
        self.first[way][sectors] = True
        self.bytes[way] += width * at.size
        by_thread = sectors
        if (of := -(-(int(threads[-1]) + 1) // LANES) * LANES) > at.size:
            by_thread = np.full(of, -1)
            by_thread[threads] = sectors
        by_warp = by_thread.reshape(-1, LANES)
        steps = np.diff(by_warp, axis=1)
        if (steps < 0).any():
            by_warp = np.sort(by_warp, axis=1)
            steps = np.diff(by_warp, axis=1)
        self.asked[way] += int(np.count_nonzero(steps) + np.count_nonzero(by_warp[:, 0] >= 0))

    def load(
        self, address: np.ndarray, width: int, threads: np.ndarray, blocks: np.ndarray
    ) -> np.ndarray:
        """Bytes [k, width] that say what else is touched."""
        self.touch("ld", address, width, threads)
        out = np.empty((address.size, width), np.uint8)
        found = np.zeros(address.size, bool)
        for base, data in self.contents:
            here = (address >= base) & (address < base + data.size)
            offset = (address[here].astype(np.int64) - base)[:, None] + np.arange(width)
            out[here] = data[offset]
            found |= here
        if not found.all():
            raise Fault("what is loaded here decides what is touched: its tensor needs memory")
        return out
