"""Interleaved timing, statistics, and the rule that nothing is reported that does not agree."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.machine import Gemm, synchronize

OURS = "w2vbert_fast"

FP32_LIMIT = 1e-5
BF16_RATIO = 1.1
INT8_LIMIT = 0.02
PEER_SLACK = 5.0
"""A peer may be this much further from the truth than we may: less exact only makes it faster."""


GEMM_SECONDS = 0.3
"""For so long the GEMM runs in each round: about as long as the encoder, so that what disturbs the
machine for a moment disturbs both."""
OUR_ROUNDS = 3
"""Rounds that our own candidates get even if they take longer than the budget."""


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass
class Prepared:
    """A candidate that is ready to run.

    Attributes:
        run: one pass over the workload; only this is timed.
        collect: what `run` returned -> each utterance's output: float tensors `[T, C]`, or texts.
        release: give memory back.
        parameters: `run` adds to their gradients.
        reset: after each run, not timed.
    """

    run: Callable[[], Any]
    collect: Callable[[Any], list[Any]]
    release: Callable[[], None] = lambda: None
    parameters: Sequence[Tensor] = ()
    reset: Callable[[], None] = lambda: None


@dataclass
class Candidate:
    """One implementation in one configuration.

    Attributes:
        implementation: "w2vbert_fast", "transformers", ...
        configuration: what distinguishes it from others of the same implementation; "" if nothing.
        dtype: "fp32", "bf16" or "int8".
        build: makes it ready; raises `Unavailable` where it cannot.
        bytes_needed: memory of its largest layer, where it is known to be large.
        memory: measure its peak memory too.
    """

    implementation: str
    configuration: str
    dtype: str
    build: Callable[[], Prepared]
    bytes_needed: int = 0
    memory: bool = False

    @property
    def ours(self) -> bool:
        return self.implementation == OURS

    @property
    def label(self) -> str:
        return joined(self.implementation, self.configuration, self.dtype)


@dataclass
class Timing:
    """Times of one candidate, in seconds, beside what it returned."""

    candidate: Candidate
    prepared: Prepared | None = None
    skipped: str | None = None
    outputs: list[Any] = field(default_factory=list)
    stopped: bool = False
    seconds: list[float] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        """Give its place up."""
        self.skipped, self.prepared, self.outputs = reason, None, []


def joined(*parts: str) -> str:
    """Those that are not empty, with commas."""
    return ", ".join(part for part in parts if part)


def statistics(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median, p20 and p80, between order statistics linearly, and the number of rounds."""
    median, p20, p80 = np.quantile(seconds, (0.5, 0.2, 0.8)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "rounds": len(seconds)}


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of `expected`, all utterances together.

    Infinite when the shapes differ or anything is not finite.
    """
    if len(outputs) != len(expected):
        return math.inf
    difference = norm = 0.0
    for got, want in zip(outputs, expected, strict=True):
        if got.shape != want.shape:
            return math.inf
        want = want.double().cpu()
        difference += float((got.detach().double().cpu() - want).square().sum())
        norm += float(want.square().sum())
    error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf


def limit(dtype: str, ours: bool, reference_error: float | None) -> float:
    """The relative error to the float64 run up to which a result counts.

    Args:
        dtype: "fp32", "bf16" or "int8".
        ours: our own implementation; peers get `PEER_SLACK` times as much.
        reference_error: transformers' own error in bf16, needed for bf16.

    Raises:
        ValueError: bf16 without `reference_error`, or an unknown dtype.
    """
    slack = 1.0 if ours else PEER_SLACK
    if dtype == "fp32":
        return FP32_LIMIT * slack
    if dtype == "int8":
        return INT8_LIMIT * slack
    if dtype == "bf16":
        if reference_error is None:
            raise ValueError("reference_error is None; bf16 is judged by the reference's own error")
        return BF16_RATIO * reference_error * slack
    raise ValueError(f"dtype is {dtype!r}; it must be fp32, bf16 or int8")


def prepare(candidate: Candidate, device: torch.device, free: int) -> Timing:
    """Build a candidate, run it once to warm it up, and keep what it returned."""
    timing = Timing(candidate)
    try:
        if candidate.bytes_needed > 0.8 * free:
            raise Unavailable(
                f"would need {candidate.bytes_needed / 1e9:.1f} GB for one attention layer; "
                f"{free / 1e9:.1f} GB are free"
            )
        timing.prepared = candidate.build()
        with torch.inference_mode():
            timing.outputs = timing.prepared.collect(timing.prepared.run())
    except Unavailable as error:
        timing.skip(str(error))
    except Exception as error:  # a peer that fails is a row of the report, not its end
        timing.skip(f"failed: {type(error).__name__}: {first_line(error)}")
    if timing.skipped:
        gc.collect()
    return timing


def first_line(error: Exception) -> str:
    """Of its message, 200 characters at most."""
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def interleave(
    timings: Sequence[Timing],
    gemms: dict[str, Gemm],
    device: torch.device,
    *,
    rounds: int,
    budget: float,
    pause: float,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run every candidate once a round, and the best GEMM of each dtype before them.

    Args:
        timings: from `prepare`; their `seconds` are filled in.
        gemms: by dtype.
        device: where they run.
        rounds: at most so many.
        budget: seconds for one candidate: a slow one stops earlier, ours not before round 3.
        pause: seconds of rest before each run, so that another library's waiting threads have gone
            to sleep.
        warm: call each once before it is timed, so that it finds code and weights in the caches as
            where it runs again and again, and not what the one before it left there.
        clock: for tests.

    Returns:
        GEMM rate in FLOP/s of every round, by dtype.
    """
    rates: dict[str, list[float]] = {dtype: [] for dtype in gemms}
    active = [t for t in timings if t.prepared is not None and t.skipped is None]

    def timed(run: Callable[[], Any], at_least: float = 0.0) -> float:
        """Seconds of one call; the mean of as many as take `at_least` seconds."""
        if pause:
            time.sleep(pause)
        synchronize(device)
        start, calls, passed = clock(), 0, 0.0
        while calls == 0 or passed < at_least:
            run()
            synchronize(device)
            calls, passed = calls + 1, clock() - start
        return passed / calls

    with torch.inference_mode():
        for index in range(rounds):
            for dtype, gemm in gemms.items():
                rates[dtype].append(gemm.flops / timed(gemm.run, GEMM_SECONDS))
            for timing in active:
                assert timing.prepared is not None
                spent = sum(timing.seconds)
                if timing.stopped or (
                    index >= (OUR_ROUNDS if timing.candidate.ours else 1)
                    and (spent > budget / 2 and spent + spent / index > budget)
                ):
                    timing.stopped = True
                    continue
                if warm:
                    timing.prepared.run()
                timing.seconds.append(timed(timing.prepared.run))
                timing.prepared.reset()
    return {dtype: values for dtype, values in rates.items() if values}
