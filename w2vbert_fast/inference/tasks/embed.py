"""Embedding: recordings to hidden states of a layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast import models
from w2vbert_fast._extras import require
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.tasks.base import EncoderTask, Piece, file_digest, identity
from w2vbert_fast.models.model import hidden_state_index
from w2vbert_fast.models.pooling import checked_statistics


@dataclass(frozen=True)
class Embedding(Result):
    """A recording's hidden state.

    Attributes:
        embedding: `[frames, hidden_size]`, or `[hidden_size]` where frames were pooled; float16 or
            float32 on the CPU. None after an error.
    """

    embedding: Tensor | None = None

    def fields(self) -> dict[str, Any]:
        return {} if self.embedding is None else {"shape": list(self.embedding.shape)}

    @property
    def tensor(self) -> Tensor | None:
        return self.embedding


@dataclass
class Embed(EncoderTask):
    """Hidden states.

    Attributes:
        layer: index into `hidden_states`; -1: the last.
        stats: file of mean and variance, such as `wav2vec2bert_stats.pt`, or a mapping.
        pool: "mean" or "none".
        embedding_dtype: "float32" or "float16", of the result.
    """

    layer: int = -1
    stats: str | os.PathLike[str] | dict[str, Tensor] | None = None
    pool: str = "none"
    embedding_dtype: str = "float32"

    name = "embed"
    result = Embedding
    column_names = ("shape", "embedding")
    has_tensors = True
    # Hidden states of so much audio, 24 layers of the published model in float32, are 120 MB.
    window_seconds = 600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("mean", "none"):
            raise ValueError(f"pool must be 'mean' or 'none', got {self.pool!r}")
        if self.embedding_dtype not in ("float32", "float16"):
            raise ValueError(
                f"embedding_dtype must be 'float32' or 'float16', got {self.embedding_dtype!r}"
            )
        self._stats: dict[str, Tensor] | None = None

    @property
    def width(self) -> int:
        """Numbers in a frame's hidden state."""
        width: int = self.network.config.hidden_size
        return width

    def class_name(self) -> str:
        return "Wav2Vec2BertModel"

    def check(self, network: models.Wav2Vec2BertPreTrainedModel) -> None:
        encoder = network.base_model
        assert isinstance(encoder, models.Wav2Vec2BertModel)
        hidden_state_index(self.layer, encoder.encoder.num_layers)
        self._stats = None
        if self.stats is not None:
            found = self.stats
            if not isinstance(found, dict):
                found = torch.load(found, map_location="cpu", weights_only=True)
            mean, variance = checked_statistics(found, network.config.hidden_size)
            device = next(network.parameters()).device
            self._stats = {"mean": mean.to(device), "var": variance.to(device)}

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        """`[frames, hidden_size]` each; pooled already where a piece is the whole recording."""
        features, mask = self.features(pieces)
        pooled = self.pool == "mean" and all(piece.whole for piece in pieces)
        network = self.network
        assert isinstance(network, models.Wav2Vec2BertModel)
        with torch.inference_mode():
            states = network.encode(
                features,
                mask,
                layer=self.layer,
                stats=self._stats,
                pool="mean" if pooled else None,
            )
        kind = getattr(torch, self.embedding_dtype)
        if pooled:
            return list(states.to(kind).cpu().clone().unbind(0))
        if self.pool == "none":
            states = states.to(kind)
        counts = mask.sum(1).tolist()
        return [row[:n].cpu().clone() for row, n in zip(states, counts, strict=True)]

    def finish(self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]) -> Embedding:
        embedding = outputs[0]
        if embedding.dim() == 2:
            parts = [self.kept_frames(c, x) for c, x in zip(chunks, outputs, strict=True)]
            embedding = torch.cat(parts) if len(parts) > 1 else parts[0]
            if self.pool == "mean":
                embedding = embedding.float().mean(0).to(getattr(torch, self.embedding_dtype))
        return Embedding(**identity(loaded), embedding=embedding)

    def columns(self) -> list[tuple[str, Any]]:
        arrow = require("pyarrow", "offline")
        kind = arrow.float16() if self.embedding_dtype == "float16" else arrow.float32()
        vector = arrow.list_(kind, self.width)
        return [("embedding", vector if self.pool == "mean" else arrow.list_(vector))]

    def options(self) -> dict[str, Any]:
        stats: Any = self.stats
        if isinstance(stats, dict):
            stats = {name: value.tolist() for name, value in stats.items()}
        elif stats is not None:
            stats = file_digest(Path(stats))
        return {
            **self.common_options(),
            "layer": self.layer,
            "stats": stats,
            "pool": self.pool,
            "embedding_dtype": self.embedding_dtype,
        }
