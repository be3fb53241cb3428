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
    Block,
    Mask,
    Read,
    Step,
    address,
    reader,
    unsigned,
    unsupported,
    vector,
    whole_warps,
    writer,
)
from .faults import Fault
from .numbers import bfloat16_to_float32
from .ptx import Instruction, Program
from .rules import rule
from .transfers import chosen, spread


def _rows(where: Read, count: int, b: Block, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of the rows, [warps * 8 * count], and the threads that give them."""
    if not whole_warps(mask):
        raise Fault("a matrix of a warp by a part of it", b.active(mask))
    at = chosen(where, b, mask).reshape(-1, LANES)[:, : 8 * count]
    threads = b.active(mask).reshape(-1, LANES)[:, : 8 * count]
    return at.reshape(-1), threads.reshape(-1)


@rule(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count = int(m["count"])
    puts = [writer(i, name, program) for name in vector(i.operands[0])]
    where = address(i, i.operands[1], 32, program)

    def load(b: Block, mask: Mask) -> None:
        at, threads = _rows(where, count, b, mask)
        data = b.shared.load(at, 16, threads, whole_warp=True)
        matrices = data.view(np.uint16).reshape(-1, count, 8, 8)
        if m["trans"]:
            matrices = matrices.swapaxes(2, 3)
        # Two neighbours of a row for each lane, the lanes along the rows.
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, LANES)
        for number, put in enumerate(puts):
            put(b, spread(b, words[:, number].reshape(-1), mask), mask)

    return load


@rule(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared\.b16")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count = int(m["count"])
    where = address(i, i.operands[0], 32, program)
    reads = [reader(i, name, unsigned(32), program) for name in vector(i.operands[1])]

    def store(b: Block, mask: Mask) -> None:
        at, threads = _rows(where, count, b, mask)
        words = np.stack([chosen(r, b, mask).reshape(-1, LANES) for r in reads], 1)
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if m["trans"]:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        b.shared.store(at, rows, threads)

    return store


def _words(reads: list[Read], b: Block, mask: Mask) -> np.ndarray:
    """Registers of whole warps, [warps, registers, groups of 4 lanes, lane in the group]."""
    return np.stack([chosen(read, b, mask).reshape(-1, 8, 4) for read in reads], 1)


# Operands of 16 x K and K x 8 as float32, from registers [warps, registers, 8, 4].


def _a16(words: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    pairs = value(np.ascontiguousarray(words).view(np.uint16)).reshape(-1, 2, 2, 8, 4, 2)
    return pairs.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 16, 16)


def _b16(words: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    pairs = value(np.ascontiguousarray(words).view(np.uint16)).reshape(-1, 2, 8, 4, 2)
    return pairs.transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)


def _a32(words: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return value(words).reshape(-1, 2, 2, 8, 4).transpose(0, 2, 3, 1, 4).reshape(-1, 16, 8)


def _b32(words: np.ndarray, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return value(words).transpose(0, 1, 3, 2).reshape(-1, 8, 8)


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
    puts = [writer(i, name, program) for name in to]
    reads_a, reads_b, reads_c = (
        [reader(i, name, unsigned(32), program) for name in names] for names in (a, b, c)
    )

    def multiply(block: Block, mask: Mask) -> None:
        if not whole_warps(mask):
            raise Fault("mma.sync by a part of a warp", block.active(mask))
        x = left(_words(reads_a, block, mask), value).astype(np.float64)
        y = right(_words(reads_b, block, mask), value).astype(np.float64)
        z = _words(reads_c, block, mask).view(np.float32).reshape(-1, 2, 2, 8, 4)
        z = z.transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)
        out = (x @ y + z).astype(np.float32).reshape(-1, 2, 8, 4, 2)
        out = out.transpose(0, 1, 4, 2, 3).reshape(-1, 4, LANES)
        for number, put in enumerate(puts):
            put(block, spread(block, out[:, number].reshape(-1), mask), mask)

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

    def multiply(block: Block, mask: Mask) -> None:
        if not whole_warps(mask):
            raise Fault("mma.sync by a part of a warp", block.active(mask))
        # [warps, slices, halves, 8, 4], [warps, slices, 8, 4] and [warps, halves, 2, 8, 4]
        x = _words(reads_a, block, mask).reshape(-1, slices, halves, 8, 4)
        x = x.transpose(0, 2, 3, 1, 4).reshape(-1, 8 * halves, 4 * slices)
        y = _words(reads_b, block, mask).transpose(0, 1, 3, 2).reshape(-1, 4 * slices, 8)
        z = _words(reads_c, block, mask).reshape(-1, halves, 2, 8, 4)
        z = z.transpose(0, 1, 3, 4, 2).reshape(-1, 8 * halves, 8)
        out = (x @ y + z).reshape(-1, halves, 8, 4, 2).transpose(0, 1, 4, 2, 3)
        out = out.reshape(-1, 2 * halves, LANES)
        for number, put in enumerate(puts):
            put(block, spread(block, out[:, number].reshape(-1), mask), mask)

    return multiply
