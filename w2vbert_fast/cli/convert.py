"""The command `w2vbert-fast convert`: the original checkpoint to the reference layout and back."""

# No `from __future__ import annotations`: typer reads the annotations of the command.
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

    from w2vbert_fast.export.original import Converted

HELP = (
    "Convert the original checkpoint of w2v-BERT 2.0 (conformer_shaw.pt, in the layout of fairseq2 "
    "and Seamless Communication, or of fairseq) to a folder that from_pretrained loads; or, where "
    "SOURCE is such a folder or a hub id, back to one file with fairseq2's names.\n\n"
    "Only tensors are read: no code that a file may hold is run. Missing and unexpected tensors "
    "are listed before anything is written."
)


def register(
    app: "typer.Typer", report: Callable[[str], None], fail: Callable[[Exception], Any]
) -> None:
    """Add the command to a typer app; the arguments are those of the other commands' `register`."""
    import typer

    @app.command("convert", short_help="Convert the original checkpoint, or back.", help=HELP)
    def convert_command(
        source: Annotated[
            str, typer.Argument(metavar="SOURCE", help="conformer_shaw.pt, a folder or a hub id.")
        ],
        out: Annotated[
            Path, typer.Argument(metavar="OUT", help="The folder, or back: the file, .pt.")
        ],
        config: Annotated[
            Path | None,
            typer.Option(
                metavar="PATH",
                help="From the original: a folder with the config.json to take instead of the "
                "published settings.",
            ),
        ] = None,
        pretraining: Annotated[
            Path | None,
            typer.Option(
                metavar="PT",
                help="To the original: an original checkpoint to take the tensors from that only "
                "pre-training uses.",
            ),
        ] = None,
    ) -> None:
        try:
            converted = _convert(source, out, config, pretraining)
        except (OSError, ValueError, TypeError) as error:
            fail(error)
            return
        for file in converted.files:
            print(file)
        left = len(converted.left_out)
        used = f"; {left} that only pre-training uses were left out" if left else ""
        report(f"{converted.num_tensors} tensors{used}")


def _convert(source: str, out: Path, config: Path | None, pretraining: Path | None) -> "Converted":
    from w2vbert_fast.export.original import convert_original, convert_to_original
    from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

    if Path(source).is_file():
        if pretraining is not None:
            raise ValueError("--pretraining is for the way back; SOURCE is an original checkpoint")
        chosen = None if config is None else Wav2Vec2BertConfig.from_pretrained(config)
        return convert_original(source, out, config=chosen)
    if config is not None:
        raise ValueError("--config is for original checkpoints; SOURCE has its own config.json")
    if Path(source).suffix == ".pt":
        raise FileNotFoundError(f"{source} does not exist")
    if out.is_dir() or out.suffix != ".pt":
        raise ValueError(f"OUT is {out}; on the way back it must be a file that ends in .pt")
    return convert_to_original(source, out, pretraining=pretraining)
