"""Wav2Vec2-BERT, fast: the reference's weights, names and answers.

Names are loaded on first use, so that importing the package costs nothing and touches no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2vbert_fast._lazy import names_of

__version__ = "0.1.0"

if TYPE_CHECKING:
    from w2vbert_fast.models import (
        Wav2Vec2BertForAudioFrameClassification as Wav2Vec2BertForAudioFrameClassification,
        Wav2Vec2BertForCTC as Wav2Vec2BertForCTC,
        Wav2Vec2BertForSequenceClassification as Wav2Vec2BertForSequenceClassification,
        Wav2Vec2BertForXVector as Wav2Vec2BertForXVector,
        Wav2Vec2BertModel as Wav2Vec2BertModel,
        Wav2Vec2BertPreTrainedModel as Wav2Vec2BertPreTrainedModel,
    )
    from w2vbert_fast.models.configuration import Wav2Vec2BertConfig as Wav2Vec2BertConfig
    from w2vbert_fast.processing import (
        SeamlessM4TFeatureExtractor as SeamlessM4TFeatureExtractor,
        Wav2Vec2BertProcessor as Wav2Vec2BertProcessor,
        Wav2Vec2CTCTokenizer as Wav2Vec2CTCTokenizer,
    )

    AutoConfig = Wav2Vec2BertConfig
    AutoFeatureExtractor = SeamlessM4TFeatureExtractor
    AutoModel = Wav2Vec2BertModel
    AutoModelForAudioClassification = Wav2Vec2BertForSequenceClassification
    AutoModelForAudioFrameClassification = Wav2Vec2BertForAudioFrameClassification
    AutoModelForAudioXVector = Wav2Vec2BertForXVector
    AutoModelForCTC = Wav2Vec2BertForCTC
    AutoProcessor = Wav2Vec2BertProcessor
    AutoTokenizer = Wav2Vec2CTCTokenizer

_HOMES = {
    "models": (
        "Wav2Vec2BertForAudioFrameClassification",
        "Wav2Vec2BertForCTC",
        "Wav2Vec2BertForSequenceClassification",
        "Wav2Vec2BertForXVector",
        "Wav2Vec2BertModel",
        "Wav2Vec2BertPreTrainedModel",
    ),
    "models.configuration": ("Wav2Vec2BertConfig",),
    "processing": ("SeamlessM4TFeatureExtractor", "Wav2Vec2BertProcessor", "Wav2Vec2CTCTokenizer"),
}
_ALIASES = {
    "AutoConfig": "Wav2Vec2BertConfig",
    "AutoFeatureExtractor": "SeamlessM4TFeatureExtractor",
    "AutoModel": "Wav2Vec2BertModel",
    "AutoModelForAudioClassification": "Wav2Vec2BertForSequenceClassification",
    "AutoModelForAudioFrameClassification": "Wav2Vec2BertForAudioFrameClassification",
    "AutoModelForAudioXVector": "Wav2Vec2BertForXVector",
    "AutoModelForCTC": "Wav2Vec2BertForCTC",
    "AutoProcessor": "Wav2Vec2BertProcessor",
    "AutoTokenizer": "Wav2Vec2CTCTokenizer",
}

__all__ = ["__version__", *_ALIASES]
__all__ += [name for names in _HOMES.values() for name in names]

__getattr__, __dir__ = names_of(__name__, _HOMES, _ALIASES)
