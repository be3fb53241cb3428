"""Executes a launch in NumPy, all threads of a block at once and one block after another."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

# Imported for the rules that they register.
from . import arithmetic, tensor_cores, transfers, warpgroups  # noqa: F401
from .block import LANES, Block, Mask, Step, unsigned
from .faults import Fault, UnsupportedError, ranges
from .global_memory import Checks, GlobalMemory
from .ptx import Instruction, Program, parse
from .record import Argument, Launch
from .rules import compiled
from .shared_memory import SharedMemory

_FLOATS = {"fp32": "f", "f32": "f", "fp64": "d", "fp16": "e"}
_CONTROL = frozenset({"bra", "bra.uni", "ret", "bar.sync", "barrier.sync"})


@dataclass
class Counts:
    """What a launch did: instructions of warps by opcode, and bytes of global memory."""

    instructions: Counter[str] = field(default_factory=Counter)
    loaded_bytes: int = 0
    stored_bytes: int = 0


class ExecutionError(Exception):
    """A fault with its place: kernel, block, threads, line of PTX and of the source."""


def _bits(argument: Argument) -> int:
    value = argument.value
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    if argument.type in _FLOATS:
        return int.from_bytes(struct.pack("<" + _FLOATS[argument.type], value), "little")
    if argument.type == "bf16":
        raise UnsupportedError(f"argument {argument.name} is a bf16 number")
    return int(value) & (2**64 - 1)


def _blocks(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z


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
        self._programs: dict[str, tuple[Program, list[Step | None]]] = {}

    def __call__(self, launch: Launch) -> None:
        memory = GlobalMemory(launch.tensors, self.checks)
        before = [storage.bytes.copy() for storage in memory.storages]
        with np.errstate(all="ignore"):
            counts = self._run(launch, memory, seed=1)
            try:
                if self.checks.written_whole:
                    memory.check_written_whole()
                if self.checks.garbage:
                    self._run_again(launch, memory, before)
            except Fault as fault:
                raise ExecutionError(f"kernel {launch.name}: {fault.message}") from None
        if self.counted is not None:
            self.counted(launch, counts)

    def _run_again(self, launch: Launch, first: GlobalMemory, before: list[np.ndarray]) -> None:
        """A second run from the same inputs, the last block first. What the first run did not read
        before it was written starts as garbage; registers and shared memory start as other garbage.
        """
        garbage = np.random.default_rng(3)
        after = [storage.bytes.copy() for storage in first.storages]
        for storage, old in zip(first.storages, before, strict=True):
            only_written = (storage.writer != 0) & ~storage.is_input
            noise = garbage.integers(0, 256, storage.size, np.uint8)
            storage.bytes[:] = np.where(only_written, noise, old)
        second = GlobalMemory(launch.tensors, self.checks)
        self._run(launch, second, seed=2)
        for storage, bytes_after in zip(second.storages, after, strict=True):
            wrong = storage.bytes != bytes_after
            if wrong.any() and not storage.is_scratch:
                place = second.place(storage, int(np.flatnonzero(wrong)[0]))
                storage.bytes[:] = bytes_after
                raise Fault(
                    f"{place} depends on the order of blocks, or on what registers, shared memory "
                    "or outputs held before they were written: two runs differ in "
                    f"{int(wrong.sum())} bytes"
                )

    def _program(self, ptx: str) -> tuple[Program, list[Step | None]]:
        if ptx not in self._programs:
            program = parse(ptx)
            steps = [
                None if i.opcode in _CONTROL else compiled(i, program) for i in program.instructions
            ]
            self._programs[ptx] = program, steps
        return self._programs[ptx]

    def _run(self, launch: Launch, memory: GlobalMemory, seed: int) -> Counts:
        program, steps = self._program(launch.ptx)
        counts = Counts()
        garbage = np.random.default_rng(seed)
        registers: dict[str, np.ndarray] = {}
        for name, width in program.registers.items():
            if width == 1:
                registers[name] = garbage.integers(0, 2, program.threads).astype(bool)
            else:
                most = 2**width
                registers[name] = garbage.integers(0, most, program.threads, unsigned(width))
        bits = [_bits(argument) for argument in launch.arguments]
        # Behind its own parameters a kernel has those of scratch memory, which there is none of.
        bits += [0] * (len(program.parameters) - len(bits))
        blocks = list(enumerate(_blocks(launch.grid)))
        for number, index in blocks if seed == 1 else reversed(blocks):
            block = Block(
                number=number,
                index=index,
                grid=launch.grid,
                registers=dict(registers),
                parameters=dict(zip(program.parameters, bits, strict=True)),
                memory=memory,
                shared=SharedMemory(
                    launch.shared_bytes, program.threads, garbage, self.checks.races
                ),
                threads=np.arange(program.threads),
            )
            _execute(launch.name, program, steps, block, counts.instructions)
        counts.loaded_bytes, counts.stored_bytes = memory.loaded_bytes, memory.stored_bytes
        return counts


def _placed(kernel: str, block: Block, i: Instruction | None, fault: Fault) -> ExecutionError:
    lines = [f"kernel {kernel}, block {block.index}: {fault.message}"]
    if fault.threads is not None:
        threads = np.unique(fault.threads)
        lines.append(f"  threads {ranges(threads)} ({threads.size} of {block.threads.size})")
    if i is not None:
        lines.append(f"  PTX line {i.line}: {i.text}")
        lines.append(f"  source {i.source or 'unknown'}")
    return ExecutionError("\n".join(lines))


def _execute(
    kernel: str, program: Program, steps: list[Step | None], block: Block, counts: Counter[str]
) -> None:
    """One block to its end. Of threads at different instructions those at the first go first, so
    that they meet again where their ways do."""
    threads = block.threads.size
    at = np.zeros(threads, np.int64)
    alive = np.ones(threads, bool)
    waiting = np.zeros(threads, bool)
    end = len(program.instructions)
    together: int | None = 0  # where all threads are, if they are
    i: Instruction | None = None
    try:
        while True:
            if together is None:
                running = alive & ~waiting
                if not running.any():
                    if not alive.any():
                        break
                    i = program.instructions[int(at[waiting][0])]
                    if not alive.all() or (at != at[0]).any():
                        here = waiting & (at == at[waiting][0])
                        raise Fault("a barrier that not all threads reach", np.flatnonzero(here))
                    waiting[:] = False
                    block.shared.barrier()
                    together = int(at[0]) + 1
                    continue
                here = int(at[running].min())
                mask: Mask = running & (at == here)
            else:
                here, mask = together, None
            if here >= end:
                break
            i = program.instructions[here]
            going = mask
            if i.guard is not None:
                guard = block.registers[i.guard] ^ i.negated
                going = guard if mask is None else mask & guard
                if mask is None and going.all():
                    going = None
            some = going is None or bool(going.any())
            counts[i.opcode] += (
                threads // LANES if going is None else int(going.reshape(-1, LANES).any(1).sum())
            )
            step = steps[here]
            if block.owed:
                _check_lent(block, i)
            if step is not None:
                if some:
                    step(block, going)
                if together is not None:
                    together += 1
                    continue
                at[mask] = here + 1
            elif together is not None and going is None and i.opcode.startswith("bra"):
                together = program.labels[i.operands[0]]
                continue
            elif together is not None and not some:
                together += 1
                continue
            elif together is not None and going is None and i.opcode == "ret":
                break
            elif together is not None and going is None:
                _one_barrier(i)
                block.shared.barrier()
                together += 1
                continue
            else:
                if together is not None:
                    at[:] = together
                    together, mask = None, np.ones(threads, bool)
                at[mask] = here + 1
                if i.opcode.startswith("bra"):
                    at[going] = program.labels[i.operands[0]]
                elif i.opcode == "ret":
                    alive[going] = False
                else:
                    _one_barrier(i)
                    at[going] = here
                    waiting |= going
            if alive.all() and not waiting.any() and (at == at[0]).all():
                together = int(at[0])
        i = None
        if block.copies or any(block.groups):
            raise Fault("the block ends before a cp.async was waited for")
        if block.owed or block.products or any(block.product_groups):
            raise Fault("the block ends before a wgmma was waited for")
    except Fault as fault:
        raise _placed(kernel, block, i, fault) from None


def _check_lent(block: Block, i: Instruction) -> None:
    if i.opcode.startswith("wgmma."):
        return
    if taken := sorted(block.owed.keys() & i.registers):
        raise Fault(f"{taken[0]} is used before the wgmma that adds to it was waited for")
    if taken := sorted(block.lent & i.written):
        raise Fault(f"{taken[0]} is written before the wgmma that reads it was waited for")


def _one_barrier(i: Instruction) -> None:
    if i.operands not in (("0",), ("0x0",)):
        raise UnsupportedError(f"PTX line {i.line}: no rule for {i.text!r}")
