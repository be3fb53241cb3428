"""The Wav2Vec2-BERT model family, with the reference's class, parameter and output names."""

from w2vbert_fast.models.heads import (
    Wav2Vec2BertForAudioFrameClassification,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertForSequenceClassification,
    Wav2Vec2BertForXVector,
)
from w2vbert_fast.models.model import Wav2Vec2BertModel
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel

__all__ = [
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForCTC",
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForXVector",
    "Wav2Vec2BertModel",
    "Wav2Vec2BertPreTrainedModel",
]
