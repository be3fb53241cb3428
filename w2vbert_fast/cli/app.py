"""The command line, `w2vbert-fast`.

Exit status: 0 when everything went well, 1 when some file failed, 2 when nothing could be started
(wrong usage, a model that cannot be loaded, a missing package).
"""

# No `from __future__ import annotations`: typer reads the annotations of the commands, and they
# name things that exist only inside `_build_app`.
import contextlib
import enum
import json
import os
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from w2vbert_fast import __version__
from w2vbert_fast._extras import require
from w2vbert_fast.cli.jobs import (
    INPUT_HELP,
    JOB_HELP,
    OF_ALL_TASKS,
    OF_JOBS,
    given_options,
    register,
    start,
    with_job_options,
)

if TYPE_CHECKING:
    from w2vbert_fast.inference.batching import Batcher
    from w2vbert_fast.inference.transcripts import Transcript

PROGRAM = "w2vbert-fast"
DEMO_NOTICE = (
    "the model 'demo' knows English telephone prompts only; "
    "for open speech: --model hf-audio/wav2vec2-bert-CV16-en"
)
SIDECAR_FORMATS = ("srt", "vtt", "txt", "json")
TRANSCRIBE_HELP = (
    "Print what is said in recordings: for every one its name, the text, the seconds of audio, "
    "and the real-time factor (seconds of processing per second of audio).\n\n"
    "Where the output is not a terminal, these are four columns separated by tabs. A recording "
    "that cannot be read is reported and the others go on; the exit status is then 1.\n\n"
    "With --format srt, vtt, txt or json a file is written beside each recording instead "
    "(talk.mp4: talk.srt), or for a single one to --out FILE. Files that are there are not "
    "replaced without --overwrite.\n\n"
    "With --out DIR it is a job. " + JOB_HELP
)
DOCTOR_HELP = (
    "Print what is installed, what this machine has, which implementation each operation would use "
    "and why, and the error and time of each against plain PyTorch. The exit status is 1 when a "
    "check failed."
)
ITEMS_FAILED = 1
NOT_STARTED = 2


class Dtype(str, enum.Enum):
    """Types of the weights that a model runs with."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"


def main() -> None:
    """Run the command line on `sys.argv`."""
    try:
        require("typer", "audio,cli")
        require("rich", "audio,cli")
    except ImportError as error:
        _fail(error)
    _build_app()(prog_name=PROGRAM)


def _build_app() -> Any:
    import typer

    from w2vbert_fast.cli.convert import register as register_convert
    from w2vbert_fast.cli.export import register as register_export
    from w2vbert_fast.cli.finetune import register as register_finetune

    app = typer.Typer(
        help="Wav2Vec2-BERT speech recognition, fast.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def print_version(wanted: bool) -> None:
        if wanted:
            print(f"{PROGRAM} {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", help="Print the version.", callback=print_version, is_eager=True
            ),
        ] = False,
    ) -> None:
        """Hold the options that come before a command; it also keeps `transcribe` a command."""

    @app.command(
        "transcribe", short_help="Print what is said in audio files.", help=TRANSCRIBE_HELP
    )
    @with_job_options
    def transcribe_command(
        *,
        inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help=INPUT_HELP)],
        model: Annotated[
            str,
            typer.Option(
                metavar="demo|PATH|HUB_ID",
                help="The model in this package, a folder, or a model of the Hugging Face hub.",
            ),
        ] = "demo",
        as_json: Annotated[
            bool, typer.Option("--json", help="Print one JSON object a line.")
        ] = False,
        device: Annotated[
            str | None,
            typer.Option(help="cpu, cuda or cuda:N. Default: a CUDA device if there is one."),
        ] = None,
        dtype: Annotated[
            Dtype | None,
            typer.Option(
                help="Default: the checkpoint's own on a GPU, float32 on a CPU; int8 is for CPUs."
            ),
        ] = None,
        out: Annotated[
            str | None,
            typer.Option(
                metavar="DIR|FILE",
                help="Folder of a job, which can be resumed; or a file such as talk.srt.",
            ),
        ] = None,
        timestamps: Annotated[
            str | None,
            typer.Option(
                metavar="none|word|character",
                help="Times and confidences. Default: word for srt, vtt and json, else none.",
            ),
        ] = None,
        beam: Annotated[
            int, typer.Option(help="Hypotheses of the beam search; 0 decodes greedily.")
        ] = 0,
        lm: Annotated[
            str | None,
            typer.Option(
                metavar="FILE|none",
                help="n-gram model of the beam search. Default: in the model's language_model/.",
            ),
        ] = None,
        lm_weight: Annotated[float | None, typer.Option(help="Weight of its score.")] = None,
        word_bonus: Annotated[float | None, typer.Option(help="Score of every word.")] = None,
        unigrams: Annotated[
            str | None,
            typer.Option(
                metavar="FILE", help="Words that the n-gram model knows, where it does not say so."
            ),
        ] = None,
        hotwords: Annotated[
            list[str] | None,
            typer.Option(
                metavar="WORDS|FILE",
                help="Words and phrases to prefer: separated by commas, or a file of lines.",
            ),
        ] = None,
        hotword_weight: Annotated[float | None, typer.Option(help="How much.")] = None,
        **shared: Any,
    ) -> None:
        options = {
            "model": model,
            "device": device,
            "dtype": None if dtype is None else dtype.value,
            "timestamps": timestamps,
            "beam": beam,
            "lm": lm,
            "lm_weight": lm_weight,
            "word_bonus": word_bonus,
            "unigrams": unigrams,
            "hotwords": hotwords,
            "hotword_weight": hotword_weight,
        }
        file = None if out is None or _file_format(out) is None else out
        if out is not None and file is None:
            if as_json:
                raise typer.BadParameter("--json is for printing; a job has --log-json")
            if model == "demo":
                _report(DEMO_NOTICE)
            raise typer.Exit(start("transcribe", inputs, out, options, shared, _report, _fail))
        formats = list(dict.fromkeys(shared["formats"] or ()))
        if file is not None:
            formats = formats or [str(_file_format(file))]
            if formats != [_file_format(file)]:
                raise typer.BadParameter(f"--out {file} is not of --format {', '.join(formats)}")
        for name in formats:
            if name not in SIDECAR_FORMATS:
                raise typer.BadParameter(f"--format {name} needs --out DIR")
        for option in given_options({}, {name: shared[name] for name in OF_JOBS}):
            raise typer.BadParameter(f"{option} needs --out DIR")
        if shared["overwrite"] and not formats:
            raise typer.BadParameter("--overwrite needs --format or --out")
        if timestamps not in (None, "none") and not (formats or as_json):
            raise typer.BadParameter(
                "--timestamps has no effect on what is printed; add --json, --format or --out DIR"
            )
        options.update((name, shared[name]) for name in OF_ALL_TASKS)
        raise typer.Exit(_transcribe(inputs, options, shared, formats, file, as_json))

    @app.command("doctor", short_help="Check what runs here, and how.", help=DOCTOR_HELP)
    def doctor_command(
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:
        raise typer.Exit(_doctor(as_json))

    register(app, _report, _fail, Dtype)
    register_finetune(app, _report, _fail)
    register_export(app, _report, _fail)
    register_convert(app, _report, _fail)
    return app


def _doctor(as_json: bool) -> int:
    """Examine this machine and print what was found; the exit status."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from w2vbert_fast.doctor import examine

    found = examine()
    if as_json:
        content = {**dataclasses.asdict(found), "passed": found.passed}
        content["packages"], content["machine"] = dict(found.packages), dict(found.machine)
        content["reasons"] = dict(found.reasons)
        _write_line(json.dumps(content, indent=2))
        return 0 if found.passed else ITEMS_FAILED
    # Lines are not wrapped where the output is a file.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for title, rows in (("Installed", found.packages), ("Machine", found.machine)):
        console.print(title, style="bold")
        for name, value in rows:
            console.print(f"  {name:20} {value}", markup=False)
    console.print("Implementations", style="bold")
    for device, reason in found.reasons:
        console.print(f"  {device:20} {reason}", markup=False)
    table = Table(title="Self-check: relative error against plain PyTorch in float64")
    for column in ("operation", "device", "dtype", "implementation", "error", "limit", "ms", ""):
        table.add_column(column, justify="right" if column in ("error", "limit", "ms") else "left")
    for check in found.checks:
        table.add_row(
            check.operation,
            check.device,
            check.dtype,
            check.implementation,
            "" if check.error is None else f"{check.error:.1e}",
            f"{check.limit:.1e}",
            "" if check.milliseconds is None else f"{check.milliseconds:.2f}",
            "ok" if check.passed else "FAILED",
        )
    console.print(table)
    failed = [check for check in found.checks if not check.passed]
    for check in failed:
        where = f"{check.operation}, {check.device}, {check.dtype}"
        console.print(f"FAILED {where}: {check.failure}", markup=False, soft_wrap=True)
    console.print(f"{len(found.checks)} checks, {len(failed)} failed")
    return 0 if found.passed else ITEMS_FAILED


def _file_format(out: str) -> str | None:
    """The format of a file that `--out` names; None: it names a folder."""
    kind = os.path.splitext(out)[1][1:].lower()
    return kind if kind in SIDECAR_FORMATS and not os.path.isdir(out) else None


def _transcribe(
    names: list[str],
    options: dict[str, Any],
    shared: dict[str, Any],
    formats: list[str],
    out: str | None,
    as_json: bool,
) -> int:
    """Transcribe and print, or write a file for each recording; the exit status."""
    from rich.console import Console

    readable = sys.stdout.isatty() and not as_json
    console = Console(stderr=not readable, highlight=False)
    if options["model"] == "demo":
        _report(DEMO_NOTICE)
    status = 0
    try:
        from w2vbert_fast.cli.running import checked_budget, messages, transcribe_options
        from w2vbert_fast.inference.jobs import sidecars
        from w2vbert_fast.inference.jobs.inputs import open_inputs
        from w2vbert_fast.inference.jobs.shard import Formats
        from w2vbert_fast.inference.reading import LONGEST_SECONDS
        from w2vbert_fast.inference.runner import Flow, Transcriber
        from w2vbert_fast.inference.transcripts import transcripts

        given = transcribe_options(options, formats)
        budget = checked_budget(shared["frame_budget"])
        flow = Flow(
            # A probe takes longer than most of what is printed.
            frame_budget=None if isinstance(budget, str) else budget,
            workers=shared["workers"],
            longest=LONGEST_SECONDS if shared["longest"] is None else shared["longest"],
            window_rows=1,
        )
        runner = Transcriber(**given, flow=flow)
        Formats.of_task(runner.task, [name for name in formats if name != "json"])
        inputs = open_inputs(names)
        files = None
        if formats:
            files = sidecars.plan(inputs, formats, out, overwrite=shared["overwrite"])
        characters = given["timestamps"] == "character"
        rows = transcripts(runner, inputs.rows())
        if readable or (sys.stderr.isatty() and not sys.stdout.isatty()):
            rows = _with_progress(rows, inputs.total, runner.batcher, console)
        with contextlib.closing(rows), messages(_report, below_progress=False):
            for row in rows:
                if row.error is not None:
                    status = ITEMS_FAILED
                elif files is not None:
                    sidecars.write(row, files[row.file], characters=characters)
                if as_json:
                    _write_line(sidecars.to_json(row, characters))
                elif row.error is not None:
                    _report(f"{_one_line(row.file)}: {_one_line(row.error)}")
                elif files is not None:
                    for path in files[row.file]:
                        _write_line(_one_line(str(path)))
                elif readable:
                    _print_readably(row, console)
                else:
                    _write_line(_as_columns(row))
        if inputs.passed_over.counts:
            _report(f"passed over: {inputs.passed_over}")
    except (RuntimeError, ValueError, TypeError, ImportError, MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        _fail(error)
    return status


def _with_progress(
    rows: "Generator[Transcript, None, None]", total: int | None, batcher: "Batcher", console: Any
) -> "Generator[Transcript, None, None]":
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


def _print_readably(row: "Transcript", console: Any) -> None:
    from rich.padding import Padding
    from rich.text import Text

    heading = Text.assemble(
        (_one_line(row.file), "bold"),
        (f"  {row.audio_seconds:.2f} s, real-time factor {row.real_time_factor:.3f}", "dim"),
    )
    console.print(heading)
    console.print(Padding(Text(row.text or "(no speech)"), (0, 0, 0, 2)))


def _as_columns(row: "Transcript") -> str:
    text = _one_line(row.text or "")
    return f"{_one_line(row.file)}\t{text}\t{row.audio_seconds:.2f}\t{row.real_time_factor:.4f}"


def _one_line(text: str) -> str:
    """Replace what would break a line or a column by its escape, as \\n, \\t or \\udcff."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _write_line(line: str) -> None:
    """Write a line of output as UTF-8, whatever the locale says, and at once."""
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()


def _report(message: str) -> None:
    try:
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    except OSError:
        # Nobody reads it. What is left in its buffer would change the program's exit status.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _fail(error: Exception) -> NoReturn:
    """Report an error that leaves nothing to do, in one line, and end the program."""
    _report(_one_line(" ".join(str(error).split())) or type(error).__name__)
    sys.exit(NOT_STARTED)
