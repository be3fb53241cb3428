"""Which implementation of an operation runs: Triton kernels, fast CPU functions or plain PyTorch.

Each operation is registered as `torch.ops.w2vbert.*` and asks here which of its forms runs
(`operation`). Callers reach it through the functions of `w2vbert_fast.ops` with `fast=True`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from w2vbert_fast.ops.cpu import capability

logger = logging.getLogger(__name__)

Implementation = Literal["triton", "cpu", "plain"]

_OLDEST_CAPABILITY = (7, 5)
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CPU_DTYPES = (torch.float32, torch.bfloat16)

_OLDEST_TRITON = "3.5"
"""The first whose `tl.dot` takes float64, as the filterbank does."""

_FIRST_WITH_FENCE = (3, 7, 1)
_FENCE = (
    "on this GPU take triton 3.7.1 (PyTorch 2.13) or later: earlier ones leave out a fence between "
    "copies and products in linear layers and attention; whether that shows is a matter of timing"
)
"""Seen with 3.6.0 for sm_90 and sm_100; https://github.com/triton-lang/triton/pull/10537."""


def _triton_obstacle() -> str | None:
    """Why there are no Triton kernels at all; `None` where there are. Nothing is imported."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return "Triton is not installed"
    if spec.origin is None:
        return None
    # The builds for other systems and devices are distributions of other names.
    text = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text)
    oldest = tuple(map(int, _OLDEST_TRITON.split(".")))
    if found is None or (int(found[2]), int(found[3])) >= oldest:
        return None
    return (
        f"Triton {found[1]} is installed; the kernels need {_OLDEST_TRITON}, which comes with "
        "PyTorch 2.9, or later"
    )


# A constant, because compiled code asks, and guards on it.
_TRITON_OBSTACLE = _triton_obstacle()

_forced: Implementation | None = None
_logged: set[str] = set()


def has_triton() -> bool:
    """Whether a Triton is installed that compiles the kernels. Nothing is imported."""
    return _TRITON_OBSTACLE is None


def implementation(tensor: Tensor) -> Implementation:
    """Which implementation operations on a tensor of this device and dtype run.

    Where none is faster the plain one runs, which the log says once for each type of device. It
    warns once of a Triton that compiles the kernels with a fault for the device.
    """
    return _implementation(tensor.device, tensor.dtype, _forced)


@functools.cache
def _implementation(
    device: torch.device, dtype: torch.dtype, forced: Implementation | None
) -> Implementation:
    if forced is not None:
        return _if_possible(forced, device.type, dtype)
    if device.type == "cuda":
        chosen: Implementation = "triton"
        problem = _triton_problem(device.index or 0)
    elif device.type == "cpu":
        chosen = "cpu"
        problem = _cpu_problem()
    else:
        chosen = "plain"
        problem = "there are no kernels for this type of device"
    if problem is not None:
        if device.type not in _logged:
            _logged.add(device.type)
            logger.info("operations on %s run in plain PyTorch: %s", device.type, problem)
        return "plain"
    if device.type == "cuda" and _FENCE not in _logged and _lacks_fence(device.index or 0):
        _logged.add(_FENCE)
        logger.warning("Triton kernels on %s: %s", device, _FENCE)
    return _if_possible(chosen, device.type, dtype)


def _if_possible(wanted: Implementation, device_type: str, dtype: torch.dtype) -> Implementation:
    if wanted == "triton" and device_type in ("cuda", "cpu") and dtype in _TRITON_DTYPES:
        return "triton"
    if wanted == "cpu" and device_type == "cpu" and dtype in _CPU_DTYPES:
        return "cpu"
    return "plain"


def explain(device: torch.device | str) -> str:
    """What operations with `fast=True` run on a device, and why, in one line."""
    device = torch.device(device)
    if device.type == "cuda":
        problem = _triton_problem(device.index or 0)
        if problem is not None:
            return f"plain PyTorch: {problem}"
        import triton

        text = f"Triton kernels: triton {triton.__version__} is installed; float64 is plain"
        return f"{text}; {_FENCE}" if _lacks_fence(device.index or 0) else text
    if device.type == "cpu":
        problem = _cpu_problem()
        if problem is not None:
            return f"plain PyTorch: {problem}"
        return "fast CPU functions for float32 and bfloat16; other dtypes are plain"
    return "plain PyTorch: there are no kernels for this type of device"


@functools.cache
def _triton_problem(device_index: int) -> str | None:
    """Why Triton kernels cannot run on a CUDA or ROCm device; `None` when they can."""
    if _TRITON_OBSTACLE is not None:
        return _TRITON_OBSTACLE
    try:
        importlib.import_module("csrc_triton")
    except ImportError as error:
        return f"the Triton kernels cannot be imported: {error}"
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device_index)
        if capability < _OLDEST_CAPABILITY:
            has, needs = (".".join(map(str, pair)) for pair in (capability, _OLDEST_CAPABILITY))
            return f"the device has compute capability {has}; the kernels need {needs}"
    return None


def _lacks_fence(device_index: int) -> bool:
    """Whether products on this device read what copies may not have written yet."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    import triton

    # Hopper's wgmma and Blackwell's tcgen05 read through a proxy of their own; mma.sync does not.
    by_proxy = torch.cuda.get_device_capability(device_index)[0] in (9, 10)
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
    return by_proxy and version < _FIRST_WITH_FENCE


def _cpu_problem() -> str | None:
    """Why the fast CPU functions cannot run; `None` when they can."""
    return "; ".join(capability.reasons()) or None


def runs_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run Triton kernels."""
    return implementation(tensor) == "triton"


def on_triton_device(tensor: Tensor) -> bool:
    """Whether Triton kernels are to be expected for this tensor, for choices of code path.

    Unlike `runs_triton` this looks at no device and imports nothing, so that compiled code may ask.
    Both paths behind such a choice must give the right answer.
    """
    if _forced is not None:
        return _forced == "triton"
    return tensor.device.type == "cuda" and _TRITON_OBSTACLE is None


def takes_fast_path(fast: bool, *tensors: Tensor | None) -> bool:
    """Whether a call goes to a registered operation that has no gradient and no autocast.

    A call whose result needs a gradient stays with the plain form, which autograd differentiates;
    one under autocast with the plain form too, whose operations autocast knows.
    """
    if not fast or torch.is_autocast_enabled(_device_type(tensors)):
        return False
    return not records_gradient(*tensors)


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def _device_type(tensors: tuple[Tensor | None, ...]) -> str:
    return next(tensor.device.type for tensor in tensors if tensor is not None)


@contextlib.contextmanager
def force(wanted: Implementation) -> Iterator[None]:
    """Run one implementation wherever it exists for the device and dtype, else the plain one.

    Args:
        wanted: "triton" (on CPU tensors in Triton's interpreter), "cpu" or "plain".

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it cannot run here. For "triton": Triton is not installed, or its interpreter
            is off (`TRITON_INTERPRET=1` must be in the environment before triton is imported).
    """
    if wanted not in ("triton", "cpu", "plain"):
        raise ValueError(f"implementation is {wanted!r}; it must be 'triton', 'cpu' or 'plain'")
    if wanted == "triton":
        if _TRITON_OBSTACLE is not None:
            raise RuntimeError(f"Triton kernels cannot be forced: {_TRITON_OBSTACLE}")
        from csrc_triton.architectures import cpu_architecture

        if cpu_architecture() is None:
            raise RuntimeError(
                "Triton kernels run on CPU tensors in Triton's interpreter only; "
                "set TRITON_INTERPRET=1 before triton is imported"
            )
    if wanted == "cpu" and (problem := _cpu_problem()) is not None:
        raise RuntimeError(problem)
    global _forced
    before, _forced = _forced, wanted
    try:
        yield
    finally:
        _forced = before


def force_triton() -> contextlib.AbstractContextManager[None]:
    """`force("triton")`."""
    return force("triton")


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16 (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
