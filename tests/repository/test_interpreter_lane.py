"""Runs `tests/kernels` in a process of its own, with Triton's interpreter on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ROOT / "tests" / "kernels"

TESTS_AT_LEAST = 200


def test_every_kernel_in_the_interpreter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.xml"
    # Options meant for this process must not thin out the lane. The matrices are small: more than
    # one thread each would only get in each other's way.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    lane = subprocess.run(
        [sys.executable, "-m", "pytest", str(KERNEL_TESTS), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert lane.returncode == 0, f"the interpreter lane failed:\n{lane.stdout}"

    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    assert not [case.get("name") for case in cases if case.find("skipped") is not None]
    assert len(cases) >= TESTS_AT_LEAST, lane.stdout
    modules = {f"tests.kernels.{path.stem}" for path in KERNEL_TESTS.glob("test_*.py")}
    names = [(case.get("classname") or "").split(".") for case in cases]
    assert modules == {".".join(name[:3]) for name in names}, lane.stdout
    with capsys.disabled():
        print(f"\n[interpreter lane] {lane.stdout.strip().splitlines()[-1]}")
