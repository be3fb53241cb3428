"""How a result is judged, and what is kept of it.

A tolerance is earned: in fp16 and bf16 a result may be at most `limit` times as far from float64 as
plain PyTorch in the same dtype is (largest and root-mean-square error both); in fp32 it may be off
by 1e-5 of the largest element.

For the largest error in fp16 and bf16 an element counts that is off by more than a unit in its own
last place. One that is nearer is one of the two numbers of the format next to the exact one (it is
faithfully rounded), and which of both it is where an operation rounds twice, say a norm of a norm
that is stored, is chance: half a unit of the first rounding and half a unit of the second add up or
cancel. No element by itself says then that something is wrong; many do, and the RMS error has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.helpers.operations import OF_WAVEFORMS
from tests.kernels.lane import FP32_TOLERANCE

if TYPE_CHECKING:
    from tools.virtual_gpu.executor import Counts
    from tools.virtual_gpu.record import Launch

ENOUGH_FOR_A_LARGEST = 256
"""Elements of a result. The largest error of fewer is a matter of luck; the mean one is not."""
_FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


@dataclass(frozen=True)
class Errors:
    """Distance from float64, relative to the exact result's own largest element and RMS, or to
    `at_least` where that is more."""

    largest: float
    rms: float

    @classmethod
    def of(cls, result: Tensor, exact: Tensor, at_least: float = 1e-300) -> Errors:
        difference = (result.double() - exact).abs()
        return cls(
            float(difference.max() / exact.abs().max().clamp(min=at_least)),
            float(difference.norm() / exact.norm().clamp(min=at_least * exact.numel() ** 0.5)),
        )

    @classmethod
    def beyond_a_unit(cls, result: Tensor, exact: Tensor, at_least: float = 1e-300) -> Errors:
        """As `of`, but elements count as exact that are off by at most a unit in the last place."""
        off = (result.double() - exact).abs() > unit_in_the_last_place(exact, result.dtype)
        return cls.of(torch.where(off | result.isnan(), result.double(), exact), exact, at_least)


@dataclass(frozen=True)
class Record:
    """One comparison.

    Attributes:
        kernel: what was compared.
        dtype: of the result, or the narrower one of what it was computed from: what decides how far
            off it may be.
        largest: largest error, relative to the largest exact element.
        rms: root-mean-square error, relative to that of the exact result.
        ratio: the larger of both as a multiple of plain PyTorch's; `None` where there is no twin,
            and in fp32, whose limit is not PyTorch's error.
        ran: the Triton kernels, each with its dtype, that were launched since the comparisons
            before; known on a virtual GPU alone.
    """

    kernel: str
    dtype: str
    largest: float
    rms: float
    ratio: float | None
    ran: list[tuple[str, str]]


@dataclass
class Ran:
    """What a test launched of one kernel in one dtype: launches and instructions of warps."""

    launches: int = 0
    instructions: int = 0


@dataclass
class Row:
    """A test's outcome ("" as long as it has none), duration, comparisons and launches."""

    outcome: str = ""
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    launches: dict[tuple[str, str], Ran] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """The row in JSON's types."""
        return {
            "outcome": self.outcome,
            "seconds": round(self.seconds, 3),
            "records": [asdict(record) for record in self.records],
            "launches": [
                {"kernel": kernel, "dtype": dtype, **asdict(ran)}
                for (kernel, dtype), ran in self.launches.items()
            ],
        }


def unit_in_the_last_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours in a dtype around each element."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=limits.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exact, limits.eps), exponent)


def worst_elements(result: Tensor, exact: Tensor, count: int = 3) -> Iterator[str]:
    """The elements that are furthest off, NaN first."""
    difference = (result.double() - exact).abs().nan_to_num(nan=math.inf).flatten()
    for index in difference.topk(min(count, difference.numel())).indices.tolist():
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), exact.shape))
        yield f"at {place}: {float(result[place]):.9g}, exactly {float(exact[place]):.9g}"


def dtype_of_launch(types: Iterable[str]) -> str:
    """The narrowest floating-point dtype of a kernel's tensors, by their Triton types, such as
    `*bf16`; "integers" where there is none."""
    pointers = set(types)
    floats = [kind for kind in _FLOATS if f"*{kind}" in pointers]
    return _FLOATS[floats[0]] if floats else "integers"


def _ratio(mine: float, other: float) -> float:
    if mine == 0:
        return 0.0
    return mine / other if other > 0 else math.inf


class Judge:
    """Compares results and remembers by how much they were off: `row` is that of this test."""

    def __init__(self) -> None:
        self.row = Row()
        self._ran: set[tuple[str, str]] = set()
        self._compared = False

    def start(self) -> None:
        """The next test begins."""
        self.row = Row()
        self._ran.clear()

    def launched(self, launch: Launch, counts: Counts) -> None:
        """Remembers a launch that was executed; the comparisons that follow are of its results."""
        if self._compared:
            self._ran.clear()
            self._compared = False
        key = (launch.kernel, dtype_of_launch(argument.type for argument in launch.arguments))
        self._ran.add(key)
        ran = self.row.launches.setdefault(key, Ran())
        ran.launches += 1
        ran.instructions += counts.instructions.total()

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
        at_least: float = 1e-300,
        inputs: torch.dtype | None = None,
        or_a_unit: bool = False,
    ) -> Errors:
        """Asserts that a result is as near to float64 as it has to be; returns how near it is.

        Args:
            kernel: what is compared, for the table.
            result: of the kernel.
            exact: float64, of the plain operation.
            plain: of the plain operation in the dtype of `result`; needed in fp16 and bf16.
            limit: how many times plain PyTorch's error is allowed in fp16 and bf16.
            largest_limit: the same for the largest error alone; `None`: as `limit`; infinite: it is
                not looked at.
            tolerance: what is allowed in fp32, relative to the largest exact element.
            at_least: what the largest exact element is taken to be at least.
            inputs: the dtype of what `result` was computed from; `None`: that of `result`. An fp32
                sum of fp16 or bf16 is measured as those are, up to its own rounding.
            or_a_unit: in fp16 and bf16 the largest error may also be a unit in the last place of
                the largest element, since the maximum of few errors is a matter of luck.
        """
        assert exact.dtype == torch.float64
        assert result.shape == exact.shape, f"{kernel}: {result.shape} is not {exact.shape}"
        if exact.numel() == 0:
            return Errors(0.0, 0.0)
        ours = Errors.of(result, exact, at_least)
        theirs = None if plain is None else Errors.of(plain, exact, at_least)
        of_largest = limit if largest_limit is None else largest_limit
        only_rms = math.isinf(of_largest)
        kind = inputs or result.dtype
        if kind == torch.float32:
            fits = ours.largest <= tolerance and ours.rms <= tolerance
            allowed = f"{tolerance:.3g}"
        else:
            assert plain is not None and plain.dtype in (result.dtype, kind) and theirs is not None
            rounding = torch.finfo(torch.float32).eps if result.dtype == torch.float32 else 0.0
            fits = ours.rms <= limit * theirs.rms + rounding and (
                only_rms
                or ours.largest <= of_largest * theirs.largest + rounding
                or Errors.beyond_a_unit(result, exact, at_least).largest
                <= of_largest * theirs.largest + rounding
                or (or_a_unit and ours.largest <= torch.finfo(kind).eps)
            )
            allowed = (
                f"{of_largest} times PyTorch's {theirs.largest:.3g}, RMS {limit} times "
                f"{theirs.rms:.3g}"
            )
        ratio = None
        if theirs is not None and kind != torch.float32:
            ratio = _ratio(ours.rms, theirs.rms)
            if not only_rms:
                ratio = max(ratio, _ratio(ours.largest, theirs.largest))
        self._remember(kernel, kind, ours, ratio)
        if not fits:
            elements = "\n  ".join(worst_elements(result, exact))
            raise AssertionError(
                f"{kernel}, {self.row.records[-1].dtype}: largest error {ours.largest:.3g}, "
                f"RMS {ours.rms:.3g}; allowed: {allowed}\n  {elements}"
            )
        return ours

    def operation(
        self,
        name: str,
        dtype: torch.dtype,
        ours: Sequence[Tensor],
        plain: Sequence[Tensor],
        exact: Sequence[Tensor],
    ) -> None:
        """Asserts of all results of a registered operation that they are as they have to be.

        Args:
            name: of the operation.
            dtype: of its arguments.
            ours: its results by the kernels.
            plain, exact: as `tests.helpers.operations.answers` gives them.
        """
        limit = OF_WAVEFORMS.get(name)
        assert len(ours) == len(exact) > 0
        for number, (one, theirs, right) in enumerate(zip(ours, plain, exact, strict=True)):
            if not one.is_floating_point():
                assert torch.equal(one, right), f"{name}: result {number} differs"
                self.counted(name, one.dtype)
                continue
            if limit is not None:  # `exact` is plain PyTorch in float32
                off = (one - right).abs().max()
                assert off <= limit, f"{name}: off by {float(off):.3g}"
            few = one.numel() < ENOUGH_FOR_A_LARGEST
            self(
                name,
                one,
                right.double(),
                theirs,
                inputs=dtype,
                largest_limit=math.inf if few else None,
                tolerance=FP32_TOLERANCE if limit is None else limit,
                or_a_unit=name.endswith("_backward"),  # as test_gemm_backward.py has it
            )

    def counted(self, kernel: str, dtype: torch.dtype) -> None:
        """Remembers a comparison that must be, and was, exact."""
        self._remember(kernel, dtype, Errors(0.0, 0.0), None)

    def _remember(
        self, kernel: str, dtype: torch.dtype, errors: Errors, ratio: float | None
    ) -> None:
        self._compared = True
        name = str(dtype).removeprefix("torch.")
        record = Record(kernel, name, errors.largest, errors.rms, ratio, sorted(self._ran))
        self.row.records.append(record)
