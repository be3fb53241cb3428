"""The machine: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import w2vbert_fast
from w2vbert_fast._extras import versions as versions_of
from w2vbert_fast.doctor import processor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "ctranslate2", "onnxruntime", "openvino", "onnx",
    "kaldi-native-fbank",
)  # fmt: skip
_FLAGS = ("avx2", "avx512", "avx_vnni", "amx", "asimd", "bf16", "i8mm", "sve")


def describe() -> dict[str, Any]:
    """CPU, cores, instruction sets and GPU."""
    model, found = processor()
    flags = sorted(flag for flag in found if any(known in flag for known in _FLAGS))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": cores(), "flags": flags, "gpu": gpu}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python, this library and of every peer that is installed."""
    return {"w2vbert_fast": w2vbert_fast.__version__, **versions_of(PACKAGES)}


def write_results(path: Path, **content: Any) -> None:
    """A JSON file of results, with the machine and the versions that they come from."""
    facts = {"machine": describe(), "versions": versions()}
    path.write_text(json.dumps({**facts, **content}, indent=1, default=str) + "\n")


def commit(folder: Path) -> str:
    """The commit checked out in `folder`, with "+" behind it when tracked files differ from it."""
    try:
        run = dict(cwd=folder, capture_output=True, text=True, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def available_memory(device: torch.device) -> int:
    """Free memory in bytes, of the GPU for a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Gemm:
    """The fastest matrix multiplication found on this machine for a dtype.

    Attributes:
        name: how it was called and on which shape.
        flops: per call.
        run: one call.
        rate: FLOP/s, the median of the survey.
    """

    name: str
    flops: float
    run: Callable[[], Tensor]
    rate: float


def _calls(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute x W^T."""
    calls: dict[str, Callable[[], Tensor]] = {
        "torch.mm": lambda: torch.mm(x, weight.t()),
        "F.linear": lambda: F.linear(x, weight),
    }
    if x.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        calls["oneDNN"] = _one_dnn(x, weight)
    return calls


def _packed_calls(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return {"oneDNN, packed": _one_dnn(x, packed)}


def _one_dnn(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _layer_shapes(rows: int) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the encoder layer's linear layers."""
    widths = ((1024, 1024), (1024, 2048), (1024, 4096), (4096, 1024))
    return [(rows, *width) for width in widths]


def _survey(
    shapes: Sequence[tuple[int, int, int]],
    dtype: str,
    device: torch.device,
    calls: Callable[[Tensor, Tensor], dict[str, Callable[[], Tensor]]],
) -> Iterator[Gemm]:
    """What runs of every call on every shape."""
    for m, k, n in shapes:
        x = torch.randn(m, k, dtype=DTYPES[dtype], device=device)
        weight = torch.randn(n, k, dtype=DTYPES[dtype], device=device)
        flops = 2.0 * m * k * n
        with torch.inference_mode(), contextlib.suppress(RuntimeError):  # not for this dtype here
            for name, call in calls(x, weight).items():
                with contextlib.suppress(RuntimeError):
                    rate = flops / _time(call, device)
                    yield Gemm(f"{name}, {m} x {k} x {n}", flops, call, rate)


def best_gemm(dtype: str, device: torch.device, rows: int = 1500, square: int = 4096) -> Gemm:
    """Find the fastest GEMM over the layer's shapes and a large square one.

    Args:
        dtype: "fp32" or "bf16".
        device: where.
        rows: tokens in the layer's shapes (1500: 30 s).
        square: size of the square one.

    Returns:
        The one with the highest median rate over `torch.mm`, `F.linear` and, on a CPU, oneDNN's
        linear (which PyTorch does not use for fp32 by itself).
    """
    shapes = [*_layer_shapes(rows), (square, square, square)]
    return max(_survey(shapes, dtype, device, _calls), key=lambda gemm: gemm.rate)


def packed_gemm_rate(dtype: str, device: torch.device, rows: int = 1500) -> float | None:
    """FLOP/s of oneDNN's fastest product with a weight in its own layout; None where there is none.

    Beside the rate of `best_gemm`, whose operands lie in memory as parameters do.
    """
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return None
    found = _survey(_layer_shapes(rows), dtype, device, _packed_calls)
    return max((gemm.rate for gemm in found), default=None)


def _time(call: Callable[[], Tensor], device: torch.device) -> float:
    call()
    times = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() - started < 0.3):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times)
