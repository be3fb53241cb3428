"""The state of one block while it is executed, and how instructions read and write registers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .faults import UnsupportedError
from .global_memory import GlobalMemory
from .ptx import Instruction, Program
from .shared_memory import SharedMemory

LANES = 32

# Which threads an instruction is executed by; None: all of the block.
Mask = np.ndarray | None


@dataclass
class Copy:
    """A cp.async under way: bytes [k, width] of shared memory, and what they will be."""

    at: np.ndarray
    values: np.ndarray
    threads: np.ndarray


@dataclass
class Block:
    """One block.

    Attributes:
        number: counted from 0, x fastest.
        index, grid: its place, and how many there are, in x, y and z.
        registers: by name, one value for each thread, as unsigned integers or bool.
        parameters: the bits of each parameter.
        copies: cp.async of no group yet; groups: those committed, the oldest first.
        products, product_groups: the same of wgmma.
        owed: accumulators of wgmma under way, and what they will be; lent: registers it reads.
        fenced: the registers at the last wgmma.fence.
    """

    number: int
    index: tuple[int, int, int]
    grid: tuple[int, int, int]
    registers: dict[str, np.ndarray]
    parameters: dict[str, int]
    memory: GlobalMemory
    shared: SharedMemory
    threads: np.ndarray
    copies: list[Copy] = field(default_factory=list)
    groups: list[list[Copy]] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)
    product_groups: list[list[Any]] = field(default_factory=list)
    owed: dict[str, np.ndarray] = field(default_factory=dict)
    lent: set[str] = field(default_factory=set)
    fenced: dict[str, np.ndarray] = field(default_factory=dict)

    def active(self, mask: Mask) -> np.ndarray:
        return self.threads if mask is None else np.flatnonzero(mask)


Step = Callable[[Block, Mask], None]
Read = Callable[[Block], np.ndarray]
Write = Callable[[Block, np.ndarray, Mask], None]


def unsupported(instruction: Instruction) -> UnsupportedError:
    return UnsupportedError(f"PTX line {instruction.line}: no rule for {instruction.text!r}")


def unsigned(width: int) -> np.dtype:
    return np.dtype(f"u{width // 8}")


def _special(name: str) -> Callable[[Block], np.ndarray | int] | None:
    if name == "%tid.x":
        return lambda b: b.threads
    if name == "%laneid":
        return lambda b: b.threads % LANES
    if name in ("%tid.y", "%tid.z"):
        return lambda b: 0
    if found := re.fullmatch(r"%(ctaid|nctaid)\.([xyz])", name):
        axis = "xyz".index(found[2])
        if found[1] == "ctaid":
            return lambda b: b.index[axis]
        return lambda b: b.grid[axis]
    if name == "%ntid.x":
        return lambda b: b.threads.size
    return None


def reader(i: Instruction, operand: str, dtype: np.dtype, program: Program) -> Read:
    """A function that gives the operand's value in every thread, as `dtype`."""
    bits = unsigned(8 * dtype.itemsize)
    width = program.registers.get(operand)
    if width == 1:
        if dtype.itemsize != 1:
            raise unsupported(i)
        return lambda b: b.registers[operand]
    if width is not None:
        if width == 8 * dtype.itemsize:
            return lambda b: b.registers[operand].view(dtype)
        # A wider register gives its low bits; a narrower one is extended with zeros.
        return lambda b: b.registers[operand].astype(bits).view(dtype)
    if special := _special(operand):
        return lambda b: np.full(b.threads.size, special(b), bits).view(dtype)
    if found := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]{8}|[0-9A-Fa-f]{16})", operand):
        value = int(found[1], 16)
    elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        value = int(operand.rstrip("U"), 0)
    elif operand == "global_smem":
        value = 0  # shared memory begins here
    else:
        raise unsupported(i)
    constant = np.array(value & ((1 << 8 * dtype.itemsize) - 1), bits).view(dtype)
    return lambda b: np.full(b.threads.size, constant)


def predicate(i: Instruction, operand: str, program: Program) -> Read:
    if program.registers.get(operand) == 1:
        return lambda b: b.registers[operand]
    if operand in ("0", "1", "-1"):
        return lambda b: np.full(b.threads.size, operand != "0")
    raise unsupported(i)


def writer(i: Instruction, operand: str, program: Program) -> Write:
    """A function that puts values, one for each thread of the block, where the mask is set.

    Signed values are extended with their sign in a wider register, others with zeros.
    """
    if operand == "_":
        return lambda b, values, mask: None
    width = program.registers.get(operand)
    if width is None:
        raise unsupported(i)
    dtype = np.dtype(bool) if width == 1 else unsigned(width)
    kept = np.dtype(f"i{width // 8}") if width > 1 else dtype

    def put(b: Block, values: np.ndarray, mask: Mask) -> None:
        if values.dtype != dtype:
            if values.dtype.itemsize != dtype.itemsize:
                signed = values.dtype.kind == "i"
                values = values.astype(kept if signed else dtype)
            values = np.ascontiguousarray(values).view(dtype)
        if mask is not None:
            values = np.where(mask, values, b.registers[operand])
        b.registers[operand] = values

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
