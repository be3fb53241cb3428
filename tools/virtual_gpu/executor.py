"""Executes a launch in NumPy, all threads of some blocks at once, group after group."""

from __future__ import annotations

import math
import struct
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

# Imported for the rules that they register.
from . import arithmetic, atomics, bulk_copies, halves, tensor_cores, transfers, warpgroups  # noqa: F401
from .block import Blocks, Mask, literal, unsigned
from .block_order import BlockOrder
from .code import Code, Run, warps
from .faults import Fault, UnsupportedError, ranges
from .global_memory import Checks, GlobalMemory, Storage
from .global_order import Interval
from .ptx import Instruction, parse
from .record import Argument, Launch
from .shared_memory import SharedMemory

_FLOATS = {"fp32": "f", "f32": "f", "fp64": "d", "fp16": "e"}
_BARRIERS = 16
SIDE_BY_SIDE = 1024
"""Threads up to which blocks are executed at once: NumPy's cost of a call is shared among them."""


@dataclass
class Counts:
    """What a launch did.

    Attributes:
        instructions: of warps, by opcode.
        loaded_bytes: of global memory, by threads.
        stored_bytes: by threads.
        loaded_sectors: of 32 bytes, asked for by each load of each warp.
        stored_sectors: by each store of each warp.
        first_loaded: sectors that were loaded, each counted once; the others are repeats, which a
            cache may hold.
        first_stored: sectors that were stored.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    loaded_bytes: int = 0
    stored_bytes: int = 0
    loaded_sectors: int = 0
    stored_sectors: int = 0
    first_loaded: int = 0
    first_stored: int = 0


_PATIENCE = 64
"""Turns without a change in memory after which further blocks start beside those that wait."""
_ENDLESS = 1024
"""And after which, when all have started, the kernel is said not to end."""
_DOES_NOT_END = "the kernel does not end: it waits, and nothing changes in memory"


class OrderWarning(UserWarning):
    """What a launch with atomics leaves to the order of blocks or threads, and is no fault."""


def _differs(one: Storage, other: Storage) -> bool:
    return not one.is_scratch and not np.array_equal(one.bytes, other.bytes)


class ExecutionError(Exception):
    """A fault with its place: kernel, block, threads, line of PTX and of the source."""


def bits_of(argument: Argument) -> int:
    value = argument.value
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    if argument.type in _FLOATS:
        return int.from_bytes(struct.pack("<" + _FLOATS[argument.type], value), "little")
    if argument.type == "bf16":
        # As Triton's launcher hands it over: the upper half of the float32 number, cut off.
        return int.from_bytes(struct.pack("<f", value), "little") >> 16
    return int(value) & (2**64 - 1)


class Executor:
    """Runs launches; called with one, it executes it on the tensors that it was given.

    Raises ExecutionError where the kernel does what it must not, UnsupportedError where there is no
    rule for an instruction.
    """

    def __init__(
        self,
        checks: Checks | None = None,
        counted: Callable[[Launch, Counts], None] | None = None,
    ) -> None:
        self.checks = Checks() if checks is None else checks
        self.counted = counted
        self._codes: dict[str, Code] = {}

    def __call__(self, launch: Launch) -> None:
        code = self._code(launch.ptx)
        memory = self._memory(launch, code)
        before = [storage.bytes.copy() for storage in memory.storages]
        with np.errstate(all="ignore"):
            try:
                counts = self._run(launch, code, memory, seed=1)
                if self.checks.written_whole:
                    memory.check_written_whole()
                if self.checks.garbage:
                    self._run_again(launch, code, memory, before)
                for remark in memory.remarks.values():
                    warnings.warn(f"kernel {launch.name}: {remark}", OrderWarning, stacklevel=2)
            except Fault as fault:
                raise ExecutionError(f"kernel {launch.name}: {fault.message}") from None
            finally:
                memory.write_back()
        if self.counted is not None:
            self.counted(launch, counts)

    def _memory(self, launch: Launch, code: Code, backwards: bool = False) -> GlobalMemory:
        order = BlockOrder(math.prod(launch.grid), code.program.threads) if code.atomic else None
        granule = code.granules["global"]
        return GlobalMemory(launch.tensors, self.checks, granule, order, backwards)

    def _run_again(
        self, launch: Launch, code: Code, first: GlobalMemory, before: list[np.ndarray]
    ) -> None:
        """A second run from the same inputs, the last block first. What the first run did not read
        before it was written starts as garbage; registers and shared memory start as other garbage.
        With atomics a third run, the blocks as in the first, tells what garbage changed.
        """
        second = self._repeated(launch, code, first, before, backwards=True)
        if code.atomic and any(map(_differs, second.storages, first.storages)):
            third = self._repeated(launch, code, first, before, backwards=False)
            if not any(map(_differs, third.storages, first.storages)):
                if self.checks.order:
                    first.check_rounding(second)
                return
            second = third
        for storage, one in zip(second.storages, first.storages, strict=True):
            if _differs(storage, one):
                wrong = storage.bytes != one.bytes
                place = second.place(storage, int(np.flatnonzero(wrong)[0]))
                raise Fault(
                    f"{place} depends on the order of blocks, or on what registers, shared memory "
                    "or outputs held before they were written: two runs differ in "
                    f"{int(wrong.sum())} bytes"
                )

    def _repeated(
        self,
        launch: Launch,
        code: Code,
        first: GlobalMemory,
        before: list[np.ndarray],
        backwards: bool,
    ) -> GlobalMemory:
        garbage = np.random.default_rng(3)
        second = self._memory(launch, code, backwards)
        for storage, one, old in zip(second.storages, first.storages, before, strict=True):
            only_written = one.by_byte((one.writer != 0) & ~one.is_input)
            noise = garbage.integers(0, 256, storage.size, np.uint8)
            storage.bytes[:] = np.where(only_written, noise, old)
        self._run(launch, code, second, seed=2)
        return second

    def _code(self, ptx: str) -> Code:
        if ptx not in self._codes:
            self._codes[ptx] = Code(parse(ptx))
        return self._codes[ptx]

    def _at_once(self, code: Code, memory: GlobalMemory) -> int:
        """How many blocks are executed side by side. Where one may see what another leaves, the
        second run has them one after another: it is in the order of blocks that it differs."""
        apart = self.checks.races and not any(s.is_scratch for s in memory.storages)
        if memory.backwards and (code.atomic or not apart):
            return 1
        return max(1, SIDE_BY_SIDE // code.program.threads)

    def _run(self, launch: Launch, code: Code, memory: GlobalMemory, seed: int) -> Counts:
        program = code.program
        counts = Counts()
        garbage = np.random.default_rng(seed)
        started: dict[int, np.ndarray] = {}
        for width, number in Counter(program.registers.values()).items():
            shape = number, program.threads
            if width == 1:
                started[1] = garbage.integers(0, 2, shape).astype(bool)
            else:
                started[width] = garbage.integers(0, 2**width, shape, unsigned(width))
        bits = [bits_of(argument) for argument in launch.arguments]
        # Behind its own parameters a kernel has those of scratch memory, which there is none of;
        # behind these arguments are the tensors of descriptors.
        bits = (bits + [0] * len(program.parameters))[: len(program.parameters)]
        numbers = np.arange(launch.grid[0] * launch.grid[1] * launch.grid[2])
        at_once = self._at_once(code, memory)

        def begun(start: int) -> Blocks:
            some = numbers[:: -1 if memory.backwards else 1][start : start + at_once]
            return Blocks(
                numbers=some,
                grid=launch.grid,
                program=program,
                files={width: np.tile(file, some.size) for width, file in started.items()},
                parameters=dict(zip(program.parameters, bits, strict=True)),
                memory=memory,
                shared=SharedMemory(
                    launch.shared_bytes,
                    program.threads,
                    some.size,
                    garbage,
                    self.checks.races,
                    code.granules["shared"],
                    code.asynchronous,
                ),
                interval=Interval(program.threads),
                counts=counts.instructions,
            )

        visits: Counter[int] = Counter()
        starts, ways = deque(range(0, numbers.size, at_once)), deque[tuple[int, Blocks]]()
        idle = 0  # turns in which atomics changed nothing
        while starts or ways:
            if not ways or (starts and idle > _PATIENCE * len(ways)):
                ways.append((0, begun(starts.popleft())))
                idle = 0
            # Who waits for another block lets all others go on first.
            at, blocks = ways.popleft() if code.atomic else ways.pop()
            course, before = Course(launch.name, code, blocks, visits), memory.changes
            after = course.go(at)
            ways.extend(after)
            idle = idle + 1 if len(after) == 1 and memory.changes == before else 0
            if idle > _ENDLESS * len(ways):
                raise course.placed(Fault(_DOES_NOT_END))
        for start, times in visits.items():
            run = code.run(start)
            assert run is not None
            for opcode, number in run.opcodes.items():
                counts.instructions[opcode] += times * number
        counts.loaded_bytes, counts.stored_bytes = memory.loaded_bytes, memory.stored_bytes
        counts.loaded_sectors, counts.stored_sectors = memory.loaded_sectors, memory.stored_sectors
        counts.first_loaded, counts.first_stored = memory.touched()
        return counts


class Course:
    """Blocks on their way, side by side until they part.

    Args:
        visits: how many warps went through which run, by where it begins.
    """

    def __init__(self, kernel: str, code: Code, blocks: Blocks, visits: Counter[int]) -> None:
        self.kernel, self.code, self.blocks, self.visits = kernel, code, blocks, visits
        self.here = 0
        self.atomics = blocks.memory.atomics

    def go(self, at: int) -> list[tuple[int, Blocks]]:
        """From an instruction to the end, or until they part, or have done something atomic and
        are about to do it again: who goes on where."""
        try:
            return self._go(at)
        except Fault as fault:
            raise self.placed(fault) from None

    def placed(self, fault: Fault) -> ExecutionError:
        b, lines = self.blocks, []
        block, threads = 0, fault.threads
        if threads is not None:
            block = int(threads.min()) // b.per
            threads = np.unique(threads[threads // b.per == block]) % b.per
            lines.append(f"  threads {ranges(threads)} ({threads.size} of {b.per})")
        if self.here < len(self.code.instructions):
            i = self.code.instructions[self.here]
            lines += [f"  PTX line {i.line}: {i.text}", f"  source {i.source or 'unknown'}"]
        index = tuple(int(axis) for axis in b.place(b.numbers[block]))
        place = f"kernel {self.kernel}, block {index}: {fault.message}"
        return ExecutionError("\n".join([place, *lines]))

    def _go(self, at: int) -> list[tuple[int, Blocks]]:
        code, b = self.code, self.blocks
        every = b.threads.size // 32
        while at < len(code.instructions):
            run = code.run(at)
            if run is not None:
                self._through(run)
                self.visits[at] += every
                at = run.end
                continue
            self.here = at
            i = code.instructions[at]
            going = code.going(at, b, None)
            if going is not None and going.any():
                if b.numbers.size > 1:
                    return [(at, b.part(which)) for which in self._parted(going)]
                at = self._apart(at)
                continue
            b.counts[i.opcode] += warps(b, going)
            self._check_lent(i)
            step = code.steps[at]
            if going is not None:
                at += 1
            elif step is not None:
                step(b, None)
                at += 1
            elif i.opcode.startswith("bra"):
                back, at = at, code.program.labels[i.operands[0]]
                if code.atomic and at <= back and b.memory.atomics != self.atomics:
                    return [(at, b)]
            elif i.opcode == "ret":
                break
            else:
                _of_all_threads(i, b)
                b.barrier()
                at += 1
        self.here = len(code.instructions)
        self._finished()
        return []

    def _parted(self, going: np.ndarray) -> list[np.ndarray]:
        """Groups of blocks that go the same way with all their threads, or each by itself."""
        by_block = going.reshape(-1, self.blocks.per)
        some = by_block.any(1)
        if (by_block.all(1) == some).all():
            return [np.flatnonzero(~some), np.flatnonzero(some)]
        return [np.array([block]) for block in range(len(by_block))]

    def _through(self, run: Run) -> None:
        b = self.blocks
        if b.owed and (run.registers & b.owing or run.written & b.lent):
            for self.here, step in run.steps:
                self._check_lent(self.code.instructions[self.here])
                step(b, None)
        else:
            for self.here, step in run.steps:
                step(b, None)
        b.unfenced |= run.registers

    def _check_lent(self, i: Instruction) -> None:
        b = self.blocks
        if not b.owed or i.opcode.startswith("wgmma."):
            return
        bits = b.program.bits
        if taken := [name for name in sorted(i.registers) if bits([name]) & b.owing]:
            raise Fault(f"{taken[0]} is used before the wgmma that adds to it was waited for")
        if taken := [name for name in sorted(i.written) if bits([name]) & b.lent]:
            raise Fault(f"{taken[0]} is written before the wgmma that reads it was waited for")

    def _apart(self, start: int) -> int:
        """One block whose threads part, until they are together again: where. Of threads at
        different instructions those at the first go first, so that they meet where their ways do;
        at what a warp does together they wait for those of the warp that are on their way.
        """
        code, b = self.code, self.blocks
        at = np.full(b.per, start)
        alive = np.ones(b.per, bool)
        waiting = np.zeros(b.per, bool)
        end = len(code.instructions)
        idle, changes = 0, 0
        while True:
            running = alive & ~waiting
            if not running.any():
                if not alive.any():
                    return end
                self.here = int(at[waiting][0])
                here = waiting & (at == self.here)
                if not alive.all() or not here.all():
                    raise Fault("a barrier that not all threads reach", np.flatnonzero(here))
                b.barrier()
                return self.here + 1
            here = int(at[running].min())
            if here >= end:
                return end
            if _of_a_warp(code.instructions[here]) and _partly(running & (at == here), running):
                others = np.unique(at[running & (at < end)])
                whole = (
                    place
                    for place in others.tolist()
                    if not _of_a_warp(code.instructions[place])
                    or not _partly(running & (at == place), running)
                )
                here = next(whole, here)
            self.here = here
            mask: Mask = running & (at == here)
            i = code.instructions[here]
            going = code.going(here, b, mask)
            assert going is not None
            b.counts[i.opcode] += warps(b, going)
            self._check_lent(i)
            step = code.steps[here]
            at[mask] = here + 1
            if step is not None:
                if going.any():
                    step(b, None if going.all() else going)
                    if code.asynchronous and not i.opcode.startswith("wgmma."):
                        b.unfenced |= b.program.bits(i.registers)
            elif i.opcode.startswith("bra"):
                at[going] = code.program.labels[i.operands[0]]
                if code.atomic:
                    idle = idle + 1 if b.memory.changes == changes else 0
                    changes = b.memory.changes
                    if idle > _ENDLESS:
                        raise Fault(_DOES_NOT_END, np.flatnonzero(going))
            elif i.opcode == "ret":
                alive[going] = False
            else:
                _of_all_threads(i, b)
                at[going] = here
                waiting |= going
            if alive.all() and not waiting.any() and (at == at[0]).all():
                return int(at[0])

    def _finished(self) -> None:
        b = self.blocks
        if any(copy.threads.size for group in (*b.groups, b.copies) for copy in group):
            raise Fault("the block ends before a cp.async was waited for")
        if any(one.copies for one in b.mbarriers.values()) or any(map(any, b.stores.values())):
            raise Fault("the block ends before a cp.async.bulk was waited for")
        if b.owed or b.products or any(b.product_groups):
            raise Fault("the block ends before a wgmma was waited for")


def _of_a_warp(i: Instruction) -> bool:
    return ".sync" in i.opcode and not i.opcode.startswith(("bar.sync", "barrier."))


def _partly(here: np.ndarray, running: np.ndarray) -> bool:
    """Whether some of a warp's running threads are here and some are not."""
    by_warp = here.reshape(-1, 32)
    return bool((by_warp.any(1) & (running.reshape(-1, 32) & ~by_warp).any(1)).any())


def _of_all_threads(i: Instruction, b: Blocks) -> None:
    """`bar.sync 0`, or a barrier of any number which names how many threads the block has."""
    number, *count = (literal(operand) for operand in i.operands)
    if number is None or number >= _BARRIERS or (count or [b.per]) != [b.per]:
        raise UnsupportedError(f"PTX line {i.line}: no rule for {i.text!r}: of a part of the block")
