"""The Wav2Vec2-BERT model family, with the reference's class, parameter and output names."""

from w2vbert_fast.models import heads
from w2vbert_fast.models.heads import *  # noqa: F403  (a head is named in its own file alone)
from w2vbert_fast.models.model import Wav2Vec2BertModel
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel

__all__ = ["Wav2Vec2BertModel", "Wav2Vec2BertPreTrainedModel"]
__all__ += heads.__all__
