"""`python -m bench.contended`: turns, neighbours that end, and limits; nothing is timed here."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from bench import contended


class Clock:
    """Time goes by where a model says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Process:
    """Stands for a process of ours: answers what it is told to, and can be killed."""

    made: ClassVar[list[Process]] = []

    def __init__(self, command: list[str], **options: Any) -> None:
        self.args, self.events = command, ["started"]
        lines = "ready\ndone\ndone\n" if options.get("text") else ""
        self.stdin, self.stdout = io.StringIO(), io.StringIO(lines)
        Process.made.append(self)

    def kill(self) -> None:
        self.events.append("killed")

    def wait(self) -> None:
        self.events.append("ended")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(contended, "time", clock)
    return clock


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    monkeypatch.setattr(Process, "made", [])
    monkeypatch.setattr(contended.subprocess, "Popen", Process)
    return Process.made


ARGUMENTS = argparse.Namespace(layers=1, seconds=2.0, rounds=3, threads=2)


def test_ours_and_transformers_take_turns_beside_each_neighbour(
    clock: Clock, processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    beside = iter([1.0, 2.0, 3.0])  # so many times as slow
    slower = [1.0]

    def forms(layers: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
        def model(name: str, seconds: float) -> Any:
            def run(x: torch.Tensor) -> None:
                assert x.shape == (1, 100, 160) and x.dtype == dtype
                turns.append(name)
                # Each pass beside a neighbour takes longer than the one before it.
                passes = turns.count(name) % (ARGUMENTS.rounds + 1) or ARGUMENTS.rounds + 1
                clock.now += seconds * slower[0] * passes

            return run

        return {"w2vbert_fast": model("ours", 1.0), "transformers, eager": model("theirs", 4.0)}

    neighbour = contended.neighbour

    def next_neighbour(code: str | None, threads: int) -> Any:
        slower[0] = next(beside)
        return neighbour(code, threads)

    monkeypatch.setattr(contended, "forms", forms)
    monkeypatch.setattr(contended, "neighbour", next_neighbour)
    found = contended.measure(ARGUMENTS, torch.bfloat16)
    assert found == [
        ("nothing", 3.0, 12.0),  # of passes 2 to 4: the first warms up
        ("a busy process", 6.0, 24.0),
        ("PyTorch on all cores", 9.0, 36.0),
    ]
    assert turns == ["ours", "theirs"] * 3 * (ARGUMENTS.rounds + 1)
    # Each neighbour was there, on as many threads as asked for, and is gone.
    assert [process.events for process in processes] == [["started", "killed", "ended"]] * 2
    assert "set_num_threads(2)" in processes[1].args[-1]


def test_a_neighbour_ends_with_a_failure_too(clock: Clock, processes: list[Process]) -> None:
    with pytest.raises(KeyError), contended.neighbour("pass", 1):
        assert clock.now == contended.SETTLING
        raise KeyError
    assert [process.events for process in processes] == [["started", "killed", "ended"]]


def test_two_of_ours_run_one_after_the_other_and_at_once(
    clock: Clock, processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []  # how many had been told to run when an answer was waited for
    answer = contended._answer

    def wait(process: Process) -> None:
        told.append(sum(made.stdin.getvalue().count("go") for made in processes))
        clock.now += 1.0
        answer(process)  # type: ignore[arg-type]

    monkeypatch.setattr(contended, "_answer", wait)
    times = contended.side_by_side(ARGUMENTS, "bf16")
    assert told == [0, 0, 1, 2, 4, 4]
    assert times == (2.0, 2.0)
    assert [process.events for process in processes] == [["started", "killed", "ended"]] * 2
    options = "--serve --dtype bf16 --layers 1 --seconds 2.0 --rounds 3 --threads 2"
    assert processes[0].args[2:] == ["bench.contended", *options.split()]


def test_a_process_of_ours_that_ends_is_an_error(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(Process):
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__(command)

    monkeypatch.setattr(contended.subprocess, "Popen", Ending)
    with pytest.raises(RuntimeError, match="a process of ours ended"):
        contended.side_by_side(ARGUMENTS, "fp32")
    assert [process.events[-1] for process in processes] == ["ended", "ended"]


def test_a_served_process_runs_when_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[int] = []
    model = {"w2vbert_fast": lambda x: passes.append(x.shape[1])}
    monkeypatch.setattr(contended, "forms", lambda *shape: model)
    monkeypatch.setattr(contended.sys, "stdin", io.StringIO("go\ngo\n"))
    contended.serve(ARGUMENTS, torch.float32)
    assert passes == [100] * (1 + 2 * ARGUMENTS.rounds)
    assert capsys.readouterr().out.split() == ["ready", "done", "done"]


GOOD = [("nothing", 1.0, 2.0), ("a busy process", 2.2, 4.0), ("PyTorch on all cores", 2.6, 5.0)]


def test_limits() -> None:
    assert contended.missed(GOOD, 2.0, 2.3) == []
    slow = [GOOD[0], ("a busy process", 2.3, 4.0), ("PyTorch on all cores", 2.7, 5.0)]
    assert contended.missed(slow, 2.0, 2.4) == [
        "beside a busy process: 2.30 times the quiet time, at most 2.2",
        "beside PyTorch on all cores: 2.70 times the quiet time, at most 2.6",
        "two of ours at once: 1.20 times one after the other, at most 1.15",
    ]
    behind = [("nothing", 1.0, 1.6), *GOOD[1:]]
    fault = "beside nothing: 1.60 x transformers, at least 1.7"
    assert contended.missed(behind, 2.0, 2.0) == [fault]


@pytest.mark.parametrize(("check", "status"), [([], 0), (["--check"], 1)])
def test_a_missed_limit_fails_the_command_only_with_check(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    check: list[str],
    status: int,
) -> None:
    monkeypatch.setattr(contended, "limit_threads", lambda threads: None)
    monkeypatch.setattr(contended, "measure", lambda arguments, dtype: GOOD)
    monkeypatch.setattr(contended, "side_by_side", lambda arguments, dtype: (2.0, 3.0))
    out = tmp_path / "contended.json"
    assert contended.main([*check, "--out", str(out)]) == status
    printed = capsys.readouterr()
    assert "beside a busy process: 2.20 s, 2.20 times the quiet time" in printed.out
    assert printed.err == "two of ours at once: 1.50 times one after the other, at most 1.15\n"
    assert json.loads(out.read_text())["two of ours"] == [2.0, 3.0]
