"""Offline inference on Ray Data: one machine or many, one actor for each device.

```python
import ray
from w2vbert_fast.integrations.ray import transcribe_dataset, write_dataset

recordings = ray.data.read_parquet("s3://bucket/recordings")  # columns id, audio_filepath, ...
transcripts = transcribe_dataset(recordings, "me/my-ctc-model", num_gpus=1, concurrency=(1, 8))
write_dataset(transcripts, "s3://bucket/transcripts", id_column="id")
```

Scheduling, retries, moving rows between machines, reading and writing are Ray Data's, and so are
the checkpoints by which `write_dataset` continues a job that was stopped. What is here is the
actor: it holds a model and hands the rows of a shard to the same engine that runs on a single
machine. docs/use/scaling.md says how to size a cluster.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec

from w2vbert_fast._extras import require
from w2vbert_fast.inference.runner import Flow
from w2vbert_fast.inference.tasks import Classify, Embed, Task, Transcribe
from w2vbert_fast.integrations.ray.actor import ROWS_PER_SHARD, Actor, Actors, Columns, Dataset
from w2vbert_fast.integrations.ray.runner import RayRunner

_CHECKPOINT = "_checkpoint"
_ROWS = "rows"
_P = ParamSpec("_P")
_READING = ("Read", "ReadFiles")  # Ray Data's operators behind which it filters rows that are done


def _add(
    kind: type[Task],
    /,
    ds: Dataset,
    model: str | os.PathLike[str] = "demo",
    *,
    audio: str | None = None,
    sampling_rate: int | None = None,
    num_gpus: float = 0.0,
    num_cpus: float = 1.0,
    concurrency: int | tuple[int, int] = 1,
    rows_per_shard: int = ROWS_PER_SHARD,
    keep_audio: bool = False,
    flow: Flow | None = None,
    **options: Any,
) -> Dataset:
    """What the functions for datasets do, with their arguments; see `transcribe_dataset`."""
    actors = Actors(num_gpus, num_cpus, concurrency, rows_per_shard)
    columns = Columns(audio, sampling_rate, keep_audio)
    return map_dataset(ds, kind(model, **options), columns, actors, flow)


def _arguments_of(
    written: Callable[Concatenate[type[Task], _P], Dataset],
) -> Callable[[Callable[..., Dataset]], Callable[_P, Dataset]]:
    """Say to editors, type checkers and `help` which arguments a function takes."""
    signature = inspect.signature(written)
    signature = signature.replace(parameters=list(signature.parameters.values())[1:])

    def give(function: Callable[..., Dataset]) -> Callable[_P, Dataset]:
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return give


@_arguments_of(_add)
def transcribe_dataset(*args: Any, **arguments: Any) -> Dataset:
    """Add what is said to a dataset of recordings. Lazy: it runs when the result is used.

    The columns `text`, `seconds` (length of the audio), `error_type` and `error` are added, and
    `words` where `timestamps` are asked for. A recording that cannot be read has an error, and the
    others go on. The order of rows is Ray Data's: keep a column that identifies them.

    Args:
        ds: a `ray.data.Dataset` with a column of recordings: paths that every machine can open; the
            content of files, as bytes or as `{bytes, path}`; or samples, as lists, tensors or
            `{array, sampling_rate}`. Beside paths and content, the columns `offset` and `duration`
            (seconds) name a part, as in a manifest. All other columns are carried through; one that
            is named as a result, such as `text`, becomes `input_text`.
        model: "demo", a folder that every machine can open, or a hub id.
        audio: name of the column; None: the one there is of `audio_filepath`, `audio`, `file`.
        sampling_rate: of samples that come without one; None: the column `sampling_rate` if there
            is one, else 16 kHz.
        num_gpus: GPUs of an actor. With 0.5, two actors share one; each may use half of its memory.
        num_cpus: CPUs of an actor: that many threads decode, and compute where there is no GPU.
        concurrency: number of actors; or the fewest and the most, between which Ray Data scales.
        rows_per_shard: rows that are handed to an actor at once, and written as one file. What an
            actor that dies has done since the last shard is done again.
        keep_audio: carry the column of recordings through even if it holds bytes or samples.
        flow: how recordings are read and batched; None: `num_cpus` threads that decode.
        **options: of `Transcribe`: dtype, timestamps, max_seconds, beam, lm, ...

    Returns:
        A `ray.data.Dataset` with a row for every row of `ds`.

    Raises:
        TypeError: an option is unknown.
        ValueError: an option has an impossible value, or the column of recordings is missing.
        ImportError: Ray is not installed.
    """
    return _add(Transcribe, *args, **arguments)


@_arguments_of(_add)
def embed_dataset(*args: Any, **arguments: Any) -> Dataset:
    """Add hidden states to a dataset of recordings; see `transcribe_dataset` for the arguments.

    The columns `embedding` (a list of vectors, or one vector with `pool="mean"`), `seconds`,
    `error_type` and `error` are added.

    Args:
        **options: of `Embed`: layer, stats (a file that every machine can open, or a mapping),
            pool, embedding_dtype, dtype, ...
    """
    return _add(Embed, *args, **arguments)


@_arguments_of(_add)
def classify_dataset(*args: Any, **arguments: Any) -> Dataset:
    """Add classes, or x-vectors, to a dataset of recordings, by the model's head.

    The columns `label` and `scores` of a sequence classifier, `segments` of a frame classifier, or
    `embedding` of an x-vector model are added, and `seconds`, `error_type` and `error`.

    Args:
        **options: of `Classify`: dtype, max_seconds, ...
    """
    return _add(Classify, *args, **arguments)


def write_dataset(
    ds: Dataset, path: str | os.PathLike[str], *, id_column: str, file_format: str = "parquet"
) -> None:
    """Run a dataset and write its rows to `path/rows`; continue where an earlier run was stopped.

    Ray Data notes in `path/_checkpoint` the ids of the rows of every file that is complete (under a
    temporary name first, which is then renamed), and removes at the next start the files that are
    not. So the same call, made again, runs the rows that are missing, and none after it succeeded.

    Args:
        ds: made by this module from a dataset that reads files (`ray.data.read_parquet`,
            `read_json`, `read_binary_files`, ...), which is what Ray Data can restart.
        path: a folder that every machine can open, or a URI of `s3://`, `gs://`, ... One job at a
            time may write to it.
        id_column: a column of integers or strings, without null, that differ in every row.
        file_format: "parquet" or "jsonl".

    Raises:
        ValueError: the format is unknown, or the dataset does not read files.
        ImportError: Ray is not installed.
    """
    if file_format not in ("parquet", "jsonl"):
        raise ValueError(f"file_format must be 'parquet' or 'jsonl', got {file_format!r}")
    require("ray", "ray")
    if not _is_read(ds._logical_plan.dag):
        raise ValueError(
            "ds must come from files (ray.data.read_parquet, read_json, ...), because Ray Data can "
            "restart no other dataset; write it to Parquet first, and read that"
        )
    from ray.data.checkpoint import CheckpointConfig

    name = os.fspath(path)
    folder = name.rstrip("/") if "://" in name else os.path.abspath(name)
    before = ds.context.checkpoint_config
    ds.context.checkpoint_config = CheckpointConfig(
        id_column, f"{folder}/{_CHECKPOINT}", delete_checkpoint_on_success=False
    )
    write = ds.write_parquet if file_format == "parquet" else ds.write_json
    try:
        write(f"{folder}/{_ROWS}")
    finally:
        ds.context.checkpoint_config = before


def _is_read(operator: Any) -> bool:
    """Whether all rows that come to an operator were read from somewhere.

    Ray Data's own check takes a dataset that is in memory for one, and then does all rows again.
    """
    if type(operator).__name__ in _READING:
        return True
    inputs = operator.input_dependencies
    return bool(inputs) and all(_is_read(found) for found in inputs)


def map_dataset(
    ds: Dataset, task: Task, columns: Columns, actors: Actors, flow: Flow | None = None
) -> Dataset:
    """Add the results of a task to a dataset of recordings; what the functions above do.

    Args:
        ds: a `ray.data.Dataset`.
        task: what is done.
        columns: where the recordings are.
        actors: what Ray is asked for.
        flow: how recordings are read and batched; None: `num_cpus` threads that decode.

    Raises:
        ValueError: the column of recordings is missing, or `task` asks for another device.
        ImportError: Ray is not installed.
    """
    require("ray", "ray")
    schema = ds.schema(fetch_if_missing=False)
    if schema is not None:
        columns.find(schema.names)
    if task.device not in (None, actors.device):
        raise ValueError(
            f"device is {task.device!r}, but actors with num_gpus={actors.num_gpus:g} run on "
            f"{actors.device!r}: leave device out"
        )
    shards = ds.repartition(target_num_rows_per_block=actors.rows_per_shard)
    task = replace(task, device=actors.device)
    return actors.map(shards, Actor, task, actors.flow(flow), columns)


def job_runner(
    task: Task,
    flow: Flow | None = None,
    *,
    num_gpus: float | None = None,
    num_cpus: float = 1.0,
    concurrency: int | tuple[int, int] | None = None,
    rows_per_shard: int | None = None,
) -> RayRunner:
    """A runner for a `Job` whose models live in actors, in the cluster that this process is in.

    Ray finds the cluster (the variable RAY_ADDRESS, or one that was started on this machine), or
    starts one on this machine that ends with the process.

    Args:
        task: what is done.
        flow: how recordings are read and batched; None: `num_cpus` threads that decode.
        num_gpus: GPUs of an actor, up to 1; None: 1 where the cluster has GPUs, else 0.
        num_cpus: CPUs of an actor.
        concurrency: number of actors; or the fewest and the most; None: from 1 to as many as the
            cluster has room for.
        rows_per_shard: rows that are handed to an actor at once; None: those of a window.

    Raises:
        ValueError: an option has an impossible value.
        ConnectionError: the cluster does not answer.
        ImportError: Ray is not installed.
    """
    ray = require("ray", "ray")
    data = require("ray.data", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # The job shows how far it is.
    data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = 1.0 if there.get("GPU", 0.0) >= 1 else 0.0
    if concurrency is None:
        # One CPU is left for what Ray does itself.
        room = [(there.get("CPU", 1.0) - 1) / num_cpus if num_cpus > 0 else math.inf]
        room.append(there["GPU"] / num_gpus if num_gpus > 0 else math.inf)
        most = min(room)
        concurrency = (1, max(1, int(most))) if math.isfinite(most) else 1
    if rows_per_shard is None:
        rows_per_shard = (flow or Flow()).window_rows
    actors = Actors(num_gpus, num_cpus, concurrency, rows_per_shard)
    return RayRunner(task, flow, actors)
