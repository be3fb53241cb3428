"""Options and body of the commands that run jobs: `transcribe --out`, `embed`, `classify`."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from w2vbert_fast.cli.messages import ITEMS_FAILED, fail, log_shown, one_line, report
from w2vbert_fast.cli.options import (
    COLUMNS,
    COLUMNS_METAVAR,
    REQUIRED,
    argument,
    given,
    option,
    values,
)
from w2vbert_fast.inference.jobs.formats import help_text
from w2vbert_fast.recordings.manifest import ColumnNames

if TYPE_CHECKING:
    from w2vbert_fast.inference.jobs.job import Summary
    from w2vbert_fast.recordings.inputs import Inputs as Surveyed

HELP = (
    "Results go to tables in the folder, part-*; rows with errors to errors-*.jsonl. A command "
    "that was stopped, by whatever, goes on when it is given again, and does what is new in its "
    "input. Exit status: 0 all went well, 1 some rows failed, 2 the job did. report.html shows it "
    "all."
)
_AUTO = "auto"


class Dtype(str, enum.Enum):
    """Types of the weights that a model runs with."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


@dataclass(kw_only=True)
class Inputs:
    inputs: list[str] = argument(
        "Files, folders, patterns such as 'calls/**/*.wav', or data sets: JSON lines, CSV, "
        "Parquet, WebDataset tars, AudioFolder, Common Voice, Kaldi (docs/use/datasets.md).",
        metavar="INPUT...",
    )
    columns: str | None = option(None, COLUMNS, metavar=COLUMNS_METAVAR)

    def open(self, *, say: bool = True) -> Surveyed:
        """Survey them, and say what data sets were taken for."""
        from w2vbert_fast.recordings.inputs import open_inputs

        found = open_inputs(self.inputs, ColumnNames.parse(self.columns))
        for line in found.described if say else ():
            report(one_line(line))
        return found


@dataclass(kw_only=True)
class Model:
    """The model of a job."""

    model: str = option(REQUIRED, "Folder or hub id.", metavar="PATH|HUB_ID")
    device: str | None = option(None, "cpu, cuda or cuda:N.")
    dtype: Dtype | None = option(None, "Of the weights.")


@dataclass(kw_only=True)
class Out:
    """The folder of a job."""

    out: str = option(REQUIRED, "Folder for results.", metavar="DIR")


@dataclass(kw_only=True)
class Chunks:
    """What is done with long recordings, whatever is made of them."""

    max_seconds: float = option(
        300.0, "Recordings up to this length are computed whole, longer ones in chunks."
    )
    overlap_seconds: float | None = option(
        None, "What neighbouring chunks have in common. Default: 4."
    )
    vad: bool = option(False, "Cut long recordings at silences.")


@dataclass(kw_only=True)
class Sound:
    """What is taken of recordings, as tasks have it."""

    channels: str = option("mix", "The mean of all channels, or one, from 0.", metavar="mix|N")
    track: str | None = option(
        None,
        "Audio track of a video, from 0, or its language. Default: the file's.",
        metavar="N|LANG",
    )
    salvage: bool = option(False, "Take what decodes of damaged files, and say so in the row.")

    def of_task(self) -> dict[str, Any]:
        """Arguments of a task: numbers as numbers."""
        return {
            name: int(value) if isinstance(value, str) and value.isdecimal() else value
            for name, value in values(self).items()
        }


@dataclass(kw_only=True)
class Reading:
    """How recordings are read and batched."""

    frame_budget: str = option(
        _AUTO, "20 ms frames in a batch; auto: found by a probe.", metavar="N|auto"
    )
    workers: int | None = option(None, "Threads that decode. Default: the CPUs, at most 8.")
    longest: float | None = option(
        None, "Recordings of more seconds are errors. Default: 14400.", "--longest-seconds"
    )

    def flow(self, *, probe: bool = True) -> dict[str, Any]:
        """Arguments of `Flow`.

        Args:
            probe: whether a budget is found by a probe, which takes longer than few recordings do.
        """
        budget: int | str | None = _AUTO if probe else None
        if self.frame_budget != _AUTO:
            try:
                budget = int(self.frame_budget)
            except ValueError:
                raise ValueError(
                    f"--frame-budget must be a number or {_AUTO}, got {self.frame_budget!r}"
                ) from None
        longest = {} if self.longest is None else {"longest": self.longest}
        return {"frame_budget": budget, "workers": self.workers, **longest}


@dataclass(kw_only=True)
class Files:
    """What is written."""

    formats: list[str] | None = option(
        None,
        help_text(),
        "--format",
        metavar="NAME",
    )
    overwrite: bool = option(False, "Replace files, or another job's results in the folder.")


@dataclass(kw_only=True)
class Books:
    """What means nothing without a job's folder."""

    shard_rows: int = option(1000, "Rows of a table.")
    max_errors: int | None = option(None, "End the job when more rows have failed.")
    by_content: bool = option(
        False, "Know recordings by what they hold, and not by path, size and time."
    )
    retry_errors: bool = option(False, "Do the rows again that have failed.")
    log_json: bool = option(False, "Report progress as JSON lines on standard error.")
    no_page: bool = option(False, "Write no report.html at the end.")


@dataclass(kw_only=True)
class Engine:
    """Where a job computes; nor does this."""

    processes: int = option(
        1,
        "Processes that compute on a CPU, each on a part of --threads, with one copy of the model.",
    )
    engine: str = option(
        "local",
        "ray: models live in the actors of a Ray cluster; the options below are for that.",
        metavar="local|ray",
    )
    actors: str | None = option(
        None,
        "How many, or between how many. Default: from 1 to as many as there is room for.",
        metavar="N|MIN:MAX",
    )
    gpus_per_actor: float | None = option(
        None, "Up to 1. Default: 1 where the cluster has GPUs, else 0."
    )
    cpus_per_actor: float = option(1.0, "Threads that decode, or compute without a GPU.")

    def make_runner(self, device: str | None) -> Callable[..., Any]:
        """What makes the runner of a task and a flow."""
        if self.engine == "local":
            from w2vbert_fast.inference.runner import Runner

            for name in given(self, Engine):
                if name != "--processes":
                    raise ValueError(f"{name} is for --engine ray")
            return Runner
        if self.engine != "ray":
            raise ValueError(f"--engine must be local or ray, got {self.engine!r}")
        if self.processes != 1:
            raise ValueError("--processes is for --engine local; with ray there is --actors")
        if device is not None:
            raise ValueError("--device is for --engine local; with ray there is --gpus-per-actor")
        from w2vbert_fast.integrations.ray import job_runner

        gpus, cpus = self.gpus_per_actor, self.cpus_per_actor
        return partial(job_runner, num_gpus=gpus, num_cpus=cpus, concurrency=self._concurrency())

    def _concurrency(self) -> int | tuple[int, int] | None:
        """A number of actors, or the fewest and the most."""
        if self.actors is None:
            return None
        try:
            numbers = [int(part) for part in self.actors.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise ValueError(f"--actors must be a number or MIN:MAX, got {self.actors!r}")
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


@dataclass(kw_only=True)
class Job(Engine, Books, Files, Reading):
    """What all jobs have, beside their input, their model and their folder."""


def run_job(
    task: str,
    source: Inputs,
    out: str,
    task_options: dict[str, Any],
    job: Job,
    **how: Any,
) -> int:
    """Run a job as the command line asks for it; the exit status.

    Args:
        task: "transcribe", "embed" or "classify".
        source: what is read.
        out: the job's folder.
        task_options: of the task's class.
        job: how it is run.
        **how: of the class `Job`: layout, beside.

    Raises:
        JobError, OSError, ValueError, TypeError, ImportError: the job has failed.
    """
    from w2vbert_fast.inference.jobs.job import Job as Run, JobOptions
    from w2vbert_fast.inference.runner import Flow
    from w2vbert_fast.inference.tasks import TASKS

    make_runner = job.make_runner(task_options.get("device"))
    options = JobOptions(
        shard_rows=job.shard_rows,
        max_errors=job.max_errors,
        retry_errors=job.retry_errors,
        overwrite=job.overwrite,
        log_json=job.log_json,
        by_content=job.by_content,
        page=not job.no_page,
    )
    kind = TASKS[task]
    flow = Flow(
        window_rows=min(Flow.window_rows, options.shard_rows),
        window_seconds=kind.window_seconds,
        processes=job.processes,
        **job.flow(),
    )
    runner = make_runner(kind(**task_options), flow)
    inputs = source.open(say=not options.log_json)
    run = Run(runner, inputs, out, job.formats or (), options, **how)
    with _stoppable(), log_shown("w2vbert_fast.inference", below_progress=True):
        try:
            summary = run.run()
        except BrokenPipeError as error:
            # Nobody reads its progress: an error of the job, as a full disk is. What prints texts
            # ends as every command of a pipe does.
            fail(error)
    if not options.log_json:
        report(_ending(summary, out))
    return ITEMS_FAILED if summary.errors else 0


def _ending(summary: Summary, out: str) -> str:
    from w2vbert_fast.recordings.rows import how_many
    from w2vbert_fast.recordings.which_files import PassedOver

    run = summary.content["this_run"]
    text = f"{how_many(summary.rows)}, {summary.content['audio_hours']:.2f} h of audio"
    if run["rows"]:
        text += (
            f"; {run['rows']} in {run['seconds']:.1f} s now, "
            f"{run['audio_hours_per_hour']:.0f} h of audio an hour"
        )
    for what, told in (
        ("changed and done again", summary.content["changed"]),
        ("no longer there", summary.content["vanished"]),
    ):
        if told["rows"]:
            text += f"; {how_many(told['rows'])} {what} ({', '.join(told['examples'])})"
    passed_over = PassedOver.from_json(summary.content["passed_over"])
    if passed_over.counts:
        text += f"; passed over: {passed_over}"
    count = sum(summary.errors.values())
    if count:
        kinds = ", ".join(f"{number} {name}" for name, number in summary.errors.items())
        text += f"; {how_many(count, 'error')} ({kinds}), see {os.path.join(out, 'errors-*.jsonl')}"
    return text


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the job as Ctrl-C does: what is done is kept."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
