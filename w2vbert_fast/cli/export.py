"""The command `w2vbert-fast export`: a checkpoint to a file of another runtime."""

# No `from __future__ import annotations`: typer reads the annotations of the command.
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

    from w2vbert_fast.export import Exported

HELP = (
    "Write a model as a file that runs without this package, for any batch size and length: ONNX, "
    "an AOTInductor package (CPU), or a program of torch.export.\n\n"
    "The head is the one of the checkpoint; --layer exports a hidden state of its encoder. The "
    "file is run and compared with the model before it gets its name."
)


def register(
    app: "typer.Typer", report: Callable[[str], None], fail: Callable[[Exception], Any]
) -> None:
    """Add the command to a typer app; the arguments are those of the other commands' `register`."""
    import typer

    def option(help_text: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=help_text, **more)

    @app.command("export", short_help="Write a model for another runtime.", help=HELP)
    def export_command(
        model: Annotated[
            str, typer.Argument(metavar="demo|PATH|HUB_ID", help="The model to export.")
        ],
        out: Annotated[
            Path, typer.Argument(metavar="OUT", help="The file: .onnx, or .pt2 for aoti and torch.")
        ],
        format_name: Annotated[
            str, option("onnx, aoti or torch.", "--format", metavar="FORMAT")
        ] = "onnx",
        waveform: Annotated[
            bool, option("Waveforms go in: the features are part of the file.", "--waveform")
        ] = False,
        layer: Annotated[
            int | None, option("Export hidden_states[K], no layer behind it.", metavar="K")
        ] = None,
        stats: Annotated[
            Path | None,
            option(
                "With --layer: a file with mean and var, as wav2vec2bert_stats.pt.", metavar="PT"
            ),
        ] = None,
        opset: Annotated[int, option("Of ONNX, 18 or later.")] = 18,
        check: Annotated[
            bool, option("Compare the file with the model.", "--check/--no-check")
        ] = True,
        as_json: Annotated[bool, option("Print one JSON object.", "--json")] = False,
    ) -> None:
        try:
            exported = _export(model, out, format_name, waveform, layer, stats, opset, check)
        except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
            fail(error)
            return
        _print(exported, as_json)


def _export(
    model: str,
    out: Path,
    format_name: str,
    waveform: bool,
    layer: int | None,
    stats: Path | None,
    opset: int,
    check: bool,
) -> "Exported":
    import torch

    import w2vbert_fast
    from w2vbert_fast.export import FORMATS, export
    from w2vbert_fast.export.formats import OLDEST_OPSET, SUFFIXES

    # What can be known without the model is said before it is loaded.
    if format_name not in FORMATS:
        raise ValueError(f"--format is {format_name!r}; it must be one of {', '.join(FORMATS)}")
    if out.suffix != SUFFIXES[format_name]:
        raise ValueError(f"OUT is {out}; for {format_name} it must end in {SUFFIXES[format_name]}")
    if opset < OLDEST_OPSET:
        raise ValueError(f"--opset is {opset}; it must be at least {OLDEST_OPSET}")
    if stats is not None and layer is None:
        raise ValueError("--stats needs --layer, whose hidden state it normalises")
    statistics = None
    if stats is not None:
        try:
            statistics = torch.load(stats, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"--stats: {stats} is no file of tensors: {error}") from error
    folder = model
    if model == "demo":
        folder = str(Path(w2vbert_fast.__file__).parent / "demo")
    config = w2vbert_fast.Wav2Vec2BertConfig.from_pretrained(folder)
    name = "Wav2Vec2BertModel"
    if layer is None and config.architectures:
        name = config.architectures[0]
    names = [known for known in w2vbert_fast.__all__ if known.startswith("Wav2Vec2BertFor")]
    if name not in (*names, "Wav2Vec2BertModel"):
        raise ValueError(f"{model} is a {name}, which cannot be exported; {', '.join(names)} can")
    loaded = getattr(w2vbert_fast, name).from_pretrained(folder, dtype=torch.float32)
    extractor = None
    if waveform:
        extractor = w2vbert_fast.SeamlessM4TFeatureExtractor.from_pretrained(folder)
    checked: Any = format_name
    return export(
        loaded,
        out,
        checked,
        feature_extractor=extractor,
        layer=layer,
        stats=statistics,
        opset=opset,
        check=check,
    )


def _print(exported: "Exported", as_json: bool) -> None:
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
