"""That the GPU lane's runner works where there is no GPU: `python -m tests.gpu`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import _statuses
from tests.gpu.lane import Judge, table

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"OUT": str(out), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_nothing_ran(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("NOTHING RAN")
    assert not list(tmp_path.iterdir())


def test_some_of_its_tests_on_a_virtual_gpu(tmp_path: Path) -> None:
    selection = "test_norm.py and test_layer_norm and bfloat16 and 48"
    result = run(tmp_path, "--virtual", "sm_90", "-k", selection)
    assert result.returncode == 0, result.stdout
    said = "1 passed in"
    assert said in result.stdout
    assert "compiled for sm_90 and executed in NumPy, NOT on a GPU" in result.stdout
    assert "layer_norm                  bfloat16" in result.stdout
    assert json.loads((tmp_path / "gpu_test.json").read_text())["outcomes"] == {"passed": 1}


def test_some_of_its_tests_in_the_interpreter(tmp_path: Path) -> None:
    selection = "test_norm.py or (test_attention.py and ragged)"
    result = run(tmp_path, "--interpret", "-k", selection)
    assert result.returncode == 0, result.stdout
    results = json.loads((tmp_path / "gpu_test.json").read_text())
    kernels = {record["kernel"].partition("/")[0] for record in results["records"]}
    assert kernels == {
        "double_layer_norm",
        "layer_norm",
        "residual_layer_norm",
        "shaw_attention",
        "shaw_attention_lse",
    }
    assert results["outcomes"].keys() == {"passed"}
    assert results["outcomes"]["passed"] >= 20
    *_, blank, verdict = result.stdout.splitlines()
    assert blank == ""
    assert verdict.startswith("passed: ") and "NOT on a GPU" in verdict
    assert "\nshaw_attention              float16 " in result.stdout


def test_a_failing_process_fails_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, "--interpret", "--no-such-option")
    assert result.returncode == 1
    assert "unrecognized arguments: --no-such-option" in result.stdout
    assert "FAILED" in result.stdout.splitlines()[-1]


def test_no_test_starts_after_the_limit(tmp_path: Path) -> None:
    result = run(tmp_path, "--interpret", "--limit", "0.001", "-k", "test_norm.py")
    assert result.returncode == 1, result.stdout
    results = json.loads((tmp_path / "gpu_test.json").read_text())
    assert results["outcomes"] == {"passed": 1}
    assert len(results["not_run"]) > 5
    *_, not_run, verdict = result.stdout.splitlines()
    assert not_run.startswith("NOT RUN in the time there was: tests/gpu/test_norm.py::")
    assert verdict.startswith("FAILED")


def test_processes_that_run_past_the_limit_are_ended() -> None:
    commands = ("import sys; sys.stdin.read()", "pass")
    processes = [
        subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE)
        for command in commands
    ]
    processes[1].wait()
    assert _statuses(processes, end=0.0) == [-signal.SIGKILL, 0]


def test_what_counts_as_near_enough() -> None:
    judge = Judge()
    exact = torch.linspace(1.0, 100.0, 1000, dtype=torch.float64)
    judge("kernel/fp32", (exact * (1 + 9e-6)).float(), exact)
    with pytest.raises(AssertionError, match=r"fp32, float32: largest error 1\.2e-05, RMS"):
        judge("kernel/fp32", (exact * (1 + 1.2e-5)).float(), exact)

    plain = exact.bfloat16()
    judge("kernel/half", plain, exact, plain)
    with pytest.raises(AssertionError, match=r"allowed: 1.1 times PyTorch's"):
        judge("kernel/half", plain * 1.01, exact, plain)
    bad = plain.clone()
    bad[7] = float("nan")
    with pytest.raises(AssertionError, match=r"at \(7,\): nan, exactly 1\.69"):
        judge("kernel/half", bad, exact, plain)
    # One element beyond the others shows in the largest error though hardly in the RMS.
    bad[7] = exact[7].bfloat16() + 1.0
    with pytest.raises(AssertionError, match="largest error"):
        judge("kernel/half", bad, exact, plain)
    with pytest.raises(AssertionError, match="is not"):
        judge("kernel/half", plain[:5], exact, plain)
    lines = table(judge.results()).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["kernel", "bfloat16", "4"],
        ["kernel", "float32", "2"],
    ]
