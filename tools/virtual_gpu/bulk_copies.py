"""Rules of bulk copies of tensors (TMA), of tensor maps, and of the mbarriers that they arrive at.

PTX ISA, "mbarrier", "cp.async.bulk.tensor" and "tensormap.replace". A copy to shared memory
arrives when its mbarrier is waited for, as late as it may; until then its bytes are nobody's. One
from shared memory stores at once, and reads until its group was waited for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from .block import (
    LANES,
    PARAMETER,
    Blocks,
    Copy,
    Mask,
    Read,
    Step,
    address,
    reader,
    unsigned,
    unsupported,
    whole_warps,
    writer,
)
from .faults import Fault, UnsupportedError
from .ptx import Instruction, Program
from .rules import rule
from .tensor_maps import BYTES, CHUNK, MAP, Box, box
from .transfers import chosen, spread

_MBARRIER = 8
SHARED = r"\.shared(?:::cta)?"


Boxes = Callable[[Blocks, Mask], Iterator[tuple[int, Box]]]


@dataclass
class Mbarrier:
    """An mbarrier of one block.

    Attributes:
        count: arrivals of each phase; pending: those that this phase still waits for.
        bytes: that are to be copied in this phase, less those that were; copies: those under way.
        arrived: when each thread of the block arrived in this phase, [threads] (-1: it did not);
            released: the same of the phase before.
    """

    count: int
    pending: int
    arrived: np.ndarray
    released: np.ndarray
    bytes: int = 0
    parity: int = 0
    copies: list[Copy] = field(default_factory=list)

    def is_over(self) -> bool:
        """Whether nothing is missing: then the next phase begins."""
        if over := not (self.pending or self.bytes or self.copies):
            self.pending, self.parity = self.count, 1 - self.parity
            self.released, self.arrived = self.arrived, np.full_like(self.arrived, -1)
        return over

    def part(self, thread_of: np.ndarray) -> Mbarrier:
        return replace(self, copies=[copy.part(thread_of) for copy in self.copies])


def _each(b: Blocks, mask: Mask, *reads: Read) -> Iterator[tuple[int, ...]]:
    """Of each thread that takes part its number, and what it reads."""
    columns = (b.active(mask), *(chosen(read, b, mask) for read in reads))
    yield from zip(*(column.tolist() for column in columns), strict=True)


def _mbarrier(b: Blocks, thread: int, at: int) -> Mbarrier:
    found = b.mbarriers.get((thread // b.per, at))
    if found is None:
        raise Fault(f"there is no mbarrier at byte {at} of shared memory", np.array([thread]))
    b.shared.load(np.array([at]), _MBARRIER, np.array([thread]))
    return found


@rule(rf"mbarrier\.(?P<what>init|inval){SHARED}\.b64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    where = address(i, i.operands[0], 32, program)
    counts = reader(i, (*i.operands, "0")[1], unsigned(32), program)

    def make(b: Blocks, mask: Mask) -> None:
        for thread, at, count in _each(b, mask, where, counts):
            word = np.array([[count]], np.uint64).view(np.uint8)
            b.shared.store(np.array([at]), word, np.array([thread]))
            old = b.mbarriers.pop((thread // b.per, at), None)
            if old is not None and old.copies:
                raise Fault("an mbarrier that a copy is to arrive at yet", np.array([thread]))
            if m["what"] == "init":
                never = np.full(b.per, -1)
                b.mbarriers[thread // b.per, at] = Mbarrier(count, count, never, never)

    return make


@rule(rf"mbarrier\.arrive(?P<expects>\.expect_tx)?{SHARED}\.b64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    _, where_, *given = i.operands
    if i.operands[0] != "_" or (m["expects"] and not given):
        raise unsupported(i)
    where = address(i, where_, 32, program)
    number = reader(i, given[0] if given else "1", unsigned(32), program)

    def arrive(b: Blocks, mask: Mask) -> None:
        for thread, at, many in _each(b, mask, where, number):
            one = _mbarrier(b, thread, at)
            one.bytes += many if m["expects"] else 0
            one.pending -= 1 if m["expects"] else many
            if one.pending < 0:
                raise Fault(
                    f"mbarrier at byte {at}: an arrival more than its {one.count}, before the "
                    "phase was waited for",
                    np.array([thread]),
                )
            one.arrived[thread % b.per] = b.shared.arrival()
            one.is_over()

    return arrive


@rule(rf"mbarrier\.try_wait\.parity{SHARED}\.b64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    put = writer(i, i.operands[0], program)
    where = address(i, i.operands[1], 32, program)
    parity = reader(i, i.operands[2], unsigned(32), program)

    def wait(b: Blocks, mask: Mask) -> None:
        if mask is not None:
            raise UnsupportedError(f"PTX line {i.line}: no rule for a wait by a part of the block")
        b.shared.load(where(b), _MBARRIER, b.threads)
        asked = np.stack([b.threads // b.per, where(b), parity(b)], 1).astype(np.int64)
        whose, first = np.unique(asked, axis=0, return_index=True)
        if len(whose) > b.numbers.size:
            raise UnsupportedError(f"PTX line {i.line}: no rule for a wait that threads part at")
        for (_, at, phase), thread in zip(whose.tolist(), first.tolist(), strict=True):
            one = _mbarrier(b, thread, at)
            if one.parity == phase:  # not over yet
                for copy in one.copies:
                    b.shared.land(copy.address, copy.values, copy.threads, seen_by_all=True)
                    one.bytes -= copy.values.size
                one.copies = []
            if one.parity == phase and not one.is_over():
                raise Fault(
                    f"the kernel does not end: the mbarrier at byte {at} waits for {one.pending} "
                    f"arrivals and {one.bytes} bytes that do not come",
                    np.array([thread]),
                )
            b.shared.acquire(thread // b.per, one.released)
        put(b, np.ones(b.threads.size, bool), None)

    return wait


@rule(r"elect\.sync")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    """The manual lets any lane be the leader, the same each time: here the first."""
    leader, _, is_leader = i.operands[0].partition("|")
    puts = writer(i, leader, program), writer(i, is_leader, program)
    members = reader(i, i.operands[1], unsigned(32), program)

    def elect(b: Blocks, mask: Mask) -> None:
        if not whole_warps(mask) or (chosen(members, b, mask) != 0xFFFFFFFF).any():
            raise Fault("elect.sync by a part of a warp", b.active(mask))
        puts[0](b, np.zeros(b.threads.size, np.uint32), mask)
        puts[1](b, b.threads % LANES == 0, mask)

    return elect


@rule(r"cvta\.(?P<space>global|param)\.u64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    put = writer(i, i.operands[0], program)
    read = reader(i, i.operands[1], unsigned(64), program)

    def generic(b: Blocks, mask: Mask) -> None:
        at = read(b)
        if m["space"] == "param":
            known = {
                PARAMETER * number: b.parameters[name]
                for number, name in enumerate(program.parameters)
                if name in program.by_address
            }
            found = [known.get(place) for place in chosen(read, b, mask).tolist()]
            if None in found:
                raise Fault("cvta.param of what is no parameter's address", b.active(mask))
            at = spread(b, np.array(found, np.uint64), mask)
        put(b, at, mask)

    return generic


@rule(
    r"tensormap\.replace\.tile\.(?P<field>global_address|rank|box_dim|global_dim|global_stride"
    rf"|element_stride|elemtype|interleave_layout|swizzle_mode|fill_mode){SHARED}\.b1024\.b(?:32|64)"
)
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    assert MAP.fields is not None
    kind, offset, *_ = MAP.fields[m["field"]]
    size = kind.base.itemsize
    where = address(i, i.operands[0], 64, program)
    read = reader(i, i.operands[-1], unsigned(8 * size), program)
    number = int(i.operands[1], 0) if kind.shape else 0
    if len(i.operands) != 2 + bool(kind.shape) or number >= (*kind.shape, 1)[0]:
        raise unsupported(i)

    def change(b: Blocks, mask: Mask) -> None:
        at = chosen(where, b, mask) + np.uint64(offset + number * size)
        values = np.ascontiguousarray(chosen(read, b, mask)).view(np.uint8).reshape(-1, size)
        b.shared.store(at, values, b.active(mask))

    return change


@rule(rf"tensormap\.cp_fenceproxy\.global{SHARED}\.tensormap::generic\.release\.gpu\.sync\.aligned")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    to, source = (address(i, operand, 64, program) for operand in i.operands[:2])
    if int(i.operands[2], 0) != BYTES:
        raise unsupported(i)

    def copy(b: Blocks, mask: Mask) -> None:
        if not whole_warps(mask):
            raise Fault("tensormap.cp_fenceproxy by a part of a warp", b.active(mask))
        for thread, there, here in _each(b, mask, to, source):
            if thread % LANES == 0:
                pieces, who = CHUNK * np.arange(BYTES // CHUNK), np.full(BYTES // CHUNK, thread)
                b.store(there + pieces, b.shared.load(here + pieces, CHUNK, who), who)
                b.unacquired.add(there)

    return copy


@rule(r"fence\.proxy\.tensormap::generic\.acquire\.gpu")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    where = address(i, i.operands[0], 64, program)
    if int(i.operands[1], 0) != BYTES:
        raise unsupported(i)

    def fence(b: Blocks, mask: Mask) -> None:
        b.unacquired.difference_update(chosen(where, b, mask).tolist())

    return fence


def _boxes(i: Instruction, tensor: str, shared: str, rank: int, program: Program) -> Boxes:
    """A function that gives, of each thread that takes part, its number and its box."""
    found = re.fullmatch(r"\[(%\w+),\s*(\{.*\})\]", tensor)
    if found is None or len(names := found[2].strip("{}").split(",")) != rank:
        raise unsupported(i)
    map_at = reader(i, found[1], unsigned(64), program)
    place = [reader(i, name.strip(), np.dtype("i4"), program) for name in names]
    where = address(i, shared, 32, program)

    def boxes(b: Blocks, mask: Mask) -> Iterator[tuple[int, Box]]:
        for thread, source, here, *at in _each(b, mask, map_at, where, *place):
            if source in b.unacquired:
                raise Fault(
                    "a tensor map that was written and that no fence.proxy.tensormap acquired",
                    np.array([thread]),
                )
            pieces = source + CHUNK * np.arange(BYTES // CHUNK)
            map_bytes = b.load(pieces, CHUNK, np.full(pieces.size, thread))
            try:
                one = box(map_bytes, at, here)
            except Fault as fault:
                raise Fault(fault.message, np.array([thread])) from None
            yield thread, one

    return boxes


@rule(
    # The shared memory of a cluster is that of the block where it has no other.
    r"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.shared(?:::cta|::cluster)?\.global(?:\.tile)?"
    r"\.mbarrier::complete_tx::bytes"
)
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    if len(i.operands) != 3:
        raise unsupported(i)
    boxes = _boxes(i, i.operands[1], i.operands[0], int(m["rank"]), program)
    arrives = address(i, i.operands[2], 32, program)

    def load(b: Blocks, mask: Mask) -> None:
        for thread, one in boxes(b, mask):
            at, threads = CHUNK * one.chunks, np.full(one.chunks.size, thread)
            b.shared.start_copy(at, CHUNK, threads)
            values = np.zeros((one.address.size, one.width), np.uint8)
            some = one.address[one.inside]
            values[one.inside] = b.load(some, one.width, np.full(some.size, thread))
            mbarrier = _mbarrier(b, thread, int(arrives(b)[thread]))
            mbarrier.copies.append(Copy(at, values.reshape(-1, CHUNK), threads))

    return load


@rule(rf"cp\.async\.bulk\.tensor\.(?P<rank>[1-5])d\.global{SHARED}(?:\.tile)?\.bulk_group")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    if len(i.operands) != 2:
        raise unsupported(i)
    boxes = _boxes(i, i.operands[0], i.operands[1], int(m["rank"]), program)

    def store(b: Blocks, mask: Mask) -> None:
        for thread, one in boxes(b, mask):
            chunks = one.chunks[None]
            data = b.shared.begin_read("cp.async.bulk", chunks, np.array([thread // b.per]))
            values = data.reshape(-1, one.width)[one.inside]
            some = one.address[one.inside]
            b.store(some, values, np.full(some.size, thread))
            b.stores.setdefault(thread, [[]])[-1].append(chunks)

    return store


@rule(r"cp\.async\.bulk\.commit_group")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def commit(b: Blocks, mask: Mask) -> None:
        for thread, groups in b.stores.items():
            if mask is None or mask[thread]:
                groups.append([])

    return commit


@rule(r"cp\.async\.bulk\.wait_group(?:\.read)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    left = int(i.operands[0], 0)

    def wait(b: Blocks, mask: Mask) -> None:
        for thread, groups in b.stores.items():
            # The last group is not committed yet.
            while (mask is None or mask[thread]) and len(groups) - 1 > left:
                for chunks in groups.pop(0):
                    b.shared.end_read("cp.async.bulk", chunks, np.array([thread // b.per]))

    return wait
