"""Processes that compute batches: each with a part of the cores, all with one copy of the weights.

They are forked from a process that has loaded the model, so that its weights, packed or not, lie in
memory once. Where a thread has computed with OpenMP, its copy waits for threads that are not there.
So they are forked from a new thread, which has none of these yet.

Every process computes one batch at a time. One that ends is replaced, and its batch goes to
another; a batch over which two have ended is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from w2vbert_fast.inference.tasks.base import Piece, Task

logger = logging.getLogger(__name__)

LOST_IN_A_ROW = 100
"""Processes that may end without a result in between; then none is replaced any more."""


class ProcessEndedError(RuntimeError):
    """Two processes have ended over a batch."""


@dataclasses.dataclass(frozen=True)
class _Work:
    """A batch as it is sent, and whether a process has ended over it."""

    number: int
    content: bytes
    lost: bool = False


class Workers:
    """Forked processes with a task's model.

    Args:
        task: the task, whose model is loaded.
        processes: how many there are.
        threads: that each computes on.

    Raises:
        ValueError: the model is not on the CPU; or this system has no fork.
        OSError: a process cannot be made.
    """

    def __init__(self, task: Task, processes: int, threads: int) -> None:
        self._pids: dict[connection.Connection[Any, Any], int] = {}
        self._busy: dict[connection.Connection[Any, Any], _Work] = {}
        self._waiting: deque[_Work] = deque()
        self._numbers = itertools.count()
        self._task, self._threads = task, threads
        self._lost_in_a_row = 0
        self._owner = os.getpid()
        device = next(task.network.parameters()).device
        if device.type != "cpu" or not hasattr(os, "fork"):
            where = f"the model is on {device}" if hasattr(os, "fork") else "there is no fork here"
            raise ValueError(f"processes is {processes}; it is for models on the CPU, {where}")
        for _ in range(processes):
            self._start()

    def _start(self) -> None:
        ours, theirs = connection.Pipe()
        with theirs:
            self._pids[ours] = _forked(self._task, theirs, self._threads)

    @property
    def free(self) -> int:
        """Processes that have nothing to do."""
        # Of those that could not be replaced the batches wait.
        return max(0, len(self._pids) - len(self._busy) - len(self._waiting))

    def submit(self, pieces: Sequence[Piece]) -> int:
        """Let a batch be computed; its number."""
        number = next(self._numbers)
        # Arrays, because a tensor's pickle holds the whole recording of a piece.
        work = pickle.dumps([(piece.samples.numpy(), piece.whole) for piece in pieces])
        self._waiting.append(_Work(number, work))
        return number

    def result(self) -> tuple[int, Any]:
        """The number of a batch that is done, and what `Task.run` returned or raised; or a
        `ProcessEndedError`.

        Raises:
            RuntimeError: all processes have ended; or no batch is computed.
        """
        while True:
            for pipe in [pipe for pipe in self._idle() if pipe.poll()]:
                self._replace(pipe)  # it has ended, and over no batch
            for pipe in self._idle()[: len(self._waiting)]:
                self._busy[pipe] = self._waiting.popleft()
                with contextlib.suppress(OSError):  # it has ended: reading says so too
                    pipe.send_bytes(self._busy[pipe].content)
            if not self._busy:
                raise RuntimeError("a result is waited for, and no batch is computed")
            ready = connection.wait([*self._busy])
            for pipe in [pipe for pipe in self._busy if pipe in ready]:
                work = self._busy.pop(pipe)
                try:
                    answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    why = self._replace(pipe)
                    if work.lost:
                        return work.number, ProcessEndedError(
                            f"two processes that computed it have ended, the last {why}"
                        )
                    self._waiting.append(dataclasses.replace(work, lost=True))
                else:
                    self._lost_in_a_row = 0
                    return work.number, answer

    def _idle(self) -> list[connection.Connection[Any, Any]]:
        return [pipe for pipe in self._pids if pipe not in self._busy]

    def _replace(self, pipe: connection.Connection[Any, Any]) -> str:
        """Start another process for one that has ended; how that was."""
        pid = self._pids.pop(pipe)
        pipe.close()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        why = f"with status {status}"
        if status < 0:
            why = f"by signal {-status}" + " (out of memory?)" * (status == -signal.SIGKILL)
        self._lost_in_a_row += 1
        problem = f"{self._lost_in_a_row} in a row"
        if self._lost_in_a_row < LOST_IN_A_ROW:
            try:
                self._start()
                problem = ""
            except OSError as error:
                problem = str(error)
        if not self._pids:
            raise RuntimeError(
                f"all processes that compute have ended, the last {why}, and none can replace it: "
                f"{problem}"
            )
        then = f"the others, {len(self._pids)}, go on: {problem}" if problem else "it is replaced"
        logger.warning("a process that computes has ended %s; %s", why, then)
        return why

    def close(self) -> None:
        """End the processes, whatever they do."""
        if os.getpid() != self._owner:
            return  # a copy, in a process that was forked later
        for pipe, pid in self._pids.items():
            pipe.close()
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self._pids.clear()
        self._busy.clear()
        self._waiting.clear()

    def __del__(self) -> None:
        self.close()


def _forked(task: Task, pipe: connection.Connection[Any, Any], threads: int) -> int:
    """The id of a new process that works."""
    found: list[int | OSError] = []

    def fork() -> None:
        try:
            pid = os.fork()
        except OSError as error:
            found.append(error)
            return
        if pid == 0:
            _work(task, pipe, threads)
        found.append(pid)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def _work(task: Task, pipe: connection.Connection[Any, Any], threads: int) -> NoReturn:
    """What a forked process does until nobody is at the other end of the pipe."""
    try:
        # Ctrl-C reaches all of a terminal's processes; this one ends with the job.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The job's lock and the other processes' pipes would live as long as this process does.
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        torch.set_num_threads(threads)
        while True:
            pieces = [
                Piece(torch.from_numpy(samples), whole)
                for samples, whole in pickle.loads(pipe.recv_bytes())
            ]
            pipe.send_bytes(pickle.dumps(_answer(task, pieces)))
    finally:
        os._exit(0)  # nothing of what the other process has begun is ended here


def _answer(task: Task, pieces: Sequence[Piece]) -> Any:
    try:
        # Copies of views, because a tensor's pickle holds all that it is a view of.
        return tree_map_only(Tensor, _compact, task.run(pieces))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error.with_traceback(None)


def _compact(x: Tensor) -> Tensor:
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x
