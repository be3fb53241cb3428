"""What one operation costs: kernel launches, bytes through device memory, FLOPs, scratch memory.

The rule for bytes is the same for every operation of every implementation: what it reads is read
once, and what it writes written once. Caches that keep data from one operation to the next are not
credited, and re-reads within an operation (keys and values by every query tile, operands of a
matrix product by every output tile) are not charged. For PyTorch's operations that are the distinct
bytes of their tensors; for our kernels, the sectors of 32 bytes that they touch as compiled. FLOPs
are those of the mathematics, without what tiles waste at their edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# FLOPs an element, as the docstrings of csrc_triton count them.
NORM_FLOPS = 8
ACTIVATION_FLOPS = 4
SOFTMAX_FLOPS = 5


@dataclass(frozen=True)
class Cost:
    """Of one operation, or of several together.

    Attributes:
        launches: kernels started.
        read: bytes.
        written: bytes.
        matrix_flops: in matrix products, which have their own units.
        vector_flops: everything else, in fp32.
        double_flops: in fp64.
        again: bytes of our kernels' sectors that a launch touches again: what caches are for.
        temporary: bytes of device memory taken and returned within the operation.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    matrix_flops: int = 0
    vector_flops: int = 0
    double_flops: int = 0
    again: int = 0
    temporary: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.vector_flops + self.double_flops

    def __add__(self, other: Cost) -> Cost:
        """Sums, but for `temporary`: the larger, because one follows the other."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**{**sums, "temporary": max(self.temporary, other.temporary)})

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True)
class Call:
    """One call of an operation of `w2vbert_fast.ops`.

    Attributes:
        arguments: by name, those that were left out with their defaults.
        results: its tensors.
    """

    arguments: Mapping[str, Any]
    results: Sequence[Tensor]

    def __getitem__(self, name: str) -> Any:
        """The argument; `None` where the operation was called without."""
        return self.arguments.get(name)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 0:
            return 0
        elements *= size if stride != 0 else 1
    return min(elements * tensor.itemsize, tensor.untyped_storage().nbytes())


def total_size(values: Iterable[object]) -> int:
    """Bytes of the tensors among some values; one that is given twice counts once."""
    distinct = {}
    for tensor in values:
        if isinstance(tensor, Tensor):
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
            distinct[(*place, tuple(tensor.shape), tensor.stride())] = tensor
    return sum(size_of(tensor) for tensor in distinct.values())
