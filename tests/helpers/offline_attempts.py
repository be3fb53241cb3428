"""Kills a job again and again, lets it end, and prints how often it was killed.

    python -m tests.helpers.offline_attempts MANIFEST MODEL FOLDER random|steps SHARD_ROWS

This process imports everything and forks one for each attempt: what is killed is a whole process at
work, and 20 of them do not take 20 times the seconds of importing PyTorch.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers.offline import job
from w2vbert_fast.inference import Flow
from w2vbert_fast.inference.tasks.transcribe import Transcribe

FLOW = Flow(frame_budget=400, workers=2, window_rows=10)
KILLS = 24
LONGEST_WAIT = 0.3
# Of the job's 500. No attempt gets further, however long this process sleeps, which is to kill it
# earlier: else the job might end before it was killed often enough.
MOST_STEPS = 12


def attempt(
    work: Callable[[], object],
    before: Callable[[], None] = lambda: None,
    meanwhile: Callable[[int], None] = lambda child: None,
) -> bool:
    """Whether work, in a process of its own, came to its end."""
    child = os.fork()
    if child == 0:
        try:
            before()
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    meanwhile(child)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def at_random_moments(work: Callable[[], object], halfway: Callable[[], None]) -> int:
    """Kill it `KILLS` times, at a random moment or at a random step, whichever comes first."""
    moments = random.Random(0)

    def kill(child: int) -> None:
        time.sleep(moments.uniform(0.0, LONGEST_WAIT))
        os.kill(child, signal.SIGKILL)

    for number in range(KILLS):
        if number == KILLS // 2:
            halfway()
        ended = attempt(work, at_step(moments.randint(2, MOST_STEPS)), kill)
        assert not ended
    return KILLS


def at_step(number: int) -> Callable[[], None]:
    """The `number`-th time that something is made permanent is the last thing that happens."""

    def prepare() -> None:
        left = [number]

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def stop(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return stop

        os.replace, os.fsync = counted(os.replace), counted(os.fsync)

    return prepare


def main() -> None:
    manifest, model, out, mode, shard_rows = sys.argv[1:]
    torch.set_num_threads(1)
    task = Transcribe(model, timestamps="word")
    task.load()

    def into(folder: Path) -> Callable[[], object]:
        return lambda: job([manifest], folder, task, flow=FLOW, shard_rows=int(shard_rows)).run()

    killed = 0
    if mode == "random":
        # The input grows meanwhile.
        whole = Path(manifest).read_bytes().splitlines(keepends=True)
        Path(manifest).write_bytes(b"".join(whole[: len(whole) * 2 // 3]))

        def grow() -> None:
            Path(manifest).write_bytes(b"".join(whole))

        killed = at_random_moments(into(Path(out)), grow)
        assert attempt(into(Path(out)))
    else:
        while not attempt(into(Path(out, str(killed + 1))), at_step(killed + 1)):
            killed += 1
            assert attempt(into(Path(out, str(killed))))
    print("killed", killed)


if __name__ == "__main__":
    main()
