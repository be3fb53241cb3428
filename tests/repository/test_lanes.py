"""The kernels' tests where there is no GPU: in the interpreter, on a virtual GPU, and their runner.

Triton decides once, when a kernel is defined, whether it is interpreted or compiled, so that a lane
needs a process of its own; to run some of one by hand:
`TRITON_INTERPRET=1 pytest tests/kernels -k linear`,
`W2VBERT_LANE=sm_80 pytest tests/kernels -k norm`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels import results
from tests.kernels.__main__ import _statuses
from tests.kernels.judge import Judge
from tests.kernels.results import ROOT, TARGETS, table
from w2vbert_fast.ops.operation import OPERATIONS

ON_DEMAND = ("gradients", "graphs", "large", "models", "operations")
"""Minutes each in the interpreter: `python -m tests.kernels --interpret`."""
TESTS_AT_LEAST = 350


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"OUT": str(out), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels", *options],
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


def test_every_kernel_in_the_interpreter(tmp_path: Path) -> None:
    ignored = [f"--ignore=tests/kernels/test_{name}.py" for name in ON_DEMAND]
    result = run(tmp_path, "--interpret", *ignored)
    assert result.returncode == 0, f"the interpreter lane failed:\n{result.stdout}"
    found = json.loads((tmp_path / "lane_interpreter.json").read_text())
    assert found["outcomes"].keys() <= {"passed", "skipped"}
    assert found["outcomes"]["passed"] >= TESTS_AT_LEAST
    files = {path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    ran = {Path(test.partition("::")[0]).stem for test in found["rows"]}
    assert ran == files - {f"test_{name}" for name in ON_DEMAND}
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith("needs a device") for line in skipped), skipped


@pytest.mark.parametrize("target", TARGETS)
def test_every_operation_as_compiled(target: str, tmp_path: Path) -> None:
    """Forward and backward in bf16; operations on waveforms have float32 alone."""
    dtypes = "bfloat16 or log_mel_filterbank or normalize_and_stack"
    options = ("--virtual", target, "-k", f"test_every_operation and small and ({dtypes})")
    result = run(tmp_path, *options)
    assert result.returncode == 0, result.stdout
    assert f"compiled for {target} and executed in NumPy, NOT on a GPU" in result.stdout
    found = json.loads((tmp_path / f"lane_{target}.json").read_text())
    # Of all but the work list, which attention makes for itself.
    assert found["outcomes"] == {"passed": len(OPERATIONS) - 1}
    launched = {
        launch["kernel"].rpartition(":")[2]
        for row in found["rows"].values()
        for launch in row["launches"]
    }
    assert launched == set(kernels())
    # What has passed does not run again.
    again = run(tmp_path, *options)
    assert again.returncode == 0, again.stdout
    assert "0 selected" in again.stdout or again.stdout.splitlines()[-1].startswith("passed: ")
    assert len((tmp_path / "lanes" / f"{target}.0.jsonl").read_text().splitlines()) == (
        len(OPERATIONS) + 1
    )


def kernels() -> Iterator[str]:
    """The Triton kernels of `csrc_triton`, by name."""
    for path in (ROOT / "csrc_triton").rglob("*.py"):
        yield from re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)


def test_a_row_holds_until_what_it_launched_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "csrc_triton"
    shutil.copytree(ROOT / "csrc_triton", folder)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    launched = {
        "gemm": ["csrc_triton.gemm.forward:_linear_kernel"],
        "conv and ctc": ["csrc_triton.conv.forward:_slide_kernel", "csrc_triton.ctc:_ctc_kernel"],
        "nothing": [],
    }
    rows = tmp_path / "rows.jsonl"
    results.source.cache_clear()
    for test, kernels_of_test in launched.items():
        results.write(rows, {"test": test, "sources": results.sources(kernels_of_test)})
    for changed, kept in (
        ("plans.py", {"gemm", "conv and ctc", "nothing"}),
        ("attention/forward.py", {"gemm", "conv and ctc"}),
        ("norm/config.py", {"gemm"}),
        ("functions.py", set()),
    ):
        with (folder / changed).open("a") as file:
            file.write("# changed\n")
        results.source.cache_clear()
        assert results.read([rows])[0].keys() == kept, changed
    results.source.cache_clear()


def test_parts_import_no_others_than_they_say() -> None:
    importing = re.compile(r"^from csrc_triton\.(\w+)", re.MULTILINE)
    found: dict[str, set[str]] = {}
    for path in (ROOT / "csrc_triton").rglob("*.py"):
        part = path.relative_to(ROOT / "csrc_triton").parts[0].removesuffix(".py")
        found.setdefault(part, set()).update(importing.findall(path.read_text()))
    shared = {"plans", "script", *results.OF_NO_PART}  # which run on the host
    assert found.keys() - {"__init__"} - shared == results.PARTS.keys()
    for part, others in results.PARTS.items():
        assert found[part] - shared - {part} == set(others)


def test_a_failing_process_fails_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, "--interpret", "--no-such-option")
    assert result.returncode == 1
    assert "unrecognized arguments: --no-such-option" in result.stdout
    assert "FAILED" in result.stdout.splitlines()[-1]


def test_no_test_starts_after_the_limit(tmp_path: Path) -> None:
    result = run(tmp_path, "--interpret", "--limit", "0.001", "-k", "test_norm.py")
    assert result.returncode == 1, result.stdout
    found = json.loads((tmp_path / "lane_interpreter.json").read_text())
    assert found["outcomes"] == {"passed": 1}
    assert len(found["not_run"]) > 5
    *_, not_run, verdict = result.stdout.splitlines()
    assert not_run.startswith("NOT RUN in the time there was: tests/kernels/test_norm.py::")
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
    # Which of its two neighbours an element is says nothing, any further one does.
    exact[900] = 91.1  # between 91 and 91.5
    plain = exact.bfloat16()
    for number, right in ((91.0, True), (91.5, True), (90.5, False), (92.0, False)):
        bad = plain.clone()
        bad[900] = number
        if right:
            judge("kernel/half", bad, exact, plain)
        else:
            with pytest.raises(AssertionError, match="largest error"):
                judge("kernel/half", bad, exact, plain)
    lines = table({"test": judge.row.described()}).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["kernel", "bfloat16", "8"],
        ["kernel", "float32", "2"],
    ]
