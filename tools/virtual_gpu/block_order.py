"""Which blocks are ordered, in launches with atomics.

A release publishes what its block did up to the last barrier, what its own thread did since, and
what the block knew of others. Who acquires from the same place, behind that release or behind other
atomics on it, knows that from the next barrier on. (PTX ISA, "Memory Consistency Model", with less:
what is not ordered here may be ordered there, never the other way round.)

A fence makes acquires of its thread's earlier atomics and releases of its later ones, which publish
what lies before the fence.

An access is noted as a stamp: block, thread, and epoch of the block, which barriers and releases
move on. The order is that of one run. That a release came first by luck is seen where the blocks
run the other way round: there, nothing was released.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .faults import UnsupportedError

# A stamp: the block's number from 1, the thread's from 1, and the epoch.
_BLOCK, _THREAD = 42, 31
_EPOCH = (1 << _THREAD) - 1
_ANY_THREAD = (1 << _BLOCK - _THREAD) - 1
MANY = -1
"""Of several blocks that are not ordered."""


def in_turns(
    data: np.ndarray,
    rows: np.ndarray,
    function: Callable[..., np.ndarray],
    given: np.ndarray,
    sequence: np.ndarray,
) -> np.ndarray:
    """Puts function(what is there, *given [operands, k]) in rows, [k], of the data, one after
    another in a sequence of numbers below k. Returns what each found, [k]."""
    found = np.empty(rows.size, data.dtype)
    # Of those that go to one row, one in each turn.
    by_row = sequence[np.argsort(rows[sequence], kind="stable")]
    numbers = np.arange(rows.size)
    first = np.r_[True, np.diff(rows[by_row]) != 0][: rows.size]
    turn = numbers - np.maximum.accumulate(np.where(first, numbers, 0))
    for now in range(int(turn.max(initial=-1)) + 1):
        some = by_row[turn == now]
        found[some] = data[rows[some]]
        data[rows[some]] = function(found[some], *given[:, some])
    return found


class Ordering(NamedTuple):
    """What an atomic access orders, and whether only for its own block."""

    acquires: bool
    releases: bool
    in_block: bool


class _Seen(NamedTuple):
    """What a block has acquired, newest first."""

    releases: tuple[_Release, ...]
    before: _Seen | None


class _Release(NamedTuple):
    """What was published at a place: of all threads up to an epoch, of one up to a later one."""

    block: int
    below: int
    thread: int
    epoch: int
    seen: _Seen | None
    before: _Release | None


@dataclass
class _Known:
    """What a block knows: of others, the epoch up to which, and by thread one that is later."""

    below: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    threads: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(lambda: -1))
    visited: set[int] = field(default_factory=set)


@dataclass
class _Place:
    """An address that atomics go to: its last release, and the last access of each block."""

    width: int
    release: _Release | None = None
    touched: dict[int, int] = field(default_factory=dict)
    in_block: bool = False
    count: int = 0


class BlockOrder:
    """Of a launch of so many blocks."""

    def __init__(self, blocks: int, per: int) -> None:
        self.blocks, self.per = blocks, per
        self._epoch = np.zeros(blocks, np.int64)
        self._barrier = np.zeros(blocks, np.int64)  # the epoch that the last one began
        self._acquired: dict[int, list[_Release]] = defaultdict(list)  # since the last barrier
        self._seen: dict[int, _Seen] = {}
        # By block and thread: what its last fence lets it publish, and what it found since.
        self._fenced: dict[tuple[int, int], _Release] = {}
        self._found: dict[tuple[int, int], list[_Release]] = defaultdict(list)
        self._known: dict[int, _Known] = defaultdict(_Known)
        self.places = [_Place(0)]  # of number 0: none

    def barrier(self, blocks: np.ndarray) -> None:
        self._epoch[blocks] += 1
        self._barrier[blocks] = self._epoch[blocks]
        for block in self._acquired.keys() & set(blocks.tolist()):
            releases = tuple(self._acquired.pop(block))
            self._seen[block] = _Seen(releases, self._seen.get(block))
            self._learn(self._known[block], self._seen[block])

    def _learn(self, known: _Known, seen: _Seen) -> None:
        todo: list[_Seen | _Release | None] = [seen]
        while todo:
            one = todo.pop()
            if one is None or id(one) in known.visited:
                continue
            known.visited.add(id(one))  # nothing of it is thrown away: it hangs on `_seen`
            todo.append(one.before)
            if isinstance(one, _Seen):
                todo += one.releases
                continue
            known.below[one.block] = max(known.below[one.block], one.below)
            by = one.block, one.thread
            known.threads[by] = max(known.threads[by], one.epoch)
            todo.append(one.seen)

    def fence(self, blocks: np.ndarray, threads: np.ndarray) -> None:
        """By these threads, [k], of blocks, [k]."""
        for block, thread in zip(blocks.tolist(), (threads % self.per).tolist(), strict=True):
            if found := self._found.pop((block, thread), None):
                self._acquired[block] += found
            self._fenced[block, thread] = self._release(block, thread, None)
        self._epoch[np.unique(blocks)] += 1

    def _release(self, block: int, thread: int, before: _Release | None) -> _Release:
        """What a thread can publish now."""
        below, epoch = int(self._barrier[block]), int(self._epoch[block])
        return _Release(block, below, thread, epoch, self._seen.get(block), before)

    def stamps(self, blocks: np.ndarray, threads: np.ndarray | None) -> np.ndarray:
        """Of accesses now, by these threads of theirs; None: by any."""
        by = _ANY_THREAD if threads is None else threads % self.per + 1
        return (blocks + 1).astype(np.int64) << _BLOCK | by << _THREAD | self._epoch[blocks]

    def _ordered(self, block: int, stamp: int) -> bool:
        """Whether an access lies before what a block does now."""
        other, thread, epoch = (stamp >> _BLOCK) - 1, stamp >> _THREAD & _ANY_THREAD, stamp & _EPOCH
        if other == block:
            return True
        known = self._known.get(block)
        if stamp == MANY or known is None:
            return False
        return epoch < known.below.get(other, 0) or epoch <= known.threads.get(
            (other, thread - 1), -1
        )

    def unordered(self, stamps: np.ndarray, which: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Of some accesses, [k, granules], those not before what `blocks`, [k], do now."""
        which = which.copy()
        rows, cells = np.nonzero(which)
        pairs = np.stack([blocks[rows], stamps[rows, cells]])
        different, which_pair = np.unique(pairs, axis=1, return_inverse=True)
        late = [not self._ordered(block, stamp) for block, stamp in different.T.tolist()]
        which[rows, cells] = np.array(late, bool)[which_pair.reshape(-1)]
        return which

    def note_read(self, reads: np.ndarray, rows: np.ndarray, blocks: np.ndarray) -> None:
        """The last reader stays, where those before it are ordered before it."""
        now = np.broadcast_to(self.stamps(blocks, None)[:, None], (rows.size, reads.shape[1]))
        before = reads.take(rows, 0)
        others = (before != 0) & (before >> _BLOCK != now >> _BLOCK)
        note = np.where(self.unordered(before, others, blocks), MANY, now)
        reads[rows] = note
        if (other := reads.take(rows, 0) != note).any():  # several blocks in this very access
            row, cell = np.nonzero(other)
            reads[rows[row], cell] = MANY

    def after_atomics(self, places: np.ndarray, blocks: np.ndarray, stores: bool) -> np.ndarray:
        """Of plain accesses to places, [k, granules] (0: none), those that atomics of other blocks
        are not ordered before."""
        wrong = np.zeros(places.shape, bool)
        rows, cells = np.nonzero(places)
        numbers = places[rows, cells]
        for block, number in set(zip(blocks[rows].tolist(), numbers.tolist(), strict=True)):
            place = self.places[number]
            if not all(self._ordered(block, stamp) for stamp in place.touched.values()):
                here = (numbers == number) & (blocks[rows] == block)
                wrong[rows[here], cells[here]] = True
            elif stores:  # whoever acquires this value acquires no release
                place.release, place.touched = None, {}
        return wrong

    def atomics(
        self,
        places: np.ndarray,
        rows: np.ndarray,
        blocks: np.ndarray,
        threads: np.ndarray,
        sequence: Iterable[int],
        how: Ordering,
        width: int,
    ) -> np.ndarray:
        """Notes atomic accesses in their sequence. Returns, [k], those that are in no order with
        others because one of them is atomic for its own block alone."""
        wrong = np.zeros(rows.size, bool)
        stamps = self.stamps(blocks, threads)
        for at in sequence:
            number = int(places[rows[at], 0])
            if not number:
                number = len(self.places)
                self.places.append(_Place(width))
            if (places[rows[at]] != number).any():
                if places[rows[at]].any():
                    raise UnsupportedError("atomics of several widths on the same bytes")
                places[rows[at]] = number
            place = self.places[number]
            if place.width != width:
                raise UnsupportedError("atomics of several widths on the same bytes")
            block, thread = int(blocks[at]), int(threads[at]) % self.per
            if how.in_block or place.in_block:
                wrong[at] = not all(self._ordered(block, stamp) for stamp in place.touched.values())
                place.in_block = True
            place.touched[block] = int(stamps[at])
            place.count += 1
            if how.in_block:
                continue
            by = block, thread
            if place.release is not None:
                (self._acquired[block] if how.acquires else self._found[by]).append(place.release)
            if how.releases:
                place.release = self._release(block, thread, place.release)
            elif by in self._fenced:
                place.release = self._fenced[by]._replace(before=place.release)
        if how.releases:
            self._epoch[np.unique(blocks)] += 1
        return wrong
