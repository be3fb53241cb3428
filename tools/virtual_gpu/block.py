"""The state of blocks that are executed side by side, and how instructions use registers.

Their threads stand in one row, one block after another: thread t is thread `t % per` of block
`t // per` of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .block_order import Ordering
from .faults import UnsupportedError
from .global_memory import GlobalMemory
from .global_order import Interval
from .ptx import Instruction, Program
from .shared_memory import SharedMemory

LANES = 32
PARAMETER = 128
"""Bytes from one parameter to the next in their space."""

# Which threads an instruction is executed by; None: all.
Mask = np.ndarray | None


@dataclass
class Copy:
    """A cp.async under way: addresses [k] in shared memory, and what will be there, [k, width]."""

    address: np.ndarray
    values: np.ndarray
    threads: np.ndarray

    def part(self, thread_of: np.ndarray) -> Copy:
        moved = thread_of[self.threads]
        kept = moved >= 0
        return Copy(self.address[kept], self.values[kept], moved[kept])


@dataclass
class Blocks:
    """Blocks at the same instruction.

    Attributes:
        numbers: of each block, counted from 0, x fastest.
        grid: how many blocks there are, in x, y and z.
        parameters: the bits of each parameter.
        files: by width in bits, registers [registers of that width, threads] as unsigned integers,
            those of width 1 as bool.
        values: what instructions read and write, as `slot` numbered it.
        interval: what was done to global memory since the last barrier.
        counts: instructions that not all threads executed, of warps and by opcode.
        copies: cp.async of no group yet; groups: those committed, the oldest first.
        products, product_groups: the same of wgmma.
        mbarriers: by block of these and byte of shared memory; stores: bulk copies from shared
            memory, by thread: its groups, the last one not yet committed, each of the chunks
            [1, k] that a copy reads; unacquired: tensor maps that no fence lies behind.
        owed: what becomes of the accumulators of wgmma under way, by their names, and which product
            of several makes it; owing: those accumulators; lent: registers that such a product
            reads; unfenced: those read or written since the last wgmma.fence. The last three are
            sets as `Program.bits` writes them.
    """

    numbers: np.ndarray
    grid: tuple[int, int, int]
    program: Program
    files: dict[int, np.ndarray]
    parameters: dict[str, int]
    memory: GlobalMemory
    shared: SharedMemory
    interval: Interval
    counts: Counter[str]
    values: list[np.ndarray] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)
    product_groups: list[list[Any]] = field(default_factory=list)
    mbarriers: dict[tuple[int, int], Any] = field(default_factory=dict)
    stores: dict[int, list[list[np.ndarray]]] = field(default_factory=dict)
    unacquired: set[int] = field(default_factory=set)
    owed: dict[tuple[str, ...], tuple[np.ndarray, int]] = field(default_factory=dict)
    owing: int = 0
    lent: int = 0
    unfenced: int = -1

    def __post_init__(self) -> None:
        self.per = self.program.threads
        self.threads = np.arange(self.numbers.size * self.per)
        self.block_of = self.numbers.repeat(self.per)
        views: dict[tuple[int, np.dtype], list[np.ndarray]] = {}
        self.values = []
        for operand, dtype in self.program.slots:
            place = self.program.places.get(operand)
            if place is None:
                self.values.append(np.full(self.threads.size, self._constant(operand, dtype)))
                continue
            width, row = place
            if (width, dtype) not in views:
                views[width, dtype] = list(self.files[width].view(dtype))
            self.values.append(views[width, dtype][row])

    def _constant(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """What is in every thread as it was from the beginning."""
        bits = unsigned(8 * dtype.itemsize)
        if operand.startswith("%"):
            of_thread = _SPECIAL[operand](self)
            return np.asarray(of_thread).astype(bits).view(dtype)
        value = literal(operand)
        if operand in self.program.by_address:  # in a space of its own, 32 or 64 bits wide
            value = PARAMETER * self.program.parameters.index(operand)
        assert value is not None
        if dtype.kind == "b":
            return np.array(value != 0)
        return np.array(value & ((1 << 8 * dtype.itemsize) - 1), bits).view(dtype)

    def active(self, mask: Mask) -> np.ndarray:
        return self.threads if mask is None else np.flatnonzero(mask)

    def barrier(self) -> None:
        """All threads of each block have come here."""
        self.shared.barrier()
        self.interval.barrier()
        if self.memory.order is not None:
            self.memory.order.barrier(self.numbers)

    def load(self, address: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """Bytes [k, width] of global memory."""
        if self.memory.checks.races:
            self.interval.read(address, width, threads, self._of_grid(threads))
        return self.memory.load(address, width, threads, self.block_of[threads])

    def store(self, address: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Stores bytes [k, width] in global memory."""
        self.memory.store(address, values, threads, self.block_of[threads])
        if self.memory.checks.races:
            self.interval.written(address, values.shape[1], threads, self._of_grid(threads))

    def atomic(
        self,
        i: Instruction,
        address: np.ndarray,
        function: Callable[..., np.ndarray],
        operands: np.ndarray,
        threads: np.ndarray,
        how: Ordering,
    ) -> np.ndarray:
        """Puts function(what is there, *operands) in global memory for one thread after another.
        Returns what was there, [k]."""
        if self.memory.checks.races:
            who, width = self._of_grid(threads), operands.itemsize
            told = self.interval.changed(address, width, threads, who)
            if told is not None:
                self.memory.remarks.setdefault(i.line, f"{told} (PTX line {i.line}, {i.source})")
        return self.memory.atomic(address, function, operands, threads, self.block_of[threads], how)

    def _of_grid(self, threads: np.ndarray) -> np.ndarray:
        """Their numbers among all threads of the grid."""
        return self.block_of[threads] * self.per + threads % self.per

    def place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where in the grid blocks of these numbers are, in x, y and z."""
        x, y, _ = self.grid
        return numbers % x, numbers // x % y, numbers // (x * y)

    def part(self, which: np.ndarray) -> Blocks:
        """Some of the blocks, which go on for themselves."""
        threads = (which[:, None] * self.per + np.arange(self.per)).reshape(-1)
        thread_of = np.full(self.threads.size, -1)
        thread_of[threads] = np.arange(threads.size)
        return replace(
            self,
            numbers=self.numbers[which],
            files={width: file[:, threads] for width, file in self.files.items()},
            shared=self.shared.part(which),
            interval=self.interval.part(),
            copies=[copy.part(thread_of) for copy in self.copies],
            groups=[[copy.part(thread_of) for copy in group] for group in self.groups],
            products=[product.part(which) for product in self.products],
            product_groups=[[p.part(which) for p in group] for group in self.product_groups],
            mbarriers={
                (thread_of[block * self.per] // self.per, at): one.part(thread_of)
                for (block, at), one in self.mbarriers.items()
                if block in which
            },
            stores={thread_of[t]: of for t, of in self.stores.items() if thread_of[t] >= 0},
            owed={
                names: (values[:, threads], number) for names, (values, number) in self.owed.items()
            },
        )


Step = Callable[[Blocks, Mask], None]
Read = Callable[[Blocks], np.ndarray]
Write = Callable[[Blocks, np.ndarray, Mask], None]


def unsupported(instruction: Instruction) -> UnsupportedError:
    return UnsupportedError(f"PTX line {instruction.line}: no rule for {instruction.text!r}")


def unsigned(width: int) -> np.dtype:
    return np.dtype(f"u{width // 8}")


def _threads(b: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, _ = b.program.shape
    inside = b.threads % b.per
    return inside % x, inside // x % y, inside // (x * y)


def _axis(of: Callable[[Blocks], tuple[Any, ...]], axis: int) -> Callable[[Blocks], Any]:
    return lambda b: of(b)[axis]


_SPECIAL: dict[str, Callable[[Blocks], Any]] = {
    "%laneid": lambda b: b.threads % LANES,
    "%warpid": lambda b: b.threads % b.per // LANES,
}
for _number, _name in enumerate("xyz"):
    _SPECIAL |= {
        f"%tid.{_name}": _axis(_threads, _number),
        f"%ntid.{_name}": _axis(lambda b: b.program.shape, _number),
        f"%ctaid.{_name}": _axis(lambda b: b.place(b.block_of), _number),
        f"%nctaid.{_name}": _axis(lambda b: b.grid, _number),
    }


def literal(operand: str) -> int | None:
    """The bits of a constant."""
    if found := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", operand):
        return int(found[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        return int(operand.rstrip("U"), 0)
    return 0 if operand == "global_smem" else None  # shared memory begins there


def slot(program: Program, operand: str, dtype: np.dtype) -> int:
    """Where `Blocks.values` has an operand."""
    return program.slots.setdefault((operand, dtype), len(program.slots))


def readable(i: Instruction, operand: str, dtype: np.dtype, program: Program) -> int | None:
    """The slot of an operand that is as wide as `dtype`; None where it is a register of another
    width."""
    width = program.registers.get(operand)
    known = operand in _SPECIAL or operand in program.by_address or literal(operand) is not None
    if width is None and not known:
        raise unsupported(i)
    if width == 1 and dtype.itemsize != 1:
        raise unsupported(i)
    if width is not None and width != (1 if dtype.kind == "b" else 8 * dtype.itemsize):
        return None
    return slot(program, operand, dtype)


def reader(i: Instruction, operand: str, dtype: np.dtype, program: Program) -> Read:
    """A function that gives the operand's value in every thread, as `dtype`."""
    at = readable(i, operand, dtype, program)
    if at is not None:
        return lambda b: b.values[at]
    # A wider register gives its low bits; a narrower one is extended with zeros.
    bits = unsigned(8 * dtype.itemsize)
    other = slot(program, operand, unsigned(program.registers[operand]))
    return lambda b: b.values[other].astype(bits).view(dtype)


_BOOL = np.dtype(bool)


def predicate(i: Instruction, operand: str, program: Program) -> Read:
    if program.registers.get(operand) != 1 and operand not in ("0", "1", "-1"):
        raise unsupported(i)
    return reader(i, operand, _BOOL, program)


def writable(i: Instruction, operand: str, program: Program) -> np.dtype:
    """The type of a register that can be written."""
    width = program.registers.get(operand)
    if width is None:
        raise unsupported(i)
    return _BOOL if width == 1 else unsigned(width)


def writer(i: Instruction, operand: str, program: Program) -> Write:
    """A function that puts values, one for each thread, where the mask is set.

    Signed values are extended with their sign in a wider register, others with zeros.
    """
    if operand == "_":
        return lambda b, values, mask: None
    dtype = writable(i, operand, program)
    at = slot(program, operand, dtype)
    kept = np.dtype(f"i{dtype.itemsize}") if dtype.kind != "b" else dtype

    def put(b: Blocks, values: np.ndarray, mask: Mask) -> None:
        if values.dtype != dtype:
            if values.dtype.itemsize != dtype.itemsize:
                signed = values.dtype.kind == "i"
                values = values.astype(kept if signed else dtype)
            values = np.ascontiguousarray(values).view(dtype)
        if mask is None:
            np.copyto(b.values[at], values)
        else:
            np.copyto(b.values[at], values, where=mask)

    return put


def words(i: Instruction, operands: Sequence[str], program: Program) -> Read:
    """A function that gives 32-bit operands in every thread, [operands, threads]."""
    if all(program.registers.get(name) == 32 for name in operands):
        rows = np.array([program.places[name][1] for name in operands])
        return lambda b: b.files[32].take(rows, 0)
    reads = [reader(i, name, unsigned(32), program) for name in operands]
    return lambda b: np.stack([read(b) for read in reads])


def words_writer(i: Instruction, operands: Sequence[str], program: Program) -> Write:
    """A function that puts 32-bit values [operands, threads] where the mask is set."""
    if any(program.registers.get(name) != 32 for name in operands):
        raise unsupported(i)
    rows = np.array([program.places[name][1] for name in operands])

    def put(b: Blocks, values: np.ndarray, mask: Mask) -> None:
        if mask is not None:
            values = np.where(mask, values, b.files[32].take(rows, 0))
        b.files[32][rows] = values

    return put


def address(i: Instruction, operand: str, width: int, program: Program) -> Read:
    """The address `[base+offset]` in every thread, as uint32 or uint64."""
    found = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if found is None:
        raise unsupported(i)
    base = reader(i, found[1], unsigned(width), program)
    offset = int(found[2] or "0", 0)
    if not offset:
        return base
    step = unsigned(width).type(offset & ((1 << width) - 1))
    return lambda b: base(b) + step


def vector(operand: str) -> tuple[str, ...]:
    """The elements of `{%r1, %r2}`, or the one operand there is."""
    if operand.startswith("{"):
        return tuple(part.strip() for part in operand[1:-1].split(","))
    return (operand,)


def whole_warps(mask: Mask) -> bool:
    """Whether every warp takes part with all lanes or with none."""
    if mask is None:
        return True
    lanes = mask.reshape(-1, LANES)
    return bool((lanes.any(1) == lanes.all(1)).all())
