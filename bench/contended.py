"""The CPU path beside other processes on the same cores, against transformers in the same place.

python -m bench.contended [--check] [--dtype bf16] [--layers 2] [--seconds 30] [--rounds 7]

The same random weights at the published width run here and in transformers, in turns: beside
nothing, beside a process that is always busy, and beside PyTorch multiplying matrices on as many
threads as there are cores. Then two processes of ours run one after the other and side by side.
With `--check` a limit that is missed makes the command fail. Only a machine that does nothing else
gives numbers of worth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.context import limit_threads
from bench.machine import DTYPES
from bench.studies.drop_in import FRAMES_PER_SECOND, WIDTH, forms

BUSY = "while True: pass"
MULTIPLIES = """
import torch
torch.set_num_threads({threads})
a = torch.randn(500, 500)
while True:
    a @ a
"""
NEIGHBOURS = {"nothing": None, "a busy process": BUSY, "PyTorch on all cores": MULTIPLIES}
SLOWER = {"nothing": 1.0, "a busy process": 2.2, "PyTorch on all cores": 2.6}
"""At most so many times the time beside nothing."""
FASTER = 1.7
"""At least so many times as fast as transformers beside the same neighbour."""
TOGETHER = 1.15
"""Two processes of ours, at most so many times what they take one after the other."""
SETTLING = 2.0
"""Seconds after which a neighbour is at work."""


@contextlib.contextmanager
def neighbour(code: str | None, threads: int) -> Iterator[None]:
    """Another process on the same cores."""
    if code is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", code.replace("{threads}", str(threads))])
    try:
        time.sleep(SETTLING)
        yield
    finally:
        process.kill()
        process.wait()


def measure(arguments: argparse.Namespace, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """Neighbour, our seconds and those of transformers, medians."""
    made = forms(arguments.layers, WIDTH, dtype)
    ours, theirs = made["w2vbert_fast"], made["transformers, eager"]
    x = torch.randn(1, round(arguments.seconds * FRAMES_PER_SECOND), 160, dtype=dtype)
    found = []
    for name, code in NEIGHBOURS.items():
        with neighbour(code, arguments.threads):
            seconds: list[list[float]] = [[], []]
            for index in range(arguments.rounds + 1):
                for model, times in zip((ours, theirs), seconds, strict=True):
                    start = time.perf_counter()
                    model(x)
                    if index > 0:
                        times.append(time.perf_counter() - start)
            found.append((name, *map(statistics.median, seconds)))
    return found


def serve(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """A process of ours: as many passes as there are rounds, whenever it is told to."""
    ours = forms(arguments.layers, WIDTH, dtype)["w2vbert_fast"]
    x = torch.randn(1, round(arguments.seconds * FRAMES_PER_SECOND), 160, dtype=dtype)
    ours(x)
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(arguments.rounds):
            ours(x)
        print("done", flush=True)


def side_by_side(arguments: argparse.Namespace, dtype: str) -> tuple[float, float]:
    """Seconds of two processes of ours: one after the other, and at once."""
    command = [sys.executable, "-m", "bench.contended", "--serve", "--dtype", dtype]
    for name in ("layers", "seconds", "rounds", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for process in both:
            _answer(process)
        times = []
        for groups in ([[both[0]], [both[1]]], [both]):
            start = time.perf_counter()
            for group in groups:
                for process in group:
                    assert process.stdin is not None
                    print("go", file=process.stdin, flush=True)
                for process in group:
                    _answer(process)
            times.append(time.perf_counter() - start)
    finally:
        for process in both:
            process.kill()
            process.wait()
    return times[0], times[1]


def _answer(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError(f"a process of ours ended: {process.args}")


def missed(
    beside: list[tuple[str, float, float]], one_after_the_other: float, at_once: float
) -> list[str]:
    """The limits that measurements miss, a sentence each: what is seen and what is wanted."""
    quiet = beside[0][1]
    faults = []
    for name, ours, theirs in beside:
        most = SLOWER[name]
        if ours > most * quiet:
            faults.append(
                f"beside {name}: {ours / quiet:.2f} times the quiet time, at most {most:g}"
            )
        if theirs < FASTER * ours:
            faults.append(f"beside {name}: {theirs / ours:.2f} x transformers, at least {FASTER:g}")
    if at_once > TOGETHER * one_after_the_other:
        ratio = at_once / one_after_the_other
        faults.append(
            f"two of ours at once: {ratio:.2f} times one after the other, at most {TOGETHER:g}"
        )
    return faults


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.contended", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a limit is missed")
    parser.add_argument("--dtype", choices=[*DTYPES], default="fp32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    with torch.inference_mode():
        if arguments.serve:
            serve(arguments, dtype)
            return 0
        beside = measure(arguments, dtype)
    for name, ours, theirs in beside:
        print(
            f"beside {name}: {ours:.2f} s, {ours / beside[0][1]:.2f} times the quiet time; "
            f"transformers {theirs:.2f} s, {theirs / ours:.2f} x"
        )
    together = side_by_side(arguments, arguments.dtype)
    print(f"two of ours: one after the other {together[0]:.2f} s, at once {together[1]:.2f} s")
    if arguments.out is not None:
        content = {"beside": beside, "two of ours": together}
        arguments.out.write_text(json.dumps(content, indent=2), encoding="utf-8")
    faults = missed(beside, *together)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
