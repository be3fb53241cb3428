"""Rules of warp matrices: ldmatrix, stmatrix and mma.sync, with the fragments of the PTX ISA.

Sums are a model: products are exact, their sum and the accumulator are added in float64 and rounded
to float32 once, where the hardware adds in an order and with a width of its own. tf32 operands lose
the 13 bits that the format has no room for.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .block import (
    LANES,
    Blocks,
    Mask,
    Read,
    Step,
    address,
    reader,
    unsupported,
    vector,
    whole_warps,
    words,
    words_writer,
    writer,
)
from .faults import Fault
from .numbers import bfloat16_to_float32
from .ptx import Instruction, Program
from .rules import rule
from .transfers import chosen


def _rows(where: Read, count: int, b: Blocks, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of the rows, [warps * 8 * count], and the threads that give them."""
    if not whole_warps(mask):
        raise Fault("a matrix of a warp by a part of it", b.active(mask))
    at = chosen(where, b, mask).reshape(-1, LANES)[:, : 8 * count]
    threads = b.active(mask).reshape(-1, LANES)[:, : 8 * count]
    return at.reshape(-1), threads.reshape(-1)


@rule(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count = int(m["count"])
    put = words_writer(i, vector(i.operands[0]), program)
    where = address(i, i.operands[1], 32, program)

    def load(b: Blocks, mask: Mask) -> None:
        at, threads = _rows(where, count, b, mask)
        data = b.shared.load(at, 16, threads, whole_warp=True)
        matrices = data.view(np.uint16).reshape(-1, count, 8, 8)
        if m["trans"]:
            matrices = matrices.swapaxes(2, 3)
        # Two neighbours of a row for each lane, the lanes along the rows.
        lanes = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, LANES)
        put(b, _by_register(b, lanes, mask), mask)

    return load


@rule(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count = int(m["count"])
    where = address(i, i.operands[0], 32, program)
    read = words(i, vector(i.operands[1]), program)

    def store(b: Blocks, mask: Mask) -> None:
        at, threads = _rows(where, count, b, mask)
        values = read(b) if mask is None else read(b)[:, mask]
        lanes = values.reshape(count, -1, LANES).swapaxes(0, 1)
        matrices = np.ascontiguousarray(lanes).view(np.uint16).reshape(-1, count, 8, 8)
        if m["trans"]:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        b.shared.store(at, rows, threads)

    return store


def _by_register(b: Blocks, lanes: np.ndarray, mask: Mask) -> np.ndarray:
    """[registers, threads] of [warps that take part, registers, lanes]."""
    values = lanes.swapaxes(0, 1).reshape(lanes.shape[1], -1)
    if mask is None:
        return values
    every = np.zeros((lanes.shape[1], b.threads.size), values.dtype)
    every[:, mask] = values
    return every


# Operands of 16 x K and K x 8 as float32, from registers [registers, threads].


def _a16(registers: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    pairs = value(registers.view(np.uint16)).reshape(2, 2, -1, 8, 4, 2)
    return pairs.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def _b16(registers: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    pairs = value(registers.view(np.uint16)).reshape(2, -1, 8, 4, 2)
    return pairs.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def _a32(registers: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return value(registers).reshape(2, 2, -1, 8, 4).transpose(2, 1, 3, 0, 4).reshape(-1, 16, 8)


def _b32(registers: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return value(registers).reshape(2, -1, 8, 4).transpose(1, 0, 3, 2).reshape(-1, 8, 8)


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": bfloat16_to_float32,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),
}


@rule(
    r"mma\.sync\.aligned\.(?:m16n8k16\.row\.col\.f32\.(?P<half>bf16|f16)\.(?P=half)\.f32"
    r"|m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32)"
)
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    value = VALUES[m["half"] or "tf32"]
    left, right = (_a16, _b16) if m["half"] else (_a32, _b32)
    to, a, b, c = (vector(operand) for operand in i.operands)
    if (len(to), len(a), len(b), len(c)) != (4, 4, 2, 4):
        raise unsupported(i)
    put = words_writer(i, to, program)
    read_a, read_b, read_c = (words(i, names, program) for names in (a, b, c))

    def multiply(block: Blocks, mask: Mask) -> None:
        if not whole_warps(mask):
            raise Fault("mma.sync by a part of a warp", block.active(mask))
        x = left(read_a(block), value).astype(np.float64)
        y = right(read_b(block), value).astype(np.float64)
        z = read_c(block).view(np.float32).reshape(2, 2, -1, 8, 4)
        z = z.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        out = (x @ y + z).astype(np.float32).reshape(-1, 2, 8, 4, 2)
        put(block, out.transpose(1, 4, 0, 2, 3).reshape(4, -1).view(np.uint32), mask)

    return multiply


@rule(r"mma\.sync\.aligned\.(?:m8n8k4|m16n8k(?P<depth>4|8|16))\.row\.col\.f64\.f64\.f64\.f64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    slices = int(m["depth"] or 4) // 4  # of K, each of as many columns as a group has lanes
    halves = 2 if m["depth"] else 1  # of M, each of 8 rows
    to, a, b, c = (vector(operand) for operand in i.operands)
    if (len(to), len(a), len(b), len(c)) != (2 * halves, halves * slices, slices, 2 * halves):
        raise unsupported(i)
    puts = [writer(i, name, program) for name in to]
    reads_a, reads_b, reads_c = (
        [reader(i, name, np.dtype("f8"), program) for name in names] for names in (a, b, c)
    )

    def multiply(block: Blocks, mask: Mask) -> None:
        if not whole_warps(mask):
            raise Fault("mma.sync by a part of a warp", block.active(mask))
        x, y, z = (np.stack([r(block) for r in reads]) for reads in (reads_a, reads_b, reads_c))
        # [slices, halves, warps, 8, 4], [slices, warps, 8, 4] and [halves, 2, warps, 8, 4]
        x = x.reshape(slices, halves, -1, 8, 4).transpose(2, 1, 3, 0, 4)
        x = x.reshape(-1, 8 * halves, 4 * slices)
        y = y.reshape(slices, -1, 8, 4).transpose(1, 0, 3, 2).reshape(-1, 4 * slices, 8)
        z = z.reshape(halves, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 8 * halves, 8)
        out = (x @ y + z).reshape(-1, halves, 8, 4, 2).transpose(1, 4, 0, 2, 3)
        for put, values in zip(puts, out.reshape(2 * halves, -1), strict=True):
            put(block, values, mask)

    return multiply
