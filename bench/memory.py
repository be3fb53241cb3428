"""Peak memory of one candidate above its weights, in a process of its own.

    python -m bench.memory --workload 1x30s --candidate "w2vbert_fast, fp32"

prints a number of bytes. On Linux it is the highest resident set size during the first run
(`VmHWM`, reset before it) less the size before; so what a library packs, compiles or allocates in
its first run counts. On CUDA it is PyTorch's own peak. Gradients of the weights, in a training
step, are there before and do not count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.context import limit_threads
from bench.measure import Candidate, Prepared

MARK = "peak_bytes_above_weights="


def peak_of(prepared: Prepared, device: torch.device) -> int | None:
    """Run once; bytes above what was there before. None where the system cannot tell."""
    gc.collect()
    for parameter in prepared.parameters:
        # Touched, and added to: neither they nor their making counts.
        parameter.grad = torch.empty_like(parameter).fill_(0.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            prepared.run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        with torch.inference_mode():
            prepared.run()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def measure(
    candidate: Candidate, workload: str, device: str, threads: int, layers: int
) -> int | None:
    """`peak_of` in a fresh process; None when that process fails."""
    command = [sys.executable, "-m", "bench.memory", "--workload", workload]
    command += ["--candidate", candidate.label, "--device", device]
    command += ["--threads", str(threads), "--layers", str(layers)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            value: int | None = json.loads(line[len(MARK) :])
            return value
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--candidate", required=True, help='such as "transformers, sdpa, fp32"')
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    from bench.context import open_context
    from bench.peers import candidates_of
    from bench.workloads import WORKLOADS

    workload = WORKLOADS[arguments.workload]
    device = torch.device(arguments.device)
    with open_context(workload, device, arguments.threads, arguments.layers) as context:
        found = candidates_of(context, workload.dtypes)
        (candidate,) = [c for c in found if c.label == arguments.candidate]
        prepared = candidate.build()
        context.drop_other_weights(candidate.dtype)
        print(f"{MARK}{json.dumps(peak_of(prepared, device))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
