"""Rules of wgmma: products of a warpgroup, read from shared memory by the asynchronous proxy.

PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": the fragments, the matrix descriptor
and the canonical layouts that it describes. Sums are the model of `tensor_cores`. A product is
computed when it is issued; until its group is waited for, its accumulators are nobody else's and
what it reads may not be written.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import numpy as np

from .block import Blocks, Mask, Read, Step, predicate, reader, unsigned, unsupported, vector
from .faults import Fault
from .ptx import Instruction, Program
from .rules import rule
from .tensor_cores import VALUES

WARPGROUP = 128


@dataclass
class Product:
    """A wgmma under way: its accumulators, which of the products that added to them it is, which 16
    bytes of shared memory it reads (an array [blocks, k] for each operand), and the registers that
    it reads, as `Program.bits` has them."""

    names: tuple[str, ...]
    number: int
    reads: list[np.ndarray]
    sources: int

    def part(self, which: np.ndarray) -> Product:
        return replace(self, reads=[chunks[which] for chunks in self.reads])


# The descriptor's swizzling mode -> 16-byte chunks of a row of the pattern.
_CHUNKS = {0: 1, 1: 8, 2: 4, 3: 2}


@functools.lru_cache(maxsize=4096)
def operand_chunks(descriptor: int, rows: int, depth: int, size: int, by_depth: bool) -> np.ndarray:
    """Which 16 bytes of shared memory an operand lies in, as numbers of chunks: [rows, depth * size
    / 16] where elements along K are neighbours, else [depth, rows * size / 16].

    Args:
        descriptor: the 64-bit matrix descriptor.
        rows: M of the left operand, N of the right one.
        depth: K.
        size: bytes of an element.
        by_depth: whether elements along K are neighbours ("K-major"), or those along the rows.
    """
    start, leading, stride = (((descriptor >> at) & 0x3FFF) for at in (0, 16, 32))
    mode = descriptor >> 62
    if descriptor >> 49 & 7:
        raise Fault("wgmma with a base offset in its descriptor: there is no rule for it")
    chunks, unit = _CHUNKS[mode], 16 // size
    if by_depth:
        row, chunk = np.arange(rows)[:, None], np.arange(depth // unit)[None, :]
        across = leading if mode == 0 else 1
        offset = row % 8 * chunks + row // 8 * stride + chunk * across
    else:
        k, chunk = np.arange(depth)[:, None], np.arange(rows // unit)[None, :]
        blocks, slices = (stride, leading) if mode == 0 else (leading, stride)
        offset = chunk % chunks + chunk // chunks * blocks + k % 8 * chunks + k // 8 * slices
    found = start + offset
    found = found ^ (found >> 3 & chunks - 1)
    found.flags.writeable = False
    return found


def _uniform(values: np.ndarray) -> np.ndarray:
    """A value for each warpgroup, the same in all of its threads."""
    by_group = values.reshape(-1, WARPGROUP)
    if (wrong := by_group != by_group[:, :1]).any():
        raise Fault("wgmma whose threads disagree on an operand", np.flatnonzero(wrong))
    return by_group[:, 0]


def _write(b: Blocks, names: tuple[str, ...], values: np.ndarray) -> None:
    b.files[32][[b.program.places[name][1] for name in names]] = values


def _all_threads(name: str, b: Blocks, mask: Mask) -> None:
    if mask is not None:
        raise Fault(f"{name} by a part of the block", b.active(mask))
    if b.per % WARPGROUP:
        raise Fault(f"{name} in a block of {b.per} threads, no whole warpgroups")


@rule(r"wgmma\.fence\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def fence(b: Blocks, mask: Mask) -> None:
        _all_threads("wgmma.fence", b, mask)
        b.unfenced = 0

    return fence


@rule(r"wgmma\.commit_group\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def commit(b: Blocks, mask: Mask) -> None:
        _all_threads("wgmma.commit_group", b, mask)
        b.product_groups.append(b.products)
        b.products = []

    return commit


@rule(r"wgmma\.wait_group\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    left = int(i.operands[0], 0)

    def wait(b: Blocks, mask: Mask) -> None:
        _all_threads("wgmma.wait_group", b, mask)
        while len(b.product_groups) > left:
            for product in b.product_groups.pop(0):
                for chunks in product.reads:
                    b.shared.end_read("wgmma", chunks, np.arange(len(chunks)))
                # A later product may have taken the accumulators on.
                owed = b.owed.get(product.names)
                if owed is not None and owed[1] == product.number:
                    _write(b, product.names, owed[0])
                    del b.owed[product.names]
        under_way = [p for group in (*b.product_groups, b.products) for p in group]
        b.owing = program.bits(name for names in b.owed for name in names)
        b.lent = 0
        for product in under_way:
            b.lent |= product.sources

    return wait


@rule(r"fence\.proxy\.async(?:\.shared::cta)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def fence(b: Blocks, mask: Mask) -> None:
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
    if any(program.registers.get(name) != 32 for name in names):
        raise unsupported(i)
    rows_of = np.array([program.places[name][1] for name in names])
    accumulators, borrowed = program.bits(names), program.bits(sources)

    def loaded(
        b: Blocks, read: Read, rows: int, by_depth: bool, reads: list[np.ndarray]
    ) -> np.ndarray:
        """[warpgroups or 1, rows, depth] as float64."""
        by_block = _uniform(read(b)).reshape(b.numbers.size, -1)
        if (by_block == by_block[:, :1]).all():  # an operand of all warpgroups
            by_block = by_block[:, :1]
        at = np.stack(
            [
                operand_chunks(int(descriptor), rows, depth, size, by_depth)
                for descriptor in by_block.reshape(-1)
            ]
        )
        chunks = at.reshape(b.numbers.size, -1)
        data = b.shared.begin_read("wgmma", chunks, np.arange(len(chunks)))
        reads.append(chunks)
        # [blocks, warpgroups or 1, rows, depth], or the last two exchanged
        values = value(data.view(unsigned(8 * size))).astype(np.float64)
        values = values.reshape(*by_block.shape, *at.shape[1:-1], -1)
        values = values if by_depth else values.swapaxes(2, 3)
        shape = b.numbers.size, b.per // WARPGROUP, rows, depth
        return np.broadcast_to(values, shape).reshape(-1, rows, depth)

    def multiply(b: Blocks, mask: Mask) -> None:
        _all_threads("wgmma", b, mask)
        adding = names in b.owed
        if not adding and b.owing & accumulators:
            raise Fault(f"{names[0]} is used before the wgmma that adds to it was waited for")
        late = b.unfenced & (borrowed if adding else accumulators | borrowed)
        if late and b.memory.checks.register_fences:
            name = next(name for name in (*sources, *names) if program.bits([name]) & late)
            raise Fault(f"wgmma of {name}, which was used after the last wgmma.fence")
        reads: list[np.ndarray] = []
        if from_registers:
            # Registers [warpgroups, warps, halves of K, halves of 16 rows, 8 rows, 4 lanes].
            words = np.stack([read(b).reshape(-1, 4, 8, 4) for read in reads_a], 2)
            a = value(np.ascontiguousarray(words).view(unsigned(8 * size)))
            a = a.reshape(-1, 4, 2, 2, 8, 4, 4 // size).transpose(0, 1, 3, 4, 2, 5, 6)
            left = a.reshape(-1, 64, depth).astype(np.float64)
        else:
            left = loaded(b, describe[0], 64, not turned[0], reads)
        right = loaded(b, describe[-1], columns, not turned[-1], reads)
        out = left @ right.swapaxes(1, 2)  # [warpgroups, 64, columns]
        # Accumulators [warpgroups, 4 warps, 2 x 8 rows, columns / 8, 4 lanes, 2].
        fragments = out.reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        total = fragments.transpose(4, 2, 6, 0, 1, 3, 5).reshape(columns // 2, -1)
        going = _uniform(adds(b)).astype(bool)
        if going.any():
            before = b.owed[names][0] if adding else b.files[32][rows_of]
            added = total + before.view(np.float32)
            total = added if going.all() else np.where(going.repeat(WARPGROUP), added, total)
        number = b.owed[names][1] + 1 if adding else 0
        b.owed[names] = total.astype(np.float32).view(word), number
        b.owing |= accumulators
        b.lent |= borrowed
        b.products.append(Product(names, number, reads, borrowed))

    return multiply
