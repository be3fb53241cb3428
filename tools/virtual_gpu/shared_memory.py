"""Shared memory of blocks, which says when two threads touch a byte without an order.

Two threads are ordered by a barrier of the block (`bar.sync`: a new interval begins) or, in one
warp, by `bar.warp.sync`. Within an interval, two threads and one byte, one of them writing, is a
race; a write of what is there already harms nobody. A `cp.async` owns its bytes from its start
until its thread waited for it, and counts as that thread's write then.

wgmma and bulk copies read through the asynchronous proxy: what threads wrote must be behind a fence
of proxies and, unless the barrier lies in front of that, a barrier; and may not be written before
the product or the copy was waited for. That an mbarrier's phase is over orders what was done before
the arrivals for those who wait for it.

Who wrote and who read last is noted by granule: the narrowest access of the program, of which all
others are multiples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .block_order import in_turns
from .faults import Fault

_LANES = 32
_SEVERAL_WARPS = -1
_ATOMICS = -1  # of what was written: by atomics, whoever they are
# A granule that the asynchronous proxy cannot see yet: written, or fenced too but by its writer.
_WRITTEN, _FENCED = 1, 2
CHUNK = 16
"""Bytes that swizzling leaves together, by which the asynchronous proxy reads."""
# What reads through it, as counted in `products`.
_READERS = {"wgmma": 1, "cp.async.bulk": 256}


def _warp(who: np.ndarray) -> np.ndarray:
    """The warp of a note: a thread (0, ...), a whole warp (-2, ...), or several warps (-1)."""
    return np.where(who >= 0, who // _LANES, -2 - who)


def _who(note: np.ndarray) -> np.ndarray:
    return note.astype(np.int32)  # the low half


@dataclass
class _Views:
    """The same memory as rows of one width."""

    bytes: np.ndarray
    writes: np.ndarray
    reads: np.ndarray
    copies: np.ndarray
    products: np.ndarray
    unfenced: np.ndarray


class SharedMemory:
    """Of `blocks` blocks, one after another, each with `size` bytes."""

    def __init__(
        self,
        size: int,
        threads: int,
        blocks: int,
        garbage: np.random.Generator,
        races: bool,
        granule: int = 1,
        asynchronous: bool = True,
    ) -> None:
        self.size, self.per, self.blocks = size, threads, blocks
        self.stride = -(-size // CHUNK) * CHUNK
        self.granule, self.asynchronous, self.races = granule, asynchronous, races
        total = blocks * self.stride
        self.bytes = garbage.integers(0, 256, total, np.uint8)
        # A clock that every barrier moves on; what happened before `floor` is ordered for all.
        self.clock, self.floor = 1, 1
        self.warp_floor = np.zeros(blocks * threads // _LANES, np.int64)
        # By granule: the time, and in the low half who it was.
        self.writes, self.reads = np.zeros((2, total // granule), np.int64)
        self.copies = np.zeros(total // granule, np.int16)  # cp.async under way
        self.products = np.zeros(total // granule, np.int16)  # wgmma and bulk copies that read
        self.unfenced = np.zeros(total // granule, np.int8)
        self.flying = self.running = 0
        # Reads of this interval that no write has been compared with yet.
        self.fresh: list[tuple[np.ndarray, int, np.ndarray, bool]] = []
        self._views: dict[int, _Views] = {}

    def part(self, which: np.ndarray) -> SharedMemory:
        """Of some of the blocks."""
        self._note_reads()
        made = object.__new__(SharedMemory)
        made.__dict__ |= self.__dict__
        made.blocks, made._views, made.fresh = which.size, {}, []
        for name in ("bytes", "copies", "products", "unfenced", "warp_floor"):
            setattr(made, name, getattr(self, name).reshape(self.blocks, -1)[which].reshape(-1))
        moved = np.full(self.blocks, -1)
        moved[which] = np.arange(which.size)
        for name in ("writes", "reads"):
            notes = getattr(self, name).reshape(self.blocks, -1)[which]
            # Threads and warps of a block have other numbers now.
            by, who = (moved[which] - which)[:, None] * self.per, _who(notes)
            who = np.where(who >= 0, who + by, np.where(who < -1, who - by // _LANES, who))
            setattr(made, name, (notes >> 32 << 32 | who & 0xFFFFFFFF).reshape(-1))
        return made

    def _at_width(self, width: int) -> _Views:
        if width not in self._views:
            cells = width // self.granule
            self._views[width] = _Views(
                self.bytes.view(f"V{width}"),
                *(
                    array.reshape(-1, cells)
                    for array in (
                        self.writes,
                        self.reads,
                        self.copies,
                        self.products,
                        self.unfenced,
                    )
                ),
            )
        return self._views[width]

    def arrival(self) -> int:
        """When a thread arrived at an mbarrier."""
        self._note_reads()
        self.clock += 1
        return self.clock - 1

    def acquire(self, block: int, until: np.ndarray) -> None:
        """What each thread of a block did up to its time in `until` is ordered for all of them."""
        of_warp = until.reshape(-1, _LANES).min(1)
        for notes in (self.writes, self.reads):
            mine = notes.reshape(self.blocks, -1)[block]
            at = np.flatnonzero(mine >= self.floor << 32)
            who = _who(mine[at])
            time = np.where(who < 0, until.min(), until[who % self.per])
            time = np.where(who < -1, of_warp[_warp(who) % of_warp.size], time)
            mine[at[mine[at] >> 32 <= time]] = 0

    def barrier(self) -> None:
        self.clock += 1
        self.floor = self.clock
        self.fresh.clear()
        if self.asynchronous:
            self.unfenced[self.unfenced == _FENCED] = 0

    def proxy_fence(self) -> None:
        """Every thread's `fence.proxy.async`: of what was written before a barrier, of everybody;
        of what each wrote since, his own, which the next barrier makes everybody's."""
        unfenced = self.unfenced != 0
        before = self.writes[unfenced] < self.floor << 32
        self.unfenced[unfenced] = np.where(before, 0, _FENCED)

    def warp_barrier(self, threads: np.ndarray) -> None:
        self._note_reads()
        self.clock += 1
        self.warp_floor[np.unique(threads // _LANES)] = self.clock

    def _at(
        self, what: str, address: np.ndarray, width: int, threads: np.ndarray
    ) -> tuple[np.ndarray, _Views]:
        """Which rows of the views of that width an access is to."""
        address = address.astype(np.int64)
        if (wrong := address % width != 0).any():
            raise Fault(f"{what} of {width} bytes that is not aligned to them", threads[wrong])
        if (wrong := address + width > self.size).any():
            raise Fault(
                f"{what} at byte {address[wrong][0]} of the {self.size} of shared memory",
                threads[wrong],
            )
        if self.blocks > 1:
            address += threads // self.per * self.stride
        rows, views = address // width, self._at_width(width)
        if self.races and self.flying and (wrong := views.copies.take(rows, 0) != 0).any():
            raise Fault(f"{what} of what a cp.async still copies to", threads[wrong.any(1)])
        return rows, views

    def _unordered(self, notes: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """Accesses of this interval by others that no barrier of the warp lies after."""
        who, warp = _who(notes), threads // _LANES
        ordered = (_warp(who) == warp) & (notes < self.warp_floor[warp] << 32)
        return (notes >= self.floor << 32) & (who != threads) & ~ordered

    def load(
        self, address: np.ndarray, width: int, threads: np.ndarray, whole_warp: bool = False
    ) -> np.ndarray:
        """Bytes [k, width]. `whole_warp`: all lanes of a thread's warp get them (ldmatrix)."""
        rows, views = self._at("shared load", address, width, threads)
        if self.races:
            notes = views.writes.take(rows, 0)
            if notes.size and notes.max() >= self.floor << 32:
                # A warp that reads is not the thread that wrote.
                me = -2 - threads[:, None] // _LANES if whole_warp else threads[:, None]
                warp = threads[:, None] // _LANES
                ordered = (_warp(_who(notes)) == warp) & (notes < self.warp_floor[warp] << 32)
                wrong = (notes >= self.floor << 32) & (_who(notes) != me) & ~ordered
                if wrong.any():
                    raise Fault(
                        f"race in shared memory: read of what {self._name(_who(notes)[wrong][0])} "
                        "wrote since the last barrier",
                        threads[wrong.any(1)],
                    )
            self.fresh.append((rows, width, threads, whole_warp))
        return views.bytes.take(rows).view(np.uint8).reshape(-1, width)

    def _note_reads(self) -> None:
        for rows, width, threads, whole_warp in self.fresh:
            views = self._at_width(width)
            warp = (threads // _LANES)[:, None]
            me = -2 - warp if whole_warp else threads[:, None]
            old = views.reads.take(rows, 0)
            who = _who(old)
            same_warp = _warp(who) == warp
            forgotten = (old < self.floor << 32) | (same_warp & (old < self.warp_floor[warp] << 32))
            note = np.where(
                forgotten | (who == me), me, np.where(same_warp, -2 - warp, _SEVERAL_WARPS)
            )
            note = self.clock << 32 | note.astype(np.int64) & 0xFFFFFFFF
            views.reads[rows] = note
            # Several threads read one granule in this very load.
            kept = views.reads.take(rows, 0)
            if (other := kept != note).any():
                place, warp = (
                    np.broadcast_to(rows[:, None], other.shape),
                    warp.repeat(other.shape[1], 1),
                )
                column = np.broadcast_to(np.arange(other.shape[1]), other.shape)
                apart = other & (_warp(_who(kept)) != warp)
                time = self.clock << 32
                views.reads[place[other], column[other]] = (
                    time | (-2 - warp[other]).astype(np.int64) & 0xFFFFFFFF
                )
                views.reads[place[apart], column[apart]] = time | _SEVERAL_WARPS & 0xFFFFFFFF
        self.fresh.clear()

    def _claim(
        self,
        rows: np.ndarray,
        views: _Views,
        threads: np.ndarray,
        values: np.ndarray | None,
        atomic: bool = False,
    ) -> None:
        """Checks and notes a write. Of `values` (None: unknown) those that are there already harm
        nobody, and atomics not each other."""
        if not self.races:
            return
        if self.running and (wrong := (readers := views.products.take(rows, 0)) != 0).any():
            name = "wgmma" if readers.max() < _READERS["cp.async.bulk"] else "cp.async.bulk"
            raise Fault(
                f"race in shared memory: write of what a {name} still reads", threads[wrong.any(1)]
            )
        if self.asynchronous:
            views.unfenced[rows] = _WRITTEN
        self._note_reads()
        for notes, said in (
            (views.writes.take(rows, 0), "wrote"),
            (views.reads.take(rows, 0), "read"),
        ):
            if not notes.size or notes.max() < self.floor << 32:
                continue
            wrong = self._unordered(notes, threads[:, None])
            if said == "wrote" and atomic:
                wrong &= _who(notes) != _ATOMICS
            if said == "wrote" and values is not None and wrong.any():
                changes = views.bytes.take(rows).view(np.uint8).reshape(values.shape) != values
                wrong &= changes.reshape(*wrong.shape, self.granule).any(2)
            if wrong.any():
                name = self._name(_who(notes)[wrong][0])
                raise Fault(
                    f"race in shared memory: write of what {name} {said} since the last barrier",
                    threads[wrong.any(1)],
                )
        by = np.full(threads.size, _ATOMICS & 0xFFFFFFFF) if atomic else threads
        views.writes[rows] = (self.clock << 32 | by)[:, None]

    def _name(self, who: np.int32) -> str:
        return f"thread {who % self.per}" if who >= 0 else "another thread"

    def atomic(
        self,
        address: np.ndarray,
        function: Callable[..., np.ndarray],
        operands: np.ndarray,
        threads: np.ndarray,
        backwards: bool,
    ) -> np.ndarray:
        """As that of `GlobalMemory`; the last thread comes first where it goes `backwards`."""
        rows, views = self._at("shared atomic access", address, operands.itemsize, threads)
        self._claim(rows, views, threads, None, atomic=True)
        sequence = np.arange(rows.size)[:: -1 if backwards else 1]
        return in_turns(self.bytes.view(operands.dtype), rows, function, operands, sequence)

    def store(self, address: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Stores bytes [k, width] at k addresses."""
        width = values.shape[1]
        rows, views = self._at("shared store", address, width, threads)
        self._claim(rows, views, threads, values)
        views.bytes[rows] = np.ascontiguousarray(values).view(views.bytes.dtype)[:, 0]
        if self.races:
            wrong = views.bytes.take(rows).view(np.uint8).reshape(-1, width) != values
            if wrong.any():
                raise Fault("race in shared memory: two values for one byte", threads[wrong.any(1)])

    def start_copy(self, address: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Bytes that a cp.async will write, taken until `land`."""
        rows, views = self._at("cp.async", address, width, threads)
        self._claim(rows, views, threads, None)
        views.copies[rows] += 1
        self.flying += 1
        if self.races and np.unique(rows).size != rows.size:
            raise Fault("race in shared memory: two copies to one byte", threads)

    def land(
        self,
        address: np.ndarray,
        values: np.ndarray,
        threads: np.ndarray,
        seen_by_all: bool = False,
    ) -> None:
        """What a copy brings. `seen_by_all`: to every thread and proxy, as a bulk copy that all
        have waited for."""
        width = values.shape[1]
        self.flying -= 1
        views = self._at_width(width)
        rows = (address + threads // self.per * self.stride) // width
        views.copies[rows] = 0
        views.bytes[rows] = np.ascontiguousarray(values).view(views.bytes.dtype)[:, 0]
        views.unfenced[rows] = 0 if seen_by_all else _WRITTEN
        views.writes[rows] = 0 if seen_by_all else (self.clock << 32 | threads)[:, None]

    def _chunks(self, chunks: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        return (chunks + blocks[:, None] * (self.stride // CHUNK)).reshape(-1)

    def begin_read(self, what: str, chunks: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Bytes [n, k, 16] of chunks [n, k] of these blocks, [n], read by what `_READERS` names,
        which goes on until `end_read`."""
        if (wrong := (chunks < 0) | ((chunks + 1) * CHUNK > self.size)).any():
            raise Fault(
                f"{what} at byte {CHUNK * chunks[wrong][0]} of the {self.size} of shared memory",
                self._all_of(blocks[wrong.any(1)][0]),
            )
        rows, views = self._chunks(chunks, blocks), self._at_width(CHUNK)
        if self.races:
            if self.flying and (wrong := views.copies.take(rows, 0) != 0).any():
                block = blocks[np.flatnonzero(wrong.any(1))[0] // chunks.shape[1]]
                raise Fault(f"{what} of what a cp.async still copies to", self._all_of(block))
            if (wrong := views.unfenced.take(rows, 0) != 0).any():
                block = blocks[np.flatnonzero(wrong.any(1))[0] // chunks.shape[1]]
                writer = int(_who(views.writes.take(rows, 0)[wrong])[0]) % self.per
                raise Fault(
                    f"race in shared memory: {what} of what thread {writer} wrote, with no "
                    "fence.proxy.async and barrier between",
                    self._all_of(block),
                )
            views.products[rows] += _READERS[what]
            self.running += 1
        return views.bytes.take(rows).view(np.uint8).reshape(*chunks.shape, CHUNK)

    def _all_of(self, block: int) -> np.ndarray:
        return np.arange(block * self.per, (block + 1) * self.per)

    def end_read(self, what: str, chunks: np.ndarray, blocks: np.ndarray) -> None:
        if self.races:
            rows, views = self._chunks(chunks, blocks), self._at_width(CHUNK)
            views.products[rows] -= _READERS[what]
            self.running -= 1
            views.reads[rows] = self.clock << 32 | _SEVERAL_WARPS & 0xFFFFFFFF
