"""Runs the GPU lane in several processes, and ends with one table.

    python -m tests.gpu [--processes N] [--limit SECONDS] [--interpret | --virtual TARGET]
                        [pytest's arguments]

Most of the time goes into compiling kernels, which takes a CPU core each, so the tests are dealt
out to several processes. It installs nothing: torch, triton and pytest must be there; transformers
is used where it is. The results also go to `$OUT/gpu_test.json`, or `build/gpu_test.json`.

The run ends by itself: past the limit no process starts another test, and those that are still busy
a little later are ended. What did not run for that is counted and fails the run; the results of
what did are kept.

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
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
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
    on_cpu = options.interpret or options.virtual is not None
    if options.interpret:
        os.environ |= {"TRITON_INTERPRET": "1", "W2VBERT_GPU_TESTS": "interpret"}
    elif options.virtual is not None:
        os.environ["W2VBERT_GPU_TESTS"] = options.virtual
    device = None if on_cpu else _device()
    if device is None and not on_cpu:
        print("NOTHING RAN: PyTorch sees no CUDA or ROCm device, so the GPU tests are skipped.")
        return 0
    versions = _versions() | {"device": device}
    print(", ".join(f"{name} {value}" for name, value in versions.items() if value), flush=True)

    # Only a GPU is taken away after a while.
    limit, grace = (math.inf, math.inf) if on_cpu else (LIMIT, GRACE)
    if options.limit is not None:
        limit = options.limit
    os.environ["W2VBERT_GPU_DEADLINE"] = str(time.time() + limit - (time.perf_counter() - started))
    count = options.processes or (1 if on_cpu else min(8, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as folder:
        shares = [
            _start(Path(folder), number, max(count, 1), pytest_arguments)
            for number in range(max(count, 1))
        ]
        statuses = _statuses([process for process, _, _ in shares], started + limit + grace)
        results = _merged(shares)
    results |= {"versions": versions, "seconds_in_all": time.perf_counter() - started}
    # 5: no test was selected, as in a share of few.
    failed = any(status not in (0, 5) for status in statuses) or set(statuses) == {5}
    failed = failed or bool(results["not_run"])
    where = device or "nowhere"
    if options.interpret:
        where = "in Triton's interpreter, NOT on a GPU"
    elif options.virtual is not None:
        where = f"compiled for {options.virtual} and executed in NumPy, NOT on a GPU"
    _report(results, "FAILED" if failed else "passed", where)
    return 1 if failed else 0


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--processes", type=int, help="default: half the cores, at most 8")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help=f"no test starts after them; default: {LIMIT:.0f} on a GPU, none without one",
    )
    elsewhere = parser.add_mutually_exclusive_group()
    elsewhere.add_argument(
        "--interpret", action="store_true", help="small CPU tensors in Triton's interpreter"
    )
    elsewhere.add_argument(
        "--virtual",
        metavar="TARGET",
        choices=("sm_80", "sm_90"),
        help="small CPU tensors, the kernels compiled for TARGET and executed in NumPy",
    )
    return parser.parse_known_args()


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


Share = tuple["subprocess.Popen[bytes]", Path, Path]


def _start(folder: Path, number: int, count: int, arguments: list[str]) -> Share:
    """Starts one process; its output and its results go to files."""
    output, results = folder / f"{number}.txt", folder / f"{number}.json"
    environment = os.environ | {
        "W2VBERT_GPU_SHARE": f"{number}/{count}",
        "W2VBERT_GPU_RESULTS": str(results),
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
    return process, output, results


def _statuses(processes: list[subprocess.Popen[bytes]], end: float) -> list[int]:
    """Waits for the processes, and ends those that run past `end` of `time.perf_counter`."""
    for process in processes:
        left = end - time.perf_counter()
        try:
            process.wait(None if math.isinf(left) else max(left, 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def _merged(shares: list[Share]) -> dict[str, Any]:
    """Prints what each process said, and joins their results."""
    records: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    outcomes: Counter[str] = Counter()
    not_run: list[str] = []
    for number, (process, output, results) in enumerate(shares):
        text = output.read_text(errors="replace")
        if process.returncode not in (0, 5):
            print(f"---- process {number}, exit status {process.returncode}\n{text}")
        else:
            print("\n".join(sorted(set(re.findall(r"^SKIPPED .*", text, re.MULTILINE)))))
        if results.exists():
            share = json.loads(results.read_text())
            records += share["records"]
            seconds |= share["seconds"]
            outcomes.update(share["outcomes"].values())
            not_run += share["not_run"]
    return {
        "outcomes": dict(outcomes),
        "records": records,
        "seconds": seconds,
        "not_run": not_run,
    }


def _report(results: dict[str, Any], verdict: str, where: str) -> None:
    from tests.gpu.lane import table

    folder = Path(os.environ.get("OUT") or ROOT / "build")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gpu_test.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}\n")
    counts = ", ".join(f"{number} {outcome}" for outcome, number in results["outcomes"].items())
    if results["not_run"]:
        print(f"NOT RUN in the time there was: {', '.join(results['not_run'])}")
    print(f"{verdict}: {counts} in {results['seconds_in_all']:.0f} s, {where}; {file}")


if __name__ == "__main__":
    sys.exit(main())
