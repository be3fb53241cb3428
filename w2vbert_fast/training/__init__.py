"""Fine-tuning: a manifest of recordings in, checkpoints in the reference's format out.

    from w2vbert_fast.training import FinetuneConfig, finetune

    finetune(FinetuneConfig("facebook/w2v-bert-2.0", "train.jsonl", "dev.jsonl", "out"))

Names are loaded on first use: this package needs the extra `train`, and importing it does not.
`docs/use/finetune.md` describes manifests, options and outputs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "FinetuneConfig": "config",
    "FinetuneResult": "trainer",
    "ManifestError": "manifest",
    "StepReport": "trainer",
    "Utterance": "data",
    "UtteranceError": "data",
    "UtteranceSource": "data",
    "finetune": "trainer",
}

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

if TYPE_CHECKING:
    from w2vbert_fast.training.config import FinetuneConfig as FinetuneConfig
    from w2vbert_fast.training.data import Utterance as Utterance
    from w2vbert_fast.training.data import UtteranceError as UtteranceError
    from w2vbert_fast.training.data import UtteranceSource as UtteranceSource
    from w2vbert_fast.training.manifest import ManifestError as ManifestError
    from w2vbert_fast.training.trainer import FinetuneResult as FinetuneResult
    from w2vbert_fast.training.trainer import StepReport as StepReport
    from w2vbert_fast.training.trainer import finetune as finetune


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
