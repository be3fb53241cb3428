"""Wav2Vec2-BERT, fast: the reference's weights, names and answers.

Names are loaded on first use, so that importing the package costs nothing and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AutoConfig": ("models.configuration", "Wav2Vec2BertConfig"),
    "AutoFeatureExtractor": ("processing", "SeamlessM4TFeatureExtractor"),
    "AutoModel": ("models", "Wav2Vec2BertModel"),
    "AutoModelForAudioClassification": ("models", "Wav2Vec2BertForSequenceClassification"),
    "AutoModelForAudioFrameClassification": (
        "models",
        "Wav2Vec2BertForAudioFrameClassification",
    ),
    "AutoModelForAudioXVector": ("models", "Wav2Vec2BertForXVector"),
    "AutoModelForCTC": ("models", "Wav2Vec2BertForCTC"),
    "AutoProcessor": ("processing", "Wav2Vec2BertProcessor"),
    "AutoTokenizer": ("processing", "Wav2Vec2CTCTokenizer"),
    "SeamlessM4TFeatureExtractor": ("processing", "SeamlessM4TFeatureExtractor"),
    "Wav2Vec2BertConfig": ("models.configuration", "Wav2Vec2BertConfig"),
    "Wav2Vec2BertForAudioFrameClassification": (
        "models",
        "Wav2Vec2BertForAudioFrameClassification",
    ),
    "Wav2Vec2BertForCTC": ("models", "Wav2Vec2BertForCTC"),
    "Wav2Vec2BertForSequenceClassification": ("models", "Wav2Vec2BertForSequenceClassification"),
    "Wav2Vec2BertForXVector": ("models", "Wav2Vec2BertForXVector"),
    "Wav2Vec2BertModel": ("models", "Wav2Vec2BertModel"),
    "Wav2Vec2BertPreTrainedModel": ("models", "Wav2Vec2BertPreTrainedModel"),
    "Wav2Vec2BertProcessor": ("processing", "Wav2Vec2BertProcessor"),
    "Wav2Vec2CTCTokenizer": ("processing", "Wav2Vec2CTCTokenizer"),
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from w2vbert_fast.models import (
        Wav2Vec2BertForAudioFrameClassification as Wav2Vec2BertForAudioFrameClassification,
    )
    from w2vbert_fast.models import Wav2Vec2BertForCTC as Wav2Vec2BertForCTC
    from w2vbert_fast.models import (
        Wav2Vec2BertForSequenceClassification as Wav2Vec2BertForSequenceClassification,
    )
    from w2vbert_fast.models import Wav2Vec2BertForXVector as Wav2Vec2BertForXVector
    from w2vbert_fast.models import Wav2Vec2BertModel as Wav2Vec2BertModel
    from w2vbert_fast.models import Wav2Vec2BertPreTrainedModel as Wav2Vec2BertPreTrainedModel
    from w2vbert_fast.models.configuration import Wav2Vec2BertConfig as Wav2Vec2BertConfig
    from w2vbert_fast.processing.features import (
        SeamlessM4TFeatureExtractor as SeamlessM4TFeatureExtractor,
    )
    from w2vbert_fast.processing.processor import Wav2Vec2BertProcessor as Wav2Vec2BertProcessor
    from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer as Wav2Vec2CTCTokenizer

    AutoConfig = Wav2Vec2BertConfig
    AutoFeatureExtractor = SeamlessM4TFeatureExtractor
    AutoModel = Wav2Vec2BertModel
    AutoModelForAudioClassification = Wav2Vec2BertForSequenceClassification
    AutoModelForAudioFrameClassification = Wav2Vec2BertForAudioFrameClassification
    AutoModelForAudioXVector = Wav2Vec2BertForXVector
    AutoModelForCTC = Wav2Vec2BertForCTC
    AutoProcessor = Wav2Vec2BertProcessor
    AutoTokenizer = Wav2Vec2CTCTokenizer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
