"""`w2vbert-fast doctor`: what it tells, and that a wrong operation is found."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import w2vbert_fast
from w2vbert_fast import doctor
from w2vbert_fast.cli.doctor import Printing, command
from w2vbert_fast.cli.messages import ITEMS_FAILED
from w2vbert_fast.ops.operation import OPERATIONS as DECLARED

OPERATIONS = {
    name
    for name in DECLARED
    # A list of tiles has no result of its own to compare, and a gradient is tested elsewhere.
    if name != "attention_tile_map" and not name.endswith("_backward")
}
CPU = torch.device("cpu")

TESTS = Path(__file__).resolve().parents[1]


def test_the_tested_range_is_what_the_lanes_install() -> None:
    pins = [(TESTS / f"torch_{which}.txt").read_text() for which in ("oldest", "newest")]
    found = [re.findall(r"^torch==(\d+\.\d+)", text, re.MULTILINE) for text in pins]
    assert found == [[version] for version in doctor.TESTED_TORCH]
    assert f'"torch>={doctor.TESTED_TORCH[0]}"' in (TESTS.parent / "pyproject.toml").read_text()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "w2vbert_fast.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_json_tells_packages_machine_and_every_operation() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is True
    assert found["packages"]["w2vbert_fast"] == w2vbert_fast.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["machine"]["threads of PyTorch"] == "1"
    assert found["reasons"]["cpu"] and found["tuned"]["cpu"]
    on_cpu = [check for check in found["checks"] if check["device"] == "cpu"]
    assert {check["operation"] for check in on_cpu} == OPERATIONS
    assert {check["dtype"] for check in on_cpu} == {"float32", "bfloat16"}
    assert all(0 <= check["error"] <= check["limit"] < 0.05 for check in on_cpu)


def test_the_table_is_not_cut() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    for operation in OPERATIONS:
        assert f" {operation} " in done.stdout
    assert done.stdout.rstrip().endswith("checks, 0 failed")


def replace_call(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Tensor]) -> None:
    changed = dataclasses.replace(DECLARED[name], call=call)
    monkeypatch.setitem(DECLARED, name, changed)


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    right = DECLARED["linear"]

    def wrong(*arguments: Any) -> Tensor:
        y: Tensor = right.call(*arguments)
        return y * 1.01

    replace_call(monkeypatch, "linear", wrong)
    found = doctor.examine()
    failed = [check for check in found.checks if not check.passed]
    assert not found.passed
    assert {(check.operation, check.dtype) for check in failed} >= {("linear", "float32")}
    assert {check.operation for check in failed} == {"linear"}
    assert "is above" in str(failed[0].failure)
    assert command(Printing(as_json=False)) == ITEMS_FAILED
    assert "FAILED linear, cpu, float32: error" in capfd.readouterr().out


@pytest.mark.parametrize("as_json", [False, True])
def test_an_operation_that_raises_is_told_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, as_json: bool
) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such\ninstruction")

    replace_call(monkeypatch, "layer_norm", broken)
    checks = {c.operation: c for c in doctor.check_operations(CPU) if c.dtype == "float32"}
    assert checks["layer_norm"].failure == "RuntimeError: no such instruction"
    assert checks["layer_norm"].error is None
    assert checks["shaw_attention"].passed
    assert command(Printing(as_json=as_json)) == ITEMS_FAILED
    assert "no such instruction" in capfd.readouterr().out


def test_not_a_number_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(x: Tensor, *_: Any) -> Tensor:
        return x * float("nan")

    replace_call(monkeypatch, "layer_norm", poisoned)
    (check,) = [
        c
        for c in doctor.check_operations(CPU)
        if (c.operation, c.dtype) == ("layer_norm", "float32")
    ]
    assert not check.passed
    assert check.failure == "the result is not finite"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert ("no-such-package-anywhere", "not installed") in doctor._packages()
