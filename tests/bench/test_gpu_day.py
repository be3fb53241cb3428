"""Minutes of a GPU: parts in order, each within its time, and what is written as they go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as bench, gpu_day
from bench.gpu_day import Part
from tests.helpers.waiting import PATIENCE
from tests.kernels import __main__ as kernels
from w2vbert_fast.ops import dispatch

HANG = "import time; print('begun', flush=True); time.sleep(600)"
# Another process, as the tests start some, that does not end when it is asked to.
STUBBORN = (
    "import signal, subprocess, sys; "
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)'], "
    "stdout=subprocess.PIPE); child.stdout.readline(); print(child.pid, flush=True)"
)
SEES = (
    "import json, os, pathlib; "
    "print(json.loads(pathlib.Path(os.environ['OUT'], 'summary.json').read_text()))"
)


def part(name: str, script: str, seconds: float = 60.0) -> Part:
    return Part(name, ("-c", script), seconds)


def summary(folder: Path) -> dict[str, Any]:
    return {e["part"]: e["status"] for e in json.loads((folder / "summary.json").read_text())}


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    chosen = [
        part("good", "print('fine')"),
        part("hangs", HANG, 1.0),
        part("bad", "import sys; print('it broke'); sys.exit(3)"),
        part("last", "print('here')"),
    ]
    assert gpu_day.run(chosen, tmp_path) == 1
    assert summary(tmp_path) == {
        "good": "passed",
        "hangs": "cut",
        "bad": "failed, status 3",
        "last": "passed",
    }
    output = {name: (tmp_path / f"{name}.txt").read_text() for name in ("good", "bad", "last")}
    assert output == {"good": "fine\n", "bad": "it broke\n", "last": "here\n"}
    assert gpu_day.run(chosen[:1], tmp_path) == 0


def test_nothing_is_left_of_a_part(tmp_path: Path) -> None:
    assert gpu_day.run([part("stubborn", STUBBORN)], tmp_path) == 0
    child = int((tmp_path / "stubborn.txt").read_text())
    while alive(child):
        time.sleep(0.05)


def test_results_are_written_as_it_goes(tmp_path: Path) -> None:
    gpu_day.run([part("first", "pass"), part("sees", SEES), part("last", "pass")], tmp_path)
    seen = (tmp_path / "sees.txt").read_text()
    statuses = ("'passed'", "'running'", "'not begun'")
    places = [seen.index(status) for status in statuses]
    assert places == sorted(places)


def test_what_time_is_not_left_for_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(gpu_day.time, "monotonic", lambda: now[0])
    limits: list[float] = []

    def ended(part: Part, folder: Path, limit: float) -> int | None:
        (folder / f"{part.name}.txt").touch()
        limits.append(limit)
        now[0] += min(limit, 250.0)
        return 0 if limit >= 250.0 else None

    monkeypatch.setattr(gpu_day, "_ended", ended)
    chosen = [part(name, "", 300.0) for name in ("one", "two", "three")]
    assert gpu_day.run(chosen, tmp_path, 400.0) == 1
    assert limits == [300.0, 150.0] and now[0] == 500.0
    assert summary(tmp_path) == {"one": "passed", "two": "cut", "three": "not begun"}


def test_a_run_that_is_ended_says_how_far_it_was(tmp_path: Path) -> None:
    script = (
        "import signal, sys; from pathlib import Path; from bench.gpu_day import Part, run; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"run([Part('first', ('-c', 'pass'), 60.0), Part('hangs', ('-c', {HANG!r}), 600.0)], "
        "Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": "."}
    )
    output = tmp_path / "hangs.txt"
    while not (output.exists() and output.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    assert summary(tmp_path) == {"first": "passed", "hangs": "interrupted"}


def test_the_parts_are_commands_that_there_are_and_fit_into_nine_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests, *rows, tuner = gpu_day.parts(tmp_path)
    assert tests.seconds <= 210 and sum(part.seconds for part in rows) <= 180
    together = sum(part.seconds for part in (tests, *rows, tuner))
    assert together <= gpu_day.SECONDS <= 540 - gpu_day.GRACE
    monkeypatch.setattr(sys, "argv", ["tests.kernels", *tests.command[2:]])
    options, left = kernels._arguments()
    assert options.limit + kernels.GRACE <= tests.seconds and left == ["-k", gpu_day.BF16]
    asked = set()
    for part in rows:
        assert part.command[:2] == ("-m", "bench")
        found = bench.parser().parse_args(part.command[2:])
        assert (found.device, found.dtypes, found.peers) == ("cuda", ["bf16"], ["transformers"])
        assert found.out.parent == tmp_path
        asked |= {(name, found.match) for name in found.workload}
    assert {(name, "") for name in gpu_day.ROWS} < asked and len(asked) == 6
    code, minutes, table = tuner.command[1:]
    compile(code, "tuner", "exec")
    assert 60 * float(minutes) < tuner.seconds and Path(table).parent == tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tuners_part_runs_without_the_command_line(tmp_path: Path) -> None:
    """And says what is missing."""
    *_, tuner = gpu_day.parts(tmp_path)
    gpu_day.run([tuner], tmp_path)
    assert "needs a CUDA or ROCm device" in (tmp_path / "tuner.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_day.main(["--out", str(tmp_path)]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "NOTHING RAN" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_it_says_which_kernels_a_gpu_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so, of a Triton that compiles them with a fault, that it does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "explain", lambda device: f"kernels on {device}")
    exec(gpu_day._PROBE, {})
    assert capsys.readouterr().out == "kernels on cuda\n"
