"""The command line, `w2vbert-fast`.

Exit status: 0 when everything went well, 1 when some file failed, 2 when nothing could be started
(wrong usage, a model that cannot be loaded, a missing package).
"""

# No `from __future__ import annotations`: typer reads the annotations of `options`.
from typing import Annotated, Any

from w2vbert_fast import __version__
from w2vbert_fast._extras import require
from w2vbert_fast.cli import (
    align,
    classify,
    convert,
    doctor,
    embed,
    evaluate,
    export,
    finetune,
    report,
    transcribe,
    tune,
    tune_lm,
    warm,
)
from w2vbert_fast.cli.messages import PROGRAM, fail
from w2vbert_fast.cli.options import add


def main() -> None:
    """Run the command line on `sys.argv`."""
    try:
        require("typer", "audio,cli")
        require("rich", "audio,cli")
    except ImportError as error:
        fail(error)
    build_app()(prog_name=PROGRAM)


def build_app() -> Any:
    """The app of typer, with all commands."""
    import typer

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
        """Hold the options that come before a command."""

    inferring = (transcribe, align, doctor, embed, classify, report)
    for module in (*inferring, evaluate, tune_lm, finetune, export, convert, tune, warm):
        add(app, module.command, short=module.SHORT, help_text=module.HELP)
    return app
