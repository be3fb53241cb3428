"""Running trained models on recordings: audio in, text out."""

from .audio import Audio, AudioError, load_audio, to_mono_16khz
from .transcribe import Pipeline, Transcript, load_pipeline, transcribe

__all__ = [
    "Audio",
    "AudioError",
    "Pipeline",
    "Transcript",
    "load_audio",
    "load_pipeline",
    "to_mono_16khz",
    "transcribe",
]
