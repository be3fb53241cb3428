"""Where the tests of this folder run, on which tensors, and how large those are.

A lane is a process of its own, because Triton decides once, when a kernel is defined, whether it is
interpreted or compiled:

- `TRITON_INTERPRET=1`: Triton's interpreter, small CPU tensors; in fp32 and fp16, since its bf16
  products are broken.
- `W2VBERT_LANE=sm_80`, `sm_90`: the kernels compiled for that target as they ship and executed on
  CPU tensors with every check of `tools.virtual_gpu`; in all dtypes.
- neither: a GPU, at the sizes of the published model. `W2VBERT_LANE=small` takes the small tensors
  there, for tools that slow every kernel down.

`python -m tests.kernels` starts them. Where there is no lane the tests are skipped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from tests.kernels.results import TARGETS

T = TypeVar("T")


def _lane() -> str | None:
    asked = os.environ.get("W2VBERT_LANE", "")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if asked not in ("", "small", *TARGETS):
        raise pytest.UsageError(f"W2VBERT_LANE is {asked!r}; it may be small, {', '.join(TARGETS)}")
    if asked in TARGETS:
        return asked
    return (asked or "device") if torch.cuda.is_available() else None


LANE = _lane()
INTERPRETED = LANE == "interpreter"
VIRTUAL = LANE if LANE in TARGETS else None
WITHOUT_DEVICE = INTERPRETED or VIRTUAL is not None
SMALL = WITHOUT_DEVICE or LANE == "small"
DEVICE = torch.device("cpu" if WITHOUT_DEVICE else "cuda")
DATA = Path(__file__).parent / "data"
FP32_TOLERANCE = 1e-5

needs_device = pytest.mark.skipif(WITHOUT_DEVICE, reason="needs a device")
"""What neither interpreter nor virtual GPU has: graphs, streams, a compiler of layers."""
in_memory_of_its_own = pytest.mark.skipif(
    not INTERPRETED, reason="needs the interpreter: pages that are never touched take no memory"
)
"""What reads far beyond 2^31 elements; `test_large.py` does on a device."""


def choose(device: T, small: T) -> T:
    """What a test takes on a GPU, and what it takes where little must do."""
    return small if SMALL else device


def _dtypes() -> tuple[torch.dtype, ...]:
    half = [torch.float16, torch.bfloat16]
    old = (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() < (8, 0)
    )
    if INTERPRETED or old:  # Turing's matrix units have no bf16
        half = [torch.float16]
    return (torch.float32, *half)


DTYPES = _dtypes()
HALF = DTYPES[1:]
WIDTH = choose(1024, 48)
INNER = choose(4096, 80)
HEADS = choose(16, 2)
HEAD_DIM = choose(64, 16)
LEFT, RIGHT = 64, 8
LENGTHS = choose([0, 1, 2, 31, 63, 64, 65, 217, 300, 1500, 0], [0, 1, 2, 31, 65, 0])
LONG = choose(20_011, 70)
VERY_LONG = choose(100_000, 200)


def packed(lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens` of utterances, on the device."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device=DEVICE, dtype=torch.int32)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values, drawn in fp32 so that all dtypes get the same ones but for rounding."""
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values in a view whose rows are strided and whose surroundings are NaN."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 24), math.nan, dtype=tensor.dtype, device=DEVICE)
    return buffer[1:-1, 8 : 8 + columns].copy_(tensor)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Sentinels:
    """A buffer around an output, whose every other element must stay as it is."""

    VALUE = -123.0

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.buffer = torch.full((rows + 4, columns + 32), self.VALUE, dtype=dtype, device=DEVICE)
        self.out = self.buffer[2:-2, 16:-16].fill_(math.nan)

    def untouched(self) -> bool:
        outside = self.buffer.clone()
        outside[2:-2, 16:-16] = self.VALUE
        return bool((outside == self.VALUE).all())
