"""Runs one workload: prepares every candidate, checks that they agree, times them interleaved."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench import memory, training
from bench.agreement import Disagreement, judge
from bench.context import Context, open_context
from bench.flops import encoder_flops
from bench.machine import Gemm, available_memory
from bench.measure import Candidate, Timing, interleave, prepare, statistics
from bench.peers import candidates_of
from bench.rows import Row
from bench.workloads import Workload

LAYERED = ("encoder", "early_exit", "training")
"""Kinds of workload whose FLOPs follow from the number of layers."""


@dataclass
class Settings:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads of every library.
        layers: encoder layers; None: as `Workload.depth` says.
        rounds: rounds at most.
        budget: seconds of timing for each candidate.
        pause: seconds of rest before each timed run.
        peers: implementations to compare with; None: all.
        match: of the peers' configurations only those whose label holds this.
        without: and none of these.
        dtypes: of these only; None: the workload's.
        memory: measure peak memory too, in fresh processes; on a CPU of the workloads that say so.
        folder: where exported models are kept during the run; None: a folder for each workload.
    """

    device: str = "cpu"
    threads: int = 1
    layers: int | None = None
    rounds: int = 5
    budget: float = 4.0
    pause: float = 0.25
    peers: Collection[str] | None = None
    match: str = ""
    without: Collection[str] = ()
    dtypes: Collection[str] | None = None
    memory: bool = True
    gemms: dict[str, Gemm] = field(default_factory=dict)
    folder: Path | None = None


def run_workload(
    workload: Workload, settings: Settings, report: Callable[[Row], None]
) -> tuple[list[Row], list[Disagreement]]:
    """Measure one workload.

    Args:
        workload: which.
        settings: how.
        report: called with each row as soon as it is known.

    Returns:
        Rows, and the candidates whose answers disagree: they have a row
        without times.
    """
    device = torch.device(settings.device)
    dtypes = tuple(d for d in workload.dtypes if settings.dtypes is None or d in settings.dtypes)
    rows: list[Row] = []
    if not dtypes:
        return rows, []
    opened = open_context(workload, device, settings.threads, settings.layers, settings.folder)
    with opened as context:
        candidates = select(
            candidates_of(context, dtypes), settings.peers, settings.match, settings.without
        )
        peaks: dict[str, int | None] = {}
        wanted = workload.memory or settings.device == "cuda"
        if settings.memory and wanted and workload.kind in ("encoder", "training"):
            free = available_memory(device)
            for c in candidates:
                if c.memory and c.bytes_needed < 0.8 * free:
                    peaks[c.label] = memory.measure(
                        c, workload.name, settings.device, settings.threads, context.layers
                    )
        started = time.perf_counter()
        timings = []
        for candidate in candidates:
            begun = time.perf_counter()
            timings.append(prepare(candidate, device, available_memory(device)))
            note = timings[-1].skipped or f"{time.perf_counter() - begun:.1f} s"
            print(f"  prepared {candidate.label}: {note}", file=sys.stderr, flush=True)
        errors, disagreements = judge(context, timings)
        context.drop_weights()
        gc.collect()
        prepared_in = time.perf_counter() - started
        gemms = {d: g for d, g in settings.gemms.items() if d in dtypes}
        rates = interleave(
            timings,
            gemms if workload.kind in LAYERED else {},
            device,
            rounds=min(settings.rounds, workload.rounds or settings.rounds),
            budget=settings.budget,
            pause=settings.pause,
        )
        for timing in timings:
            peak = peaks.get(timing.candidate.label)
            rows.append(row_of(context, timing, errors, rates, peak, round(prepared_in, 1)))
            report(rows[-1])
            if timing.prepared is not None:
                timing.prepared.release()
    return rows, disagreements


def select(
    candidates: Sequence[Candidate],
    peers: Collection[str] | None,
    match: str = "",
    without: Collection[str] = (),
) -> list[Candidate]:
    """Ours, those of `peers`, and transformers' first of each dtype, the measure of all."""
    kept, compared_with = [], set()
    for candidate in candidates:
        wanted = candidate.ours or peers is None or candidate.implementation in peers
        label = candidate.label
        left_out = match not in label or any(text in label for text in without)
        wanted = wanted and (candidate.ours or not left_out)
        key = candidate.dtype, training.mode_of(candidate.configuration)
        if candidate.implementation == "transformers" and key not in compared_with:
            compared_with.add(key)
            wanted = True
        if wanted:
            kept.append(candidate)
    return kept


def row_of(
    context: Context,
    timing: Timing,
    errors: dict[str, tuple[float, str]],
    rates: dict[str, list[float]],
    peak: int | None = None,
    prepared_in: float | None = None,
) -> Row:
    """What is known of a candidate: its times, its error by label, and rates of the GEMM."""
    workload, candidate = context.workload, timing.candidate
    error, error_kind = errors.get(candidate.label, (None, None))
    seconds = statistics(timing.seconds) if timing.seconds else None
    flops = gemm_rate = share = None
    if workload.kind in LAYERED:
        flops = encoder_flops(context.our_config(), context.lengths, workload.exit_layer)
        # Each product of the forward pass has two in the backward pass.
        flops *= 3.0 if workload.kind == "training" else 1.0
    if seconds is not None and flops is not None and candidate.dtype in rates:
        gemm_rate = float(np.median(rates[candidate.dtype]))
        # Of each round its own GEMM: the machine may be slower in one than in another.
        pairs = zip(timing.seconds, rates[candidate.dtype], strict=False)
        share = float(np.median([flops / s / rate for s, rate in pairs]))
    return Row(
        workload=workload.name,
        kind=workload.kind,
        implementation=candidate.implementation,
        configuration=candidate.configuration,
        dtype=candidate.dtype,
        audio_seconds=workload.audio_seconds,
        seconds=seconds,
        flops=flops,
        share_of_gemm=share,
        peak_bytes_above_weights=peak,
        error=error,
        error_kind=error_kind,
        skipped=timing.skipped,
        batch=len(context.features),
        longest_seconds=max(workload.seconds),
        layers=context.layers if flops is not None else None,
        audio_seconds_per_second=workload.audio_seconds / seconds["median"] if seconds else None,
        gemm_rate=gemm_rate,
        preparation_seconds_of_all=prepared_in,
    )
