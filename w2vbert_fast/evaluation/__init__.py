"""Error rates of models and of results on transcribed recordings, and what is tuned by them.

    from w2vbert_fast.evaluation import evaluate

    print(evaluate("dev.jsonl", "runs/first/best"))

Names are loaded on first use: this package needs the extra `evaluate`, and importing it does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w2vbert_fast._lazy import names_of

if TYPE_CHECKING:
    from w2vbert_fast.evaluation.report import write_report
    from w2vbert_fast.evaluation.scoring import Evaluation, evaluate
    from w2vbert_fast.evaluation.tuning import Tuned, tune_lm

__all__ = ["Evaluation", "Tuned", "evaluate", "tune_lm", "write_report"]

__getattr__, __dir__ = names_of(
    __name__,
    {
        "evaluation.report": ("write_report",),
        "evaluation.scoring": ("Evaluation", "evaluate"),
        "evaluation.tuning": ("Tuned", "tune_lm"),
    },
)
