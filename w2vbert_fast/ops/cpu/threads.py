"""Shares of one operation, each run to its end by one thread.

PyTorch divides every call among OpenMP threads and lets all of them wait for the slowest at its
end, some 580 times a layer of half a minute. Beside another process on the same cores each wait
takes as long as that process is given the core. Here an operation is cut once into shares, blocks
of rows or heads with all that happens to them; threads take one after the other, and only the end
of the operation waits. A thread that has lost its core for a while takes fewer.

A share's calls of PyTorch run on its thread alone, and give up Python's lock while they compute.
What is computed depends on the shares, never on which thread runs which.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from w2vbert_fast import cpus

logger = logging.getLogger(__name__)

_Share = TypeVar("_Share")
_Result = TypeVar("_Result")

_SHARES_A_THREAD = {torch.float32: 4, torch.bfloat16: 2}
"""So many shares an operation has for each thread, if it is large enough: what a busy core does not
get done the others take over. In bfloat16 twice as many make a feed-forward block 5 % slower."""
_LEAST_TOKENS = 400
"""Fewer rows take longer divided than on PyTorch's own threads: waking one costs too much."""
_LEAST_WORK = 1 << 28
"""Multiplications of a square product as wide as the rows, half of what is worth a share: with less
some operations of a layer would be divided and some not, and PyTorch's threads, which spin after
each call of theirs, and these would be in each other's way. 256 rows at the published width; 7,300
at the demo's, which is half as fast again undivided."""
_LEAST_ELEMENTS = 1 << 20
"""The same of bfloat16, where operations take a fraction of the time: 20 seconds at the published
width."""
_MOST_THREADS = 4
"""More threads than this would wait for Python's lock in bfloat16, longer than for each other."""


def count() -> int:
    """Threads among which an operation may be divided: PyTorch's number of threads.

    One within a share, and where the calls of this thread `are_watched`.
    """
    return 1 if are_watched() else torch.get_num_threads()


def are_watched() -> bool:
    """Whether PyTorch records the calls of this thread, or hands them to somebody else."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
    )


def divides(x: Tensor) -> bool:
    """Whether operations on these rows are divided here, and not by PyTorch call by call.

    Args:
        x: `[num_tokens, ...]`.
    """
    if x.device.type != "cpu" or x.dtype not in _SHARES_A_THREAD or x.shape[0] < _LEAST_TOKENS:
        return False
    if x.numel() ** 2 < x.shape[0] * _LEAST_WORK:
        return False
    if x.dtype == torch.bfloat16:
        return x.numel() >= _LEAST_ELEMENTS and 1 < count() <= _MOST_THREADS
    return count() > 1


def number(x: Tensor, worth: float, most: float = math.inf, part: int = 8) -> int:
    """Into how many shares an operation is cut.

    Args:
        x: `[num_tokens, ...]`, what it works on.
        worth: so many shares would each be worth more than their calls; half a share is the least
            that is cut at all.
        most: more lose, beyond one for each thread.
        part: where there are more threads than shares, each may have a `part`-th of one.

    Returns:
        One, or a multiple of the number of threads; fewer than threads where these are very many.
    """
    if worth < 0.5 or not divides(x):
        return 1
    threads = count()
    if part * worth < threads:
        return int(part * worth)
    shares = _SHARES_A_THREAD[x.dtype]
    return threads * max(1, int(min(shares, worth / threads, most / threads)))


def slices(length: int, number: int) -> list[slice]:
    """At most so many equal slices, at least one, which may be empty."""
    step = max(1, -(-length // number))
    return [slice(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def run(
    function: Callable[[_Share], _Result], shares: Sequence[_Share], *, divided: bool = True
) -> list[_Result]:
    """`[function(share) for share in shares]`, in any order, on several threads if it is divided.

    The threads compute in inference mode: what shares return must not outlive the operation, and
    results are written to tensors of the caller.

    Raises:
        Exception: what the first share raised that failed; shares that had not begun are left out.
    """
    threads = min(count(), len(shares)) if divided else 1
    if threads <= 1:
        return [function(share) for share in shares]
    work = _Divided(function, shares)
    try:
        _threads.run(work.take, threads)
        work.finished.acquire()
    except BaseException:  # an interrupt
        work.drop()
        # Nothing may be written to what the caller lets go, and no thread may compute while the
        # interpreter ends; whoever interrupts again waits, too.
        while work.unfinished:
            with contextlib.suppress(KeyboardInterrupt):
                work.finished.acquire()
        raise
    if work.error is not None:
        raise work.error
    return work.results


class _Divided:
    """One operation's shares, and what has become of them."""

    def __init__(self, function: Callable[[Any], Any], shares: Sequence[Any]) -> None:
        self.function = function
        self.waiting = deque(enumerate(shares))
        self.unfinished = len(shares)
        self.results: list[Any] = [None] * len(shares)
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.finished = threading.Lock()
        self.finished.acquire()

    def take(self) -> None:
        """Run shares until none is left."""
        while True:
            try:
                index, share = self.waiting.popleft()
            except IndexError:
                return
            try:
                self.results[index] = self.function(share)
            except BaseException as error:
                self.error = self.error or error
                self.drop()
            self._finish(1)

    def drop(self) -> None:
        """Leave out what has not begun."""
        dropped = 0
        while self.waiting:
            try:
                self.waiting.popleft()
            except IndexError:
                break
            dropped += 1
        self._finish(dropped)

    def _finish(self, number: int) -> None:
        with self.lock:
            self.unfinished -= number
            if number and self.unfinished == 0:
                self.finished.release()


class _Threads:
    """Threads that wait for work; as many as were ever needed at once."""

    def __init__(self) -> None:
        self.started = 0
        self.jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.lock = threading.Lock()

    def run(self, job: Callable[[], None], threads: int) -> None:
        """Begin a job on each of so many threads."""
        if self.started < threads:
            self._start(threads)
        for _ in range(threads):
            self.jobs.put(job)

    def _start(self, threads: int) -> None:
        _warn_beyond_quota(threads)
        with self.lock:
            ready = threading.Semaphore(0)
            while self.started < threads:
                name = f"w2vbert-{self.started}"
                threading.Thread(target=self._serve, args=(ready,), name=name, daemon=True).start()
                ready.acquire()
                self.started += 1
            # A thread's own number is also the one with which PyTorch begins in new threads.
            torch.set_num_threads(torch.get_num_threads())

    def _serve(self, ready: threading.Semaphore) -> None:
        torch.get_num_threads()  # PyTorch sets a thread's number when it first asks for it
        torch.set_num_threads(1)
        ready.release()
        with torch.inference_mode():
            while True:
                self.jobs.get()()


_threads = _Threads()
_warned: set[str] = set()


def _warn_beyond_quota(threads: int) -> None:
    """Say once that there are more threads than CPUs for them."""
    found = cpus.of_process()
    if threads <= found.usable or "quota" in _warned:
        return
    _warned.add("quota")
    given = "none" if found.quota is None else f"{found.quota:g}"
    logger.warning(
        "PyTorch computes on %d threads, but this process may use %d CPUs (%d there, %d allowed, "
        "quota %s): call torch.set_num_threads(%d)",
        threads,
        found.usable,
        found.machine,
        found.allowed,
        given,
        found.usable,
    )


def _forget_threads() -> None:
    """A forked process has none of its parent's threads."""
    global _threads
    _threads = _Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
