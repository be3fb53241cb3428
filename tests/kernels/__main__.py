"""Runs the kernels' tests in a lane, in several processes, and ends with one table.

    python -m tests.kernels [--processes N] [--limit SECONDS] [--interpret | --virtual TARGET]
                            [pytest's arguments]
    python -m tests.kernels --summary

Without an option: on a GPU. Most of the time goes into compiling kernels, which takes a CPU core
each, so the tests are dealt out to several processes. It installs nothing: torch, triton and pytest
must be there; transformers is used where it is. The results also go to `$OUT/lane_device.json`, or
`build/lane_device.json`.

A run on a GPU ends by itself: past the limit no process starts another test, and those that are
still busy a little later are ended. What did not run for that is counted and fails the run; the
results of what did are kept.

A virtual run that was cut goes on where it stopped: a row of each test lies in
`build/lanes/TARGET.*.jsonl`, and what has passed does not run again until the kernels that it
launched change or the rows are removed. `--summary` makes of them what `docs/tables.py` shows.

The exit status is 0 when all tests passed, and also when there is no GPU, which is said.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.kernels import results
from tests.kernels.results import ROOT, TARGETS

FOLDER = Path(__file__).parent
LIMIT = 440.0
GRACE = 20.0
"""Seconds for tests to start in, and after them for those that run to end."""


def main() -> int:
    started = time.perf_counter()  # PyTorch's own start, a process before the tests', counts too
    options, pytest_arguments = _arguments()
    missing = [name for name in ("torch", "triton", "pytest") if not _is_installed(name)]
    if missing:
        print(f"error: {sys.executable} has no {', '.join(missing)}", file=sys.stderr)
        return 2
    if options.summary:
        return _summarize()
    lane = "interpreter" if options.interpret else options.virtual or "device"
    device = _device() if lane == "device" else None
    if lane == "device" and device is None:
        print(
            "NOTHING RAN: PyTorch sees no CUDA or ROCm device, so the kernels' tests are skipped."
        )
        return 0
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif options.virtual is not None:
        os.environ["W2VBERT_LANE"] = options.virtual
    versions = _versions() | {"device": device}
    print(", ".join(f"{name} {value}" for name, value in versions.items() if value), flush=True)

    # Only a GPU is taken away after a while.
    limit, grace = (LIMIT, GRACE) if lane == "device" else (math.inf, math.inf)
    if options.limit is not None:
        limit = options.limit
    os.environ["W2VBERT_LANE_DEADLINE"] = str(time.time() + limit - (time.perf_counter() - started))
    count = max(
        1, options.processes or (1 if device is None else min(8, (os.cpu_count() or 2) // 2))
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kept = folder if options.virtual is None else _rows_folder()
        kept.mkdir(parents=True, exist_ok=True)
        shares = [
            _start(
                folder / f"{number}.txt",
                kept / f"{lane}.{number}.jsonl",
                number,
                count,
                pytest_arguments,
            )
            for number in range(count)
        ]
        statuses = _statuses([process for process, _ in shares], started + limit + grace)
        for number, (process, output) in enumerate(shares):
            _say(number, process.returncode, output.read_text(errors="replace"))
        rows, planned = results.read(sorted(kept.glob(f"{lane}.*.jsonl")))
    not_run = [test for test in planned if test not in rows]
    # 5: no test was selected, as in a share of few.
    failed = any(status not in (0, 5) for status in statuses) or set(statuses) == {5}
    outcomes = Counter(row["outcome"] for row in rows.values())
    failed = failed or bool(not_run) or outcomes["failed"] > 0
    where = {
        "device": device,
        "interpreter": "in Triton's interpreter, NOT on a GPU",
    }.get(lane, f"compiled for {lane} and executed in NumPy, NOT on a GPU")
    file = _out() / f"lane_{lane}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - started
    found = {
        "outcomes": outcomes,
        "rows": rows,
        "not_run": not_run,
        "versions": versions,
        "seconds_in_all": seconds,
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{results.table(rows)}\n")
    if not_run:
        print(f"NOT RUN in the time there was: {', '.join(not_run)}")
    counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    verdict = "FAILED" if failed else "passed"
    print(f"{verdict}: {counts} in {seconds:.0f} s, {where}; {file}")
    return int(failed)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--processes", type=int, help="default: half the cores, at most 8, on a GPU"
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help=f"no test starts after them; default: {LIMIT:.0f} on a GPU, none without one",
    )
    lane = parser.add_mutually_exclusive_group()
    lane.add_argument(
        "--interpret", action="store_true", help="small CPU tensors in Triton's interpreter"
    )
    lane.add_argument(
        "--virtual",
        metavar="TARGET",
        choices=TARGETS,
        help="small CPU tensors, the kernels compiled for TARGET and executed in NumPy",
    )
    lane.add_argument(
        "--summary", action="store_true", help=f"write {results.SUMMARY.relative_to(ROOT)}"
    )
    return parser.parse_known_args()


def _out() -> Path:
    return Path(os.environ.get("OUT") or ROOT / "build")


def _rows_folder() -> Path:
    return _out() / "lanes"


def _summarize() -> int:
    """Writes down what the rows of virtual runs say of each kernel."""
    found = {
        target: results.read(sorted(_rows_folder().glob(f"{target}.*.jsonl")))[0]
        for target in TARGETS
    }
    lines = [json.dumps(row) for row in results.summary(found)]
    results.SUMMARY.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for target, rows in found.items():
        counts = Counter(row["outcome"] for row in rows.values())
        print(target, ", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return 0


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _versions() -> dict[str, str | None]:
    packages = ("torch", "triton", "transformers")
    versions: dict[str, str | None] = {
        name: importlib.metadata.version(name) for name in packages if _is_installed(name)
    }
    return {"python": platform.python_version(), **versions}


def _device() -> str | None:
    """The name of the device, asked in a process that then gives its memory back."""
    script = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_name())"
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    name = output.stdout.splitlines()[-1]
    return None if name == "False" else name


def _start(
    output: Path, rows: Path, number: int, count: int, arguments: list[str]
) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts one process; its output and its rows go to files."""
    environment = os.environ | {
        "W2VBERT_LANE_SHARE": f"{number}/{count}",
        "W2VBERT_LANE_ROWS": str(rows),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if count > 1:  # the processes would get in each other's way
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, output


def _statuses(processes: list[subprocess.Popen[bytes]], end: float) -> list[int]:
    """Waits for the processes, and ends those that run past `end` of `time.perf_counter`."""
    for process in processes:
        left = end - time.perf_counter()
        try:
            process.wait(None if math.isinf(left) else max(left, 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def _say(number: int, status: int, text: str) -> None:
    """Prints what a process said: all of it where it failed, else what it skipped."""
    if status not in (0, 5):
        print(f"---- process {number}, exit status {status}\n{text}")
    else:
        print("\n".join(sorted(set(re.findall(r"^SKIPPED .*", text, re.MULTILINE)))))


if __name__ == "__main__":
    sys.exit(main())
