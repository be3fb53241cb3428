"""Fine-tuning: a manifest of recordings in, checkpoints in the reference's format out.

    from w2vbert_fast.training import FinetuneConfig, finetune

    finetune(FinetuneConfig("facebook/w2v-bert-2.0", "train.jsonl", "dev.jsonl", "out"))

Names are loaded on first use: this package needs the extra `train`, and importing it does not.
`docs/use/finetune.md` describes manifests, options and outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2vbert_fast._lazy import names_of

if TYPE_CHECKING:
    from w2vbert_fast.training.config import FinetuneConfig
    from w2vbert_fast.training.data import Utterance, UtteranceError, UtteranceSource
    from w2vbert_fast.training.manifest import ManifestError
    from w2vbert_fast.training.trainer import FinetuneResult, StepReport, finetune

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "ManifestError",
    "StepReport",
    "Utterance",
    "UtteranceError",
    "UtteranceSource",
    "finetune",
]

__getattr__, __dir__ = names_of(
    __name__,
    {
        "training.config": ("FinetuneConfig",),
        "training.data": ("Utterance", "UtteranceError", "UtteranceSource"),
        "training.manifest": ("ManifestError",),
        "training.trainer": ("FinetuneResult", "StepReport", "finetune"),
    },
)
