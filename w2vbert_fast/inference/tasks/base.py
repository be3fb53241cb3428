"""What all tasks of offline inference share.

A task is configured by plain values, so that it can be pickled and sent to other processes; the
model stays behind and is loaded again there. Recordings are cut into pieces, pieces are batched,
and what the model makes of the pieces of a recording is put together again.
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from w2vbert_fast import models
from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.inference.ctc.chunks import Chunk, split
from w2vbert_fast.inference.pipeline import DEMO_FOLDER, DEMO_MODEL, features_of, find_device
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.ops.cpu.capability import onednn_linear
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.recordings.audio import MIX, SPLIT, Selection
from w2vbert_fast.recordings.rows import Row

_OVERLAP_SECONDS = 4.0
_SAMPLED_BLOCK = 1 << 16
_SAMPLED_BLOCKS = 64


@dataclass(frozen=True)
class Piece:
    """A chunk's samples.

    Attributes:
        samples: float32 `[num_samples]` on the CPU.
        whole: it is the whole recording.
    """

    samples: Tensor
    whole: bool = True


@dataclass
class Task(abc.ABC):
    """A model and what is wanted of it. Picklable; the model is not part of the pickle.

    Attributes:
        model: "demo", a folder or a hub id.
        revision: branch, tag or commit on the hub.
        device: where to run; None: the first CUDA device if there is one, else the CPU.
        dtype: of the weights, as `load_pipeline` takes it.
        max_seconds: recordings up to this length are computed whole, longer ones in chunks.
        overlap_seconds: what neighbouring chunks have in common; None: 4, or half of `max_seconds`
            if that is less.
        vad: cut long recordings at silences instead, without an overlap.
        channels: "mix": the mean of all; a number: that channel alone, from 0. `Transcribe` takes
            "split", too: each by itself.
        track: audio track of files with several, by its place among them, from 0, or by its
            language as the file has it, such as "deu"; None: the container's default.
        salvage: take what decodes of damaged files, and say so in the row.
        name: of the class, as the command line and job folders have it.
        result: of the class, what comes of a row.
        column_names: of the class, the columns of tables that it may add.
        has_tensors: of the class, results are tensors, which tables of text do not hold.
        splits: of the class, channels can be computed each by itself.
        window_seconds: of the class, audio whose results a job keeps in memory at once.
    """

    model: str | os.PathLike[str] = DEMO_MODEL
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_seconds: float = 300.0
    overlap_seconds: float | None = None
    vad: bool = False
    channels: str | int = MIX
    track: int | str | None = None
    salvage: bool = False

    name: ClassVar[str] = "task"
    result: ClassVar[type[Result]] = Result
    column_names: ClassVar[tuple[str, ...]] = ()
    has_tensors: ClassVar[bool] = False
    splits: ClassVar[bool] = False
    window_seconds: ClassVar[float] = 1800.0

    def __post_init__(self) -> None:
        if not self.max_seconds >= 1:
            raise ValueError(f"max_seconds must be at least 1, got {self.max_seconds}")
        if self.overlap_seconds is not None and self.vad:
            raise ValueError("overlap_seconds has no effect with vad, whose chunks do not overlap")
        if not 0 <= self.overlap <= self.max_seconds / 2:
            raise ValueError(
                "overlap_seconds must be from 0 to half of max_seconds, "
                f"{self.max_seconds / 2:g}, got {self.overlap_seconds}"
            )
        if self.selection.channels == SPLIT and not self.splits:
            raise ValueError(f"channels {SPLIT!r} is not for {self.name}; name one by its number")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @abc.abstractmethod
    def load(self) -> None:
        """Load the model, once.

        Raises:
            OSError: the checkpoint or one of its files is not to be had.
            ValueError: it is damaged or of another kind; or an option does not fit it.
        """

    @abc.abstractmethod
    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """Compute a batch; what comes back for a piece does not depend on the others.

        Raises:
            ValueError: a piece cannot be computed.
        """

    @abc.abstractmethod
    def finish(self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]) -> Result:
        """Put together what came of a recording's chunks."""

    def depends_on(self, row: Row) -> str:
        """What a row's result is made of besides its recording; a job does the row again where that
        has changed."""
        return ""

    def join(self, results: Sequence[Result]) -> Result:
        """Put together what came of a recording's channels, computed each by itself."""
        (result,) = results
        return result

    def failed(self, loaded: Loaded, error_type: str, error: str) -> Result:
        """The result of a row with an error."""
        return self.result(**identity(loaded), error_type=error_type, error=error)

    @abc.abstractmethod
    def columns(self) -> list[tuple[str, Any]]:
        """Names and Arrow types of the columns that results have in tables of typed columns.

        Raises:
            ImportError: pyarrow is not installed.
        """

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """What decides about results, beside the model, as JSON has it."""

    def typed_columns(self) -> list[tuple[str, Any]]:
        """All columns that a task adds to tables of typed columns, as `columns`.

        Raises:
            ImportError: pyarrow is not installed.
        """
        found = self.columns()
        if self.salvage:
            arrow = require("pyarrow", "offline")
            found += [("salvaged", arrow.string()), ("expected_seconds", arrow.float64())]
        return found

    @property
    def selection(self) -> Selection:
        """What is taken of recordings."""
        return Selection(self.channels, self.track, self.salvage)

    @property
    @abc.abstractmethod
    def extractor(self) -> SeamlessM4TFeatureExtractor:
        """The feature extractor; the model must be loaded."""

    @property
    @abc.abstractmethod
    def network(self) -> torch.nn.Module:
        """The model; it must be loaded."""

    @property
    def overlap(self) -> float:
        """What neighbouring chunks have in common, in seconds."""
        if self.overlap_seconds is None:
            return min(_OVERLAP_SECONDS, self.max_seconds / 2)
        return self.overlap_seconds

    @property
    def samples_per_frame(self) -> int:
        """Samples from one encoder frame to the next, in front of an adapter."""
        return self.extractor.stride * self.extractor.sampling_rate // 100

    def chunks(self, samples: Tensor) -> list[Chunk]:
        """How a recording is cut: one chunk up to `max_seconds`."""
        count = samples.numel()
        rate = self.extractor.sampling_rate
        if count <= self.max_seconds * rate:
            return [Chunk(0, count, 0, count)]
        if self.vad:
            from w2vbert_fast.inference.ctc.silences import split_at_silence

            return split_at_silence(samples, self.max_seconds)
        return split(count, self.max_seconds, self.overlap, rate)

    def features(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """`input_features` `[batch, T, 160]` in the model's dtype and `attention_mask`."""
        return features_of(self.network, self.extractor, [piece.samples for piece in pieces])

    def kept_frames(self, chunk: Chunk, frames: Tensor) -> Tensor:
        """Those frames `[T, ...]` of a chunk, in front of an adapter, that are used."""
        hop = self.samples_per_frame
        first = round((chunk.keep_start - chunk.start) / hop)
        if chunk.keep_end >= chunk.end:
            return frames[first:]
        return frames[first : round((chunk.keep_end - chunk.start) / hop)]

    def fingerprint(self) -> dict[str, Any]:
        """What tells the model from others: its files, the weights by samples of their bytes."""
        return model_fingerprint(self.model, self.revision)

    def common_options(self) -> dict[str, Any]:
        """The options that all tasks have."""
        # Only where they are given, so that folders of before know themselves.
        more = {
            name: getattr(self, name)
            for name, usual in (("channels", MIX), ("track", None), ("salvage", False))
            if getattr(self, name) != usual
        }
        return {
            "task": self.name,
            "dtype": self.dtype,
            "max_seconds": self.max_seconds,
            "overlap_seconds": self.overlap,
            "vad": self.vad,
            **more,
        }


@dataclass
class EncoderTask(Task):
    """A model that is no CTC model, with its feature extractor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._network: models.Wav2Vec2BertPreTrainedModel | None = None
        self._extractor: SeamlessM4TFeatureExtractor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _network=None, _extractor=None)

    @abc.abstractmethod
    def class_name(self) -> str:
        """The class to load."""

    def load(self) -> None:
        if self._network is not None:
            return
        source = source_of(self.model)
        device = find_device(self.device)
        dtype = self.dtype or ("float32" if device.type == "cpu" else None)
        self._extractor = SeamlessM4TFeatureExtractor.from_pretrained(
            source, revision=self.revision
        )
        network: models.Wav2Vec2BertPreTrainedModel = getattr(
            models, self.class_name()
        ).from_pretrained(
            source, revision=self.revision, dtype=dtype, device=device, use_fast_kernels=True
        )
        self.check(network)
        pack_weights(network)
        self._network = network

    def check(self, network: models.Wav2Vec2BertPreTrainedModel) -> None:
        """Raise ValueError for options that do not fit the model."""

    @property
    def extractor(self) -> SeamlessM4TFeatureExtractor:
        self.load()
        assert self._extractor is not None
        return self._extractor

    @property
    def network(self) -> models.Wav2Vec2BertPreTrainedModel:
        self.load()
        assert self._network is not None
        return self._network


def pack_weights(network: models.Wav2Vec2BertPreTrainedModel) -> None:
    """Weights as a CPU multiplies them, where it can: nobody else has a task's model."""
    parameter = next(network.parameters())
    if parameter.device.type == "cpu" and onednn_linear(parameter.dtype):
        network.pack_weights()


def source_of(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder or hub id that a model's name stands for."""
    return DEMO_FOLDER if model == DEMO_MODEL else model


def head_of(model: str | os.PathLike[str], revision: str | None) -> str:
    """The class that a checkpoint was saved from."""
    config = Wav2Vec2BertConfig.from_pretrained(source_of(model), revision=revision)
    return config.architectures[0] if config.architectures else "Wav2Vec2BertModel"


def identity(loaded: Loaded) -> dict[str, Any]:
    """The fields of a `Result` that come from the row."""
    row = loaded.row
    return {
        "index": row.index,
        "id": row.id,
        "audio": row.name,
        "offset": row.offset,
        "columns": row.columns,
        "seconds": loaded.seconds,
        "louder_channel": loaded.louder_channel,
        "salvaged": loaded.salvaged,
    }


def model_fingerprint(model: str | os.PathLike[str], revision: str | None) -> dict[str, Any]:
    """Digests of a checkpoint's files by name. Of large files, size and 64 blocks are digested."""
    config = Repository(source_of(model), revision).find("config.json")
    if config is None:
        raise OSError(f"{os.fspath(model)} holds no config.json")
    names = sorted(
        path.name
        for path in config.parent.iterdir()
        if path.suffix in (".json", ".safetensors", ".bin") and path.is_file()
    )
    return {name: file_digest(config.parent / name) for name in names}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's size and content; of 64 blocks spread over it where it is large."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _SAMPLED_BLOCK * _SAMPLED_BLOCKS * 4:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        else:
            for i in range(_SAMPLED_BLOCKS):
                file.seek((size - _SAMPLED_BLOCK) * i // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_SAMPLED_BLOCK))
    return digest.hexdigest()
