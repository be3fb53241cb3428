"""What is installed, which implementation each operation would use and why, and how right it is.

`w2vbert-fast doctor` prints what `examine` finds.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from w2vbert_fast import __version__, ops
from w2vbert_fast.ops import dispatch

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "soundfile",
    "soxr",
    "av",
    "typer",
    "rich",
    "transformers",
)
TESTED_TORCH = ("2.5", "2.13")
"""The oldest and the newest PyTorch that the tests were run with."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# Of the plain form's own error in the same dtype, both against float64; see `_limit`.
ERROR_RATIO = 2.0
CALLS = 5

# Their plain form is the fast one on a CPU.
PLAIN_ON_CPU = ("log_mel_filterbank", "normalize_and_stack", "ctc_greedy")
FLOAT32_ONLY = ("log_mel_filterbank", "normalize_and_stack")

WIDTH, HEADS, LEFT, RIGHT, TAPS = 128, 2, 64, 8, 31
LENGTHS = (70, 1, 33)


@dataclass(frozen=True)
class Check:
    """One operation on one device in one dtype.

    Attributes:
        operation: name in `w2vbert_fast.ops`.
        device: such as "cpu" or "cuda:0".
        dtype: such as "float32".
        implementation: "triton", "cpu" or "plain".
        error: relative error of the fast form against the plain form in float64; `None` when
            there is no finite result.
        limit: largest error that passes.
        milliseconds: of the fastest of a few calls.
        failure: what went wrong, if anything.
    """

    operation: str
    device: str
    dtype: str
    implementation: str
    error: float | None
    limit: float
    milliseconds: float | None
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.error is not None and self.error <= self.limit


@dataclass(frozen=True)
class Examination:
    """What `examine` found.

    Attributes:
        packages: name and version; "not installed" for what is missing.
        machine: what was asked and the answer.
        reasons: for every device, why its operations run as they do.
        checks: every operation on every device.
    """

    packages: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    reasons: list[tuple[str, str]]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def examine() -> Examination:
    """Look at this machine and run every operation on each of its devices against its plain form.

    Takes seconds; on a GPU the kernels are compiled first.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    checks = [check for device in devices for check in check_operations(device)]
    reasons = [(str(device), dispatch.explain(device)) for device in devices]
    return Examination(_packages(), _machine(), reasons, checks)


def check_operations(device: torch.device) -> list[Check]:
    """Every operation on a device, in each dtype that the device computes in."""
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            dtypes.remove(torch.bfloat16)
    return [
        _check(name, run, device, dtype)
        for dtype in dtypes
        for name, run in _operations(device).items()
        if dtype == torch.float32 or name not in FLOAT32_ONLY
    ]


Operation = Callable[[torch.dtype, bool], Tensor]


def _operations(device: torch.device) -> dict[str, Operation]:
    """Each operation as a function of dtype and `fast`, on inputs that are equal in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        # Values that every dtype holds exactly: the inputs' rounding is nobody's error.
        values = (torch.randn(*shape, generator=generator) * scale).bfloat16()
        return values.double().to(device)

    tokens = sum(LENGTHS)
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int().to(device)
    x, residual = draw(tokens, WIDTH), draw(tokens, WIDTH)
    weight, bias = draw(2 * WIDTH, WIDTH, scale=WIDTH**-0.5), draw(2 * WIDTH)
    gain, offset = 1.0 + 0.25 * draw(WIDTH), draw(WIDTH)
    taps = draw(WIDTH, TAPS, scale=TAPS**-0.5)
    heads = [draw(tokens, HEADS, WIDTH // HEADS) for _ in range(3)]
    distances = draw(LEFT + RIGHT + 1, WIDTH // HEADS)

    def attention(dtype: torch.dtype, fast: bool) -> Tensor:
        query, key, value = (part.to(dtype) for part in heads)
        return ops.shaw_attention(
            query,
            key,
            value,
            cu_seqlens,
            max(LENGTHS),
            distance_embedding=distances.to(dtype),
            left_max_position=LEFT,
            right_max_position=RIGHT,
            fast=fast,
        )[0]

    samples = torch.tensor([0, 8000, 8400, 20000])
    waveforms = draw(20000, scale=0.1).float()
    logits = draw(tokens, 32)

    def greedy(dtype: torch.dtype, fast: bool) -> Tensor:
        if fast:
            found, counts = ops.ctc_greedy(logits.to(dtype), cu_seqlens, 0)
            rows = zip(torch.split(found, list(LENGTHS)), counts.tolist(), strict=True)
            return torch.cat([row[:count] for row, count in rows])
        collapsed = [_collapsed(u.argmax(-1)) for u in torch.split(logits, list(LENGTHS))]
        return torch.cat([row[row != 0] for row in collapsed])

    eps = 1e-5
    return {
        "layer_norm": lambda t, fast: ops.layer_norm(
            x.to(t), gain.to(t), offset.to(t), eps, fast=fast
        ),
        "residual_layer_norm": lambda t, fast: torch.stack(
            ops.residual_layer_norm(
                residual.to(t), x.to(t), 0.5, gain.to(t), offset.to(t), eps, fast=fast
            )
        ),
        "residual_double_layer_norm": lambda t, fast: torch.stack(
            ops.residual_double_layer_norm(
                residual.to(t),
                x.to(t),
                0.5,
                gain.to(t),
                offset.to(t),
                gain.to(t),
                offset.to(t),
                eps,
                fast=fast,
            )
        ),
        "linear": lambda t, fast: ops.linear(x.to(t), weight.to(t), bias.to(t), "silu", fast=fast),
        "linear_glu": lambda t, fast: ops.linear_glu(x.to(t), weight.to(t), bias.to(t), fast=fast),
        "conv_norm_act": lambda t, fast: ops.conv_norm_act(
            x.to(t), taps.to(t), gain.to(t), offset.to(t), eps, "silu", cu_seqlens, fast=fast
        ),
        "shaw_attention": attention,
        "log_mel_filterbank": lambda _, fast: ops.log_mel_filterbank(waveforms, samples, fast=fast)[
            0
        ],
        "normalize_and_stack": lambda _, fast: ops.normalize_and_stack(
            x.float(), cu_seqlens, fast=fast
        )[0],
        "ctc_greedy": greedy,
    }


def _collapsed(ids: Tensor) -> Tensor:
    """Without repeats: integer `[num_frames]` -> `[at most num_frames]`."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return ids[first]


def _check(name: str, run: Operation, device: torch.device, dtype: torch.dtype) -> Check:
    implementation = dispatch.implementation(torch.empty(0, dtype=dtype, device=device))
    if implementation == "cpu" and name in PLAIN_ON_CPU:
        implementation = "plain"
    kind = str(dtype).removeprefix("torch.")
    error = milliseconds = failure = None
    limit = 0.0
    try:
        with torch.no_grad():
            exact = run(torch.float64, False)
            limit = _limit(_error(run(dtype, False), exact), dtype)
            error = _error(run(dtype, True), exact)
            milliseconds = 1000 * min(_seconds(run, device, dtype) for _ in range(CALLS))
        if not math.isfinite(error):
            error, failure = None, "the result is not finite"
        elif error > limit:
            failure = f"error {error:.1e} is above {limit:.1e}"
    # Whatever an operation throws is what the doctor is there to tell, beside the other operations.
    except Exception as problem:
        failure = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return Check(name, str(device), kind, implementation, error, limit, milliseconds, failure)


def _seconds(run: Operation, device: torch.device, dtype: torch.dtype) -> float:
    _wait(device)
    start = time.perf_counter()
    run(dtype, True)
    _wait(device)
    return time.perf_counter() - start


def _error(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        raise ValueError(f"the result has shape {tuple(result.shape)}, not {tuple(exact.shape)}")
    exact = exact.double()
    return float((result.double() - exact).norm() / exact.norm())


def _limit(plain_error: float, dtype: torch.dtype) -> float:
    """A multiple of PyTorch's own error, and no less than one rounding."""
    return max(
        ERROR_RATIO * plain_error, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _packages() -> list[tuple[str, str]]:
    found = [("w2vbert_fast", __version__), ("python", sys.version.split()[0])]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        # PyTorch's own version also tells the build, as 2.11.0+cu130; the package's may not.
        found.append((name, str(torch.__version__) if name == "torch" else version))
    return found


def _machine() -> list[tuple[str, str]]:
    cpu, flags = _processor()
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", cpu),
        ("CPU instructions", ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown"),
        ("CPU cores", str(os.cpu_count())),
        ("threads of PyTorch", str(torch.get_num_threads())),
        ("PyTorch tested", " to ".join(TESTED_TORCH)),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gib = properties.total_memory / 2**30
        rows.append((f"GPU {index}", f"{properties.name}, {gib:.0f} GiB"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that PyTorch can use"))
    return rows


def _processor() -> tuple[str, set[str]]:
    """Name and instruction sets; Linux tells both."""
    name, flags = platform.processor() or "unknown", set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return name, flags
