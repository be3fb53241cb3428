"""What stands before and behind the model: features of waveforms, and text of token ids."""

from w2vbert_fast.processing.batch import BatchFeature
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.processor import Wav2Vec2BertProcessor
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer

__all__ = [
    "BatchFeature",
    "SeamlessM4TFeatureExtractor",
    "Wav2Vec2BertProcessor",
    "Wav2Vec2CTCTokenizer",
]
