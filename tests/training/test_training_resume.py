"""A run that was killed goes on as if nothing had happened; several processes train as one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.training import (
    RESTLESS,
    STILL,
    RandomSource,
    config,
    make_model,
    metrics,
    read_rows,
    write_clips,
)
from w2vbert_fast.training import StepReport, finetune
from w2vbert_fast.training.state import find_state

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stop(Exception):
    """What ends a run in the middle."""


def assert_equal_runs(first: Path, second: Path) -> None:
    """Logs and weights, bit for bit."""
    assert metrics(first) == metrics(second)
    for name in ("best", "last"):
        ours, theirs = (load_file(out / name / "model.safetensors") for out in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize(
    "options",
    [
        {"average": 0.9, "accumulate": 2, "log_every": 3},
        {"lora": 2, "lora_dropout": 0.2, "precision": "bf16"},
    ],
    ids=["full", "lora"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **RESTLESS)
    source = RandomSource(8, varies=True)
    common = {"steps": 11, "save_every": 4, "evaluate_every": 6, "frame_budget": 70, **options}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(config(model, whole, **common), train=source, evaluation=source)

    def stop_at(step: int) -> Any:
        def watch(report: StepReport) -> None:
            if report.step == step:
                raise Stop

        return watch

    for step in (2, 6, 10):
        # In between, the caller draws random numbers of its own.
        torch.manual_seed(step)
        with pytest.raises(Stop):
            finetune(
                config(model, parts, **common),
                train=source,
                evaluation=source,
                on_step=stop_at(step),
            )
    state = find_state(parts)
    assert state is not None and state.name == "step-00000008"
    resumed: list[int] = []
    finetune(
        config(model, parts, **common),
        train=source,
        evaluation=source,
        on_step=lambda report: resumed.append(report.step),
    )
    assert resumed == [9, 10, 11]
    assert_equal_runs(whole, parts)
    # Once more, a finished run has nothing to do.
    result = finetune(config(model, parts, **common), train=source, evaluation=source)
    assert result.steps == 11
    assert_equal_runs(whole, parts)


def test_an_incomplete_state_is_passed_over(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    out = tmp_path / "out"
    options = config(model, out, steps=4, save_every=2)

    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        finetune(options, train=source, evaluation=source, on_step=stop)
    state = find_state(out)
    assert state is not None
    # What a kill in the middle of the next save would leave.
    shutil.copytree(state, out / "state" / "step-00000004.tmp")
    shutil.copytree(state, out / "state" / "step-00000003")
    (out / "state" / "step-00000003" / "trainer.json").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert find_state(out) == state
    finetune(options, train=source, evaluation=source)
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000004"]
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 4]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    out = tmp_path / "out"
    finetune(config(model, out, steps=1), train=source, evaluation=source)
    for changes, data, message in (
        ({"learning_rate": 0.5}, source, "learning_rate: 0.001, now 0.5"),
        ({}, RandomSource(5), "data: "),
        ({"steps": 3}, source, "steps: 1, now 3"),
    ):
        with pytest.raises(ValueError, match=f"(?s)state of another run.*{message}"):
            finetune(config(model, out, **{"steps": 1, **changes}), train=data, evaluation=source)


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "w2vbert_fast.cli", "finetune", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


KILLED_AT_STEP_6 = """
import os, signal
from w2vbert_fast.cli import main
from w2vbert_fast.training import logs
write = logs.JsonLines.write
def write_and_die(self, row):
    write(self, row)
    if row["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
logs.JsonLines.write = write_and_die
main()
"""


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "model", **RESTLESS, feature_projection_input_dim=160, vocab_size=29
    )
    manifest = write_clips(tmp_path / "clips")
    arguments = [
        *("--model", model, "--train", manifest, "--eval", manifest, "--device", "cpu"),
        *("--steps", 16, "--save-every", 4, "--evaluate-every", 12, "--log-every", 1),
        *("--frame-budget", 60, "--workers", 1, "--learning-rate", 1e-3, "--precision", "fp32"),
        *("--option", "tensorboard=false", "--json", "--set", "mask_feature_prob=0.1"),
        *("--set", "mask_feature_length=2"),
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEP_6, *command(*arguments, "--out", killed)[3:]],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert ended.returncode == -signal.SIGKILL
    assert '"step": 6,' in (killed / "metrics.jsonl").read_text()
    state = find_state(killed)
    assert state is not None and int(state.name[-2:]) == 4

    result = subprocess.run(
        command(*arguments, "--out", killed), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"going on after step {int(state.name[-2:])}" in result.stderr
    printed = json.loads(result.stdout)
    assert (printed["score"], printed["steps"]) == ("wer", 16)
    assert printed["last"] == str(killed / "last")

    finetune(
        config(
            model,
            whole,
            train=manifest,
            eval=manifest,
            steps=16,
            save_every=4,
            evaluate_every=12,
            frame_budget=60,
            precision="fp32",
            model_overrides={"mask_feature_prob": 0.1, "mask_feature_length": 2},
        )
    )
    assert len(metrics(whole)) == 16 + 2
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("program", ["tests.helpers.ddp_on_cpu", "tests.helpers.fsdp_on_cpu"])
def test_two_processes_train_as_one_that_accumulates(program: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL, feature_projection_input_dim=160, vocab_size=29)
    rows = [{"text": text} for text in ("one two", "three", "four", "x" * 90)]
    manifest = write_clips(tmp_path / "clips", rows)
    common = {"steps": 3, "learning_rate": 1e-3, "evaluate_every": 2, "log_every": 1}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in common.items()]
    alone, together = tmp_path / "alone", tmp_path / "together"
    shared = ["--model", model, "--train", manifest, "--eval", manifest, "--device", "cpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [
            *(sys.executable, *launcher, "-m", program, *command(*shared, *flags)[3:]),
            *("--frame-budget", "60", "--workers", "0", "--out", str(together)),
            *("--option", "tensorboard=false", "--speeds", "1", "--precision", "fp32"),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best checkpoint: ") == 1
    if sys.platform == "linux" and program == "tests.helpers.ddp_on_cpu":
        # They could abort the process while the interpreter ends.
        assert result.stderr.count("threads of gloo: 0") == 2
    (state,) = (together / "state").iterdir()
    sharded = (state / "pytorch_model_fsdp_0").is_dir()
    assert sharded == (program == "tests.helpers.fsdp_on_cpu")
    finetune(
        config(
            model,
            alone,
            train=manifest,
            eval=manifest,
            accumulate=2,
            frame_budget=60,
            speeds=(1.0,),
            precision="fp32",
            **common,
        )
    )
    ours, theirs = metrics(together), metrics(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2, 2, 3, 3]
    for row, other in zip(ours, theirs, strict=True):
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    one, two = (load_file(out / "last" / "model.safetensors") for out in (alone, together))
    for name, tensor in one.items():
        if not name.endswith("linear_k.bias"):
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    # The transcript that is too long was left out by whichever process had it.
    files = [together / "skipped.jsonl", together / "process-1-skipped.jsonl"]
    skipped = [row["utterance"] for file in files for row in read_rows(file)]
    assert len(skipped) == sum(row["skipped"] for row in ours if "skipped" in row) > 0
    assert all("manifest.jsonl:4" in name for name in skipped)
