"""Running trained models on recordings: audio in, text, hidden states or classes out."""

from w2vbert_fast.recordings.rows import Row

from .audio import Audio, AudioError, load_audio, to_mono_16khz
from .offline import Classifier, Embedder, Flow, Transcriber
from .rows import Classification, Embedding, Result, Transcription
from .transcribe import Pipeline, Transcript, load_pipeline, transcribe

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
