"""The benchmark of a training step: what is right, what is refused, and how it is counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import memory, runner, targets, training, workloads
from bench.agreement import judge
from bench.context import Context
from bench.measure import Candidate, Prepared, Timing
from bench.peers import training as peers_training
from bench.rows import Row
from tests.bench.test_bench import CPU, row, small_context, theirs

SMALL = workloads.Workload("train small", "training", (0.5, 0.3), ("fp32", "bf16"), layers=2)


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Context:
    return small_context(monkeypatch, tmp_path, workload=SMALL)


def test_candidates_agree_and_give_rows(monkeypatch: pytest.MonkeyPatch, context: Context) -> None:
    """Ours and transformers' eager and sdpa; a compiler would take minutes."""
    uncompiled = tuple(c for c in peers_training.CONFIGURATIONS if not c[1])
    assert uncompiled == (("sdpa", ""), ("eager", ""))
    monkeypatch.setattr(peers_training, "CONFIGURATIONS", uncompiled)
    settings = runner.Settings(rounds=2, budget=math.inf, pause=0.0, memory=False, threads=1)
    printed: list[Row] = []
    rows, wrong = runner.run_workload(SMALL, settings, printed.append)
    assert wrong == [] and printed == rows
    # Three ways of training; of transformers eager and sdpa one by one, and sdpa padded.
    assert len(rows) == 3 + 3 * 3
    assert all(r.skipped is None and r.seconds and r.seconds["rounds"] == 2 for r in rows)
    errors = {r.dtype: r.error for r in rows if r.implementation == "w2vbert_fast"}
    assert 0 < errors["fp32"] < 2e-6
    assert 1e-4 < errors["bf16"] < 0.05
    forward = runner.encoder_flops(context.our_config(), [f.shape[0] for f in context.features])
    assert rows[0].flops == 3 * forward


def test_what_is_right_is_autograd_of_the_reference(context: Context) -> None:
    """Without blocks of queries and without checkpoints, all in float64."""
    found = training.truth(context, "fp32")
    model = training.reference(context, "fp32", "eager").double()
    for x, target in zip(context.features, training.labels(context), strict=True):
        logits = model(x[None].double()).logits
        torch.nn.functional.cross_entropy(logits[0], target, reduction="sum").backward()
    errors = found.errors(found.logits, model)
    assert errors.outputs == 0.0
    assert errors.gradients < 1e-7  # they are kept in float32
    assert training.truth(context, "fp32") is found


def test_inputs_of_the_candidates_are_the_same(context: Context) -> None:
    targets_of = training.labels(context)
    assert [len(t) for t in targets_of] == [f.shape[0] for f in context.features]
    padded = training.padded_labels(targets_of)
    assert int((padded == -100).sum()) == abs(len(targets_of[0]) - len(targets_of[1])) > 0
    logits = torch.randn(*padded.shape, 34)
    alone = [training.loss(logits[i : i + 1, : len(t)], t[None]) for i, t in enumerate(targets_of)]
    torch.testing.assert_close(training.loss(logits, padded), alone[0] + alone[1])
    values = training.config_values(context)
    for name in ("layerdrop", "mask_time_prob", "conformer_conv_dropout", "final_dropout"):
        assert values[name] == 0.0


def scaled(context: Context, factor: float, monkeypatch: pytest.MonkeyPatch) -> Timing:
    """Our candidate with the gradient of one norm's weight multiplied."""
    candidate = next(peers_training.candidates(context, ("fp32",)))
    build = candidate.build

    def changed() -> Prepared:
        prepared = build()
        run = prepared.run

        def off() -> Any:
            outputs = run()
            assert all(p.grad is not None for p in prepared.parameters)
            gradients = [p.grad for p in prepared.parameters if p.grad is not None]
            largest = max(gradients, key=lambda g: float(g.norm()))
            largest.mul_(factor)
            return outputs

        prepared.run = off
        return prepared

    monkeypatch.setattr(candidate, "build", changed)
    return runner.prepare(candidate, CPU, 10**12)


@pytest.mark.parametrize(
    ("factor", "agrees"), [(1.0, True), (1.0001, False), (float("nan"), False)]
)
def test_wrong_gradients_are_refused(
    factor: float, agrees: bool, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = scaled(context, factor, monkeypatch)
    _, wrong = judge(context, [timing])
    assert (wrong == []) is agrees
    assert (timing.skipped is None) is agrees and (timing.prepared is not None) is agrees
    if not agrees:
        assert wrong[0].label == "w2vbert_fast, fp32, gradients"


def judged(context: Context, ours: training.Errors, reference: training.Errors | None) -> list[str]:
    """Labels of what is refused in bf16 under autocast."""
    timings = []
    for name, errors in (("w2vbert_fast", ours), ("transformers", reference)):
        configuration = "autocast" if name == "w2vbert_fast" else "sdpa, autocast"
        candidate = Candidate(name, configuration, "bf16", lambda: Prepared(list, list))
        if errors is not None:
            timings.append(Timing(candidate, Prepared(list, list), outputs=[errors]))
    wrong = judge(context, timings)[1]
    skipped = [t.candidate.label for t in timings if t.skipped is not None]
    assert all(entry.label.startswith(tuple(skipped)) for entry in wrong)
    return skipped


def test_bf16_may_be_as_wrong_as_the_reference(context: Context) -> None:
    reference = training.Errors(1e-2, 2e-2)
    mine = "w2vbert_fast, autocast, bf16"
    assert judged(context, training.Errors(1.09e-2, 2.19e-2), reference) == []
    assert judged(context, training.Errors(1.11e-2, 2e-2), reference) == [mine]
    assert judged(context, training.Errors(1e-2, 2.21e-2), reference) == [mine]
    assert judged(context, training.Errors(1e-2, 2e-2), None) == [mine]


def test_the_reference_of_every_mode_runs_whatever_peers_are_chosen(
    context: Context,
) -> None:
    found = list(peers_training.candidates(context, ("fp32", "bf16")))
    kept = {c.label for c in runner.select(found, {"none"}) if not c.ours}
    assert kept == {
        "transformers, sdpa, one by one, fp32",
        "transformers, sdpa, one by one, bf16 weights, bf16",
        "transformers, sdpa, one by one, autocast, bf16",
    }


def test_another_model_is_no_answer(context: Context) -> None:
    found = training.Truth([torch.ones(2, 3)], {"weight": torch.ones(3)})
    with pytest.raises(ValueError, match="other parameters"):
        found.errors(found.logits, nn.Linear(3, 1))
    assert found.errors([torch.ones(1, 3)], nn.Linear(3, 1, bias=False)).outputs == float("inf")


def test_training_is_measured_when_it_is_asked_for() -> None:
    kinds = {name: w.kind for name, w in workloads.WORKLOADS.items()}
    assert {n for n, kind in kinds.items() if kind == "training"} == {
        "train 1x30s",
        "train 8x1-20s",
    }
    assert set(workloads.DEFAULT) == {n for n, kind in kinds.items() if kind != "training"}
    assert len(workloads.TRAINING_SECONDS) == 8


def test_gradients_are_no_working_memory() -> None:
    parameter = nn.Parameter(torch.zeros(20 * 2**20))  # 80 MiB, its gradient too

    def run() -> None:
        with training.recording():
            (parameter[:1] * torch.ones(1)).sum().backward()

    peak = memory.peak_of(Prepared(run, list, parameters=[parameter]), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    # What is added to it is as large; the gradient itself was there before.
    assert 0.9 * 80 < peak / 2**20 < 1.5 * 80
    assert parameter.grad is not None and float(parameter.grad.sum()) == 1.0


def test_targets_compare_equal_modes_and_the_least_memory() -> None:
    def training_row(maker: Any, *args: Any, peak: int | None = None, **changes: Any) -> Row:
        fields = {"workload": "train 1x30s", "dtype": "bf16", "peak_bytes_above_weights": peak}
        return maker(*args, **{**fields, **changes})

    rows = [
        training_row(row, configuration="bf16 weights", peak=100),
        training_row(theirs, 1.5, "autocast", implementation="w2vbert_fast"),
        training_row(theirs, 3.0, "sdpa, bf16 weights", peak=900),
        training_row(theirs, 2.4, "sdpa, compiled, bf16 weights", peak=400),
        training_row(theirs, 6.0, "sdpa, autocast", peak=500),
    ]
    speed = targets.speedup
    at = ("train 1x30s", "bf16", "transformers")
    assert speed(*at)(rows) == 2.4
    assert speed(*at, "autocast", ours_containing="autocast")(rows) == 4.0
    assert targets.peak_ratio(*at, "bf16 weights")(rows) == 0.25
    assert targets.peak_ratio(*at, "autocast")(rows) is None
    judged_rows = {e["row"]: e for e in targets.evaluate(rows, counted=False)}
    assert judged_rows["train 1x30s, bf16, against transformers' best"]["reached"] is True
    peak = judged_rows["train 1x30s, bf16, bf16 weights: peak memory over transformers' least"]
    assert (peak["reached"], peak["measured"], peak["target"]) == (True, 0.25, "<= 0.333")
