"""The benchmark's own logic: what it runs, what it refuses to report, and how it counts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import w2vbert_fast
from bench import (
    __main__ as command,
    agreement,
    context as shared,
    flops,
    machine,
    measure,
    memory,
    peers,
    runner,
    targets,
    workloads,
)
from bench.agreement import judge
from bench.measure import Candidate, Prepared, Unavailable
from bench.rows import SCHEMA, Row, parse

CPU = torch.device("cpu")
SMALL = workloads.Workload("small", "encoder", (0.5, 0.3), ("fp32",), layers=1)


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """The command sets the number of threads and environment variables for good."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


def small_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **fields: Any) -> shared.Context:
    """A context of a narrow model and two short utterances."""
    narrow = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "left_max_position_embeddings": 5,
        "right_max_position_embeddings": 3,
        "conv_depthwise_kernel_size": 7,
        "output_hidden_size": 48,
    }
    plain = shared.Context.config_values
    monkeypatch.setattr(shared.Context, "config_values", lambda self: {**plain(self), **narrow})
    workload = fields.pop("workload", SMALL)
    waveforms, _ = workloads.speech(workload.seconds)
    return shared.Context(
        workload=workload,
        device=CPU,
        threads=1,
        layers=workload.layers or 1,
        features=workloads.encoder_inputs(waveforms),
        waveforms=waveforms,
        folder=tmp_path,
    )


def candidate(outputs: list[Tensor], dtype: str = "fp32", name: str = "w2vbert_fast") -> Candidate:
    configuration = "sdpa" if name == "transformers" else ""
    return Candidate(name, configuration, dtype, lambda: Prepared(lambda: outputs, lambda x: x))


# Workloads


def test_speech_has_exactly_the_lengths_asked_for() -> None:
    utterances, source = workloads.speech((1.0, 0.25, 40.0))
    assert source == "speech"
    assert [len(u) for u in utterances] == [16_000, 4_000, 640_000]
    assert all(u.dtype == np.float32 and np.abs(u).max() > 0.01 for u in utterances)
    assert not np.array_equal(utterances[0][:4_000], utterances[1])


def test_speech_is_noise_where_nothing_decodes_flac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "clips", lambda: None)
    utterances, source = workloads.speech((0.5,))
    assert source == "noise"
    assert len(utterances[0]) == 8_000


def test_mixed_lengths_are_sixteen_between_1_and_20_seconds() -> None:
    assert len(workloads.MIXED_SECONDS) == 16
    assert min(workloads.MIXED_SECONDS) >= 1.0
    assert 15.0 < max(workloads.MIXED_SECONDS) <= 20.0


def test_every_workload_has_candidates_of_ours_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = small_context(monkeypatch, tmp_path)
    for workload in workloads.WORKLOADS.values():
        context.workload = workload
        found = peers.candidates_of(context, workload.dtypes)
        assert found[0].ours, workload.name
        assert {c.dtype for c in found if c.ours} == set(workload.dtypes)
        labels = [c.label for c in found]
        assert len(set(labels)) == len(labels)


def test_an_unknown_kind_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workload = workloads.Workload("odd", "odd", (0.5,))
    context = small_context(monkeypatch, tmp_path, workload=workload)
    with pytest.raises(ValueError, match="kind is 'odd'"):
        peers.candidates_of(context, ("fp32",))


def test_batches_hold_every_utterance_once() -> None:
    features = [torch.zeros(n, 160) for n in (5, 1, 9, 3, 7)]
    for batching in workloads.BATCHINGS:
        groups = workloads.batches(features, batching)
        assert sorted(i for rows in groups for i in rows) == [0, 1, 2, 3, 4]
    assert workloads.batches(features, "sorted batches of 4") == [[1, 3, 0, 4], [2]]
    with pytest.raises(ValueError, match="batching is 'all'"):
        workloads.batches(features, "all")


def test_padding_and_gathering_are_inverse() -> None:
    features = [torch.randn(n, 160) for n in (5, 1, 9)]
    batch, mask = workloads.padded(features)
    assert batch.shape == (3, 9, 160)
    assert mask is not None and mask.sum(1).tolist() == [5, 1, 9]
    got = shared.gather([[2, 0, 1]], [5, 1, 9], [batch[[2, 0, 1]]])
    for x, y in zip(got, features, strict=True):
        assert torch.equal(x, y)
    assert workloads.padded(features[:1])[1] is None


# Statistics and timing


def test_statistics_are_order_statistics() -> None:
    got = measure.statistics([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert got == {"median": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6}
    assert measure.statistics([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0, "rounds": 1}


# Agreement


def test_relative_error_is_infinite_for_what_cannot_be_compared() -> None:
    x = [torch.ones(3, 2), torch.ones(1, 2)]
    assert measure.relative_error(x, x) == 0.0
    assert measure.relative_error([2 * t for t in x], x) == pytest.approx(1.0)
    assert measure.relative_error(x[:1], x) == math.inf
    assert measure.relative_error([torch.ones(2, 2), x[1]], x) == math.inf
    assert measure.relative_error([x[0] * math.nan, x[1]], x) == math.inf


def test_limits() -> None:
    assert measure.limit("fp32", True, None) == 1e-5
    assert measure.limit("int8", True, None) == 0.02
    assert measure.limit("bf16", True, 1e-3) == pytest.approx(1.1e-3)
    assert measure.limit("int8", False, None) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="reference_error"):
        measure.limit("bf16", True, None)
    with pytest.raises(ValueError, match="dtype is 'fp8'"):
        measure.limit("fp8", True, None)


@pytest.mark.parametrize(
    ("dtype", "off", "agrees"),
    [
        ("fp32", 0.9e-5, True),
        ("fp32", 1.1e-5, False),
        ("bf16", 1.09e-2, True),
        ("bf16", 1.11e-2, False),
        ("int8", 0.019, True),
        ("int8", 0.021, False),
    ],
)
def test_what_disagrees_is_not_timed(
    dtype: str, off: float, agrees: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truth = [torch.ones(4, 3, dtype=torch.float64)]
    monkeypatch.setattr(agreement, "oracle", lambda context, rounding: truth)
    context = small_context(monkeypatch, tmp_path)
    made = [
        candidate([truth[0] * (1 + off)], dtype),
        candidate([truth[0] * 1.01], dtype if dtype == "bf16" else "int8", "transformers"),
    ]
    timings = [measure.prepare(c, CPU, 10**12) for c in made]
    errors, wrong = judge(context, timings)
    assert errors[made[0].label][0] == pytest.approx(off)
    assert [w.label for w in wrong] == ([] if agrees else [made[0].label])
    assert (timings[0].skipped is None) is agrees
    assert timings[1].skipped is None
    measure.interleave(timings, {}, CPU, rounds=2, budget=math.inf, pause=0.0)
    assert len(timings[0].seconds) == (2 if agrees else 0)


def test_bf16_is_not_judged_without_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    truth = [torch.ones(4, 3)]
    monkeypatch.setattr(agreement, "oracle", lambda context, rounding: truth)
    timing = measure.prepare(candidate(truth, "bf16"), CPU, 10**12)
    judge(small_context(monkeypatch, tmp_path), [timing])
    assert timing.skipped is not None and timing.prepared is None


def test_other_texts_disagree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    workload = workloads.Workload("text", "end_to_end", (0.5, 0.5))
    context = small_context(monkeypatch, tmp_path, workload=workload)
    ours, theirs = candidate(["one", "two"]), candidate(["one", "too"], name="transformers")  # type: ignore[list-item]
    timings = [measure.prepare(c, CPU, 10**12) for c in (ours, theirs)]
    _, wrong = judge(context, timings)
    assert [(w.label, w.error) for w in wrong] == [(ours.label, 0.5)]


def test_the_command_fails_when_a_candidate_disagrees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_context(monkeypatch, tmp_path)
    monkeypatch.setitem(workloads.WORKLOADS, "1x10s", SMALL)
    gemm = machine.Gemm("gemm", 1.0, lambda: torch.ones(()), 1.0)
    monkeypatch.setattr(machine, "best_gemm", lambda dtype, device: gemm)
    arguments = [
        "--workload",
        "1x10s",
        "--peer",
        "none",
        "--no-memory",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    arguments += ["--out", str(tmp_path / "result.json")]
    assert command.main(arguments) == 0
    first = json.loads((tmp_path / "result.json").read_text())
    assert [r["skipped"] for r in first["rows"]] == [None, None, None]

    forward = w2vbert_fast.Wav2Vec2BertModel.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 1.0001
        return output

    monkeypatch.setattr(w2vbert_fast.Wav2Vec2BertModel, "forward", wrong)
    assert command.main(arguments) == 1
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    for row in rows[:2]:  # ours, as it is and packed
        assert row["seconds"] is None
        assert row["skipped"].startswith("disagrees: error 1.00e-04")
    assert rows[2]["seconds"] is not None
    assert "DISAGREES, not reported: w2vbert_fast, fp32" in capsys.readouterr().err


# Candidates


def test_the_blockwise_oracle_is_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workload = workloads.Workload("long", "encoder", (6.0,), layers=2, adapter=True)
    context = small_context(monkeypatch, tmp_path, workload=workload)
    assert context.features[0].shape[0] > 256  # more than one block
    (expected,) = shared.oracle(context, "fp32")
    reference = context.reference("fp32", "eager").double()
    with torch.no_grad():
        got = reference(context.features[0][None].double()).last_hidden_state[0]
    assert expected.dtype == torch.float64
    assert measure.relative_error([got], [expected]) < 1e-12


def test_real_candidates_agree_and_give_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_context(monkeypatch, tmp_path)
    settings = runner.Settings(
        rounds=2, budget=math.inf, pause=0.0, memory=False, match="sdpa,", threads=1
    )
    settings.peers = {"transformers"}
    monkeypatch.setattr("bench.peers.pytorch._configurations", lambda context: [("sdpa", "")])
    printed: list[Row] = []
    workload = workloads.Workload("small", "encoder", (0.5, 0.3), ("fp32", "bf16"), layers=1)
    rows, wrong = runner.run_workload(workload, settings, printed.append)
    assert wrong == [] and printed == rows
    assert len(rows) == 2 * 2 + 2 * len(workloads.BATCHINGS)
    assert all(r.skipped is None and r.seconds and r.seconds["rounds"] == 2 for r in rows)
    errors = {(r.implementation, r.dtype): r.error for r in rows}
    assert errors["w2vbert_fast", "fp32"] < 1e-5 < errors["w2vbert_fast", "bf16"] < 0.05


def test_what_is_missing_or_too_large_is_named() -> None:
    def missing() -> Prepared:
        raise Unavailable("not installed: nothing")

    def broken() -> Prepared:
        raise RuntimeError("no\nmore")

    def skipped(build: Any, **fields: Any) -> str | None:
        return measure.prepare(Candidate("peer", "", "fp32", build, **fields), CPU, 10**9).skipped

    assert skipped(missing) == "not installed: nothing"
    assert skipped(broken) == "failed: RuntimeError: no"
    reason = skipped(missing, bytes_needed=58 * 10**9)
    assert reason == "would need 58.0 GB for one attention layer; 1.0 GB are free"


def test_the_reference_runs_whatever_peers_are_chosen() -> None:
    made = [candidate([]), candidate([], name="transformers"), candidate([], name="openvino")]
    assert runner.select(made, {"none"}) == made[:2]
    assert runner.select(made, {"openvino"}) == made
    assert runner.select(made, None) == made
    labels = ("sdpa", "eager", "sdpa, compiled", "sdpa, compiled max-autotune")
    first = made[1]
    made = [made[0], *(dataclasses.replace(first, configuration=label) for label in labels)]
    assert runner.select(made, None, without=["compiled"]) == made[:3]
    assert runner.select(made, None, "compiled", ["max"]) == [*made[:2], made[3]]
    assert runner.select(made, None, without=["sdpa"]) == made[:3]  # with its first, the measure


def test_memory_sees_what_a_run_allocates() -> None:
    megabytes = 80

    def run() -> Tensor:
        return torch.ones(megabytes * 2**20, dtype=torch.uint8)

    peak = memory.peak_of(Prepared(run, list), CPU)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 0.9 * megabytes < peak / 2**20 < 1.5 * megabytes


# Counting


def test_flops_by_definition() -> None:
    config = w2vbert_fast.Wav2Vec2BertConfig(num_hidden_layers=3)
    # One layer, one token: 24.1 M multiply-adds of weights and the convolution's taps.
    weights = 4 * 1024 * 4096 + 4 * 1024**2 + 3 * 1024**2 + 31 * 1024
    projection = 2 * 160 * 1024
    assert flops.encoder_flops(config, [1]) == projection + 3 * (2 * weights + 4 * 1024)
    two = flops.encoder_flops(config, [10, 20], layers=1)
    assert two == 30 * projection + 30 * 2 * weights + 4 * (100 + 400) * 1024


def test_flops_are_what_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    values = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    values |= {"output_hidden_size": 64, "num_hidden_layers": 2, "conv_depthwise_kernel_size": 1}
    for adapter in (False, True):
        config = w2vbert_fast.Wav2Vec2BertConfig(
            **values, add_adapter=adapter, position_embeddings_type=None
        )
        model = w2vbert_fast.Wav2Vec2BertModel(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 40, 160))
        # PyTorch counts no position term here (there is none), and one tap of the convolution.
        taps = 2 * 2 * 64 * 40
        counted = counter.get_total_flops()
        assert flops.encoder_flops(config, [40]) == pytest.approx(counted, abs=taps)


def test_reference_memory_of_five_minutes_is_58_gigabytes_and_more() -> None:
    config = w2vbert_fast.Wav2Vec2BertConfig()
    head_only = 15_000**2 * 64 * 4
    assert flops.reference_bytes(config, [15_000], 4) > head_only > 57e9


# Results


def row(**changes: Any) -> Row:
    base = Row(
        workload="1x30s",
        kind="encoder",
        implementation="w2vbert_fast",
        configuration="",
        dtype="fp32",
        audio_seconds=30.0,
        seconds={"median": 1.0, "p20": 1.0, "p80": 1.0, "rounds": 1},
        flops=None,
        share_of_gemm=0.9,
        peak_bytes_above_weights=None,
        error=None,
        error_kind=None,
        skipped=None,
    )
    return dataclasses.replace(base, **changes)


def theirs(seconds: float, configuration: str, **changes: Any) -> Row:
    times = {"median": seconds, "p20": seconds, "p80": seconds, "rounds": 1}
    changes = {"implementation": "transformers", "configuration": configuration, **changes}
    return row(seconds=times, **changes)


def test_speedup_is_over_the_best_configuration() -> None:
    skipped = theirs(0.1, "flex", skipped="failed")
    rows = [row(), theirs(3.0, "eager"), theirs(1.8, "sdpa"), skipped]
    assert targets.speedup("1x30s", "fp32", "transformers")(rows) == 1.8
    assert targets.speedup("1x30s", "fp32", "transformers", "eager")(rows) == 3.0
    assert targets.speedup("1x30s", "bf16", "transformers")(rows) is None
    assert targets.speedup("1x30s", "fp32", "ctranslate2")(rows) is None
    assert targets.share("1x30s", "fp32")(rows) == 0.9


def test_targets_are_reached_missed_or_unknown() -> None:
    measure_share = targets.share("1x30s", "fp32")
    made = [
        targets.Target("reached", 0.85, "", measure_share),
        targets.Target("missed", 0.95, "", measure_share),
        targets.Target("unknown", 0.5, "", targets.share("1x10s", "fp32")),
        targets.Target("memory", 2.0, "GB", targets.peak_gigabytes("1x300s", "fp32"), below=True),
    ]
    rows = [row(), row(workload="1x300s", peak_bytes_above_weights=1_500_000_000)]
    evaluated = targets.evaluate(rows, made)
    assert [e["reached"] for e in evaluated] == [True, False, None, True]
    assert evaluated[3]["target"] == "<= 2 GB"
    text = targets.render(evaluated)
    assert text.count("NOT REACHED") == 1 and "not measured" in text


def test_every_target_names_workloads_that_exist() -> None:
    names = set(workloads.WORKLOADS)
    asked: set[str] = set()

    class Asking(list[Row]):
        def __iter__(self) -> Any:
            asked.update(names)
            return iter(())

    for target in targets.TARGETS:
        if not target.counted:
            assert target.measure(Asking()) is None
            named = [n for n in names if n.split(",")[0] in target.row]
            assert named or "1x30s" in target.row, target.row


def test_check_reads_results_and_fails_on_a_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (targets.Target("share", 0.85, "", targets.share("1x30s", "fp32")),)
    monkeypatch.setattr(targets.evaluate, "__defaults__", (made, True))
    path = tmp_path / "result.json"
    names = ("machine", "versions", "gemm_rate")
    file = {"schema": SCHEMA, "commit": "", "date": "", "threads": 1, "layers": 4}
    file |= {name: {} for name in names}
    for value, status in ((0.9, 0), (0.8, 1)):
        rows = [dataclasses.asdict(row(share_of_gemm=value))]
        path.write_text(json.dumps({**file, "rows": rows}))
        assert command.main(["--check", "--from", str(path)]) == status
    assert "NOT REACHED" in capsys.readouterr().out
    path.write_text("{}")
    assert command.main(["--check", "--from", str(path)]) == 2
    assert "schema is None" in capsys.readouterr().err


def test_misuse_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rounds", "0"]) == 2
    assert command.main(["--from", "x.json"]) == 2
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda"]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_a_run_that_is_cut_leaves_the_workloads_that_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gemm = machine.Gemm("gemm", 1.0, lambda: torch.ones(()), 1.0)
    monkeypatch.setattr(machine, "best_gemm", lambda dtype, device: gemm)
    monkeypatch.setattr(machine, "packed_gemm_rate", lambda dtype, device: None)
    measured: list[str] = []

    def run_workload(workload: workloads.Workload, *_: object) -> tuple[list[Row], list[Any]]:
        measured.append(workload.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return [row(workload=workload.name)], []

    monkeypatch.setattr(runner, "run_workload", run_workload)
    path = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        command.main(["--workload", "1x30s", "--workload", "1x10s", "--out", str(path)])
    assert [found.workload for found in parse(json.loads(path.read_text()), "").rows] == ["1x30s"]


def test_results_have_the_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_context(monkeypatch, tmp_path)
    gemm = machine.Gemm("gemm", 1.0, lambda: torch.ones(()), 1.0)
    monkeypatch.setattr(machine, "best_gemm", lambda dtype, device: gemm)
    monkeypatch.setitem(workloads.WORKLOADS, "1x10s", SMALL)
    path = tmp_path / "result.json"
    command.main(
        [
            "--workload",
            "1x10s",
            "--peer",
            "none",
            "--no-memory",
            "--rounds",
            "1",
            "--threads",
            "1",
            "--out",
            str(path),
        ]
    )
    result = json.loads(path.read_text())
    assert result["schema"] == "w2vbert-bench/v1"
    for key in ("machine", "versions", "commit", "date", "threads", "layers", "gemm_rate"):
        assert key in result
    assert set(result["machine"]) >= {"cpu", "cores", "flags", "gpu"}
    keys = {
        "workload", "kind", "implementation", "configuration", "dtype", "audio_seconds", "seconds",
        "flops", "share_of_gemm", "peak_bytes_above_weights", "error", "error_kind", "skipped",
    }  # fmt: skip
    for entry in result["rows"]:
        assert set(entry) >= keys
        assert (entry["seconds"] is None) == isinstance(entry["skipped"], str)
        assert entry["audio_seconds"] == pytest.approx(0.8)
    assert all(set(t) == {"row", "target", "measured", "reached"} for t in result["targets"])
