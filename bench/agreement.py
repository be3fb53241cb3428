"""Nothing is reported that does not agree: every candidate beside what is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.context import Context, oracle
from bench.measure import Candidate, Timing, joined, limit, relative_error
from bench.training import mode_of

REFERENCE = ("transformers", "sdpa")
"""Implementation and attention whose bf16 error is the measure for ours: transformers' default."""

_EXACT = "relative to transformers in float64 from equally rounded weights"
ERRORS = {
    "encoder": _EXACT,
    "early_exit": "relative to transformers in float32",
    "features": "relative to transformers",
    "end_to_end": "share of the transcripts that differ from transformers' one by one",
    "training": f"of all gradients, {_EXACT}",
}
"""What the error of each kind of workload is."""

LIMITS = {"features": 1e-3, "end_to_end": 0.0}
"""Errors up to which kinds without a model of a dtype count, ours and peers'; others: `limit`."""


@dataclass
class Disagreement:
    """A candidate whose answer is wrong, so that it has no row."""

    label: str
    error: float
    limit: float


def judge(
    context: Context, timings: Sequence[Timing]
) -> tuple[dict[str, tuple[float, str]], list[Disagreement]]:
    """Compare every candidate's output with the truth; one that is off loses its place.

    Returns:
        Error and what it is, by label, and the candidates that disagree.
    """
    kind = context.workload.kind
    errors: dict[str, tuple[float, str]] = {}
    disagreements: list[Disagreement] = []
    measures: dict[str, dict[str, float]] = {}  # the reference's own errors in bf16, by mode
    truths: dict[str, list[Any]] = {}
    ready = [timing for timing in timings if timing.skipped is None]
    # The reference first: bf16 is judged by its error.
    ready.sort(key=lambda timing: _is_reference(timing.candidate), reverse=True)
    for timing in ready:
        candidate, mode = timing.candidate, mode_of(timing.candidate.configuration)
        if kind != "training":  # of which a candidate itself brings its errors along
            rounding = "bf16" if candidate.dtype == "bf16" else "fp32"
            if rounding not in truths:
                truths[rounding] = _truth(context, timings, rounding)
        found = _errors(kind, timing, truths)
        timing.outputs = []
        if candidate.dtype == "bf16":
            if _is_reference(candidate):
                measures.setdefault(mode, found)
            if mode not in measures:
                timing.skip("transformers could not run, whose error is the measure")
                continue
        for part, error in found.items():
            errors[candidate.label] = (error, ERRORS[kind])
            bound = LIMITS.get(kind)
            if bound is None:
                own = measures.get(mode, {}).get(part)
                bound = limit(candidate.dtype, candidate.ours, own)
            if not error <= bound and timing.skipped is None:
                disagreements.append(Disagreement(joined(candidate.label, part), error, bound))
                what = f"error of {part}" if part else "error"
                timing.skip(f"disagrees: {what} {error:.2e}, at most {bound:.2e} counts")
    return errors, disagreements


def _errors(kind: str, timing: Timing, truths: dict[str, list[Any]]) -> dict[str, float]:
    """Of each part of what a candidate gives; the last is the one that is reported."""
    if kind == "training":
        (given,) = timing.outputs
        return {"outputs": given.outputs, "gradients": given.gradients}
    truth = truths["bf16" if timing.candidate.dtype == "bf16" else "fp32"]
    if kind == "end_to_end":
        wrong = sum(a != b for a, b in zip(timing.outputs, truth, strict=True))
        return {"": wrong / len(truth)}
    return {"": relative_error(timing.outputs, truth)}


def _is_reference(candidate: Candidate) -> bool:
    return (candidate.implementation, candidate.configuration.split(",")[0]) == REFERENCE


def _truth(context: Context, timings: Sequence[Timing], rounding: str) -> list[Any]:
    """The right outputs; where no float64 run is made, those of transformers' first candidate."""
    if context.workload.kind == "encoder":
        return oracle(context, rounding)
    for timing in timings:
        if timing.candidate.implementation == "transformers" and timing.skipped is None:
            return list(timing.outputs)
    raise RuntimeError(
        f"workload {context.workload.name!r}: nothing to compare with, transformers could not run"
    )
