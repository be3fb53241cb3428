"""Rules of wgmma: products of a warpgroup, read from shared memory by the asynchronous proxy.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": the fragments, the matrix descriptor
and the canonical layouts that it describes. Sums are the model of `tensor_cores`. A product is
computed when it is issued; until its group is waited for, its accumulators are nobody else's and
what it reads may not be written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .block import Block, Mask, Read, Step, predicate, reader, unsigned, unsupported, vector
from .faults import Fault
from .ptx import Instruction, Program
from .rules import rule
from .tensor_cores import VALUES

WARPGROUP = 128


@dataclass
class Product:
    """A wgmma under way: what becomes of its accumulators, what it reads of shared memory (bytes,
    an array for each warpgroup and operand), and the registers that it reads."""

    results: dict[str, np.ndarray]
    reads: list[np.ndarray]
    sources: tuple[str, ...]


# The descriptor's swizzling mode -> 16-byte chunks of a row of the pattern.
_CHUNKS = {0: 1, 1: 8, 2: 4, 3: 2}


def operand_bytes(descriptor: int, rows: int, depth: int, size: int, by_depth: bool) -> np.ndarray:
    """Where an operand's elements lie in shared memory, as bytes [rows, depth, size].

    Args:
        descriptor: the 64-bit matrix descriptor.
        rows: M of the left operand, N of the right one.
        depth: K.
        size: bytes of an element.
        by_depth: whether elements along K are neighbours ("K-major"), or those along the rows.
    """
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise Fault("wgmma with a base offset in its descriptor: there is no rule for it")
    chunks, unit = _CHUNKS[mode], 16 // size
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if by_depth:
        across = leading if mode == 0 else 16
        offset = row % 8 * 16 * chunks + row // 8 * stride + k // unit * across + k % unit * size
    else:
        blocks, slices = (stride, leading) if mode == 0 else (leading, stride)
        width = unit * chunks
        offset = row % width * size + row // width * blocks
        offset = offset + k % 8 * 16 * chunks + k // 8 * slices
    address = start + offset
    address = address ^ ((address >> 7 & chunks - 1) << 4)
    return address[:, :, None] + np.arange(size)


def _uniform(values: np.ndarray) -> list[int]:
    """A value for each warpgroup, the same in all of its threads."""
    by_group = values.reshape(-1, WARPGROUP)
    if (wrong := by_group != by_group[:, :1]).any():
        raise Fault("wgmma whose threads disagree on an operand", np.flatnonzero(wrong))
    return [int(value) for value in by_group[:, 0]]


def _all_threads(name: str, b: Block, mask: Mask) -> None:
    if mask is not None:
        raise Fault(f"{name} by a part of the block", b.active(mask))
    if b.threads.size % WARPGROUP:
        raise Fault(f"{name} in a block of {b.threads.size} threads, no whole warpgroups")


@rule(r"wgmma\.fence\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def fence(b: Block, mask: Mask) -> None:
        _all_threads("wgmma.fence", b, mask)
        b.fenced = dict(b.registers)

    return fence


@rule(r"wgmma\.commit_group\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def commit(b: Block, mask: Mask) -> None:
        _all_threads("wgmma.commit_group", b, mask)
        b.product_groups.append(b.products)
        b.products = []

    return commit


@rule(r"wgmma\.wait_group\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    left = int(i.operands[0], 0)

    def wait(b: Block, mask: Mask) -> None:
        _all_threads("wgmma.wait_group", b, mask)
        while len(b.product_groups) > left:
            for product in b.product_groups.pop(0):
                for at in product.reads:
                    b.shared.end_read(at)
                for name, values in product.results.items():
                    # A later product may have taken the accumulator on.
                    if b.owed.get(name) is values:
                        b.registers[name] = b.fenced[name] = b.owed.pop(name)
        b.lent = {
            name
            for product in (p for group in (*b.product_groups, b.products) for p in group)
            for name in product.sources
        }

    return wait


@rule(r"fence\.proxy\.async(?:\.shared::cta)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def fence(b: Block, mask: Mask) -> None:
        if mask is not None:
            raise Fault("fence.proxy.async by a part of the block", b.active(mask))
        b.shared.proxy_fence()

    return fence


@rule(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)k(?P<depth>16|8)\.f32"
    r"\.(?P<type>bf16|f16|tf32)\.(?P=type)"
)
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    columns, depth, value = int(m["columns"]), int(m["depth"]), VALUES[m["type"]]
    size = 32 // depth
    names = vector(i.operands[0])
    from_registers = i.operands[1].startswith("{")
    flags = [int(flag, 0) for flag in i.operands[4:]]
    # Signs of both operands, and of 16-bit ones in shared memory whether they are transposed.
    turned = flags[2:] if size == 2 else [0] * (1 if from_registers else 2)
    if (
        len(names) != columns // 2
        or (size == 4) != (m["type"] == "tf32")
        or len(turned) != (1 if from_registers else 2)
        or flags[:2] != [1, 1]
        or len(flags) != (2 if size == 4 else 2 + len(turned))
    ):
        raise unsupported(i)
    word = unsigned(32)
    sources = vector(i.operands[1]) if from_registers else ()
    reads_a: list[Read] = [reader(i, name, word, program) for name in sources]
    describe = [
        reader(i, operand, unsigned(64), program)
        for operand in (i.operands[2:3] if from_registers else i.operands[1:3])
    ]
    adds = predicate(i, i.operands[3], program)

    def loaded(
        b: Block, read: Read, rows: int, by_depth: bool
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """[warpgroups, rows, depth] as float64, and the bytes of each."""
        matrices, places = [], []
        for group, descriptor in enumerate(_uniform(read(b))):
            at = operand_bytes(descriptor, rows, depth, size, by_depth)
            threads = b.threads[group * WARPGROUP : (group + 1) * WARPGROUP]
            data = b.shared.begin_read(at, threads)
            matrices.append(value(data.view(unsigned(8 * size))[..., 0]).astype(np.float64))
            places.append(at)
        return np.stack(matrices), places

    def multiply(b: Block, mask: Mask) -> None:
        _all_threads("wgmma", b, mask)
        for name in (*sources, *(name for name in names if name not in b.owed)):
            if b.registers[name] is not b.fenced.get(name):
                raise Fault(f"wgmma of {name}, which was written after the last wgmma.fence")
        places: list[np.ndarray] = []
        if from_registers:
            # Registers [warpgroups, warps, halves of K, halves of 16 rows, 8 rows, 4 lanes].
            words = np.stack([read(b).reshape(-1, 4, 8, 4) for read in reads_a], 2)
            a = value(np.ascontiguousarray(words).view(unsigned(8 * size)))
            a = a.reshape(-1, 4, 2, 2, 8, 4, 4 // size).transpose(0, 1, 3, 4, 2, 5, 6)
            left = a.reshape(-1, 64, depth).astype(np.float64)
        else:
            left, places = loaded(b, describe[0], 64, not turned[0])
        right, more = loaded(b, describe[-1], columns, not turned[-1])
        out = left @ right.swapaxes(1, 2)  # [warpgroups, 64, columns]
        # Accumulators [warpgroups, 4 warps, 2 x 8 rows, columns / 8, 4 lanes, 2].
        fragments = out.reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        by_register = fragments.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1)
        going = np.array(_uniform(adds(b)), bool).repeat(WARPGROUP)
        results = {}
        for name, total in zip(names, by_register, strict=True):
            before = b.owed.get(name, b.registers[name]).view(np.float32)
            added = np.where(going, total + before.astype(np.float64), total)
            results[name] = added.astype(np.float32).view(word)
        b.owed |= results
        b.lent |= set(sources)
        b.products.append(Product(results, places + more, sources))

    return multiply
