"""The command `w2vbert-fast transcribe`: texts to print, files beside the recordings, or a job."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from w2vbert_fast.cli import jobs
from w2vbert_fast.cli.messages import ITEMS_FAILED, log_shown, one_line, report, write_line
from w2vbert_fast.cli.options import given, option, values
from w2vbert_fast.inference.jobs.formats import (
    BESIDE,
    FORMATS,
    Formats,
    beside_format,
    listed,
    usual_timestamps,
)

if TYPE_CHECKING:
    from w2vbert_fast.inference.batching import Batcher
    from w2vbert_fast.inference.ctc.subtitles import Layout
    from w2vbert_fast.inference.tasks.transcribe import Transcription
    from w2vbert_fast.inference.transcripts import Transcript

SHORT = "Print what is said in audio files."
TIMED = [name for name, kind in FORMATS.items() if kind.has_times]
DEMO_NOTICE = (
    "the model 'demo' knows English telephone prompts only; "
    "for open speech: --model hf-audio/wav2vec2-bert-CV16-en"
)
HELP = (
    "Print what is said in recordings: for every one its name, the text, the seconds of audio, "
    "and the real-time factor (seconds of processing per second of audio).\n\n"
    "Where the output is not a terminal, these are four columns separated by tabs. A recording "
    "that cannot be read is reported and the others go on; the exit status is then 1.\n\n"
    f"With --format {listed([*BESIDE], 'or')} a file is written beside the recording instead "
    "(talk.mp4: talk.srt), or to --out FILE; beside each of several with --beside. Files that are "
    "there are not replaced without --overwrite.\n\n"
    "With --out DIR it is a job; such files are then in DIR/srt, in folders as the input has them, "
    "or with --beside beside the recordings. " + jobs.HELP
)


@dataclass(kw_only=True)
class Model(jobs.Model):
    """The model, which is there without one."""

    model: str = option(
        "demo",
        "The model in this package, a folder, or a model of the Hugging Face hub.",
        metavar="demo|PATH|HUB_ID",
    )
    device: str | None = option(
        None, "cpu, cuda or cuda:N. Default: a CUDA device if there is one."
    )
    dtype: jobs.Dtype | None = option(
        None, "Default: the checkpoint's own on a GPU, float32 on a CPU; int8 is for CPUs."
    )


@dataclass(kw_only=True)
class Printing:
    """What means nothing in a job."""

    as_json: bool = option(False, "Print one JSON object a line.", "--json")


@dataclass(kw_only=True)
class Target:
    out: str | None = option(
        None,
        "Folder of a job, which can be resumed; or a file such as talk.srt.",
        metavar="DIR|FILE",
    )
    beside: bool = option(
        False, "Write files of single recordings beside those; that of the only one is, anyway."
    )

    @property
    def is_job(self) -> bool:
        """Whether `out` names a folder."""
        return self.out is not None and _file_format(self.out) is None


@dataclass(kw_only=True)
class Sound(jobs.Sound):
    """What is taken of recordings, channel by channel too."""

    channels: str = option(
        "mix",
        "The mean of all channels; split: each by itself, merged by time; or one, from 0.",
        metavar="mix|split|N",
    )
    speakers: str | None = option(
        None, "Names of the channels, such as agent,customer; with split.", metavar="NAMES"
    )

    def of_task(self) -> dict[str, Any]:
        """Arguments of `Transcribe`: names one by one."""
        names = [] if self.speakers is None else [n.strip() for n in self.speakers.split(",")]
        return {**super().of_task(), "speakers": names}


@dataclass(kw_only=True)
class Search:
    """How texts are found."""

    beam: int = option(0, "Hypotheses of the beam search; 0 decodes greedily.")
    lm: str | None = option(
        None,
        "n-gram model of the beam search. Default: in the model's language_model/.",
        metavar="FILE|none",
    )
    lm_weight: float | None = option(None, "Weight of its score.")
    word_bonus: float | None = option(None, "Score of every word.")
    unigrams: str | None = option(
        None, "Words that the n-gram model knows, where it does not say so.", metavar="FILE"
    )
    hotwords: list[str] | None = option(
        None,
        "Words and phrases to prefer: separated by commas, or a file of lines.",
        metavar="WORDS|FILE",
    )
    hotword_weight: float | None = option(None, "How much.")

    def of_task(self) -> dict[str, Any]:
        """Arguments of `Transcribe`.

        Hotwords are phrases separated by commas, or files with one a line.

        Raises:
            OSError: a file of hotwords cannot be read.
            ValueError: it is not UTF-8, or there are no hotwords where some are given.
        """
        from w2vbert_fast.inference.ctc.language_model import read_words

        hotwords: list[str] = []
        for text in self.hotwords or ():
            # A word may have a slash; what is in a folder that is there is a name.
            in_folder = os.path.isdir(os.path.dirname(text))
            if text.endswith(".txt") or os.path.isfile(text) or in_folder:
                hotwords += read_words(text)
                continue
            phrases = [phrase for part in text.split(",") if (phrase := part.strip())]
            if not phrases:
                raise ValueError(f"--hotwords {text!r} holds no words")
            hotwords += phrases
        return {**values(self), "hotwords": tuple(hotwords)}


@dataclass(kw_only=True)
class Times:
    timestamps: str | None = option(
        None,
        f"Times and confidences. Default: word for {listed(TIMED, 'and')}, else none.",
        metavar="none|word|character",
    )


@dataclass(kw_only=True)
class Subtitles:
    """The limits of a cue: those of `Layout`, of which the usual ones need not be given."""

    line_length: int | None = option(
        None, "Columns of a line of subtitles; wide characters take two. Default: 42."
    )
    max_lines: int | None = option(None, "Lines of a cue. Default: 2.")
    max_words: int | None = option(None, "Words of a cue. Default: any number.")
    max_cue_seconds: float | None = option(None, "Longest time of a cue. Default: 7.")
    min_cue_seconds: float | None = option(
        None, "Shortest time of a cue, where the next one allows. Default: 1."
    )
    cue_pause_seconds: float | None = option(None, "Silence that ends a cue. Default: 0.6.")
    reading_speed: float | None = option(
        None, "Columns a second: cues stay until they can be read, where the next one allows."
    )
    highlight_words: bool = option(False, "Underline each word while it is spoken, in vtt.")

    def layout(self, formats: Sequence[str]) -> Layout | None:
        """The layout; None where nothing is given.

        Raises:
            ValueError: a limit is impossible.
            typer.BadParameter: an option means nothing for these formats.
        """
        wanted = given(self)
        if not wanted:
            return None
        if not any(FORMATS[name].has_cues for name in formats if name in FORMATS):
            _refuse(wanted, "is for subtitles, --format srt or vtt")
        if self.highlight_words and "vtt" not in formats:
            _refuse(["--highlight-words"], "needs --format vtt")
        from w2vbert_fast.inference.ctc.subtitles import Layout

        limits = {name.replace("cue_", ""): value for name, value in values(self).items()}
        return Layout(**{name: value for name, value in limits.items() if value is not None})


def command(
    source: jobs.Inputs,
    model: Model,
    printing: Printing,
    target: Target,
    sound: Sound,
    times: Times,
    search: Search,
    subtitles: Subtitles,
    chunks: jobs.Chunks,
    job: jobs.Job,
) -> int:
    """Run a job, or transcribe and print; the exit status."""
    is_job = target.is_job
    if is_job:
        _refuse(given(printing), "is for printing; a job has --log-json")
    formats = job.formats or ()
    timestamps = times.timestamps
    if timestamps is None:
        named = [] if is_job or target.out is None else [str(beside_format(target.out))]
        timestamps = usual_timestamps([*formats, *named])
    elif timestamps != "none" and not (formats or printing.as_json or target.out):
        more = "add --json, --format or --out DIR"
        _refuse(["--timestamps"], f"has no effect on what is printed; {more}")
    task = {**values(model, chunks), **sound.of_task(), **search.of_task()}
    task["timestamps"] = timestamps
    return perform("transcribe", source, task, target, subtitles, job, as_json=printing.as_json)


def perform(
    name: str,
    source: jobs.Inputs,
    task: dict[str, Any],
    target: Target,
    subtitles: Subtitles,
    job: jobs.Job,
    *,
    as_json: bool,
) -> int:
    """Run a job of words, or print them or write them beside the recordings; the exit status.

    Args:
        name: of the task.
        source: what is read.
        task: options of its class.
        target: where results go.
        subtitles: their layout.
        job: how it is run.
        as_json: print JSON, where no files are written.
    """
    formats = list(dict.fromkeys(job.formats or ()))
    if target.is_job:
        if target.beside and not {*BESIDE} & {*formats}:
            _refuse(["--beside"], "needs a --format with a file for each recording")
    else:
        formats = _formats_beside(formats, target.out)
        in_folders = [f for f in formats if f in FORMATS and f not in BESIDE]
        _refuse([f"--format {f}" for f in in_folders], "needs --out DIR")
        if target.beside and (target.out is not None or not formats):
            _refuse(["--beside"], f"needs --format {listed([*BESIDE], 'or')}, and no file in --out")
        _refuse(given(job, jobs.Books, jobs.Engine), "needs --out DIR")
        if job.overwrite and not formats:
            _refuse(["--overwrite"], "needs --format or --out")
    layout = subtitles.layout(formats)
    if task["model"] == "demo":
        report(DEMO_NOTICE)
    if target.out is not None and target.is_job:
        how = {"layout": layout, "beside": target.beside}
        return jobs.run_job(name, source, target.out, task, job, **how)
    return _print(name, source, task, job, formats, target, as_json, layout)


def _refuse(options: list[str], why: str) -> None:
    import typer

    for name in options:
        raise typer.BadParameter(f"{name} {why}")


def _formats_beside(formats: list[str], out: str | None) -> list[str]:
    """The formats of files, one of which may be named."""
    if out is None:
        return formats
    of_file = str(_file_format(out))
    if formats not in ([], [of_file]):
        _refuse([f"--out {out}"], f"is not of --format {', '.join(formats)}")
    return [of_file]


def _file_format(out: str) -> str | None:
    """The format of a file that `--out` names; None: it names a folder."""
    return None if os.path.isdir(out) else beside_format(out)


def _print(
    name: str,
    source: jobs.Inputs,
    task: dict[str, Any],
    job: jobs.Job,
    formats: list[str],
    target: Target,
    as_json: bool,
    layout: Layout | None,
) -> int:
    """Transcribe and print, or write a file for each recording; the exit status."""
    from rich.console import Console

    from w2vbert_fast.inference.jobs import sidecars
    from w2vbert_fast.inference.runner import Flow, Runner
    from w2vbert_fast.inference.tasks import TASKS
    from w2vbert_fast.inference.transcripts import transcripts

    readable = sys.stdout.isatty() and not as_json
    console = Console(stderr=not readable, highlight=False)
    status = 0
    flow = Flow(**job.flow(probe=False), window_rows=1)
    runner: Runner[Transcription] = Runner(TASKS[name](**task), flow)
    Formats.of_task(runner.task, [f for f in formats if f not in FORMATS or FORMATS[f].in_jobs])
    inputs = source.open()
    files = None
    if formats:
        where = {"beside": target.beside, "overwrite": job.overwrite}
        files = sidecars.plan(inputs, formats, target.out, **where)
    characters = task["timestamps"] == "character"
    rows = transcripts(runner, inputs.rows())
    if readable or (sys.stderr.isatty() and not sys.stdout.isatty()):
        rows = with_progress(rows, inputs.total, runner.batcher, console)
    with contextlib.closing(rows), log_shown("w2vbert_fast.inference"):
        for row in rows:
            if row.error is not None:
                status = ITEMS_FAILED
            elif files is not None:
                sidecars.write(row, files[row.file], characters=characters, layout=layout)
            _report_differences(row)
            if as_json:
                write_line(row.to_json(characters))
            elif row.error is not None:
                report(f"{one_line(row.file)}: {one_line(row.error)}")
            elif files is not None:
                for path in files[row.file]:
                    write_line(one_line(str(path)))
            elif readable:
                _print_readably(row, console)
            else:
                write_line(_as_columns(row))
    if inputs.passed_over.counts:
        report(f"passed over: {inputs.passed_over}")
    return status


def _report_differences(row: Transcript) -> None:
    """Say where a known transcript and the recording differ."""
    for stretch in row.unwritten or ():
        times = f"{stretch.start:.2f} to {stretch.end:.2f} s"
        report(f"{one_line(row.file)}: not in the transcript: {times}, {one_line(stretch.text)!r}")
    for place in row.unsaid or ():
        assert row.words is not None
        word = row.words[place]
        what = f"word {place} {one_line(word.text)!r}, {word.start:.2f} s"
        report(f"{one_line(row.file)}: probably not said: {what}")


def with_progress(
    rows: Generator[Transcript, None, None], total: int | None, batcher: Batcher, console: Any
) -> Generator[Transcript, None, None]:
    """Pass the rows on, and show on the last line of the console how many are done.

    Of a single recording it is shown how far it is, once that is more than one batch.
    """
    from rich import progress

    columns = (
        progress.TextColumn("transcribing"),
        progress.BarColumn(),
        progress.TaskProgressColumn() if total == 1 else progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # What goes to another place than this console must not be drawn into it.
    bar = progress.Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=sys.stderr.isatty(),
    )
    task = bar.add_task("transcribing", total=total)
    done = 0

    def watch(seconds: float, of: float) -> None:
        if seconds < of:
            bar.start()
        bar.update(task, completed=done + seconds / of)

    batcher.watch = watch
    if total != 1:
        bar.start()
    try:
        for row in rows:
            done += 1
            bar.update(task, completed=done)
            yield row
    finally:
        bar.stop()


def _print_readably(row: Transcript, console: Any) -> None:
    from rich.padding import Padding
    from rich.text import Text

    heading = Text.assemble(
        (one_line(row.file), "bold"),
        (f"  {row.audio_seconds:.2f} s, real-time factor {row.real_time_factor:.3f}", "dim"),
    )
    console.print(heading)
    console.print(Padding(Text(row.text or "(no speech)"), (0, 0, 0, 2)))


def _as_columns(row: Transcript) -> str:
    text = one_line(row.text or "")
    return f"{one_line(row.file)}\t{text}\t{row.audio_seconds:.2f}\t{row.real_time_factor:.4f}"
