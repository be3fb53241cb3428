"""A shard: rows that are finished together, all of them or none."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.inference.jobs.formats import (
    SUBTITLE_FORMATS,
    TABLE_FORMATS,
    TENSOR_FORMATS,
    Columns,
    FilePerRecording,
    JsonTable,
    ParquetTable,
    TensorShard,
    Writer,
    final_name,
    to_disk,
)
from w2vbert_fast.inference.jobs.journal import Entry, Journal, ranges_of
from w2vbert_fast.inference.rows import Embedding, Result
from w2vbert_fast.inference.tasks.base import Task
from w2vbert_fast.inference.tasks.transcribe import Embed, Transcribe


@dataclass(frozen=True)
class Formats:
    """In which formats a job writes.

    Attributes:
        names: one of "jsonl" and "parquet", and others that the task has: "srt", "vtt" and "txt" of
            transcripts, "npy" or "safetensors" of embeddings, beside which the table is "jsonl".

    Raises:
        ValueError: a format is unknown, or does not go with the task or with another format.
    """

    names: tuple[str, ...]

    @classmethod
    def of_task(cls, task: Task, names: Sequence[str]) -> Formats:
        """Formats of a task; without names, its usual ones."""
        embeds = isinstance(task, Embed)
        known = ["parquet", *TENSOR_FORMATS] if embeds else list(TABLE_FORMATS)
        if isinstance(task, Transcribe):
            known += SUBTITLE_FORMATS
        for name in names:
            if name not in known:
                raise ValueError(f"format {name!r} is not one of {task.name}'s: {', '.join(known)}")
        chosen = list(dict.fromkeys(names)) or (["parquet"] if embeds else ["jsonl"])
        if embeds and len(chosen) > 1:
            raise ValueError(f"embeddings have one format, got {', '.join(chosen)}")
        if not set(chosen) & set(TABLE_FORMATS):
            chosen.insert(0, "jsonl")
        if set(TABLE_FORMATS) <= set(chosen):
            raise ValueError("the table is either jsonl or parquet, got both")
        subtitles = [name for name in chosen if name in ("srt", "vtt")]
        if subtitles and isinstance(task, Transcribe) and task.timestamps == "none":
            raise ValueError(f"format {subtitles[0]!r} needs timestamps 'word' or 'character'")
        return cls(tuple(chosen))

    @property
    def table(self) -> str:
        """Format of the table."""
        return next(name for name in self.names if name in TABLE_FORMATS)


class Shard:
    """Results on their way to the disk.

    Args:
        folder: the job's.
        number: the shard's.
        task: the task, loaded.
        formats: in which formats to write.
        columns: of Parquet tables.
    """

    def __init__(
        self, folder: Path, number: int, task: Task, formats: Formats, columns: Columns
    ) -> None:
        self.folder = folder
        self.number = number
        self.rows = 0
        self.size = 0  # bytes of embeddings
        self.opened = time.monotonic()
        self._task, self._formats, self._columns = task, formats, columns
        self._indices: list[int] = []
        self._good = 0
        self._errors: Counter[str] = Counter()
        self._audio_seconds = 0.0
        self._writers: list[Writer] = []
        self._error_table: JsonTable | None = None
        self._per_recording: list[FilePerRecording] = []
        self._tensors: TensorShard | None = None

    def add(self, results: Sequence[Result]) -> None:
        """Take results in, under temporary names.

        Raises:
            OSError: the disk is full, for instance.
        """
        good = [result for result in results if result.error is None]
        bad = [result for result in results if result.error is not None]
        if good and not self._writers:
            self._open()
        files = [self._files(result) for result in good]
        if good:
            for writer in self._writers:
                writer.add(good, files)
        if bad:
            if self._error_table is None:
                self._error_table = JsonTable(self.folder / f"errors-{self.number:06d}.jsonl")
            self._error_table.add(bad, [{}] * len(bad))
        self._indices += [result.index for result in results]
        self.rows += len(results)
        self._good += len(good)
        self._errors.update(result.error_type or "Error" for result in bad)
        self._audio_seconds += sum(result.seconds or 0.0 for result in good)
        for result in good:
            if isinstance(result, Embedding) and result.embedding is not None:
                self.size += result.embedding.nbytes

    def commit(self, journal: Journal, supersedes: Sequence[str] = ()) -> Entry:
        """Give the files their names and write the journal's line. All or nothing.

        Raises:
            OSError: the disk is full, for instance; `discard` then takes everything back.
        """
        tables: dict[str, int] = {}
        folders = {self.folder}
        written: list[Path] = []
        for writer in [*self._writers, *([self._error_table] if self._error_table else [])]:
            paths = writer.close()
            written += paths
            if not isinstance(writer, FilePerRecording):
                tables.update((final_name(path).name, path.stat().st_size) for path in paths)
        for path in written:
            os.replace(path, final_name(path))
            # New folders have to be on the disk, and so has the list that names them.
            folders.update((path.parent, path.parent.parent) if path.parent != self.folder else ())
        for folder in folders:
            to_disk(folder)
        entry = Entry(
            shard=self.number,
            files=tables,
            rows=ranges_of(sorted(self._indices)),
            good=self._good,
            errors=dict(self._errors),
            audio_seconds=self._audio_seconds,
            supersedes=list(supersedes),
        )
        journal.write(entry)
        return entry

    def discard(self) -> None:
        """Leave nothing behind but what the next start removes."""
        for writer in [*self._writers, *([self._error_table] if self._error_table else [])]:
            writer.discard()

    def _open(self) -> None:
        stem = self.folder / f"part-{self.number:06d}"
        for name in self._formats.names:
            if name == "jsonl":
                self._writers.append(JsonTable(stem.with_suffix(".jsonl")))
            elif name == "parquet":
                columns = task_columns(self._task, self._formats)
                path = stem.with_suffix(".parquet")
                self._writers.append(ParquetTable(path, self._columns, columns))
            elif name == "safetensors":
                self._tensors = TensorShard(stem.with_suffix(".safetensors"))
                self._writers.append(self._tensors)
            else:
                self._per_recording.append(FilePerRecording(self.folder, name))
                self._writers.append(self._per_recording[-1])

    def _files(self, result: Result) -> dict[str, str]:
        """Names of files that the row states."""
        files = {f"{writer.kind}_file": writer.name(result) for writer in self._per_recording}
        if self._tensors is not None:
            files["safetensors_file"] = final_name(self._tensors.path).name
        return files


def task_columns(task: Task, formats: Formats) -> list[Any]:
    """Names and Arrow types of the columns that a task adds to a Parquet table."""
    arrow = require("pyarrow", "offline")
    string, number = arrow.string(), arrow.float64()
    files = [(f"{name}_file", string) for name in formats.names if name in SUBTITLE_FORMATS]
    if isinstance(task, Transcribe):
        times = [("start", number), ("end", number), ("confidence", number)]
        word = [("word", string), *times]
        if task.timestamps == "character":
            characters = arrow.struct([("character", string), *times])
            word.append(("characters", arrow.list_(characters)))
        words = [("words", arrow.list_(arrow.struct(word)))] if task.timestamps != "none" else []
        return [("text", string), *words, *files]
    if isinstance(task, Embed):
        kind = arrow.float16() if task.embedding_dtype == "float16" else arrow.float32()
        vector = arrow.list_(kind, task.width)
        return [("embedding", vector if task.pool == "mean" else arrow.list_(vector))]
    head = task.class_name() if hasattr(task, "class_name") else ""
    if head == "Wav2Vec2BertForXVector":
        return [("embedding", arrow.list_(arrow.float32()))]
    if head == "Wav2Vec2BertForAudioFrameClassification":
        segment = [("start", number), ("end", number), ("label", string), ("score", number)]
        return [("segments", arrow.list_(arrow.struct(segment)))]
    return [("label", string), ("scores", arrow.map_(string, number))]
