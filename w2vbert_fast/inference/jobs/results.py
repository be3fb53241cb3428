"""What a job's folder holds, read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.inference.jobs.formats import KNOWN
from w2vbert_fast.inference.jobs.journal import JOURNAL_FILE, Entry, JobError, Ranges


def read_results(
    folder: str | os.PathLike[str], *, tensors: bool = True
) -> Iterator[dict[str, Any]]:
    """The rows of a job that are done, shard by shard: those that went well and those with errors.

    Embeddings in Parquet tables are lists here; `pyarrow` reads them faster.

    Args:
        folder: the job's.
        tensors: whether rows of Parquet tables have the embeddings.

    Raises:
        JobError: the folder's files are not what its journal says.
        ImportError: a table is Parquet and pyarrow is not installed.
    """
    path = Path(folder)
    entries = list(read_entries(path))
    gone = {name for entry in entries for name in entry.supersedes}
    # Of each shard the rows that later ones have done again.
    replaced = Ranges()
    stale: list[Ranges] = []
    for entry in reversed(entries):
        stale.append(Ranges(replaced))
        for start, stop in entry.replaces:
            replaced.add(start, stop)
    for entry, again in zip(entries, reversed(stale), strict=True):
        for name in entry.files:
            if name not in gone and not name.startswith(KNOWN):
                for row in table_rows(path / name, tensors):
                    if row["index"] not in again:
                        yield row


def table_rows(path: Path, tensors: bool) -> Iterator[dict[str, Any]]:
    """The rows of a table; without `tensors` not their embeddings."""
    if not path.is_file():
        raise JobError(f"{path} is missing")
    if path.suffix == ".jsonl":
        yield from json_rows(path)
    elif path.suffix == ".parquet":
        parquet = require("pyarrow.parquet", "offline")
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if tensors or name != "embedding"]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from batch.to_pylist()


def read_entries(folder: Path) -> Iterator[Entry]:
    """The journal of a folder in which another process may be at work."""
    for line in json_rows(folder / JOURNAL_FILE):
        yield Entry(**line)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that a running job may be writing; the unfinished last one is left."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # else a running job is writing it
                yield json.loads(line)
