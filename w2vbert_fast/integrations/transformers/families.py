"""The models of transformers that have this encoder, and the names of their classes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How transformers names the classes of one model."""

    module: str
    prefix: str
    layerdrop: str  # the field of the configuration
    parts: tuple[str, ...]

    def reference(self, part: str) -> type[Any]:
        module = importlib.import_module(f"transformers.models.{self.module}")
        found: type[Any] = getattr(module, f"{self.prefix}{part}")
        return found


_PARTS = (
    "FeatureProjection",
    "Encoder",
    "EncoderLayer",
    "Adapter",
    "AdapterLayer",
    "FeedForward",
    "SelfAttention",
    "ConvolutionModule",
)
FAMILIES = (
    Family(
        "wav2vec2_bert.modeling_wav2vec2_bert", "Wav2Vec2Bert", "layerdrop", (*_PARTS, "ForCTC")
    ),
    Family(
        "seamless_m4t_v2.modeling_seamless_m4t_v2",
        "SeamlessM4Tv2Conformer",
        "speech_encoder_layerdrop",
        _PARTS,
    ),
)
