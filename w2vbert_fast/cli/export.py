"""The command `w2vbert-fast export`: a checkpoint to a file of another runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2vbert_fast.cli.options import argument, option

if TYPE_CHECKING:
    from w2vbert_fast.export import Exported

SHORT = "Write a model for another runtime."
HELP = (
    "Write a model as a file that runs without this package, for any batch size and length: ONNX, "
    "an AOTInductor package (CPU), or a program of torch.export.\n\n"
    "The head is the one of the checkpoint; --layer exports a hidden state of its encoder. The "
    "file is run and compared with the model before it gets its name."
)


@dataclass(kw_only=True)
class Paths:
    model: str = argument("The model to export.", metavar="demo|PATH|HUB_ID")
    out: Path = argument("The file: .onnx, or .pt2 for aoti and torch.", metavar="OUT")


@dataclass(kw_only=True)
class Settings:
    format_name: str = option("onnx", "onnx, aoti or torch.", "--format", metavar="FORMAT")
    waveform: bool = option(False, "Waveforms go in: the features are part of the file.")
    layer: int | None = option(None, "Export hidden_states[K], no layer behind it.", metavar="K")
    stats: Path | None = option(
        None, "With --layer: a file with mean and var, as wav2vec2bert_stats.pt.", metavar="PT"
    )
    opset: int = option(18, "Of ONNX, 18 or later.")
    check: bool = option(True, "Compare the file with the model.", "--check/--no-check")
    as_json: bool = option(False, "Print one JSON object.", "--json")


def command(paths: Paths, settings: Settings) -> int:
    """Export, and print what the file holds; the exit status."""
    _print(_export(paths, settings), settings.as_json)
    return 0


def _export(paths: Paths, settings: Settings) -> Exported:
    import torch

    import w2vbert_fast
    from w2vbert_fast import models
    from w2vbert_fast.export import FORMATS, export
    from w2vbert_fast.export.formats import OLDEST_OPSET, SUFFIXES
    from w2vbert_fast.inference.tasks.base import head_of, source_of

    model, out, kind = paths.model, paths.out, settings.format_name
    layer, stats = settings.layer, settings.stats
    # What can be known without the model is said before it is loaded.
    if kind not in FORMATS:
        raise ValueError(f"--format is {kind!r}; it must be one of {', '.join(FORMATS)}")
    if out.suffix != SUFFIXES[kind]:
        raise ValueError(f"OUT is {out}; for {kind} it must end in {SUFFIXES[kind]}")
    if settings.opset < OLDEST_OPSET:
        raise ValueError(f"--opset is {settings.opset}; it must be at least {OLDEST_OPSET}")
    if stats is not None and layer is None:
        raise ValueError("--stats needs --layer, whose hidden state it normalises")
    statistics = None
    if stats is not None:
        try:
            statistics = torch.load(stats, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"--stats: {stats} is no file of tensors: {error}") from error
    folder = source_of(model)
    name = head_of(model, None) if layer is None else "Wav2Vec2BertModel"
    if name not in models.__all__:
        names = ", ".join(models.heads.__all__)
        raise ValueError(f"{model} is a {name}, which cannot be exported; {names} can")
    loaded = getattr(models, name).from_pretrained(folder, dtype=torch.float32)
    extractor = None
    if settings.waveform:
        extractor = w2vbert_fast.SeamlessM4TFeatureExtractor.from_pretrained(folder)
    checked: Any = kind
    return export(
        loaded,
        out,
        checked,
        feature_extractor=extractor,
        layer=layer,
        stats=statistics,
        opset=settings.opset,
        check=settings.check,
    )


def _print(exported: Exported, as_json: bool) -> None:
    sizes = [file.stat().st_size for file in exported.files]
    if as_json:
        content = {
            "files": [str(file) for file in exported.files],
            "bytes": sizes,
            "inputs": {name: list(shape) for name, shape in exported.inputs.items()},
            "outputs": list(exported.outputs),
            "error": exported.error,
        }
        print(json.dumps(content))
        return
    for file, size in zip(exported.files, sizes, strict=True):
        print(f"{file}  {size / 1e6:.1f} MB")
    for name, shape in exported.inputs.items():
        print(f"  in   {name} [{', '.join(map(str, shape))}]")
    for name in exported.outputs:
        print(f"  out  {name}")
    if exported.error is not None:
        print(f"  relative error against the model: {exported.error:.1e}")
