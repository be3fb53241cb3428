"""Writing an `ExportGraph` as a file of another runtime, and running such a file."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.files import make_folder
from w2vbert_fast.export.graph import ExportGraph
from w2vbert_fast.models.pooling import Statistics
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

Format = Literal["onnx", "aoti", "torch"]
FORMATS = ("onnx", "aoti", "torch")
SUFFIXES = {"onnx": ".onnx", "aoti": ".pt2", "torch": ".pt2"}
LARGEST_ERROR = 1e-4
"""Largest relative error of a written file against the model that `export` accepts."""
OLDEST_OPSET = 18

# A protobuf message holds 2 GiB; larger ONNX models keep their weights in a file of their own.
_LARGEST_SINGLE_FILE = 1_900_000_000


_OLDEST_TORCH = (2, 10)
"""The oldest PyTorch that exports were tested with. 2.5 cannot: its shapes are narrower, and it has
no `aoti_compile_and_package`."""


class ExportError(RuntimeError):
    """A model could not be exported, or the file written answers otherwise than the model."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: the file, and for a large ONNX model the file of weights beside it.
        inputs: names of the inputs and of their dimensions, in order; a number is a fixed size.
        outputs: names of the outputs, in order.
        error: the largest relative error of an output against the model, on a padded batch of other
            sizes than the model was traced with; `None` where it was not checked.
    """

    files: tuple[Path, ...]
    inputs: dict[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    error: float | None


def export(
    model: Wav2Vec2BertPreTrainedModel,
    path: str | os.PathLike[str],
    format: Format,
    *,
    feature_extractor: SeamlessM4TFeatureExtractor | None = None,
    layer: int | None = None,
    stats: Statistics | None = None,
    opset: int = OLDEST_OPSET,
    check: bool = True,
) -> Exported:
    """Write a model as a file that runs without this package, for any batch size and length.

    The file takes `input_features` float32 `[batch, frames, features]` and `attention_mask` int64
    `[batch, frames]`, or with `feature_extractor` `waveform` float32 `[batch, samples]`, padded on
    the right, and `num_samples` int64 `[batch]`. It gives `logits` and, where there is one row per
    frame, `lengths` int64 `[batch]`, the valid frames of each row; `last_hidden_state` or, with
    `layer`, `hidden_state` instead of the logits for the encoder; `logits` and `embeddings` for
    x-vectors. Answers are the model's, in padded batches too; padding is as it leaves it.

    Nothing is left behind unless the whole file was written and, with `check`, gives the model's
    answers to `LARGEST_ERROR`.

    Args:
        model: any of this package's models, in evaluation mode, float32.
        path: the file, replaced if it is there. ONNX models above 1.9 GB get a second one, of the
            same name with `.data` behind it, which must stay beside the first.
        format: "onnx"; "aoti", code compiled for this machine's kind of CPU by AOTInductor (a C++
            compiler is needed); or "torch", a program of `torch.export`.
        feature_extractor: makes its features part of the file; `None`: features go in.
        layer: export the encoder's `hidden_states[layer]`, no layer behind it.
        stats: mean and variance that normalise this hidden state, as for `encode`.
        opset: of ONNX, at least 18.
        check: run the file and compare it with the model. For "onnx" this takes onnxruntime.

    Raises:
        ValueError: an argument is impossible or does not fit the model.
        TypeError: the model is none of this package's.
        ImportError: a package of the extra `export` is missing.
        ExportError: there is no C++ compiler, the model could not be exported, or the check failed.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    target = Path(path)
    if target.suffix != SUFFIXES[format]:
        raise ValueError(f"path is {target}; for format {format} it must end in {SUFFIXES[format]}")
    if target.is_dir():
        raise ValueError(f"path is {target}, a folder; it must be a file")
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < OLDEST_OPSET:
        raise ValueError(f"opset is {opset!r}; it must be at least {OLDEST_OPSET}")
    graph = ExportGraph(model, feature_extractor, layer=layer, stats=stats)
    if format == "onnx":
        for module in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
            require(module, "export")
    if format == "aoti":
        _check_compiler()
    folder = make_folder(target.parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    try:
        with _plain(model), torch.no_grad():
            written = staging / target.name
            try:
                _WRITERS[format](graph, written, opset)
            except Exception as error:
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                raise ExportError(
                    f"the model could not be exported: {reason[:300]}{_version_hint()}"
                ) from error
            deviation = _checked(graph, written, format) if check else None
        files = tuple(sorted(staging.iterdir(), key=lambda file: file.name != target.name))
        for file in reversed(files):  # the main file last: with it the export is complete
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    final = tuple(folder / file.name for file in files)
    return Exported(final, graph.signature.inputs, graph.signature.outputs, deviation)


def run_exported(
    path: str | os.PathLike[str], format: Format, inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """Run a written file on CPU tensors; its outputs in order.

    Args:
        path: the file.
        format: what it was written as.
        inputs: in the order of `Exported.inputs`.

    Raises:
        ValueError: there is no such format.
        ImportError: onnxruntime is missing.
    """
    if format == "onnx":
        onnxruntime = require("onnxruntime", "export")
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(os.fspath(path), providers=providers)
        names = [given.name for given in session.get_inputs()]
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(y)) for y in session.run(None, arrays)]
    if format == "aoti":
        from torch._inductor import aoti_load_package

        return list(aoti_load_package(os.fspath(path))(*inputs))
    if format == "torch":
        return list(torch.export.load(path).module()(*inputs))
    raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")


def _program(graph: ExportGraph) -> tuple[torch.export.ExportedProgram, tuple[Any, ...]]:
    """The traced graph, and the dynamic dimensions of its inputs."""
    fewest = {"batch": 1, "frames": graph.fewest(), "samples": graph.fewest()}
    sizes: dict[str, Any] = {}
    shapes = []
    for names in graph.signature.inputs.values():
        for name in names:
            if isinstance(name, str) and name not in sizes:
                sizes[name] = torch.export.Dim(name, min=fewest[name])
        shapes.append({i: sizes[name] for i, name in enumerate(names) if isinstance(name, str)})
    example = graph.example(2, 2 * graph.fewest() + 37)
    program = torch.export.export(graph, example, dynamic_shapes=tuple(shapes), strict=False)
    return program, tuple(shapes)


def _write_torch(graph: ExportGraph, path: Path, opset: int) -> None:
    torch.export.save(_program(graph)[0], path)


def _write_aoti(graph: ExportGraph, path: Path, opset: int) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(_program(graph)[0], package_path=os.fspath(path))


def _write_onnx(graph: ExportGraph, path: Path, opset: int) -> None:
    program, shapes = _program(graph)
    tensors = [*graph.parameters(), *graph.buffers()]
    large = sum(tensor.nbytes for tensor in tensors) > _LARGEST_SINGLE_FILE
    with _quiet():
        torch.onnx.export(
            program,
            (),
            path,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=list(graph.signature.inputs),
            output_names=list(graph.signature.outputs),
            external_data=large,
            verbose=False,
        )


_WRITERS = {"onnx": _write_onnx, "aoti": _write_aoti, "torch": _write_torch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, and what it says of its own workings, from the user."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _version_hint() -> str:
    version = str(torch.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) >= _OLDEST_TORCH:
        return ""
    oldest = ".".join(map(str, _OLDEST_TORCH))
    return f" (PyTorch {version} is installed; exports were tested with {oldest} and later)"


@contextlib.contextmanager
def _plain(model: Wav2Vec2BertPreTrainedModel) -> Iterator[None]:
    """The model's modules without fast kernels, which other runtimes do not have."""
    before = model.use_fast_kernels
    model.use_fast_kernels = False
    try:
        yield
    finally:
        model.use_fast_kernels = before


def _checked(graph: ExportGraph, path: Path, format: Format) -> float:
    """The largest relative error of the file's outputs against the model."""
    largest = 0.0
    for batch, longest in ((3, 3 * graph.fewest() + 20), (1, graph.fewest() + 5)):
        inputs = graph.example(batch, longest, seed=1)
        expected = graph.answers_of_the_model(*inputs)
        outputs = run_exported(path, format, inputs)
        for name, ours, theirs in zip(graph.signature.outputs, expected, outputs, strict=True):
            if ours.shape != theirs.shape:
                raise ExportError(
                    f"the exported file gives {name} of shape {tuple(theirs.shape)}; "
                    f"the model gives {tuple(ours.shape)}"
                )
            difference = (theirs.double() - ours.double()).norm()
            error = float(difference / ours.double().norm().clamp_min(1e-30))
            if not error <= LARGEST_ERROR:
                raise ExportError(
                    f"the exported file's {name} differs from the model's by {error:.1e} "
                    f"(relative); {LARGEST_ERROR:.0e} is allowed"
                )
            largest = max(largest, error)
    return largest


def _check_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ExportError(
            "format aoti needs a C++ compiler, such as g++ or clang++, and none was found (the "
            "environment variable CXX may name one)"
        ) from error
