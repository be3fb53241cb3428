"""Batches that forked processes compute: the same results, whatever becomes of the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.offline import Stub, clips, run, table
from tests.helpers.waiting import PATIENCE
from w2vbert_fast.inference import Flow
from w2vbert_fast.inference.batching import Batcher
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.inference.tasks.base import Piece
from w2vbert_fast.inference.workers import Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, /proc read")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return clips(tmp_path_factory.mktemp("clips"), 12)


@dataclass
class Elsewhere(Stub):
    """Says which process computed, and ends that process where it is told to."""

    fatal: int | None = None  # samples of a recording that ends the process; 0: every one does
    folder: str = ""  # where a process writes that it has ended; again it lives
    big: bool = False

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        lengths = super().run(pieces)
        if self.fatal in (0, *lengths):
            mark = Path(self.folder or os.devnull)
            if not self.folder or not (mark / "ended").exists():
                if self.folder:
                    (mark / "ended").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if self.big:
            whole = torch.ones(1 << 20)
            return [(whole[:n], torch.get_num_threads(), os.getpid()) for n in lengths]
        return lengths


def texts(task: Stub, files: Sequence[str], processes: int, budget: int = 20) -> list[str | None]:
    flow = Flow(frame_budget=budget, window_rows=6, processes=processes)
    return [result.text for result in Runner(task, flow)(files)]


def test_results_are_those_of_one_process(files: list[str]) -> None:
    expected = texts(Stub(), files, 1)
    task = Stub()
    assert texts(task, files, 3) == expected
    assert len(set(expected)) == len(files)
    assert task.batches == []  # nothing was computed here


def test_each_process_has_its_part_of_the_threads() -> None:
    torch.set_num_threads(4)
    assert torch.ones(1 << 22).exp().sum() > 0  # four threads of this one, and of no copy of it
    batcher = Batcher(Elsewhere(big=True), 20, processes=2)
    batcher.prepare()
    assert torch.get_num_threads() == 1
    workers = batcher._workers
    assert workers is not None and workers.free == 2
    numbers = [workers.submit([Piece(torch.zeros(n))]) for n in (5, 6)]
    assert workers.free == 0
    found = dict(workers.result() for _ in numbers)
    assert workers.free == 2
    (first,), (second,) = (found[number] for number in numbers)
    assert [first[0].tolist(), second[0].tolist()] == [[1.0] * 5, [1.0] * 6]
    assert first[0].untyped_storage().nbytes() == 4 * 5  # and not of what it was a view of
    assert first[1] == second[1] == 2
    assert len({first[2], second[2], os.getpid()}) == 3


def test_the_batch_of_a_killed_process_goes_to_another(
    files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = texts(Stub(), files, 1)
    fatal = int(expected[3] or 0)
    assert texts(Elsewhere(fatal=fatal, folder=str(tmp_path)), files, 2) == expected
    assert caplog.text.count("has ended by signal 9 (out of memory?); it is replaced") == 1


def test_a_recording_that_ends_its_process_twice_is_an_error_and_costs_no_process(
    files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = texts(Stub(), files, 1)
    fatal, flow = int(expected[3] or 0), Flow(frame_budget=30, window_rows=12, processes=2)
    runner = Runner(Elsewhere(fatal=fatal), flow)
    found = list(runner(files))
    assert [result.text for result in found] == [*expected[:3], None, *expected[4:]]
    assert (found[3].error_type, found[3].error) == (
        "ProcessEndedError",
        "two processes that computed it have ended, the last by signal 9 (out of memory?)",
    )
    # Two over the batch that it was in, two over itself; what is computed next is so by two.
    assert caplog.text.count("it is replaced") == 4
    workers = runner.batcher._workers
    assert workers is not None and workers.free == 2
    assert [result.text for result in runner(files[4:])] == expected[4:]


def killed(workers: Workers, count: int) -> None:
    for pid in list(workers._pids.values())[:count]:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_processes_that_end_over_no_batch_cost_no_recording() -> None:
    workers = Workers(Stub(), 2, 1)
    killed(workers, 2)
    number = workers.submit([Piece(torch.zeros(5))])
    assert workers.result() == (number, [5])


def test_no_more_batches_are_taken_than_there_are_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers(Stub(), 3, 1)
    killed(workers, 2)

    def no_fork() -> int:
        raise BlockingIOError("no process left")

    monkeypatch.setattr(os, "fork", no_fork)
    for count in (5, 6, 7):
        workers.submit([Piece(torch.zeros(count))])
    assert workers.result()[1] == [5]
    assert workers.free == 0  # and not less than none: two batches wait


def test_a_job_whose_processes_all_end_goes_on_later(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2vbert_fast.inference.workers.LOST_IN_A_ROW", 5)
    expected = texts(Stub(), files, 1)
    flow = Flow(frame_budget=20, window_rows=4, processes=2)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match=r"signal 9 .*none can replace it: 6 in a row"):
        run(files, out, Elsewhere(fatal=0), flow=flow, shard_rows=4)
    run(files, out, Stub(), flow=flow, shard_rows=4)
    assert [row["text"] for row in table(out)] == expected


def test_processes_that_cannot_be_replaced_are_missed(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = texts(Stub(), files, 1)
    task = Elsewhere(fatal=int(expected[3] or 0), folder=str(tmp_path))
    runner = Runner(task, Flow(frame_budget=20, window_rows=6, processes=2))
    runner.batcher.prepare()

    def no_fork() -> int:
        raise BlockingIOError("no process left")

    monkeypatch.setattr(os, "fork", no_fork)
    assert [result.text for result in runner(files)] == expected
    assert "the others, 1, go on: no process left" in caplog.text


def test_what_does_not_fit_into_memory_is_halved_and_other_failures_are_not_hidden(
    files: list[str],
) -> None:
    expected = texts(Stub(), files, 1)
    longest = max(int(text or 0) for text in expected)
    assert texts(Stub(limit=2 * longest), files, 2, budget=100) == expected

    class Fails(Stub):
        def run(self, pieces: Sequence[Piece]) -> list[Any]:
            class Local(RuntimeError):  # which cannot be pickled
                pass

            raise Local("no kernel")

    with pytest.raises(RuntimeError, match="Local: no kernel"):
        texts(Fails(), files, 2)


def test_a_window_that_is_given_up_leaves_nothing_behind(files: list[str]) -> None:
    runner = Runner(Stub(), Flow(frame_budget=12, window_rows=12, processes=2))
    results = runner(files, ordered=False)
    next(results)
    results.close()
    expected = [result.text for result in Runner(Stub())(files[:5])]
    assert [result.text for result in runner(files[:5])] == expected


def test_processes_end_with_the_one_that_forked_them(tmp_path: Path) -> None:
    """However it ends: they wait for work at a pipe whose other end is gone."""
    code = (
        "import os, signal, sys\n"
        "from tests.helpers.offline import Stub\n"
        "from w2vbert_fast.inference.workers import Workers\n"
        "lock = open(sys.argv[1], 'w')\n"
        "workers = Workers(Stub(), 3, 1)\n"
        "print(*workers._pids.values(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Held open by the processes, standard output would not end before they do.
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    pids = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and len(pids) == 3
    while any(_lives(pid) for pid in pids):
        time.sleep(0.01)


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_lock_of_the_job_is_not_kept_by_its_processes(tmp_path: Path) -> None:
    opened = (tmp_path / "file").open("w")

    class Looks(Stub):
        def run(self, pieces: Sequence[Piece]) -> list[Any]:
            links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
            return [sum(link.endswith("/file") for link in links)]

    workers = Workers(Looks(), 1, 1)
    workers.submit([Piece(torch.zeros(1))])
    assert workers.result()[1] == [0]
    opened.close()


def test_the_command_computes_in_processes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With the real model, which is loaded before it is forked."""
    clips(tmp_path / "clips", 5, seconds=0.6)
    command = [sys.executable, "-m", "w2vbert_fast.cli", "embed", str(tmp_path / "clips")]
    command += ["--model", str(tiny_checkpoint), "--layer", "1", "--format", "npy"]
    command += ["--frame-budget", "60", "--no-page", "--out"]
    found = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        subprocess.run([*command, str(out), "--threads", "2", "--processes", processes], check=True)
        found.append([np.load(out / row["npy_file"]) for row in table(out)])
    assert len(found[0]) == 5
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_nobody_waits_for_a_batch_that_no_process_has() -> None:
    workers = Workers(Stub(), 1, 1)
    with pytest.raises(RuntimeError, match="no batch is computed"):
        workers.result()
    number = workers.submit([Piece(torch.zeros(3))])
    assert workers.result() == (number, [3])


def test_impossible_numbers_and_devices() -> None:
    class OnMeta(Stub):
        @property
        def network(self) -> torch.nn.Module:
            return torch.nn.Linear(1, 1, device="meta")

    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        Flow(processes=0)
    with pytest.raises(ValueError, match="for models on the CPU, the model is on meta"):
        Workers(OnMeta(), 2, 1)
