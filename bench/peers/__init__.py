"""What the benchmark compares, by what runs it, and what is right for all of it."""

from __future__ import annotations

from bench.context import Context
from bench.measure import Candidate
from bench.peers import engines, pytorch, speech, training


def candidates_of(context: Context, dtypes: tuple[str, ...]) -> list[Candidate]:
    """Every candidate of a workload, ours first."""
    kind = context.workload.kind
    if kind == "encoder":
        found = list(pytorch.encoder_candidates(context, dtypes))
        return found + list(engines.encoder_candidates(context, dtypes))
    makers = {
        "early_exit": pytorch.early_exit_candidates,
        "features": speech.feature_candidates,
        "end_to_end": speech.text_candidates,
        "training": training.candidates,
    }
    if kind not in makers:
        raise ValueError(f"kind is {kind!r}; it must be encoder or one of {', '.join(makers)}")
    return list(makers[kind](context, dtypes))
