"""What the threads of a block do to global memory between two barriers.

Within such an interval, two threads of a block and one byte, one of them writing, is a race: unless
a barrier of their warp lies between. (Between blocks nothing is an order: `global_memory`.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .faults import Fault

_LANES = 32


@dataclass(frozen=True)
class _Accesses:
    """Of one instruction: where, by which threads of the whole grid, and after how many barriers
    of their warps."""

    first: np.ndarray
    width: int
    who: np.ndarray
    step: int
    low: int
    high: int

    def cells(self, low: int) -> np.ndarray:
        """The bytes, from `low` on: [k, width]."""
        return (self.first - low)[:, None] + np.arange(self.width)


@dataclass
class Interval:
    """Accesses since the last barrier of blocks side by side, each with `per` threads."""

    per: int
    reads: list[_Accesses] = field(default_factory=list)
    writes: list[_Accesses] = field(default_factory=list)
    atomics: list[_Accesses] = field(default_factory=list)
    step: int = 0

    def part(self) -> Interval:
        return replace(
            self, reads=list(self.reads), writes=list(self.writes), atomics=list(self.atomics)
        )

    def barrier(self) -> None:
        self.reads.clear()
        self.writes.clear()
        self.atomics.clear()

    def warp_barrier(self) -> None:
        """Of every warp."""
        self.step += 1

    def read(self, address: np.ndarray, width: int, threads: np.ndarray, who: np.ndarray) -> None:
        """By `threads`, which among all of the grid are `who`."""
        mine = self._accesses(address, width, who)
        self._compared("read", mine, self.writes, "wrote", threads)
        self._compared("read", mine, self.atomics, "changed", threads)
        self.reads.append(mine)

    def written(
        self, address: np.ndarray, width: int, threads: np.ndarray, who: np.ndarray
    ) -> None:
        mine = self._accesses(address, width, who)
        self._compared("write", mine, self.writes, "wrote", threads)
        self._compared("write", mine, self.reads, "read", threads)
        self._compared("write", mine, self.atomics, "changed", threads)
        self.writes.append(mine)

    def changed(
        self, address: np.ndarray, width: int, threads: np.ndarray, who: np.ndarray
    ) -> str | None:
        """By atomics, which harm each other nothing. Returns what is to be told, and is no fault:
        that another thread has read it, whose read may as well come later."""
        mine = self._accesses(address, width, who)
        self._compared("change", mine, self.writes, "wrote", threads)
        self.atomics.append(mine)
        try:
            self._compared("change", mine, self.reads, "read", threads)
        except Fault as fault:
            return fault.message
        return None

    def _accesses(self, address: np.ndarray, width: int, who: np.ndarray) -> _Accesses:
        first = address.astype(np.int64)
        low, high = (int(first.min()), int(first.max()) + width) if first.size else (0, 0)
        return _Accesses(first, width, who, self.step, low, high)

    def _compared(
        self, what: str, mine: _Accesses, others: list[_Accesses], said: str, threads: np.ndarray
    ) -> None:
        for other in others:
            if other.low >= mine.high or mine.low >= other.high:
                continue
            low = min(mine.low, other.low)
            cells, theirs = mine.cells(low), other.cells(low).reshape(-1)
            by = other.who.repeat(other.width)
            order = np.lexsort((by, theirs))
            theirs, by = theirs[order], by[order]
            me = mine.who[:, None]
            start, end = (np.searchsorted(theirs, cells, side) for side in ("left", "right"))
            # Sorted by thread: where the first and the last one are mine, all are.
            for at in (start, end - 1):
                one = by[np.clip(at, 0, by.size - 1)]
                wrong = (end > start) & (one != me) & (one // self.per == me // self.per)
                if other.step < self.step:
                    wrong &= one // _LANES != me // _LANES
                if wrong.any():
                    raise Fault(
                        f"race in global memory: {what} of what thread "
                        f"{one[wrong][0] % self.per} of the block {said} since the last barrier",
                        threads[wrong.any(1)],
                    )
