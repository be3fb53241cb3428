"""Running trained models on recordings: audio in, text, hidden states or classes out.

Names are loaded on first use: the command line reads names of formats here, without PyTorch.
"""

from typing import TYPE_CHECKING

from w2vbert_fast._lazy import names_of

if TYPE_CHECKING:
    from w2vbert_fast.inference.pipeline import Pipeline, load_pipeline
    from w2vbert_fast.inference.rows import Result
    from w2vbert_fast.inference.runner import Classifier, Embedder, Flow, Transcriber
    from w2vbert_fast.inference.tasks.classify import Classification
    from w2vbert_fast.inference.tasks.embed import Embedding
    from w2vbert_fast.inference.tasks.transcribe import Transcription
    from w2vbert_fast.inference.transcripts import Transcript, align, transcribe
    from w2vbert_fast.recordings.audio import Audio, AudioError, load_audio, to_mono_16khz
    from w2vbert_fast.recordings.rows import Row

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
    "align",
    "load_audio",
    "load_pipeline",
    "to_mono_16khz",
    "transcribe",
]

__getattr__, __dir__ = names_of(
    __name__,
    {
        "inference.pipeline": ("Pipeline", "load_pipeline"),
        "inference.rows": ("Result",),
        "inference.runner": ("Classifier", "Embedder", "Flow", "Transcriber"),
        "inference.tasks.classify": ("Classification",),
        "inference.tasks.embed": ("Embedding",),
        "inference.tasks.transcribe": ("Transcription",),
        "inference.transcripts": ("Transcript", "align", "transcribe"),
        "recordings.audio": ("Audio", "AudioError", "load_audio", "to_mono_16khz"),
        "recordings.rows": ("Row",),
    },
)
