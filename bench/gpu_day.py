"""One command for a GPU that is lent for minutes: the kernels' tests, the main rows, the tuner.

    python -m bench.gpu_day [--out DIR] [--seconds 530] [--rehearse]

Installs nothing and ends within nine minutes. Each part is a process with a time limit of its own,
in the order of what tells most; one that hangs is ended, with all that it started, and the next one
runs. `DIR/summary.json` says before and after each part how far it is, and each part's output lies
beside it, so that a run that is cut still tells. `--rehearse` runs small parts without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 530.0
FEWEST_SECONDS = 10.0
"""With less time left a part does not begin."""
GRACE = 3.0
"""Seconds between asking a process to end and ending it."""
SHOWN_LINES = 12

BF16 = "bfloat16 or not (float16 or float32)"
"""The tests of bf16, and those that have no dtype."""
ROWS = ("16x1-20s", "1x30s", "1x10s")
_TUNE = (
    "import sys; from w2vbert_fast.cli.tune import Model, Tuning, command; "
    "sys.exit(command(Model(), Tuning(minutes=float(sys.argv[1]), export=sys.argv[2])))"
)
_PROBE = (
    "import sys, torch; torch.cuda.is_available() or sys.exit(1); "
    "from w2vbert_fast.ops.dispatch import explain; print(explain('cuda'))"
)
_CHECK = (
    "import sys; from w2vbert_fast.doctor import examine; found = examine(); "
    "[print(check) for check in found.checks]; sys.exit(not found.passed)"
)


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        name: of its files.
        command: arguments of Python.
        seconds: it is ended after them.
        environment: what it has besides.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


def parts(folder: Path) -> list[Part]:
    """The parts on a GPU: 3.5 minutes of tests, 3 of rows, 2 of tuning.

    Args:
        folder: for their results.
    """
    tests = ("-m", "tests.kernels", "--limit", "180", "-k", BF16)
    if importlib.util.find_spec("pytest") is None:
        tests = ("-c", _CHECK)  # the operations alone, small
    bench = ("-m", "bench", "--device", "cuda", "--peer", "transformers", "--dtype", "bf16")
    bench += ("--no-memory", "--budget", "2")

    def rows(name: str, workloads: Sequence[str], seconds: float, *options: str) -> Part:
        asked = [word for workload in workloads for word in ("--workload", workload)]
        out = ("--out", str(folder / f"{name}.json"))
        return Part(name, (*bench, *asked, *options, *out), seconds)

    return [
        Part("tests", tests, 210.0),
        rows("rows", ROWS, 110.0, "--without", "compiled", "--without", "flex"),
        rows("rows_compiled_mixed", ROWS[:1], 35.0, "--match", "compiled, sorted"),
        rows("rows_compiled", ROWS[1:], 35.0, "--match", "compiled", "--without", "max-autotune"),
        Part(
            "tuner",
            ("-c", _TUNE, "1.6", str(folder / "tuned.json")),
            120.0,
            # Its file, which it writes to as it goes.
            {"HF_ASSETS_CACHE": str(folder / "cache")},
        ),
    ]


def rehearsal(folder: Path) -> list[Part]:
    """Parts like them, small, on a virtual GPU, the CPU and in Triton's interpreter."""
    test = "test_every_operation and small and bfloat16 and layer_norm and not residual"
    bench = ("-m", "bench", "--threads", "1", "--layers", "1", "--peer", "transformers")
    bench += ("--workload", "1x10s", "--dtype", "bf16", "--rounds", "1", "--budget", "0.1")
    bench += ("--no-memory", "--without", "compiled", "--without", "flex")
    tuner = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_tuning.py")
    return [
        Part("tests", ("-m", "tests.kernels", "--virtual", "sm_90", "-k", test), 210.0),
        Part("rows", (*bench, "--out", str(folder / "rows.json")), 180.0),
        Part("tuner", tuner, 120.0, {"TRITON_INTERPRET": "1"}),
    ]


def run(chosen: Sequence[Part], folder: Path, seconds: float = SECONDS) -> int:
    """Run parts one after another; 0 if all passed.

    Args:
        chosen: the parts.
        folder: for the summary and their output.
        seconds: of all together.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = [
        {"part": part.name, "command": list(part.command), "status": "not begun"} for part in chosen
    ]

    def write() -> None:
        path = folder / "summary.json"
        path.with_suffix(".new").write_text(json.dumps(entries, indent=1) + "\n")
        path.with_suffix(".new").replace(path)

    for part, entry in zip(chosen, entries, strict=True):
        limit = min(part.seconds, seconds - (time.monotonic() - started))
        if limit < min(FEWEST_SECONDS, part.seconds):
            break
        entry["status"] = "running"
        write()
        begun = time.monotonic()
        try:
            status = _ended(part, folder, limit)
            entry["status"] = {None: "cut", 0: "passed"}.get(status, f"failed, status {status}")
        except BaseException:
            entry["status"] = "interrupted"
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - begun, 1)
            write()
        text = (folder / f"{part.name}.txt").read_text(errors="replace")
        print(f"---- {part.name}: {entry['status']} in {entry['seconds']} s")
        print("\n".join(text.splitlines()[-SHOWN_LINES:]), flush=True)
    write()
    for entry in entries:
        print(f"{entry['part']}: {entry['status']}")
    print(f"results: {folder}")
    return int(any(entry["status"] != "passed" for entry in entries))


def _ended(part: Part, folder: Path, limit: float) -> int | None:
    """The exit status of a part; `None` where it took longer than `limit`. Nothing that it started
    is left."""
    environment = {**os.environ, "OUT": str(folder), "PYTHONUNBUFFERED": "1", **part.environment}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    with (folder / f"{part.name}.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out = Path(os.environ.get("OUT") or ROOT / "build") / "gpu_day"
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"default: {out}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="small parts, without a GPU")
    arguments = parser.parse_args(argv)
    folder = arguments.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.rehearse:
        return run(rehearsal(folder), folder, arguments.seconds)
    if subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, check=False).returncode != 0:
        print("NOTHING RAN: PyTorch sees no CUDA or ROCm device", file=sys.stderr)
        return 2
    return run(parts(folder), folder, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
