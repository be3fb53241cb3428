"""A shard: rows that are finished together, all of them or none."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import to_disk
from w2vbert_fast.inference.jobs.formats import (
    ERRORS,
    Columns,
    Format,
    Formats,
    JsonTable,
    final_name,
)
from w2vbert_fast.inference.jobs.journal import NO_TIMES, Entry, Journal, announce, ranges_of
from w2vbert_fast.inference.jobs.known import Known, KnownTable
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.tasks.base import Task


def made_by(task: Task, formats: Formats) -> dict[str, Any]:
    """What rows have that are done now."""
    return {"formats": list(formats.names), "timestamps": getattr(task, "timestamps", NO_TIMES)}


class Shard:
    """Results on their way to the disk.

    Args:
        folder: the job's.
        number: the shard's.
        task: the task, loaded.
        formats: in which formats to write.
        columns: of Parquet tables.
        known: the rows that were done before, and what these ones are made of.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        task: Task,
        formats: Formats,
        columns: Columns,
        known: Known,
    ) -> None:
        self.folder = folder
        self.number = number
        self.rows = 0
        self.size = 0  # bytes of embeddings
        self.opened = time.monotonic()
        self._task, self._formats, self._columns = task, formats, columns
        self._known = known
        self._table = KnownTable(folder, number, known)
        self._indices: list[int] = []
        self._replaces: list[int] = []
        self._good = 0
        self._errors: Counter[str] = Counter()
        self._audio_seconds = 0.0
        self._writers: list[Format] = []
        self._errors_table: list[Format] = []

    def add(self, results: Sequence[Result]) -> None:
        """Take results in, under temporary names.

        Raises:
            OSError: the disk is full, for instance.
        """
        good = [result for result in results if result.error is None]
        bad = [result for result in results if result.error is not None]
        if good:
            self._writers = self._writers or self._formats.writers(
                self.folder, self.number, self._task, self._columns
            )
            files: list[dict[str, str]] = [{} for _ in good]
            for writer in self._writers:
                for result, names in zip(good, files, strict=True):
                    names.update(self._stated(writer, result))
            for writer in self._writers:
                writer.add(good, files)
            self._table.add(good, files)
        if bad:
            self._errors_table = self._errors_table or [
                JsonTable(self.folder, f"{ERRORS}{self.number:06d}")
            ]
            self._errors_table[0].add(bad, [{}] * len(bad))
            self._table.add(bad, [{}] * len(bad))
        self._indices += [result.index for result in results]
        self._replaces += [r.index for r in results if self._known.is_done(r.index)]
        self.rows += len(results)
        self._good += len(good)
        self._errors.update(result.error_type or "Error" for result in bad)
        self._audio_seconds += sum(result.seconds or 0.0 for result in good)
        self.size += sum(0 if r.tensor is None else r.tensor.nbytes for r in good)

    def _stated(self, writer: Format, result: Result) -> dict[str, str]:
        """Names of files, those of a row that is done again as they were."""
        stated = writer.stated(result)
        before = self._known.files(result.index) if writer.per_recording else {}
        return {
            column: old if (old := before.get(column)) and (self.folder / old).is_file() else name
            for column, name in stated.items()
        }

    def commit(self, journal: Journal) -> Entry:
        """Give the files their names and write the journal's line. All or nothing.

        Raises:
            OSError: the disk is full, for instance; `discard` then takes everything back.
        """
        tables: dict[str, int] = {}
        folders = {self.folder}
        written: list[Path] = []
        recordings: list[Path] = []
        for writer in [*self._writers, *self._errors_table, self._table]:
            paths = writer.close()
            written += paths
            if writer.per_recording:
                recordings += map(final_name, paths)
            else:
                tables.update((final_name(path).name, path.stat().st_size) for path in paths)
        announced = announce(self.folder, self.number, recordings) if recordings else None
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
            supersedes=self._known.emptied(self._replaces, journal.entries),
            seconds=round(time.monotonic() - self.opened, 3),
            replaces=ranges_of(sorted(self._replaces)),
            made=made_by(self._task, self._formats),
        )
        journal.write(entry)
        self._known.commit(self._table.lines, self.number)
        if announced is not None:
            announced.unlink()
        return entry

    def discard(self) -> None:
        """Leave nothing behind but what the next start removes."""
        for writer in [*self._writers, *self._errors_table, self._table]:
            writer.discard()
