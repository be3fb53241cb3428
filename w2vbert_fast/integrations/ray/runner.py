"""The engine of a job, on Ray: rows go to actors, results come back to the job's process.

`RayRunner` stands where a job has its `Runner`, so that everything else about a job is as it is on
one machine: what it reads, the tables and files that it writes, its journal, its lock, its summary.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.inference.batching import Batcher
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.runner import Flow, Runner
from w2vbert_fast.inference.tasks.base import Task
from w2vbert_fast.integrations.ray.actor import BYTES_PER_TABLE, Actors, Table
from w2vbert_fast.recordings.rows import Row

_COLUMN = "row"


class RayRunner(Runner[Result]):
    """A runner whose models live in Ray's actors.

    Rows are taken all at once: a million of them are some 300 MB in Ray's object store. Results
    come as they finish, a shard of rows at a time.

    Args:
        task: what is done.
        flow: how an actor reads and batches recordings; None: as many threads as it has CPUs.
        actors: what Ray is asked for.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, task: Task, flow: Flow | None, actors: Actors) -> None:
        require("ray", "ray")
        self.actors = actors
        # Where this process needs something of the model, a device of the actors' is not taken.
        super().__init__(replace(task, device="cpu"), actors.flow(flow))
        self.batcher = _Elsewhere(self.task)

    def windows(self, rows: Iterable[Row]) -> Iterator[Any]:
        """Results of the rows, as many at a time as an actor was given, or fewer.

        Raises:
            ValueError: a row holds a recording itself, and not its name.
        """
        data = require("ray.data", "ray")
        tables = list(_tables(rows, self.actors.rows_per_shard))
        if not tables:
            return
        task = replace(self.task, device=self.actors.device)
        found = self.actors.map(data.from_arrow(tables), RowActor, task, self.flow)
        finished = iter(found.iter_batches(batch_size=None, batch_format="pyarrow"))
        with contextlib.closing(finished):
            for table in finished:
                yield [pickle.loads(cell.as_py()) for cell in table.column(_COLUMN)]

    @staticmethod
    def in_order(window: Sequence[Any], results: Iterable[Result]) -> list[Result]:
        """Results by the index of their rows."""
        return sorted(results, key=lambda result: result.index)


class _Elsewhere(Batcher):
    """Stands for the batchers in the actors: what comes in has gone through a model already."""

    def prepare(self) -> int | None:  # type: ignore[override]
        """Nothing: actors load models and find budgets. The budget that is set, if any."""
        return self.frame_budget

    def run(self, window: Sequence[Any]) -> Iterator[Result]:
        """The results themselves."""
        return iter(window)


class RowActor:
    """A model on the device of an actor, for rows that were pickled.

    Args:
        task: what is done.
        flow: how recordings are read and batched.
        actors: what Ray was asked for.
    """

    def __init__(self, task: Task, flow: Flow, actors: Actors) -> None:
        actors.claim()
        self.runner: Runner[Result] = Runner(task, flow)
        self.runner.batcher.prepare()

    def __call__(self, table: Table) -> Iterator[Table]:
        """The results of the rows in a table, some at a time."""
        pa = require("pyarrow", "ray")
        rows = [pickle.loads(cell.as_py()) for cell in table.column(_COLUMN)]
        results: list[bytes] = []
        size = 0
        for result in self.runner(rows, ordered=False):
            results.append(pickle.dumps(result))
            size += len(results[-1])
            if size >= BYTES_PER_TABLE:
                yield pa.table({_COLUMN: results})
                results, size = [], 0
        if results:
            yield pa.table({_COLUMN: results})


def _tables(rows: Iterable[Row], count: int) -> Iterator[Table]:
    """The rows, pickled, in tables of `count` rows."""
    pa = require("pyarrow", "ray")
    remaining = iter(rows)
    while cells := [_packed(row) for row in islice(remaining, count)]:
        yield pa.table({_COLUMN: cells})


def _packed(row: Row) -> bytes:
    if isinstance(row.audio, str) or row.audio is None:
        return pickle.dumps(row)
    raise ValueError(
        f"{row.name}: with Ray, a job takes names of recordings, not tar files or manifests that "
        "hold them; read those with Ray Data, as docs/use/scaling.md shows"
    )
