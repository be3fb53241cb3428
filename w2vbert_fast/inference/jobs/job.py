"""A job: an input, a folder of results, and everything that lets a killed run go on.

The folder holds `job.json` (what the job is), `journal.jsonl` (which rows are done), tables
`part-*` (rows that went well) and `errors-*.jsonl` (rows that did not), and at the end
`summary.json` and `report.html`. `read_results` reads the tables.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, cast

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.files import make_folder, read_json, to_disk, write_json
from w2vbert_fast.inference.ctc.subtitles import Layout
from w2vbert_fast.inference.jobs.formats import (
    FORMATS,
    Columns,
    Formats,
    PerRecording,
    files_of_tables,
    remove_tables,
)
from w2vbert_fast.inference.jobs.journal import (
    JOB_FILE,
    JOURNAL_FILE,
    SUMMARY_FILE,
    Entry,
    JobError,
    Journal,
    announce,
    differences,
    is_more,
    remove_announced,
)
from w2vbert_fast.inference.jobs.known import Again, Known
from w2vbert_fast.inference.jobs.progress import Progress, error_counts, peak_memory, versions
from w2vbert_fast.inference.jobs.report import REPORT_FILE, write_report
from w2vbert_fast.inference.jobs.rewriting import read_shard
from w2vbert_fast.inference.jobs.shard import Shard, made_by
from w2vbert_fast.inference.jobs.sidecars import check_beside
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.recordings.inputs import Files, Inputs
from w2vbert_fast.recordings.rows import Row, how_many
from w2vbert_fast.recordings.which_files import PassedOver

LOCK_FILE = ".lock"

_NO_SHARD = 999_999_999
_COLUMN_ROWS = 256  # rows that decide about the columns of Parquet tables
_FEW_ROWS = 100
_SHARD_BYTES = 256 << 20


class TooManyErrors(JobError):
    """More rows failed than the job may have; what is done is kept."""


class Interrupted(JobError):
    """The job was told to stop; what is done is kept."""


@dataclass(frozen=True)
class JobOptions:
    """How a job keeps its books; nothing here changes a result.

    Attributes:
        shard_rows: rows after which a shard is finished: at most so many are done again after a
            crash, give or take a window.
        shard_seconds: seconds after which it is finished.
        max_errors: end the job when more rows than this have failed; None: never.
        retry_errors: do the rows again that have failed.
        overwrite: forget what the folder holds of another job.
        log_json: report in JSON lines.
        by_content: recordings are known by what they hold, and not by path, size and time.
        page: write `report.html` at the end.
    """

    shard_rows: int = 1000
    shard_seconds: float = 60.0
    max_errors: int | None = None
    retry_errors: bool = False
    overwrite: bool = False
    log_json: bool = False
    by_content: bool = False
    page: bool = True

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {self.shard_rows}")
        if not self.shard_seconds > 0:
            raise ValueError(f"shard_seconds must be above 0, got {self.shard_seconds}")
        if self.max_errors is not None and self.max_errors < 0:
            raise ValueError(f"max_errors must be at least 0, got {self.max_errors}")


@dataclass(frozen=True)
class Summary:
    """What a job has come to.

    Attributes:
        rows: rows that are done, those of earlier runs included.
        errors: those that failed, by the type of the error.
        content: what `summary.json` holds.
    """

    rows: int
    errors: dict[str, int]
    content: dict[str, Any]


class Job:
    """A job in a folder.

    Args:
        runner: task and flow.
        inputs: the rows.
        folder: where results go; made if it is missing.
        formats: names of formats; none: the task's usual one.
        options: how books are kept.
        stream: where progress is reported; None: standard error.
        layout: of subtitles; None: the usual one.
        beside: files of single recordings lie beside those, and not in the folder.

    Raises:
        ValueError: a format does not go with the task; or nothing can lie beside such recordings.
    """

    def __init__(
        self,
        runner: Runner[Any],
        inputs: Inputs,
        folder: str | os.PathLike[str],
        formats: Sequence[str] = (),
        options: JobOptions | None = None,
        stream: TextIO | None = None,
        layout: Layout | None = None,
        beside: bool = False,
    ) -> None:
        self.runner = runner
        self.inputs = inputs
        self.folder = Path(folder)
        if beside:
            check_beside(inputs)
        how = PerRecording(layout, inputs.roots, beside)
        self.formats = Formats.of_task(runner.task, formats, how)
        self.options = options or JobOptions()
        self.columns = Columns({})
        self.known = self._known({})
        self.progress = Progress(inputs.total, 0, 0, as_json=self.options.log_json, stream=stream)
        self._stream = stream
        self._passed_over = PassedOver()

    def _known(self, whole: Mapping[str, int]) -> Known:
        return Known(self.folder, self.options.by_content, whole, self.runner.task.depends_on)

    def run(self) -> Summary:
        """Do what is not done yet.

        Raises:
            JobError: another process works in the folder; it holds another job; its results were
                changed; there are too many errors (`TooManyErrors`); or the job was interrupted
                (`Interrupted`). The rows that are done stay so in every case.
            OSError: something cannot be read or written: the disk is full, for instance.
            ValueError: the model or an option is wrong.
            ImportError: a package is missing.
        """
        make_folder(self.folder)
        with self._locked():
            try:
                return self._run()
            except KeyboardInterrupt:
                raise Interrupted("interrupted; the same command goes on") from None

    def _run(self) -> Summary:
        self._open()
        journal = Journal(self.folder)
        before = self._last_summary()
        self.known = self._known(before.get("whole", {}))
        self.known.load(journal.entries)
        self.progress = Progress(
            self.inputs.total,
            len(self.known),
            sum(self.known.errors().values()),
            as_json=self.options.log_json,
            stream=self._stream,
        )
        self.progress.event("input", {"parts": self.inputs.described})
        self._passed_over = PassedOver.from_json(before.get("passed_over", {}))
        (self.folder / SUMMARY_FILE).unlink(missing_ok=True)
        rows = self.known.missing(self.inputs, self._again(journal))
        rewritten = self._rewrite(journal)
        startup = 0.0
        # A job that has nothing to do loads no model.
        for first in islice(rows, 1):
            self._prepare()
            startup = self.progress.elapsed
            self.progress.start += startup
            self._check_errors()
            self._work(journal, chain([first], rows))
        self.progress.close()
        summary = self._finish(startup, rewritten)
        if self.options.page and self._page_is_old():
            write_report(self.folder)
        return summary

    def _again(self, journal: Journal) -> Again:
        """Which rows are done once more: those without the timestamps that are asked for, and
        those that failed, if they are to be retried."""
        made = made_by(self.runner.task, self.formats)
        lacking = {
            entry.shard
            for entry in journal.entries
            if is_more(entry.made.get("timestamps"), made["timestamps"])
        }
        retried = self.options.retry_errors
        return lambda error, shard: shard in lacking if error is None else retried

    def _rewrite(self, journal: Journal) -> int:
        """Write the tables again of rows that lack nothing but files of a format, with these.

        Returns:
            How many rows.
        """
        made = made_by(self.runner.task, self.formats)
        count = 0
        here = self.known.shards()
        for place, entry in enumerate(list(journal.entries)):
            if entry.shard not in here or not entry.made:
                continue
            if is_more(entry.made["timestamps"], made["timestamps"]) or not (
                set(made["formats"]) - set(entry.made["formats"])
            ):
                continue
            shard = self._shard(journal)
            results = list(read_shard(self.folder, entry, journal.entries[place + 1 :]))
            for result in results:
                self.known.recall(result.index)
            try:
                shard.add(results)
                self._commit(shard, journal)
            except BaseException:
                shard.discard()
                raise
            count += len(results)
        return count

    def _work(self, journal: Journal, rows: Iterator[Row]) -> None:
        """Do the rows."""
        shard = self._shard(journal)
        whole = True  # no window has been taken in by half
        try:
            windows = cast(Generator[Any, None, None], self.runner.windows(rows))
            self.runner.batcher.watch = lambda seconds, _: self.progress.begin(seconds)
            with contextlib.closing(windows):
                for window in windows:
                    results = self.runner.in_order(window, self.runner.batcher.run(window))
                    whole = False
                    self._count(results)
                    shard.add(results)
                    whole = True
                    if self._full(shard):
                        whole = False
                        self._commit(shard, journal)
                        shard = self._shard(journal)
                        whole = True
                    self._check_errors()
            if shard.rows > 0:
                whole = False
                self._commit(shard, journal)
        except (KeyboardInterrupt, TooManyErrors):
            if whole and shard.rows > 0:
                self._commit(shard, journal)
            else:
                shard.discard()
            raise
        except BaseException:
            shard.discard()
            raise

    def _count(self, results: Sequence[Result]) -> None:
        bad = sum(result.error is not None for result in results)
        seconds = sum(result.seconds or 0.0 for result in results if result.error is None)
        # Those that are done again are among the rows already, and perhaps among the errors.
        again = [error for r in results if (error := self.known.outcome(r.index)) is not None]
        self.progress.done -= len(again)
        self.progress.errors -= sum(map(bool, again))
        self.progress.update(len(results), bad, seconds)

    def _check_errors(self) -> None:
        limit = self.options.max_errors
        if limit is None or self.options.retry_errors or self.progress.errors <= limit:
            return
        raise TooManyErrors(
            f"{how_many(self.progress.errors)} failed, more than the {limit} of max_errors; the "
            f"last ones are in {self.folder}/errors-*.jsonl"
        )

    def _full(self, shard: Shard) -> bool:
        return (
            shard.rows >= self.options.shard_rows
            or shard.size >= _SHARD_BYTES
            or time.monotonic() - shard.opened >= self.options.shard_seconds
        )

    def _shard(self, journal: Journal) -> Shard:
        number = journal.next_shard()
        return Shard(self.folder, number, self.runner.task, self.formats, self.columns, self.known)

    def _commit(self, shard: Shard, journal: Journal) -> None:
        entry: Entry = shard.commit(journal)
        self.progress.event("shard", {"files": list(entry.files), "rows": shard.rows})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder: the lock ends with the process, however that ends."""
        filelock = require("filelock", "offline")
        lock = filelock.FileLock(self.folder / LOCK_FILE, blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise JobError(f"another process works in {self.folder}") from None
        try:
            yield
        finally:
            lock.release()

    def _open(self) -> None:
        """Check that the folder holds this job or none."""
        path = self.folder / JOB_FILE
        if self.options.overwrite:
            self._clear()
        fingerprint = self._fingerprint()
        if path.exists():
            known = read_json(path)
            before = known.get("fingerprint") or {}
            extended = _extended(before, fingerprint)
            found = differences(extended, fingerprint)
            gone = _gone(before, self.inputs)
            if gone:
                raise JobError(f"{gone} is not there; {self.folder} holds what was made of it")
            if found:
                raise JobError(
                    f"{self.folder} holds another job: {'; '.join(found)}. --overwrite starts again"
                )
            if extended != before:
                write_json(path, {**known, "fingerprint": fingerprint})
            self.columns = Columns(known["columns"])
            if self.runner.batcher.frame_budget is None:
                self.runner.batcher.frame_budget = known["frame_budget"]
            return
        if (self.folder / JOURNAL_FILE).exists():
            raise JobError(
                f"{self.folder} has a {JOURNAL_FILE} and no {JOB_FILE}: --overwrite starts again"
            )

    def _prepare(self) -> None:
        """Load the model, and write down what the job is before its first row."""
        batcher = self.runner.batcher
        if self.inputs.total is not None and self.inputs.total <= _FEW_ROWS:
            batcher.probes = False  # it would take longer than the job
        budget = batcher.prepare()
        path = self.folder / JOB_FILE
        if path.exists():
            return
        if self.formats.table.is_typed:
            # Without the audio: only the columns are looked at.
            head = (replace(row, audio=None) for row in self.inputs.rows())
            self.columns = Columns.of_rows(list(islice(head, _COLUMN_ROWS)))
        content = {
            "fingerprint": self._fingerprint(),
            "frame_budget": budget,
            "columns": self.columns.types,
            "versions": versions(),
            "working_folder": os.getcwd(),
        }
        write_json(path, content)
        to_disk(self.folder)

    def _fingerprint(self) -> dict[str, Any]:
        task, how = self.runner.task, self.formats.how
        # Only where it is given, so that folders of before know themselves.
        given: dict[str, Any] = {} if how.layout is None else {"layout": asdict(how.layout)}
        if how.beside:
            given["beside"] = True
        if self.options.by_content:
            given["by_content"] = True
        return {
            "model": {"name": os.fspath(task.model), "files": task.fingerprint()},
            "input": self.inputs.named,
            "options": {
                **task.options(),
                "formats": list(self.formats.names),
                "longest": self.runner.flow.longest,
                **given,
            },
        }

    def _page_is_old(self) -> bool:
        """Whether rows were done after it was written, by this run or by one that was killed."""
        page, journal = self.folder / REPORT_FILE, self.folder / JOURNAL_FILE
        return not page.exists() or page.stat().st_mtime_ns < journal.stat().st_mtime_ns

    def _clear(self) -> None:
        """Remove what a job has written, and nothing else."""
        # As of a shard that no line of the journal counts: the next start ends what this begins.
        announced = announce(self.folder, _NO_SHARD, files_of_tables(self.folder))
        # The journal first: from then on nothing of the old job counts.
        for name in (JOURNAL_FILE, JOB_FILE, SUMMARY_FILE, REPORT_FILE):
            (self.folder / name).unlink(missing_ok=True)
        remove_announced(announced)
        remove_tables(self.folder)

    def _last_summary(self) -> dict[str, Any]:
        path = self.folder / SUMMARY_FILE
        return read_json(path) if path.is_file() else {}

    def _finish(self, startup: float, rewritten: int) -> Summary:
        progress, known = self.progress, self.known
        passed_over = self.inputs.passed_over
        if progress.rows == 0 and not passed_over.counts:
            # Files that hold recordings are not read once more.
            passed_over = self._passed_over
        errors = error_counts(known.errors())
        elapsed, batcher = progress.elapsed, self.runner.batcher
        hours = progress.audio_seconds / 3600
        content = {
            "rows": len(known),
            "good": known.good(),
            "errors": errors,
            "passed_over": passed_over.as_json(),
            "changed": known.changed.as_json(),
            "vanished": known.vanished.as_json(),
            "whole": known.whole,
            "audio_hours": round(known.audio_seconds() / 3600, 6),
            "this_run": {
                "rows": progress.rows,
                "rewritten_rows": rewritten,
                "audio_hours": round(hours, 6),
                "seconds": round(elapsed, 3),
                "startup_seconds": round(startup, 3),
                "model_seconds": round(batcher.seconds, 3),
                "waiting_for_audio_seconds": round(self.runner.waited, 3),
                "batches": batcher.batches,
                "rows_per_second": round(progress.rows / elapsed, 3),
                "audio_hours_per_hour": round(hours * 3600 / elapsed, 3),
                "real_time_factor": progress.state()["real_time_factor"],
                "peak_memory_bytes": peak_memory(),
            },
            "frame_budget": batcher.frame_budget,
            "device": self._device(),
            "versions": versions(),
        }
        write_json(self.folder / SUMMARY_FILE, content)
        progress.event("summary", content)
        return Summary(len(known), errors, content)

    def _device(self) -> str | None:
        if self.runner.batcher.batches == 0:
            return None
        import torch

        device = next(self.runner.task.network.parameters()).device
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"{device} ({torch.get_num_threads()} threads)"


def _gone(before: dict[str, Any], inputs: Inputs) -> str | None:
    """A folder that a job reads, that is named once more, and that is not there."""
    known = before.get("input")
    names = known.get("names", ()) if isinstance(known, dict) else ()
    files = (part for part in inputs.parts if isinstance(part, Files))
    paths = {os.path.abspath(path) for part in files for path in part.paths}
    return next((name for name in names if name in paths and not os.path.exists(name)), None)


def _extended(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint with what may be added to a job: formats of files of single recordings, and
    timestamps."""
    options, wanted = dict(before.get("options", {})), now["options"]
    names = [*options.get("formats", ()), *wanted["formats"]]
    more = [name for name in names if name not in options.get("formats", ())]
    if set(names) == set(wanted["formats"]) and all(FORMATS[n].per_recording for n in more):
        if "layout" in wanted and not any(FORMATS[n].has_cues for n in options["formats"]):
            options["layout"] = wanted["layout"]
        options["formats"] = wanted["formats"]
    if is_more(options.get("timestamps"), wanted.get("timestamps")):
        options["timestamps"] = wanted["timestamps"]
    return {**before, "options": options}
