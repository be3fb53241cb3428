"""Rules of loads, stores, asynchronous copies, and what lanes of a warp hand each other."""

from __future__ import annotations

import re

import numpy as np

from .block import (
    LANES,
    Blocks,
    Copy,
    Mask,
    Read,
    Step,
    address,
    predicate,
    reader,
    unsigned,
    unsupported,
    vector,
    whole_warps,
    writer,
)
from .faults import Fault
from .ptx import Instruction, Program
from .rules import rule

CACHE = r"(?:\.(?:ca|cg|cs|wb|wt|nc|L1::(?:no_allocate|evict_\w+)))*"
TYPE = r"(?:\.v(?P<count>[248]))?\.(?P<type>[subf](?:8|16|32|64))"


def chosen(read: Read, b: Blocks, mask: Mask) -> np.ndarray:
    values = read(b)
    return values if mask is None else values[mask]


def spread(b: Blocks, values: np.ndarray, mask: Mask) -> np.ndarray:
    """Values of the active threads as values of all."""
    if mask is None:
        return np.ascontiguousarray(values)
    full = np.zeros(b.threads.size, values.dtype)
    full[mask] = values
    return full


@rule(r"ld\.param\.(?P<type>[subf](?:8|16|32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    put = writer(i, i.operands[0], program)
    dtype = unsigned(int(m["type"][1:]))
    name = i.operands[1].strip("[] ")
    if name not in program.parameters:
        raise unsupported(i)
    return lambda b, mask: put(b, np.full(b.threads.size, b.parameters[name], dtype), mask)


@rule(rf"ld\.(?P<space>global|shared)(?:::cta)?{CACHE}{TYPE}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    part = unsigned(int(m["type"][1:]))
    names = vector(i.operands[0])
    if len(i.operands) != 2 or len(names) != int(m["count"] or 1):
        raise unsupported(i)
    puts = [writer(i, name, program) for name in names]
    width = part.itemsize * len(names)
    shared = m["space"] == "shared"
    where = address(i, i.operands[1], 32 if shared else 64, program)
    kind = np.dtype(f"i{part.itemsize}") if m["type"][0] == "s" else part

    def load(b: Blocks, mask: Mask) -> None:
        at, threads = chosen(where, b, mask), b.active(mask)
        data = b.shared.load(at, width, threads) if shared else b.load(at, width, threads)
        for put, column in zip(puts, data.view(kind).T, strict=True):
            put(b, spread(b, column, mask), mask)

    return load


@rule(rf"st\.(?P<space>global|shared)(?:::cta)?{CACHE}{TYPE}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    part = unsigned(int(m["type"][1:]))
    names = vector(i.operands[1])
    if len(i.operands) != 2 or len(names) != int(m["count"] or 1):
        raise unsupported(i)
    reads = [reader(i, name, part, program) for name in names]
    shared = m["space"] == "shared"
    where = address(i, i.operands[0], 32 if shared else 64, program)

    def store(b: Blocks, mask: Mask) -> None:
        data = np.stack([chosen(read, b, mask) for read in reads], 1).view(np.uint8)
        at, threads = chosen(where, b, mask), b.active(mask)
        if shared:
            b.shared.store(at, data, threads)
        else:
            b.store(at, data, threads)

    return store


@rule(r"cp\.async\.(?P<cache>ca|cg)\.shared\.global(?:\.L2::\w+)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    to = address(i, i.operands[0], 32, program)
    source = address(i, i.operands[1], 64, program)
    width = int(i.operands[2], 0)
    given = reader(i, i.operands[3], unsigned(32), program) if len(i.operands) == 4 else None
    if len(i.operands) not in (3, 4) or width not in ((16,) if m["cache"] == "cg" else (4, 8, 16)):
        raise unsupported(i)

    def copy(b: Blocks, mask: Mask) -> None:
        threads = b.active(mask)
        at = chosen(to, b, mask).copy()  # the register may be another by then
        b.shared.start_copy(at, width, threads)
        values = np.zeros((threads.size, width), np.uint8)  # what is not copied becomes zero
        some = np.ones(threads.size, bool)
        if given is not None:
            count = chosen(given, b, mask)
            some = count != 0
            if (wrong := some & (count != width)).any():
                raise Fault(f"cp.async of a part of its {width} bytes", threads[wrong])
        addresses = chosen(source, b, mask)[some]
        values[some] = b.load(addresses, width, threads[some])
        b.copies.append(Copy(at, values, threads))

    return copy


@rule(r"cp\.async\.commit_group")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def commit(b: Blocks, mask: Mask) -> None:
        if mask is not None:
            raise Fault("cp.async.commit_group by a part of the block", b.active(mask))
        b.groups.append(b.copies)
        b.copies = []

    return commit


@rule(r"cp\.async\.wait_group")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    left = int(i.operands[0], 0)

    def wait(b: Blocks, mask: Mask) -> None:
        if mask is not None:
            raise Fault("cp.async.wait_group by a part of the block", b.active(mask))
        while len(b.groups) > left:
            for copy in b.groups.pop(0):
                b.shared.land(copy.address, copy.values, copy.threads)

    return wait


@rule(r"bar\.warp\.sync")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def wait(b: Blocks, mask: Mask) -> None:
        if not whole_warps(mask):
            raise Fault("bar.warp.sync by a part of a warp", b.active(mask))
        b.shared.warp_barrier(b.active(mask))
        if mask is None:
            b.interval.warp_barrier()

    return wait


@rule(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    """PTX ISA, "shfl.sync": the lane that is read, and whether it is in range."""
    to, _, inside = i.operands[0].partition("|")
    put = writer(i, to, program)
    put_inside = writer(i, inside, program) if inside else None
    word = unsigned(32)
    read, lane, clamp, members = (reader(i, operand, word, program) for operand in i.operands[1:])

    def shuffle(b: Blocks, mask: Mask) -> None:
        if not whole_warps(mask) or (chosen(members, b, mask) != 0xFFFFFFFF).any():
            raise Fault("shfl.sync by a part of a warp", b.active(mask))
        me = b.threads % LANES
        by, bound = lane(b) & 31, clamp(b)
        segment = bound >> 8 & 31
        last = me & segment | bound & 31 & ~segment
        if m["mode"] == "up":
            source = me - by.astype(np.int64)
            found = source >= last
        elif m["mode"] == "down":
            source = me + by
            found = source <= last
        elif m["mode"] == "bfly":
            source = me ^ by
            found = source <= last
        else:
            source = me & segment | by & ~segment
            found = source <= last
        source = np.where(found, source, me).astype(np.int64)
        put(b, read(b)[b.threads - me + source], mask)
        if put_inside is not None:
            put_inside(b, found, mask)

    return shuffle


@rule(r"redux\.sync\.(?P<how>add|min|max|and|or|xor)\.(?P<type>[sub]32)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    put = writer(i, i.operands[0], program)
    dtype = np.dtype("i4" if m["type"][0] == "s" else "u4")
    read = reader(i, i.operands[1], dtype, program)
    members = reader(i, i.operands[2], unsigned(32), program)
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[m["how"]]

    def reduce(b: Blocks, mask: Mask) -> None:
        if not whole_warps(mask) or (chosen(members, b, mask) != 0xFFFFFFFF).any():
            raise Fault("redux.sync by a part of a warp", b.active(mask))
        one = function.reduce(read(b).reshape(-1, LANES), axis=1, dtype=dtype)
        put(b, np.repeat(one, LANES), mask)

    return reduce


@rule(r"vote\.sync\.(?:(?P<ballot>ballot)\.b32|(?P<how>any|all|uni)\.pred)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    put = writer(i, i.operands[0], program)
    negated = i.operands[1].startswith("!")
    read = predicate(i, i.operands[1].removeprefix("!"), program)
    members = reader(i, i.operands[2], unsigned(32), program)

    def vote(b: Blocks, mask: Mask) -> None:
        if not whole_warps(mask) or (chosen(members, b, mask) != 0xFFFFFFFF).any():
            raise Fault("vote.sync by a part of a warp", b.active(mask))
        lanes = (read(b) ^ negated).reshape(-1, LANES)
        if m["ballot"]:
            one = (lanes * (np.uint32(1) << np.arange(LANES, dtype=np.uint32))).sum(
                1, dtype=np.uint32
            )
        elif m["how"] == "uni":
            one = lanes.all(1) == lanes.any(1)
        else:
            one = lanes.any(1) if m["how"] == "any" else lanes.all(1)
        put(b, np.repeat(one, LANES), mask)

    return vote
