"""The bodies of the commands that run jobs: `transcribe --out`, `embed` and `classify`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from w2vbert_fast.inference.ctc.language_model import read_words
from w2vbert_fast.inference.jobs.inputs import open_inputs
from w2vbert_fast.inference.jobs.job import Job, JobOptions, Summary
from w2vbert_fast.inference.jobs.which_files import PassedOver
from w2vbert_fast.inference.runner import Flow, Runner
from w2vbert_fast.inference.tasks.base import Task
from w2vbert_fast.inference.tasks.transcribe import Classify, Embed, Transcribe

TASKS: dict[str, type[Task]] = {"transcribe": Transcribe, "embed": Embed, "classify": Classify}

_AUTO = "auto"
# Hidden states of so much audio, 24 layers of the published model in float32, are 120 MB.
_EMBEDDING_WINDOW_SECONDS = 600.0


def run_job(
    task: str,
    names: Sequence[str],
    out: str,
    *,
    task_options: Mapping[str, Any],
    formats: Sequence[str] = (),
    frame_budget: str = _AUTO,
    workers: int | None = None,
    longest: float | None = None,
    job_options: Mapping[str, Any] | None = None,
    report: Callable[[str], None],
    make_runner: Callable[[Task, Flow], Runner[Any]] = Runner,
) -> int:
    """Run a job as the command line asks for it.

    Args:
        task: "transcribe", "embed" or "classify".
        names: files, folders, patterns, tar files and manifests.
        out: the job's folder.
        task_options: of the task's class.
        formats: names of formats; none: the task's own.
        frame_budget: a number, or "auto".
        workers: threads that decode; None: by the number of CPUs.
        longest: seconds of the longest recording; None: the usual limit.
        job_options: of `JobOptions`.
        report: prints a message for the user.
        make_runner: makes the engine of a task and a flow; the usual one is this process's own.

    Returns:
        The exit status: 0 when all rows went well, 1 when some did not.

    Raises:
        JobError, OSError, ValueError, TypeError, ImportError: the job has failed.
    """
    options = JobOptions(**(job_options or {}))
    given = dict(task_options)
    if task == "transcribe":
        given = transcribe_options(given, formats)
    flow: dict[str, Any] = {"workers": workers, "frame_budget": checked_budget(frame_budget)}
    if longest is not None:
        flow["longest"] = longest
    if task == "embed":
        flow["window_seconds"] = _EMBEDDING_WINDOW_SECONDS
    flow["window_rows"] = min(Flow.window_rows, options.shard_rows)
    runner = make_runner(TASKS[task](**given), Flow(**flow))
    inputs = open_inputs(names)
    with _stoppable(), messages(report):
        summary = Job(runner, inputs, out, formats, options).run()
    if not options.log_json:
        report(_ending(summary, out))
    return 1 if summary.errors else 0


def transcribe_options(given: Mapping[str, Any], formats: Sequence[str]) -> dict[str, Any]:
    """The options of `Transcribe` as the command line gives them: times as the formats need them.

    Hotwords are phrases separated by commas, or files with one a line.

    Raises:
        OSError: a file of hotwords cannot be read.
        ValueError: it is not UTF-8, or there are no hotwords where some are given.
    """
    options = dict(given)
    if options.get("timestamps") is None:
        options["timestamps"] = "word" if {"srt", "vtt", "json"} & set(formats) else "none"
    hotwords: list[str] = []
    for text in options.get("hotwords") or ():
        # A word may have a slash; what is in a folder that is there is a name.
        if text.endswith(".txt") or os.path.isfile(text) or os.path.isdir(os.path.dirname(text)):
            hotwords += read_words(text)
            continue
        phrases = [phrase for part in text.split(",") if (phrase := part.strip())]
        if not phrases:
            raise ValueError(f"--hotwords {text!r} holds no words")
        hotwords += phrases
    options["hotwords"] = hotwords
    return options


def checked_budget(text: str) -> int | str:
    """A frame budget as the command line gives it."""
    if text == _AUTO:
        return _AUTO
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--frame-budget must be a number or {_AUTO}, got {text!r}") from None


def _ending(summary: Summary, out: str) -> str:
    run = summary.content["this_run"]
    text = f"{summary.rows} rows, {summary.content['audio_hours']:.2f} h of audio"
    if run["rows"]:
        text += (
            f"; {run['rows']} in {run['seconds']:.1f} s now, "
            f"{run['audio_hours_per_hour']:.0f} h of audio an hour"
        )
    passed_over = PassedOver.from_json(summary.content["passed_over"])
    if passed_over.counts:
        text += f"; passed over: {passed_over}"
    count = sum(summary.errors.values())
    if count:
        kinds = ", ".join(f"{number} {name}" for name, number in summary.errors.items())
        text += f"; {count} errors ({kinds}), see {os.path.join(out, 'errors-*.jsonl')}"
    return text


@contextmanager
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


@contextmanager
def messages(report: Callable[[str], None], *, below_progress: bool = True) -> Iterator[None]:
    """Show what the package logs for users, such as that a batch did not fit into memory.

    Warnings of all of it, and of what runs models also what they run with.

    Args:
        report: prints a message.
        below_progress: begin a new line on a terminal, below the one that shows progress.
    """

    class Reporter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if below_progress and sys.stderr.isatty():
                print(file=sys.stderr)
            report(record.getMessage())

    log, talkative = (
        logging.getLogger(name) for name in ("w2vbert_fast", "w2vbert_fast.inference")
    )
    handler = Reporter(logging.INFO)
    before = log.propagate, talkative.level
    log.propagate = False
    log.addHandler(handler)
    talkative.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before[0]
        talkative.setLevel(before[1])
