"""Which implementation of an operation runs: plain PyTorch or Triton.

Each operation is registered as `torch.ops.w2vbert.*` with one implementation that asks here.
Callers reach it through the functions of `w2vbert_fast.ops` with `fast=True`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

_forced = False


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. Nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor's device run Triton kernels.

    On CUDA and ROCm they do where Triton is installed; on a CPU only inside `force_triton`.
    """
    if tensor.device.type == "cuda":
        return has_triton()
    return _forced and tensor.device.type == "cpu"


def takes_fast_path(fast: bool, *tensors: Tensor | None) -> bool:
    """Whether a call goes to the registered operation, which has no gradient.

    A call whose result needs a gradient stays with the plain form, which autograd differentiates.
    """
    if not fast:
        return False
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


@contextlib.contextmanager
def force_triton() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors, in Triton's interpreter.

    Raises:
        RuntimeError: Triton is not installed, or its interpreter is off (`TRITON_INTERPRET=1` must
            be in the environment before triton is imported).
    """
    global _forced
    if not has_triton():
        raise RuntimeError("triton is not installed, so its kernels cannot be forced on a CPU")
    from csrc_triton.runtime import interpreting

    if not interpreting():
        raise RuntimeError(
            "Triton kernels run on CPU tensors in Triton's interpreter only; "
            "set TRITON_INTERPRET=1 before triton is imported"
        )
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before
