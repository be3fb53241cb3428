"""Classifying: classes of recordings or of their frames, or x-vectors, as the head has it."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.tasks.base import EncoderTask, Piece, head_of, identity


@dataclass(frozen=True)
class Segment:
    """Successive frames of one class.

    Attributes:
        start: where it begins, in seconds from the recording's start.
        end: where it ends.
        label: the class.
        score: mean probability of the class over the frames.
    """

    start: float
    end: float
    label: str
    score: float


@dataclass(frozen=True)
class Classification(Result):
    """A recording's classes.

    Attributes:
        label: the likeliest class of a sequence classifier.
        scores: probability of every class of a sequence classifier.
        segments: stretches of one class, of a frame classifier.
        embedding: float32 `[xvector_output_dim]` on the CPU, of an x-vector model.
    """

    label: str | None = None
    scores: Mapping[str, float] | None = None
    segments: tuple[Segment, ...] | None = None
    embedding: Tensor | None = None

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.scores is not None:
            found = {"label": self.label, "scores": dict(self.scores)}
        if self.segments is not None:
            found["segments"] = [vars(segment).copy() for segment in self.segments]
        if self.embedding is not None:
            found["embedding"] = self.embedding.tolist()
        return found


class Head(abc.ABC):
    """What is made of the outputs of a head.

    Attributes:
        column_names: the columns of tables that it adds.
    """

    column_names: tuple[str, ...]

    def pieces(self, output: Any, mask: Tensor) -> list[Tensor]:
        """What a forward pass has for each piece, float32 on the CPU; here a row of `logits` each.

        Args:
            output: of the model, for a batch of pieces.
            mask: `[batch, T]`, non-zero where a frame is valid.
        """
        return list(output.logits.float().cpu().clone().unbind(0))

    @abc.abstractmethod
    def fields(
        self, task: Classify, chunks: Sequence[Chunk], outputs: Sequence[Tensor], offset: float
    ) -> dict[str, Any]:
        """Entries of a `Classification`.

        Args:
            task: the task, with its model.
            chunks: of the recording.
            outputs: of `pieces`, for each chunk.
            offset: where the recording's part begins, in seconds.
        """

    @abc.abstractmethod
    def columns(self, arrow: Any) -> list[tuple[str, Any]]:
        """Names and Arrow types of `column_names`; `arrow` is pyarrow."""


class SequenceHead(Head):
    """Probabilities of the classes of a recording."""

    column_names = ("label", "scores")

    def fields(
        self, task: Classify, chunks: Sequence[Chunk], outputs: Sequence[Tensor], offset: float
    ) -> dict[str, Any]:
        labels: dict[int, str] = task.network.config.id2label
        mean = _mean(chunks, outputs)
        scores = {labels[i]: round(p, 6) for i, p in enumerate(mean.softmax(0).tolist())}
        return {"label": labels[int(mean.argmax())], "scores": scores}

    def columns(self, arrow: Any) -> list[tuple[str, Any]]:
        return [("label", arrow.string()), ("scores", arrow.map_(arrow.string(), arrow.float64()))]


class FrameHead(Head):
    """Stretches of frames of one class."""

    column_names = ("segments",)

    def pieces(self, output: Any, mask: Tensor) -> list[Tensor]:
        """Logits `[frames, num_labels]` of each piece."""
        counts = mask.sum(1).tolist()
        logits = output.logits.float().cpu()
        return [row[:n].clone() for row, n in zip(logits, counts, strict=True)]

    def fields(
        self, task: Classify, chunks: Sequence[Chunk], outputs: Sequence[Tensor], offset: float
    ) -> dict[str, Any]:
        labels: dict[int, str] = task.network.config.id2label
        kept = [task.kept_frames(chunk, x) for chunk, x in zip(chunks, outputs, strict=True)]
        scores = torch.cat(kept).softmax(-1)
        step = task.samples_per_frame / task.extractor.sampling_rate
        best = scores.argmax(1).tolist()
        found: list[Segment] = []
        for _, group in groupby(range(len(best)), key=best.__getitem__):
            frames = list(group)
            first, last, label = frames[0], frames[-1], best[frames[0]]
            score = float(scores[first : last + 1, label].mean())
            start, end = offset + first * step, offset + (last + 1) * step
            found.append(Segment(round(start, 4), round(end, 4), labels[label], round(score, 6)))
        return {"segments": tuple(found)}

    def columns(self, arrow: Any) -> list[tuple[str, Any]]:
        string, number = arrow.string(), arrow.float64()
        segment = [("start", number), ("end", number), ("label", string), ("score", number)]
        return [("segments", arrow.list_(arrow.struct(segment)))]


class XVectorHead(Head):
    """A speaker's embedding."""

    column_names = ("embedding",)

    def pieces(self, output: Any, mask: Tensor) -> list[Tensor]:
        """The embedding `[xvector_output_dim]` of each piece."""
        return list(output.embeddings.float().cpu().clone().unbind(0))

    def fields(
        self, task: Classify, chunks: Sequence[Chunk], outputs: Sequence[Tensor], offset: float
    ) -> dict[str, Any]:
        return {"embedding": _mean(chunks, outputs)}

    def columns(self, arrow: Any) -> list[tuple[str, Any]]:
        return [("embedding", arrow.list_(arrow.float32()))]


HEADS: Mapping[str, Head] = {
    "Wav2Vec2BertForSequenceClassification": SequenceHead(),
    "Wav2Vec2BertForAudioFrameClassification": FrameHead(),
    "Wav2Vec2BertForXVector": XVectorHead(),
}
"""What can be classified with, by the class that a checkpoint was saved from."""


@dataclass
class Classify(EncoderTask):
    """The classes of a recording or of its frames, or a speaker's x-vector, by the model's head.

    Of a recording in chunks, a sequence classifier's logits are the mean over all frames, as they
    would be for the whole; x-vectors are averaged by the chunks' lengths.
    """

    name = "classify"
    result = Classification
    column_names = tuple(name for head in HEADS.values() for name in head.column_names)

    def class_name(self) -> str:
        name = head_of(self.model, self.revision)
        if name not in HEADS:
            raise ValueError(
                f"model {os.fspath(self.model)!r} is a checkpoint of {name}; classifying needs "
                f"one of {', '.join(HEADS)}"
            )
        return name

    @property
    def head(self) -> Head:
        """What is made of the model's outputs."""
        return HEADS[type(self.network).__name__]

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """What the head has for each piece, float32: see its `pieces`."""
        features, mask = self.features(pieces)
        with torch.inference_mode():
            output = self.network(features, attention_mask=mask)
            return self.head.pieces(output, mask)

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Classification:
        fields = self.head.fields(self, chunks, outputs, loaded.row.offset)
        return Classification(**identity(loaded), **fields)

    def columns(self) -> list[tuple[str, Any]]:
        return self.head.columns(require("pyarrow", "offline"))

    def options(self) -> dict[str, Any]:
        return self.common_options()


def _mean(chunks: Sequence[Chunk], outputs: Sequence[Tensor]) -> Tensor:
    """The mean of the chunks' outputs, weighted with what each is responsible for."""
    kept = [float(chunk.keep_end - chunk.keep_start) for chunk in chunks]
    weights = torch.tensor(kept, device="cpu")
    return (torch.stack(list(outputs)) * (weights / weights.sum())[:, None]).sum(0)
