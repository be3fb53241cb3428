"""Tensor maps, and where the box lies that a copy by one brings to or from shared memory.

PTX ISA, "Tensors" and "tensormap.replace": what a map says. How its 128 bytes say it is NVIDIA's
secret; `MAP` is this file's own. Dimension 0 is the innermost one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .faults import Fault, UnsupportedError

BYTES = 128
MAP = np.dtype(
    [
        ("global_address", "u8"),
        ("global_stride", "u8", 4),  # bytes, of dimension 1 and further
        ("global_dim", "u4", 5),
        ("box_dim", "u4", 5),
        ("element_stride", "u4", 5),
        ("rank", "u4"),  # less 1
        ("elemtype", "u4"),
        ("interleave_layout", "u4"),
        ("swizzle_mode", "u4"),
        ("fill_mode", "u4"),
        ("unused", "u8"),
    ]
)
# elemtype -> bytes of an element: u8, u16, u32, s32, u64, s64, f16, f32, f64, bf16. Those of tf32
# and those that flush denormals change what they copy; there is no rule for them.
_SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 9: 8, 10: 2}
# swizzle_mode -> 16-byte chunks of a row that change places.
_CHUNKS = {0: 1, 1: 2, 2: 4, 3: 8}
CHUNK = 16


def encoded(
    address: int,
    elemtype: int,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    swizzle_mode: int = 0,
    fill_mode: int = 0,
) -> np.ndarray:
    """The bytes of a map, as a host makes it: uint8 [128].

    Args:
        shape, box: of each dimension, the outermost first.
        strides: of each dimension but the innermost, in bytes.
    """
    one = np.zeros((), MAP)
    one["global_address"], one["elemtype"] = address, elemtype
    one["swizzle_mode"], one["fill_mode"] = swizzle_mode, fill_mode
    one["rank"] = len(shape) - 1
    for name, values in (("global_stride", strides), ("global_dim", shape), ("box_dim", box)):
        one[name][: len(values)] = values[::-1]
    one["element_stride"][: len(shape)] = 1
    return np.frombuffer(one.tobytes(), np.uint8).copy()


@dataclass(frozen=True)
class Box:
    """A box of a tensor, in pieces of `width` bytes that follow one another in shared memory.

    Attributes:
        address: of each piece in global memory, [k].
        inside: whether it is in the tensor, [k]; elsewhere zeros are loaded and nothing is stored.
        chunks: in which 16 bytes of shared memory, counted from its begin, each 16 bytes of the box
            lie, [k * width / 16].
    """

    address: np.ndarray
    inside: np.ndarray
    width: int
    chunks: np.ndarray

    @property
    def bytes(self) -> int:
        return CHUNK * self.chunks.size


def box(map_bytes: np.ndarray, at: Sequence[int], shared: int) -> Box:
    """The box at some coordinates, the innermost first.

    Args:
        map_bytes: uint8 [128].
        shared: where it begins in shared memory.
    """
    one = np.frombuffer(map_bytes.tobytes(), MAP)[0]
    rank, size = int(one["rank"]) + 1, _SIZES.get(int(one["elemtype"]))
    if rank != len(at):
        raise Fault(f"a tensor map of {rank} dimensions, and a copy of {len(at)}")
    limits, sides, steps, strides = (
        one[name][:rank].tolist()
        for name in ("global_dim", "box_dim", "element_stride", "global_stride")
    )
    mode = int(one["swizzle_mode"])
    row, row_of_mode = sides[0] * (size or 0), CHUNK * _CHUNKS.get(mode, 0) if mode else 0
    base = int(one["global_address"])
    for name, is_wrong, is_known in (
        ("elemtype", False, size is not None),
        ("global_address", base % 16, True),
        ("global_stride", any(step % 16 or step >= 2**40 for step in strides[: rank - 1]), True),
        ("global_dim", 0 in limits, True),
        ("element_stride", 0 in steps, max(steps) == 1),
        ("box_dim", row % 16 or not all(0 < side <= 256 for side in sides), True),
        ("swizzle_mode", 0 < row_of_mode < row, mode in _CHUNKS and row >= row_of_mode),
        ("interleave_layout", False, one["interleave_layout"] == 0),
        ("fill_mode", False, one["fill_mode"] == 0),
    ):
        if is_wrong:
            raise Fault(f"a tensor map whose {name} must not be {one[name]}")
        if not is_known:
            raise UnsupportedError(f"no rule for a tensor map whose {name} is {one[name]}")
    assert size is not None
    if shared % BYTES:
        raise Fault(f"a box at byte {shared} of shared memory, no multiple of {BYTES}")
    width = math.gcd(16, at[0] * size, limits[0] * size)
    address = at[0] * size + width * np.arange(row // width)
    inside = (address >= 0) & (address < limits[0] * size)
    for axis in range(1, rank):
        there = at[axis] + np.arange(sides[axis])
        address = (address + there[:, None] * strides[axis - 1]).reshape(-1)
        inside = (inside & ((there >= 0) & (there < limits[axis]))[:, None]).reshape(-1)
    chunks = shared // CHUNK + np.arange(address.size * width // CHUNK)
    return Box(base + address, inside, width, chunks ^ (chunks >> 3 & _CHUNKS[mode] - 1))
