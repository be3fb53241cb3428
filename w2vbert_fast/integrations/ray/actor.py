"""What Ray's actors run: a model, and the rows of a dataset on their way through it.

Datasets are Arrow tables here. A recording is a cell of one column; every other column is carried
through, and the results become columns of their own, of the same types in every table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from w2vbert_fast import cpus
from w2vbert_fast._extras import require
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.runner import Flow, Runner
from w2vbert_fast.inference.tasks.base import Task
from w2vbert_fast.recordings.manifest import AUDIO_COLUMNS, manifest_row
from w2vbert_fast.recordings.rows import Row

Table = Any
"""A `pyarrow.Table`. Neither pyarrow nor Ray is needed to import this module."""

Dataset = Any
"""A `ray.data.Dataset`."""

ROWS_PER_SHARD = 512

BYTES_PER_TABLE = 32 << 20
_SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Actors:
    """What Ray is asked for; see `transcribe_dataset`.

    Raises:
        ValueError: a number is impossible.
    """

    num_gpus: float = 0.0
    num_cpus: float = 1.0
    concurrency: int | tuple[int, int] = 1
    rows_per_shard: int = ROWS_PER_SHARD

    def __post_init__(self) -> None:
        for name in ("num_gpus", "num_cpus"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.num_gpus > 1:
            raise ValueError(
                f"num_gpus must be at most 1, got {self.num_gpus}: an actor runs on one device; "
                "for more devices set concurrency"
            )
        if not 1 <= self.fewest <= self.most:
            raise ValueError(
                "concurrency must be a number of at least 1, or (fewest, most), "
                f"got {self.concurrency!r}"
            )
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {self.rows_per_shard}")

    @property
    def fewest(self) -> int:
        return self.concurrency if isinstance(self.concurrency, int) else self.concurrency[0]

    @property
    def most(self) -> int:
        return self.concurrency if isinstance(self.concurrency, int) else self.concurrency[1]

    @property
    def device(self) -> str:
        """Device of an actor, as PyTorch calls it: Ray shows an actor no other GPU than its own."""
        return "cuda" if self.num_gpus > 0 else "cpu"

    @property
    def threads(self) -> int:
        """Threads of an actor that decode, and compute where that is done on a CPU."""
        return max(1, math.ceil(self.num_cpus))

    def flow(self, flow: Flow | None) -> Flow:
        """How an actor reads and batches recordings: with its number of threads, if none is set."""
        flow = flow or Flow()
        return replace(flow, workers=self.threads) if flow.workers is None else flow

    def map(self, ds: Dataset, kind: type, *arguments: Any) -> Dataset:
        """Run the rows of a dataset, a shard at a time, through actors of a class.

        Args:
            ds: a `ray.data.Dataset`.
            kind: called with tables; made with `arguments` and these `Actors`.
            *arguments: what can be pickled.
        """
        require("ray", "ray")
        data = require("ray.data", "ray")
        self._warn_if_too_many()
        return ds.map_batches(
            kind,
            fn_constructor_args=(*arguments, self),
            batch_size=self.rows_per_shard,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(min_size=self.fewest, max_size=self.most),
            num_gpus=self.num_gpus,
            num_cpus=self.num_cpus,
        )

    def claim(self) -> None:
        """In an actor: take the share of the machine that it was given."""
        torch.set_num_threads(min(self.threads, cpus.of_process().usable))
        if 0 < self.num_gpus < 1:
            torch.cuda.set_per_process_memory_fraction(self.num_gpus)

    def _warn_if_too_many(self) -> None:
        """Say so where Ray would wait for CPUs that a cluster of fixed size never has."""
        ray = require("ray", "ray")
        if not ray.is_initialized():
            return
        there = ray.cluster_resources().get("CPU", 0.0)
        # Tasks that read and write take one, and so does the filter of a job that is continued.
        needed = self.fewest * self.num_cpus + 2
        if there < needed:
            warnings.warn(
                f"the cluster has {there:g} CPUs; {self.fewest} actors with num_cpus="
                f"{self.num_cpus:g}, reading and writing, and continuing a job take {needed:g}. "
                "Unless the cluster grows, Ray may wait for ever: set num_cpus or concurrency "
                "lower",
                stacklevel=4,
            )


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset hold recordings; see `transcribe_dataset`.

    Raises:
        ValueError: the sampling rate is not positive.
    """

    audio: str | None = None
    sampling_rate: int | None = None
    keep_audio: bool = False

    def __post_init__(self) -> None:
        if self.sampling_rate is not None and self.sampling_rate < 1:
            raise ValueError(f"sampling_rate must be positive, got {self.sampling_rate}")

    def find(self, names: Sequence[str]) -> str:
        """The column of recordings among those of a dataset.

        Raises:
            ValueError: it is not there, or there are two.
        """
        wanted = AUDIO_COLUMNS if self.audio is None else (self.audio,)
        found = [name for name in wanted if name in names]
        if not found:
            raise ValueError(
                f"the dataset needs a column {' or '.join(wanted)}; it has {', '.join(names)}"
            )
        if len(found) > 1:
            raise ValueError(
                f"the dataset has the columns {' and '.join(found)}; say with audio= which one "
                "holds the recordings"
            )
        return found[0]

    def rows(self, table: Table) -> Iterator[Row]:
        """The rows of a table, each made when it is asked for; `index` counts in it."""
        audio = table.column(self.find(table.column_names))
        beside = [n for n in ("offset", "duration", "sampling_rate") if n in table.column_names]
        for index in range(table.num_rows):
            entries = {name: table.column(name)[index].as_py() for name in beside}
            yield self._row(index, audio[index], entries)

    def _row(self, index: int, value: Any, entries: dict[str, Any]) -> Row:
        rate = entries.pop("sampling_rate", None)
        samples, stated = _samples(value)
        if samples is not None:
            # What comes with the samples is nearest to the truth.
            found = (r for r in (stated, self.sampling_rate, rate) if r is not None)
            name = f"row {index}"
            return Row(index, samples, name, name, sampling_rate=int(next(found, _SAMPLING_RATE)))
        recording = value.as_py()
        if isinstance(recording, bytes):
            recording = {"bytes": recording}
        known = {name: entry for name, entry in entries.items() if entry is not None}
        entries = {**known, AUDIO_COLUMNS[0]: recording}
        return manifest_row(index, entries, Path(), "dataset", f"row {index}")

    def carried(self, table: Table, added: Sequence[str]) -> Table:
        """The columns that stay, all but the recordings' bytes or samples.

        Those that are named as one of `added` get the prefix `input_`, as in a job's tables.

        Raises:
            ValueError: that name is taken, too.
        """
        pa = require("pyarrow", "ray")
        audio = self.find(table.column_names)
        kind = table.schema.field(audio).type
        if not (self.keep_audio or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            table = table.drop_columns([audio])
        names = [f"input_{name}" if name in added else name for name in table.column_names]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"the dataset has two columns for {doubled[0]!r}: rename one")
        return table.rename_columns(names)


class Actor:
    """A model on the device of an actor, loaded when the actor starts.

    Args:
        task: what is done.
        flow: how recordings are read and batched.
        columns: where the recordings are.
        actors: what Ray was asked for.
    """

    def __init__(self, task: Task, flow: Flow, columns: Columns, actors: Actors) -> None:
        actors.claim()
        self.columns = columns
        self.runner: Runner[Result] = Runner(task, flow)
        self.runner.batcher.prepare()
        self.types = result_types(task)

    def __call__(self, table: Table) -> Iterator[Table]:
        """Add the results to the rows of a table, as they finish, some at a time.

        Raises:
            ValueError: a column is missing.
        """
        carried = self.columns.carried(table, list(self.types))
        results: list[Result] = []
        size = 0
        for result in self.runner(self.columns.rows(table), ordered=False):
            results.append(result)
            embedding = getattr(result, "embedding", None)
            size += 0 if embedding is None else embedding.numel() * embedding.element_size()
            if size >= BYTES_PER_TABLE:
                yield add_results(carried, results, self.types)
                results, size = [], 0
        if results:
            yield add_results(carried, results, self.types)


def add_results(table: Table, results: Sequence[Result], types: Mapping[str, Any]) -> Table:
    """The rows of a table that results belong to, in the results' order, with their columns."""
    pa = require("pyarrow", "ray")
    places = pa.array([result.index for result in results], pa.int64())
    # Column by column: a table may hold none, and then has no rows either.
    columns = {name: table.column(name).take(places) for name in table.column_names}
    found = [_cells(result) for result in results]
    for name, kind in types.items():
        cells = [entries.get(name) for entries in found]
        columns[name] = _vectors(cells, kind) if name == "embedding" else pa.array(cells, kind)
    return pa.table(columns)


def result_types(task: Task) -> dict[str, Any]:
    """Names and Arrow types of the columns that a task adds; its model must be loaded."""
    pa = require("pyarrow", "ray")
    return {
        "seconds": pa.float64(),
        "louder_channel": pa.int64(),
        **dict(task.typed_columns()),
        "error_type": pa.string(),
        "error": pa.string(),
    }


def _cells(result: Result) -> dict[str, Any]:
    """A result's cells by column."""
    cells: dict[str, Any] = {**result.fields(), "seconds": result.seconds}
    cells["louder_channel"] = result.louder_channel
    cells.update(result.salvage_fields())
    cells.update(error_type=result.error_type, error=result.error)
    embedding = getattr(result, "embedding", None)
    if embedding is not None:
        cells["embedding"] = embedding.numpy()
    if cells.get("scores") is not None:
        cells["scores"] = list(cells["scores"].items())
    return cells


def _vectors(cells: Sequence[Any], kind: Any) -> Any:
    """An Arrow array of `[hidden_size]` or `[frames, hidden_size]` arrays, None being null."""
    pa = require("pyarrow", "ray")
    nested = pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type)
    if not nested:
        return pa.array(cells, kind)
    there = [cell for cell in cells if cell is not None]
    empty = np.empty(0, np.dtype(kind.value_type.value_type.to_pandas_dtype()))
    flat = np.concatenate([cell.reshape(-1) for cell in there]) if there else empty
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), kind.value_type.list_size)
    counts = [0 if cell is None else len(cell) for cell in cells]
    offsets = pa.array(np.cumsum([0, *counts], dtype=np.int32))
    mask = pa.array([cell is None for cell in cells])
    return pa.ListArray.from_arrays(offsets, vectors, mask=mask).cast(kind)


def _samples(value: Any) -> tuple[Any, int | None]:
    """The samples in a cell, and their sampling rate where it is stated; None where it has none."""
    pa = require("pyarrow", "ray")
    stated = None
    if pa.types.is_struct(value.type) and value.is_valid:
        if "array" not in [field.name for field in value.type]:
            return None, None
        if "sampling_rate" in [field.name for field in value.type]:
            stated = value["sampling_rate"].as_py()
        value = value["array"]
    if not value.is_valid:
        return None, None
    if isinstance(value, pa.ListScalar) and not pa.types.is_nested(value.type.value_type):
        return value.values.to_numpy(zero_copy_only=False), stated
    if isinstance(value, pa.ExtensionScalar):
        # Ray's tensors.
        return value.as_py(), stated
    return None, None
