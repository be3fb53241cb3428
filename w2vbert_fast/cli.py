"""The command line, `w2vbert-fast`.

Exit status: 0 when everything went well, 1 when some file failed, 2 when nothing could be started
(wrong usage, a model that cannot be loaded, a missing package).
"""

# No `from __future__ import annotations`: typer reads the annotations of the commands, and they
# name things that exist only inside `_build_app`.
import contextlib
import enum
import json
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from w2vbert_fast import __version__
from w2vbert_fast._extras import require
from w2vbert_fast.cli_jobs import JOB_HELP, given_options, register, start, with_job_options

if TYPE_CHECKING:
    from w2vbert_fast.inference.transcribe import Pipeline, Transcript

PROGRAM = "w2vbert-fast"
DEMO_NOTICE = (
    "the model 'demo' knows English telephone prompts only; "
    "for open speech: --model hf-audio/wav2vec2-bert-CV16-en"
)
TRANSCRIBE_HELP = (
    "Print what is said in audio files: for every file its name, the text, the seconds of audio, "
    "and the real-time factor (seconds of processing per second of audio).\n\n"
    "Where the output is not a terminal, these are four columns separated by tabs. A file that "
    "cannot be read is reported and the others go on; the exit status is then 1.\n\n"
    "With --out, results go to a folder instead, and the files may also be folders, patterns, "
    "WebDataset shards (.tar) and manifests (.jsonl, .csv, .tsv, .parquet); the options below it "
    "are for that. " + JOB_HELP
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

    from w2vbert_fast.convert_command import register as register_convert
    from w2vbert_fast.export_command import register as register_export
    from w2vbert_fast.training.command import register as register_finetune

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
        files: Annotated[
            list[str],
            typer.Argument(
                metavar="FILE", help="Audio files: any format, sampling rate and channels."
            ),
        ],
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
            typer.Option(metavar="DIR", help="Folder for results, of a job that can be resumed."),
        ] = None,
        timestamps: Annotated[
            str | None,
            typer.Option(
                metavar="none|word|character",
                help="Times and confidences. Default: word for srt and vtt, else none.",
            ),
        ] = None,
        beam: Annotated[
            int, typer.Option(help="Hypotheses of the beam search; 0 decodes greedily.")
        ] = 0,
        lm: Annotated[
            str | None, typer.Option(metavar="FILE", help="n-gram model of the beam search.")
        ] = None,
        lm_weight: Annotated[float | None, typer.Option(help="Weight of its score.")] = None,
        word_bonus: Annotated[float | None, typer.Option(help="Score of every word.")] = None,
        **shared: Any,
    ) -> None:
        if out is None:
            own = {
                "timestamps": timestamps,
                "beam": beam or None,
                "lm": lm,
                "lm_weight": lm_weight,
                "word_bonus": word_bonus,
            }
            for option in given_options(own, shared):
                raise typer.BadParameter(f"{option} needs --out")
            pipeline = _load(model, device, dtype)
            raise typer.Exit(_transcribe(files, pipeline, as_json))
        if as_json:
            raise typer.BadParameter("--json is for printing; with --out there is --log-json")
        if model == "demo":
            _report(DEMO_NOTICE)
        options = {
            "model": model,
            "device": device,
            "dtype": None if dtype is None else dtype.value,
            "timestamps": timestamps,
            "beam": beam,
            "lm": lm,
            "lm_weight": lm_weight,
            "word_bonus": word_bonus,
        }
        raise typer.Exit(start("transcribe", files, out, options, shared, _report, _fail))

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


def _load(model: str, device: str | None, dtype: Dtype | None) -> "Pipeline":
    try:
        from w2vbert_fast.inference.transcribe import DEMO_MODEL, load_pipeline

        if model == DEMO_MODEL:
            _report(DEMO_NOTICE)
        return load_pipeline(model, device=device, dtype=None if dtype is None else dtype.value)
    except (OSError, ValueError, ImportError) as error:
        _fail(error)


def _transcribe(files: list[str], pipeline: "Pipeline", as_json: bool) -> int:
    """Transcribe and print; the exit status."""
    from rich.console import Console

    from w2vbert_fast.inference.transcribe import transcribe

    readable = sys.stdout.isatty() and not as_json
    console = Console(stderr=not readable, highlight=False)
    status = 0
    rows = transcribe(files, pipeline)
    if len(files) > 1 and (readable or (sys.stderr.isatty() and not sys.stdout.isatty())):
        rows = _with_progress(rows, len(files), console)
    try:
        with contextlib.closing(rows):
            for row in rows:
                if as_json:
                    _write_line(_as_json(row))
                elif row.error is not None:
                    _report(f"{_one_line(row.file)}: {_one_line(row.error)}")
                elif readable:
                    _print_readably(row, console)
                else:
                    _write_line(_as_columns(row))
                if row.error is not None:
                    status = ITEMS_FAILED
    except ImportError as error:
        _fail(error)
    return status


def _with_progress(
    rows: "Generator[Transcript, None, None]", total: int, console: Any
) -> "Generator[Transcript, None, None]":
    """Pass the rows on, and show on the last line of the console how many are done."""
    from rich import progress

    columns = (
        progress.TextColumn("transcribing"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    # What goes to another place than this console must not be drawn into it.
    with progress.Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task("transcribing", total=total)
        for row in rows:
            yield row
            bar.advance(task)


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


def _as_json(row: "Transcript") -> str:
    if row.error is not None:
        content: dict[str, Any] = {"file": row.file, "error": row.error}
    else:
        assert row.audio_seconds is not None and row.real_time_factor is not None
        content = {
            "file": row.file,
            "text": row.text,
            "seconds": round(row.audio_seconds, 4),
            "real_time_factor": round(row.real_time_factor, 5),
        }
    line = json.dumps(content, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        # A file name that is not UTF-8: escaped, Python and others read the same bytes back.
        line = json.dumps(content)
    return line


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
    with contextlib.suppress(OSError):
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)


def _fail(error: Exception) -> NoReturn:
    """Report an error that leaves nothing to do, in one line, and end the program."""
    _report(_one_line(" ".join(str(error).split())) or type(error).__name__)
    sys.exit(NOT_STARTED)


if __name__ == "__main__":
    main()
