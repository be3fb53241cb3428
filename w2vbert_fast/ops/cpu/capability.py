"""What this machine's CPU and this build of PyTorch can do, asked once and on first use."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def reasons() -> tuple[str, ...]:
    """Why the fast CPU path cannot run, one sentence each; empty when it can.

    What is missing only makes the fast functions slower: they fall back to PyTorch's own
    operations and give the same answers.
    """
    if not torch._C._has_mkldnn:
        return ("this build of PyTorch has no oneDNN",)
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ("this build of PyTorch has no oneDNN linear layer for this architecture",)
    if not _runs(torch.float32):
        return ("oneDNN's linear layer does not run on this CPU",)
    return ()


def is_available() -> bool:
    """Whether the fast CPU path runs as it is meant to."""
    return not reasons()


@functools.cache
def onednn_linear(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layer works with this dtype here."""
    if dtype == torch.float32:
        return is_available()
    if dtype == torch.bfloat16:
        # Below AVX-512 oneDNN emulates bf16, slower than fp32.
        return is_available() and has_avx512() and _runs(dtype)
    return False


@functools.cache
def has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _runs(dtype: torch.dtype) -> bool:
    """One product small enough to be exact."""
    x, weight = (torch.ones(rows, 4, dtype=dtype, device="cpu") for rows in (2, 3))
    try:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (RuntimeError, NotImplementedError):
        return False
    return bool((y == 4).all())
