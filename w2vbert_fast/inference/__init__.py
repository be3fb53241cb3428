"""Running trained models on recordings: audio in, text, hidden states or classes out."""

from w2vbert_fast.recordings.rows import Row

from .audio import Audio, AudioError, load_audio, to_mono_16khz
from .offline import Classifier, Embedder, Flow, Transcriber
from .pipeline import Pipeline, load_pipeline
from .rows import Classification, Embedding, Result, Transcription
from .transcribe import Transcript, transcribe

__all__ = [
    "Audio",
    "AudioError",
    "Classification",
    "Classifier",
    "Embedder",
    "Embedding",
    "Flow",
    "Pipeline",
    "Result",
    "Row",
    "Transcriber",
    "Transcript",
    "Transcription",
    "load_audio",
    "load_pipeline",
    "to_mono_16khz",
    "transcribe",
]
