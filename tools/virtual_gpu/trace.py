"""What the threads of each block do to memory, in order, and whether a statement that orders them
is needed for it.

The checks of `shared_memory` and `global_memory` judge accesses while they happen. Here they are
written down and judged afterwards, in another way: a barrier is needed where what lies before it
and what lies after it share a byte between two threads, one of them writing; a wait or a commit,
where a copy without it arrives after a barrier or an access to its bytes; a fence of proxies, where
a product reads what no other such fence lies after. What is not needed by a trace may be left out,
as far as the trace goes; of what is needed a check should say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .block import LANES, Blocks, Mask, Step, address, predicate, reader, unsigned
from .code import ATOMIC
from .faults import UnsupportedError
from .ptx import Instruction, Program, parse, statement
from .record import Launch
from .rules import rule
from .warpgroups import WARPGROUP, operand_chunks

_GRANULE = 2
_GLOBAL = 1 << 48  # set in addresses of global memory
_EVERYBODY = np.array([-1])

_ACCESS = re.compile(r"(ld|st)\.(shared|global)(?:::cta)?\.(?:.*\.)?(?:v(\d)\.)?[busf](\d+)")
_MATRIX = re.compile(r"(ld|st)matrix\..*\.x(\d)\..*")
_TOUCHING = ("ld.", "st.", "ldmatrix.", "stmatrix.", "wgmma.mma")
_PRODUCT = re.compile(r"wgmma\.mma_async\..*n(\d+)k(\d+)\..*")
# Statements of which a trace says whether they are needed, and what they are to `Trace.needs`.
ORDERS = {
    "bar.sync": "bar",
    "fence.proxy.async.shared::cta": "fence",
    "cp.async.commit_group": "cp.commit",
    "cp.async.wait_group": "cp.wait",
    "wgmma.commit_group.sync.aligned": "wgmma.commit",
    "wgmma.wait_group.sync.aligned": "wgmma.wait",
}


@dataclass
class Event:
    """Of one block: what happened, by which statement, and to which granules by which threads."""

    what: str
    line: int
    left: int = 0
    granules: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    threads: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Trace:
    """What happened, by block number."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[Event]] = defaultdict(list)
        self._statements: dict[int, Instruction] = {}
        self._number = next(_NUMBERS)

    def launch(self, launch: Launch) -> Launch:
        """The launch with PTX that writes itself down, its lines where they were."""
        lines = launch.ptx.splitlines()
        for i in parse(launch.ptx).instructions:
            accesses = any(p.fullmatch(i.opcode) for p in (_ACCESS, _MATRIX, _PRODUCT))
            touches = i.opcode.startswith(_TOUCHING) and not i.opcode.startswith("ld.param.")
            if i.opcode.startswith(("cp.async.bulk.tensor", *ATOMIC)) or touches > accesses:
                raise UnsupportedError(f"PTX line {i.line}: a trace has no rule for {i.text!r}")
            if accesses or i.opcode in ORDERS or i.opcode.startswith("cp.async."):
                self._statements[i.line] = i
                lines[i.line - 1] = f"trace.n{self._number}.l{i.line}; {i.text};"
        return dataclasses.replace(launch, ptx="\n".join(lines))

    def _note(
        self,
        what: str,
        i: Instruction,
        b: Blocks,
        at: np.ndarray,
        width: int,
        threads: np.ndarray,
        whole_warps: bool = False,
    ) -> None:
        """An access by these threads, or by all lanes of their warps."""
        steps = np.arange(max(width // _GRANULE, 1))
        granules = at.astype(np.int64)[:, None] // _GRANULE + steps
        inside = threads % b.per
        who = -2 - inside // LANES if whole_warps else inside
        for block, number in enumerate(b.numbers):
            mine = threads // b.per == block
            if mine.any():
                granule = granules[mine].reshape(-1)
                event = Event(what, i.line, 0, granule, who[mine].repeat(steps.size))
                self.blocks[number].append(event)

    def _order(self, event: Event, b: Blocks) -> None:
        for number in b.numbers:
            self.blocks[number].append(event)

    def _step(self, line: int, program: Program) -> Step:
        original = self._statements[line]
        i = statement(original.text, line, original.source)
        guard = predicate(i, i.guard, program) if i.guard is not None else None

        def going(b: Blocks, mask: Mask) -> np.ndarray:
            on = np.ones(b.threads.size, bool) if mask is None else mask
            return on if guard is None else on & (guard(b) != i.negated)

        if (order := ORDERS.get(i.opcode)) is not None:
            left = int(i.operands[0], 0) if order.endswith("wait") else 0
            return lambda b, mask: self._order(Event(order, line, left), b)
        if found := _PRODUCT.fullmatch(i.opcode):
            columns, depth = int(found[1]), int(found[2])
            # Of an operand in shared memory: its rows, and whether neighbours lie along K.
            turned = [flag != "0" for flag in i.operands[6:]]
            operands = [
                (reader(i, operand, unsigned(64), program), rows, not (turned and turned[flag]))
                for operand, rows, flag in zip(i.operands[1:3], (64, columns), (0, -1), strict=True)
                if not operand.startswith("{")
            ]

            def product(b: Blocks, mask: Mask) -> None:
                for read, rows, by_depth in operands:
                    by_block = read(b)[::WARPGROUP].reshape(b.numbers.size, -1)
                    for number, descriptors in zip(b.numbers, by_block, strict=True):
                        chunks = [
                            operand_chunks(int(one), rows, depth, 32 // depth, by_depth)
                            for one in np.unique(descriptors)
                        ]
                        granules = np.unique(np.concatenate(chunks, None))[:, None]
                        granules = granules * (16 // _GRANULE) + np.arange(16 // _GRANULE)
                        event = Event("product", line, 0, granules.reshape(-1), _EVERYBODY)
                        self.blocks[number].append(event)

            return product
        if found := _MATRIX.fullmatch(i.opcode):
            count, loads = int(found[2]), found[1] == "ld"
            where = address(i, i.operands[loads], 32, program)

            def matrix(b: Blocks, mask: Mask) -> None:
                on = going(b, mask) & (b.threads % LANES < 8 * count)
                threads = b.threads[on]
                what = "read" if loads else "write"
                # All lanes of the warp are given the rows.
                self._note(what, i, b, where(b)[on], 16, threads, whole_warps=True)

            return matrix
        if i.opcode.startswith("cp.async."):
            to = address(i, i.operands[0], 32, program)
            source = address(i, i.operands[1], 64, program)
            width = int(i.operands[2], 0)

            def copy(b: Blocks, mask: Mask) -> None:
                on = going(b, mask)
                self._note("copy", i, b, to(b)[on], width, b.threads[on])
                at = source(b)[on].astype(np.int64) + _GLOBAL
                self._note("read", i, b, at, width, b.threads[on])

            return copy
        found = _ACCESS.fullmatch(i.opcode)
        assert found is not None
        width = int(found[4]) // 8 * int(found[3] or 1)
        loads, shared = found[1] == "ld", found[2] == "shared"
        where = address(i, i.operands[loads], 32 if shared else 64, program)

        def access(b: Blocks, mask: Mask) -> None:
            on = going(b, mask)
            at = where(b)[on].astype(np.int64) + (0 if shared else _GLOBAL)
            self._note("read" if loads else "write", i, b, at, width, b.threads[on])

        return access

    def needs(self, what: str, line: int, left: int | None = None) -> bool:
        """Whether some block needs the statement of this line.

        Args:
            what: one of `ORDERS`.
            left: of a wait, groups that it would leave instead; None: without it.
        """
        judge = {"bar": _needs_barrier, "fence": _needs_fence}.get(what)
        if judge is not None:
            return any(judge(events, line) for events in self.blocks.values())
        return any(_needs_arrival(e, line, what, left) for e in self.blocks.values())


def _arrivals(events: list[Event], what: str, line: int | None, left: int | None) -> dict[int, int]:
    """When each copy (or product) arrives, by when it begins: places in the list."""
    kind = "copy" if what.startswith("cp.") else "product"
    of = what.partition(".")[0]
    arrives: dict[int, int] = {}
    now: list[int] = []
    groups: list[list[int]] = []
    for at, event in enumerate(events):
        mine = event.line == line
        if event.what == kind:
            now.append(at)
        elif event.what == f"{of}.commit" and not (mine and what.endswith("commit")):
            groups.append(now)
            now = []
        elif event.what == f"{of}.wait":
            most = event.left
            if mine and what.endswith("wait"):
                if left is None:
                    continue
                most = left
            while len(groups) > most:
                for begun in groups.pop(0):
                    arrives[begun] = at
    return arrives


def _needs_arrival(events: list[Event], line: int, what: str, left: int | None) -> bool:
    before, after = (_arrivals(events, what, at, left) for at in (None, line))
    for begun, right in before.items():
        late = after.get(begun)
        if late is None:
            return True
        if late == right:
            continue
        first, last = sorted((right, late))
        mine = events[begun].granules
        for event in events[first:last]:
            if event.what == "bar" or (event.granules.size and np.isin(event.granules, mine).any()):
                return True
        if what.startswith("wgmma"):
            return True  # what is done to accumulators in between is not written down
    return False


def _needs_barrier(events: list[Event], line: int) -> bool:
    """Two accesses with this barrier between them, and no other one."""
    arrivals: dict[int, list[int]] = defaultdict(list)
    for what in ("cp.wait", "wgmma.wait"):
        for begun, at in _arrivals(events, what, None, None).items():
            arrivals[at].append(begun)
    parts: list[list[tuple[int, Event, bool]]] = [[]]
    part, several = 0, False
    for at, event in enumerate(events):
        if event.what == "bar":
            part += 1
            if event.line == line:
                several = True
                continue
            if several and _share(parts[-1]):
                return True
            parts, several = [[]], False
        for one in (event, *(events[begun] for begun in arrivals[at])):
            if one.granules.size:
                parts[-1].append((part, one, one.what in ("write", "copy")))
    return several and _share(parts[-1])


def _share(accesses: list[tuple[int, Event, bool]]) -> bool:
    """Whether a granule is accessed in two parts by two threads, and written by one of them."""
    if not accesses:
        return False
    granule = np.concatenate([e.granules for _, e, _ in accesses])
    thread = np.concatenate([np.broadcast_to(e.threads, e.granules.shape) for _, e, _ in accesses])
    sizes = [e.granules.size for _, e, _ in accesses]
    part = np.repeat([p for p, _, _ in accesses], sizes)
    writes = np.repeat([w for _, _, w in accesses], sizes)
    order = np.lexsort((thread, part, granule))
    granule, thread, part, writes = (x[order] for x in (granule, thread, part, writes))
    starts = np.flatnonzero(np.r_[True, granule[1:] != granule[:-1]])
    several_parts = np.minimum.reduceat(part, starts) != np.maximum.reduceat(part, starts)
    several_threads = np.minimum.reduceat(thread, starts) != np.maximum.reduceat(thread, starts)
    some = several_parts & several_threads & np.maximum.reduceat(writes, starts)
    ends = np.r_[starts[1:], granule.size]
    for start, end in zip(starts[some], ends[some], strict=True):
        seen = {
            (int(p), int(t), bool(w))
            for p, t, w in zip(part[start:end], thread[start:end], writes[start:end], strict=True)
        }
        if any(
            p != q and t != u and (w or v)
            for (p, t, w), (q, u, v) in itertools.combinations(seen, 2)
        ):
            return True
    return False


def _needs_fence(events: list[Event], line: int) -> bool:
    """A product of what was written since the last other fence of proxies."""
    written: set[int] = set()
    arrives = _arrivals(events, "cp.wait", None, None)
    arrivals: dict[int, list[int]] = defaultdict(list)
    for begun, at in arrives.items():
        arrivals[at].append(begun)
    for at, event in enumerate(events):
        if event.what == "fence" and event.line != line:
            written.clear()
        for one in (event, *(events[begun] for begun in arrivals[at])):
            if one.what == "write" or (one.what == "copy" and one is not event):
                written.update(one.granules.tolist())
        if event.what == "product" and not written.isdisjoint(event.granules.tolist()):
            return True
    return False


_NUMBERS = itertools.count()
_TRACES: dict[int, Trace] = {}


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """A trace of launches that it makes and that are executed inside the block, each block once."""
    one = Trace()
    _TRACES[one._number] = one
    try:
        yield one
    finally:
        del _TRACES[one._number]


@rule(r"trace\.n(\d+)\.l(\d+)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return _TRACES[int(m[1])]._step(int(m[2]), program)
