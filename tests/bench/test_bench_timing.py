"""How the benchmark times: rounds, the GEMM beside them, and the shares that follow."""

from __future__ import annotations

import pytest
import torch

from bench import flops, machine, measure, runner, workloads
from bench.context import open_context
from bench.measure import Candidate, Prepared, Timing

CPU = torch.device("cpu")


def test_runs_are_interleaved_and_slow_ones_stop_early() -> None:
    order: list[str] = []
    now = [0.0]

    def make(name: str, seconds: float) -> Timing:
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return Timing(Candidate(name, "", "fp32", lambda: Prepared(run, list)), Prepared(run, list))

    timings = [make("a", 1.0), make("slow", 20.0), make("b", 2.0)]
    skipped = Timing(timings[0].candidate, skipped="not here")
    gemm = machine.Gemm("gemm", 100.0, make("gemm", 4.0).prepared.run, 1.0)  # type: ignore[union-attr]
    rates = measure.interleave(
        [*timings, skipped],
        {"fp32": gemm},
        CPU,
        rounds=3,
        budget=12.0,
        pause=0.0,
        clock=lambda: now[0],
    )
    assert order == ["gemm", "a", "slow", "b", "gemm", "a", "b", "gemm", "a", "b"]
    assert [t.seconds for t in timings] == [[1.0] * 3, [20.0], [2.0] * 3]
    assert skipped.seconds == []
    assert rates == {"fp32": [25.0] * 3}


def test_a_warm_call_is_made_before_the_timed_one_and_not_timed() -> None:
    now, order = [0.0], []

    def make(name: str, first: float, again: float) -> Timing:
        def run() -> None:
            now[0] += again if order and order[-1] == name else first
            order.append(name)

        return Timing(Candidate(name, "", "fp32", lambda: Prepared(run, list)), Prepared(run, list))

    timings = [make("a", 5.0, 1.0), make("b", 7.0, 2.0)]
    options = {"rounds": 2, "budget": 100.0, "pause": 0.0, "clock": lambda: now[0]}
    measure.interleave(timings, {}, CPU, warm=True, **options)  # type: ignore[arg-type]
    assert order == ["a", "a", "b", "b"] * 2
    assert [t.seconds for t in timings] == [[1.0] * 2, [2.0] * 2]


def test_our_candidates_get_three_rounds_and_the_gemm_as_long_as_an_encoder() -> None:
    now, calls = [0.0], {"ours": 0, "gemm": 0}

    def make(name: str, seconds: float) -> Prepared:
        def run() -> None:
            calls[name] += 1
            now[0] += seconds

        return Prepared(run, list)

    ours = make("ours", 20.0)
    timing = Timing(Candidate("w2vbert_fast", "", "fp32", lambda: ours), ours)
    gemm = machine.Gemm("gemm", 100.0, make("gemm", 0.125).run, 1.0)
    rates = measure.interleave(
        [timing], {"fp32": gemm}, CPU, rounds=4, budget=1.0, pause=0.0, clock=lambda: now[0]
    )
    assert timing.seconds == [20.0] * 3
    assert calls == {"ours": 3, "gemm": 4 * 3}  # 3 calls take the 0.3 seconds
    assert rates == {"fp32": [800.0] * 4}


def test_a_share_is_that_of_each_rounds_own_gemm() -> None:
    workload = workloads.Workload("small", "encoder", (0.5,), layers=1)
    timing = Timing(Candidate("w2vbert_fast", "", "fp32", lambda: Prepared(list, list)))
    timing.seconds = [1.0, 4.0, 1.0]  # the second round four times as slow, the GEMM of it, too
    with open_context(workload, CPU, 1, None) as context:
        row = runner.row_of(context, timing, {}, {"fp32": [8e9, 2e9, 4e9, 1.0]})
        work = flops.encoder_flops(context.our_config(), [context.features[0].shape[0]])
    assert row.share_of_gemm == pytest.approx(work / 8e9)
    assert row.gemm_rate == 3e9


def test_depth_of_a_workload() -> None:
    fixed, short = workloads.WORKLOADS["1x300s"], workloads.WORKLOADS["1x60s"]
    assert [fixed.depth("cpu"), fixed.depth("cuda"), fixed.depth("cpu", 24)] == [1, 1, 1]
    assert [short.depth("cpu"), short.depth("cuda"), short.depth("cpu", 6)] == [2, 24, 6]
    assert workloads.WORKLOADS["1x30s"].depth("cpu") == 4


def test_the_gemm_survey_takes_the_fastest() -> None:
    best = machine.best_gemm("fp32", CPU, rows=64, square=128)
    assert best.rate > 0 and best.flops in {2.0 * 64 * k * n for k in (1024, 4096) for n in (
        1024, 2048, 4096)} | {2.0 * 128**3}  # fmt: skip
    assert best.run().dtype == torch.float32


def test_rate_with_a_packed_weight() -> None:
    rate = machine.packed_gemm_rate("fp32", CPU, rows=8)
    assert rate is None or rate > 1e8
    assert machine.packed_gemm_rate("fp32", torch.device("meta")) is None
