"""The command `w2vbert-fast convert`: the original checkpoint to the reference layout and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from w2vbert_fast.cli.messages import report
from w2vbert_fast.cli.options import argument, option

if TYPE_CHECKING:
    from w2vbert_fast.export.original import Converted

SHORT = "Convert the original checkpoint, or back."
HELP = (
    "Convert the original checkpoint of w2v-BERT 2.0 (conformer_shaw.pt, in the layout of fairseq2 "
    "and Seamless Communication, or of fairseq) to a folder that from_pretrained loads; or, where "
    "SOURCE is such a folder or a hub id, back to one file with fairseq2's names.\n\n"
    "Only tensors are read: no code that a file may hold is run. Missing and unexpected tensors "
    "are listed before anything is written."
)


@dataclass(kw_only=True)
class Paths:
    source: str = argument("conformer_shaw.pt, a folder or a hub id.", metavar="SOURCE")
    out: Path = argument("The folder, or back: the file, .pt.", metavar="OUT")


@dataclass(kw_only=True)
class Settings:
    config: Path | None = option(
        None,
        "From the original: a folder with the config.json to take instead of the published "
        "settings.",
        metavar="PATH",
    )
    pretraining: Path | None = option(
        None,
        "To the original: an original checkpoint to take the tensors from that only pre-training "
        "uses.",
        metavar="PT",
    )


def command(paths: Paths, settings: Settings) -> int:
    """Convert, and print which files were written; the exit status."""
    converted = _convert(paths, settings)
    for file in converted.files:
        print(file)
    left = len(converted.left_out)
    used = f"; {left} that only pre-training uses were left out" if left else ""
    report(f"{converted.num_tensors} tensors{used}")
    return 0


def _convert(paths: Paths, settings: Settings) -> Converted:
    from w2vbert_fast.export.original import convert_original, convert_to_original
    from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

    source, out, config = paths.source, paths.out, settings.config
    if Path(source).is_file():
        if settings.pretraining is not None:
            raise ValueError("--pretraining is for the way back; SOURCE is an original checkpoint")
        chosen = None if config is None else Wav2Vec2BertConfig.from_pretrained(config)
        return convert_original(source, out, config=chosen)
    if config is not None:
        raise ValueError("--config is for original checkpoints; SOURCE has its own config.json")
    if Path(source).suffix == ".pt":
        raise FileNotFoundError(f"{source} does not exist")
    if out.is_dir() or out.suffix != ".pt":
        raise ValueError(f"OUT is {out}; on the way back it must be a file that ends in .pt")
    return convert_to_original(source, out, pretraining=settings.pretraining)
