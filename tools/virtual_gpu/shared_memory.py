"""Shared memory of one block, which says when two threads touch a byte without an order.

Two threads are ordered by a barrier of the block (`bar.sync`: a new interval begins) or, in one
warp, by `bar.warp.sync` (a new step of that warp). Within an interval, two threads and one byte,
one of them writing, is a race; a write of what is there already harms nobody. A `cp.async` owns its
bytes from its start until its thread waited for it, and counts as that thread's write then.

wgmma reads through the asynchronous proxy: what threads wrote must be behind a fence of proxies
and, unless the barrier lies in front of that, a barrier; and may not be written before the product
was waited for.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault

_LANES = 32
_SEVERAL_WARPS = -1
# A byte that the asynchronous proxy cannot see yet: written, or fenced as well but by its writer.
_WRITTEN, _FENCED = 1, 2


def _warp(thread: np.ndarray) -> np.ndarray:
    """The warp of a note: a thread (0, ...), a whole warp (-2, ...), or several warps (-1)."""
    return np.where(thread >= 0, thread // _LANES, -2 - thread)


class SharedMemory:
    def __init__(self, size: int, threads: int, garbage: np.random.Generator, races: bool) -> None:
        self.bytes = garbage.integers(0, 256, size, np.uint8)
        self.races = races
        self.interval = 1
        self.steps = np.zeros(threads // _LANES, np.int32)
        # By byte: who, in which interval and in which step of his warp.
        self.writer, self.reader = np.zeros((2, size), np.int32)
        self.written, self.read = np.zeros((2, size), np.int32)
        self.written_step, self.read_step = np.zeros((2, size), np.int32)
        self.copies = np.zeros(size, np.int16)  # cp.async under way
        self.products = np.zeros(size, np.int16)  # wgmma under way that read
        self.unfenced = np.zeros(size, np.int8)

    def barrier(self) -> None:
        self.interval += 1
        self.unfenced[self.unfenced == _FENCED] = 0

    def proxy_fence(self) -> None:
        """Every thread's `fence.proxy.async`: of what was written before a barrier, of everybody;
        of what each wrote since, his own, which the next barrier makes everybody's."""
        unfenced = self.unfenced != 0
        self.unfenced[unfenced] = np.where(self.written[unfenced] < self.interval, 0, _FENCED)

    def warp_barrier(self, threads: np.ndarray) -> None:
        self.steps[np.unique(threads // _LANES)] += 1

    def _at(self, what: str, address: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        address = address.astype(np.int64)
        if (wrong := address % width != 0).any():
            raise Fault(f"{what} of {width} bytes that is not aligned to them", threads[wrong])
        if (wrong := address + width > self.bytes.size).any():
            raise Fault(
                f"{what} at byte {address[wrong][0]} of the {self.bytes.size} of shared memory",
                threads[wrong],
            )
        at = address[:, None] + np.arange(width)
        if self.races and (wrong := self.copies[at] != 0).any():
            raise Fault(f"{what} of what a cp.async still copies to", threads[wrong.any(1)])
        return at

    def _unordered(
        self, who: np.ndarray, when: np.ndarray, step: np.ndarray, threads: np.ndarray
    ) -> np.ndarray:
        """Accesses of this interval by others that no barrier of the warp lies after."""
        warp = threads // _LANES
        ordered = (_warp(who) == warp) & (step < self.steps[warp])
        return (when == self.interval) & (who != threads) & ~ordered

    def load(
        self, address: np.ndarray, width: int, threads: np.ndarray, whole_warp: bool = False
    ) -> np.ndarray:
        """Bytes [k, width]. `whole_warp`: all lanes of a thread's warp get them (ldmatrix)."""
        at = self._at("shared load", address, width, threads)
        if self.races:
            thread = np.broadcast_to(threads[:, None], at.shape)
            warp = thread // _LANES
            me = -2 - warp if whole_warp else thread
            wrong = (
                self._unordered(self.writer[at], self.written[at], self.written_step[at], me)
                if not whole_warp
                else (
                    (self.written[at] == self.interval)
                    & ~(
                        (_warp(self.writer[at]) == warp)
                        & (self.written_step[at] < self.steps[warp])
                    )
                )
            )
            if wrong.any():
                raise Fault(
                    f"race in shared memory: read of what thread {self.writer[at][wrong][0]} wrote "
                    "since the last barrier",
                    threads[wrong.any(1)],
                )
            old = self.reader[at]
            same_warp = _warp(old) == warp
            fresh = (self.read[at] != self.interval) | (
                same_warp & (self.read_step[at] < self.steps[warp])
            )
            note = np.where(fresh | (old == me), me, np.where(same_warp, -2 - warp, _SEVERAL_WARPS))
            self.reader[at] = note
            # Several threads read one byte in this very load.
            if (other := self.reader[at] != note).any():
                kept = self.reader[at][other]
                self.reader[at[other]] = -2 - warp[other]
                apart = _warp(kept) != warp[other]
                self.reader[at[other][apart]] = _SEVERAL_WARPS
            self.read[at] = self.interval
            self.read_step[at] = self.steps[warp]
        return self.bytes[at]

    def _claim(self, at: np.ndarray, threads: np.ndarray, changes: np.ndarray) -> None:
        """Checks and notes a write; `changes` says which bytes get another value."""
        if not self.races:
            return
        if (wrong := self.products[at] != 0).any():
            raise Fault(
                "race in shared memory: write of what a wgmma still reads", threads[wrong.any(1)]
            )
        self.unfenced[at] = _WRITTEN
        thread = np.broadcast_to(threads[:, None], at.shape)
        for who, when, step, said in (
            (self.writer, self.written, self.written_step, "wrote"),
            (self.reader, self.read, self.read_step, "read"),
        ):
            wrong = changes & self._unordered(who[at], when[at], step[at], thread)
            if wrong.any():
                other = int(who[at][wrong][0])
                name = f"thread {other}" if other >= 0 else "another thread"
                raise Fault(
                    f"race in shared memory: write of what {name} {said} since the last barrier",
                    threads[wrong.any(1)],
                )
        self.writer[at] = thread
        self.written[at] = self.interval
        self.written_step[at] = self.steps[thread // _LANES]

    def store(self, address: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Stores bytes [k, width] at k addresses."""
        at = self._at("shared store", address, values.shape[1], threads)
        self._claim(at, threads, self.bytes[at] != values)
        self.bytes[at] = values
        if self.races and (wrong := self.bytes[at] != values).any():
            raise Fault("race in shared memory: two values for one byte", threads[wrong.any(1)])

    def start_copy(self, address: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """The bytes [k, width] that a cp.async will write, taken until `land`."""
        at = self._at("cp.async", address, width, threads)
        self._claim(at, threads, np.ones(at.shape, bool))
        np.add.at(self.copies, at, 1)
        if self.races and (wrong := self.copies[at] > 1).any():
            raise Fault("race in shared memory: two copies to one byte", threads[wrong.any(1)])
        return at

    def land(self, at: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        self.copies[at] = 0
        self.bytes[at] = values
        self.unfenced[at] = _WRITTEN
        thread = np.broadcast_to(threads[:, None], at.shape)
        self.writer[at] = thread
        self.written[at] = self.interval
        self.written_step[at] = self.steps[thread // _LANES]

    def begin_read(self, at: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """The bytes `at`, read by a wgmma of these threads, which goes on until `end_read`."""
        if (wrong := (at < 0) | (at >= self.bytes.size)).any():
            raise Fault(
                f"wgmma at byte {at[wrong][0]} of the {self.bytes.size} of shared memory", threads
            )
        if self.races:
            if (self.copies[at] != 0).any():
                raise Fault("wgmma of what a cp.async still copies to", threads)
            if (wrong := self.unfenced[at] != 0).any():
                writer = int(self.writer[at][wrong][0])
                raise Fault(
                    f"race in shared memory: wgmma of what thread {writer} wrote, with no "
                    "fence.proxy.async and barrier between",
                    threads,
                )
            self.products[at] += 1
        return self.bytes[at]

    def end_read(self, at: np.ndarray) -> None:
        if self.races:
            self.products[at] -= 1
            self.reader[at] = _SEVERAL_WARPS
            self.read[at] = self.interval
