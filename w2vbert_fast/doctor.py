"""What is installed, which implementation each operation would use and why, and how right it is.

`w2vbert-fast doctor` prints what `examine` finds.
"""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast import __version__, cpus
from w2vbert_fast._extras import versions
from w2vbert_fast.ops import dispatch, tuned
from w2vbert_fast.ops.examples import Sizes, example
from w2vbert_fast.ops.operation import OPERATIONS

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
TESTED_TORCH = ("2.5", "2.15")
"""The oldest and the newest PyTorch that tests were run with."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# Of the plain form's own error in the same dtype, both against float64; see `error_limit`.
ERROR_RATIO = 2.0
CALLS = 5

# The work list of a kernel has no right answer but its own.
CHECKED = sorted(
    name for name in OPERATIONS if not name.endswith("_backward") and name != "attention_tile_map"
)
FLOAT32_ONLY = ("log_mel_filterbank", "normalize_and_stack")
SIZES = Sizes(
    lengths=(70, 1, 33),
    width=128,
    inner=256,
    heads=2,
    head_size=64,
    left=64,
    right=8,
    taps=31,
    vocabulary=32,
)


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
        tuned: for every device, what was measured on it, and what runs where nothing was.
        checks: every operation on every device.
    """

    packages: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    reasons: list[tuple[str, str]]
    tuned: list[tuple[str, str]]
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
    measured = [(str(device), tuned.explain(device)) for device in devices]
    return Examination(_packages(), _machine(), reasons, measured, checks)


def check_operations(device: torch.device) -> list[Check]:
    """Every operation on a device, in each dtype that the device computes in."""
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            dtypes.remove(torch.bfloat16)
    return [
        _check(name, device, dtype)
        for dtype in dtypes
        for name in CHECKED
        if dtype == torch.float32 or name not in FLOAT32_ONLY
    ]


def _collapsed(ids: Tensor) -> Tensor:
    """Without repeats: integer `[num_frames]` -> `[at most num_frames]`."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return ids[first]


def _check(name: str, device: torch.device, dtype: torch.dtype) -> Check:
    operation = OPERATIONS[name]
    implementation = dispatch.implementation(torch.empty(0, dtype=dtype, device=device))
    if implementation == "cpu" and operation.cpu is None:
        implementation = "plain"
    kind = str(dtype).removeprefix("torch.")
    error = milliseconds = failure = None
    limit = 0.0
    try:
        arguments = _arguments(name, device, dtype)
        with torch.no_grad():
            exact = _exact(name, _arguments(name, device, torch.float64))
            limit = error_limit(_error(operation.plain(*arguments), exact), dtype)
            error = _error(operation.call(*arguments), exact)
            milliseconds = 1000 * min(
                _seconds(operation.call, arguments, device) for _ in range(CALLS)
            )
        if not math.isfinite(error):
            error, failure = None, "the result is not finite"
        elif error > limit:
            failure = f"error {error:.1e} is above {limit:.1e}"
    # Whatever an operation throws is what the doctor is there to tell, beside the other operations.
    except Exception as problem:
        failure = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    return Check(name, str(device), kind, implementation, error, limit, milliseconds, failure)


def _arguments(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """The same values in each dtype: the inputs' rounding is nobody's error."""

    def held(value: Any) -> Any:
        if isinstance(value, list):
            return [held(entry) for entry in value]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.bfloat16().to(torch.float32 if name in FLOAT32_ONLY else dtype)

    return tuple(held(value) for value in example(name, SIZES, device=device))


def _exact(name: str, arguments: tuple[Any, ...]) -> Any:
    if name != "ctc_greedy":
        return OPERATIONS[name].plain(*arguments)
    logits, cu_seqlens, blank = arguments
    tokens = cu_seqlens.new_full((len(logits),), -1)
    counts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        ids = _collapsed(logits[start:end].argmax(-1))
        ids = ids[ids != blank]
        tokens[start : start + len(ids)] = ids
        counts.append(len(ids))
    return tokens, torch.tensor(counts, device=tokens.device)


def _seconds(call: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call(*arguments)
    _wait(device)
    return time.perf_counter() - start


def _error(results: Any, exact: Any) -> float:
    """The largest relative error of the results."""
    if isinstance(results, Tensor):
        results, exact = (results,), (exact,)
    return max(relative_error(*pair) for pair in zip(results, exact, strict=True))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The norm of the difference by that of the exact result.

    Raises:
        ValueError: their shapes differ.
    """
    if result.shape != exact.shape:
        raise ValueError(f"the result has shape {tuple(result.shape)}, not {tuple(exact.shape)}")
    exact = exact.double()
    return float((result.double() - exact).norm() / exact.norm())


def error_limit(plain_error: float, dtype: torch.dtype) -> float:
    """The largest error that passes: a multiple of PyTorch's own, and no less than a rounding."""
    return max(
        ERROR_RATIO * plain_error, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _packages() -> list[tuple[str, str]]:
    found = {"w2vbert_fast": __version__, **versions(PACKAGES)}
    return [*found.items(), *((name, "not installed") for name in PACKAGES if name not in found)]


def _machine() -> list[tuple[str, str]]:
    cpu, flags = processor()
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU", cpu),
        ("CPU instructions", ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown"),
        ("CPU cores", _cores()),
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


def _cores() -> str:
    found = cpus.of_process()
    quota = "no quota" if found.quota is None else f"a quota of {found.quota:g}"
    return f"{found.machine}, of which this process may run on {found.allowed}, with {quota}"


def processor() -> tuple[str, set[str]]:
    """Name and instruction sets of the CPU; Linux tells both."""
    name, flags = platform.processor() or platform.machine() or "unknown", set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, flags
