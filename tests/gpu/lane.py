"""Where the GPU lane runs, at which sizes, and how a result is judged.

On a GPU the sizes are those of the published model. Without one, `W2VBERT_GPU_TESTS=interpret`
together with `TRITON_INTERPRET=1` runs the same test bodies on small CPU tensors through Triton's
interpreter, so that the tests themselves are tested (its bf16 products are broken: fp32 and fp16).
`W2VBERT_GPU_TESTS=sm_80` compiles the kernels for that target as they ship and executes them on the
same small tensors with every check of `tools.virtual_gpu`; in all dtypes.
`W2VBERT_GPU_TESTS=small` takes the small tensors to the GPU, for tools that slow every kernel down.

A tolerance is earned: in fp16 and bf16 a result may be at most `limit` times as far from float64 as
plain PyTorch in the same dtype is (largest and root-mean-square error both); in fp32 it may be off
by 1e-5 of the largest element.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_WHERE = os.environ.get("W2VBERT_GPU_TESTS", "")
INTERPRETED = _WHERE == "interpret"
VIRTUAL = _WHERE if _WHERE.startswith("sm_") else None
WITHOUT_DEVICE = INTERPRETED or VIRTUAL is not None
SMALL = WITHOUT_DEVICE or _WHERE == "small"
DEVICE = torch.device("cpu" if WITHOUT_DEVICE else "cuda")
DATA = Path(__file__).parent / "data"
FP32_TOLERANCE = 1e-5


def choose(gpu: T, small: T) -> T:
    """What a test takes on a GPU, and what it takes where little must do."""
    return small if SMALL else gpu


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


@dataclass(frozen=True)
class Errors:
    """Distance from float64, relative to the exact result's own largest element and RMS."""

    largest: float
    rms: float

    @classmethod
    def of(cls, result: Tensor, exact: Tensor) -> Errors:
        difference = (result.double() - exact).abs()
        return cls(
            float(difference.max() / exact.abs().max().clamp(min=1e-300)),
            float(difference.norm() / exact.norm().clamp(min=1e-300)),
        )


@dataclass(frozen=True)
class Record:
    """One comparison.

    Attributes:
        test: its test.
        kernel: what was compared.
        dtype: of the result.
        largest: largest error, relative to the largest exact element.
        rms: root-mean-square error, relative to that of the exact result.
        ratio: the larger of both as a multiple of plain PyTorch's; `None` where there is no twin.
    """

    test: str
    kernel: str
    dtype: str
    largest: float
    rms: float
    ratio: float | None


def worst_elements(result: Tensor, exact: Tensor, count: int = 3) -> Iterator[str]:
    """The elements that are furthest off, NaN first."""
    difference = (result.double() - exact).abs().nan_to_num(nan=math.inf).flatten()
    for index in difference.topk(min(count, difference.numel())).indices.tolist():
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), exact.shape))
        yield f"at {place}: {float(result[place]):.9g}, exactly {float(exact[place]):.9g}"


class Judge:
    """Compares results and remembers by how much they were off."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.seconds: dict[str, float] = {}
        self.planned: list[str] = []
        self.outcomes: dict[str, str] = {}
        self.test = ""
        self.started = time.perf_counter()

    def __call__(
        self,
        kernel: str,
        result: Tensor,
        exact: Tensor,
        plain: Tensor | None = None,
        *,
        limit: float = 1.1,
        largest_limit: float | None = None,
        tolerance: float = FP32_TOLERANCE,
    ) -> None:
        """Asserts that a result is as near to float64 as it has to be.

        Args:
            kernel: what is compared, for the table.
            result: of the kernel.
            exact: float64, of the plain operation.
            plain: of the plain operation in the dtype of `result`; needed in fp16 and bf16.
            limit: how many times plain PyTorch's error is allowed in fp16 and bf16.
            largest_limit: the same for the largest error alone; `None`: as `limit`.
            tolerance: what is allowed in fp32, relative to the largest exact element.
        """
        assert exact.dtype == torch.float64
        assert result.shape == exact.shape, f"{kernel}: {result.shape} is not {exact.shape}"
        if exact.numel() == 0:
            return
        ours = Errors.of(result, exact)
        theirs = None if plain is None else Errors.of(plain, exact)
        ratio = None
        if result.dtype == torch.float32:
            fits = ours.largest <= tolerance and ours.rms <= tolerance
            allowed = f"{tolerance:.3g}"
        else:
            assert plain is not None and plain.dtype == result.dtype and theirs is not None
            of_largest = limit if largest_limit is None else largest_limit
            fits = ours.largest <= of_largest * theirs.largest and ours.rms <= limit * theirs.rms
            allowed = (
                f"{of_largest} times PyTorch's {theirs.largest:.3g}, RMS {limit} times "
                f"{theirs.rms:.3g}"
            )
        if theirs is not None:
            ratio = max(
                mine / max(other, 1e-300) if mine > 0 or math.isnan(mine) else 0.0
                for mine, other in ((ours.largest, theirs.largest), (ours.rms, theirs.rms))
            )
        dtype = str(result.dtype).removeprefix("torch.")
        self.records.append(Record(self.test, kernel, dtype, ours.largest, ours.rms, ratio))
        if not fits:
            elements = "\n  ".join(worst_elements(result, exact))
            raise AssertionError(
                f"{kernel}, {dtype}: largest error {ours.largest:.3g}, RMS {ours.rms:.3g}; "
                f"allowed: {allowed}\n  {elements}"
            )

    def counted(self, kernel: str, dtype: torch.dtype) -> None:
        """Remembers a comparison that must be, and was, exact."""
        name = str(dtype).removeprefix("torch.")
        self.records.append(Record(self.test, kernel, name, 0.0, 0.0, None))

    def results(self) -> dict[str, Any]:
        return {
            "records": [asdict(record) for record in self.records],
            "seconds": self.seconds,
            "outcomes": self.outcomes,
            "not_run": [test for test in self.planned if test not in self.outcomes],
        }


def table(results: dict[str, Any]) -> str:
    """A line for each kernel and dtype: cases, worst errors, and seconds of their tests.

    The variants of a kernel (what follows a slash in its name) share a line.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    rows_of_test: dict[str, set[tuple[str, str]]] = {}
    for record in results["records"]:
        key = (record["kernel"].partition("/")[0], record["dtype"])
        groups.setdefault(key, []).append(record)
        rows_of_test.setdefault(record["test"], set()).add(key)
    seconds = dict.fromkeys(groups, 0.0)
    for test, keys in rows_of_test.items():
        for key in keys:
            seconds[key] += results["seconds"].get(test, 0.0) / len(keys)

    lines = ["kernel                      dtype     cases  worst error  x PyTorch's  seconds"]
    for (kernel, dtype), records in sorted(groups.items()):
        ratios = [record["ratio"] for record in records if record["ratio"] is not None]
        ratio = f"{max(ratios):.2f}" if ratios else "exact" if _exact(records) else "-"
        worst = max(record["largest"] for record in records)
        lines.append(
            f"{kernel:<27} {dtype:<9} {len(records):>5}  {worst:>11.2e}  {ratio:>11}  "
            f"{seconds[kernel, dtype]:>7.1f}"
        )
    return "\n".join(lines)


def _exact(records: list[dict[str, Any]]) -> bool:
    return all(record["largest"] == 0 for record in records)
