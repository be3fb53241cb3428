"""Global memory: the tensors that a launch was given, and what its blocks do to them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .faults import Fault

_MANY = np.int32(-1)


@dataclass(frozen=True)
class Checks:
    """Which checks are made. Bounds, alignment and barriers always are.

    A parameter with "scratch" in its name is memory that blocks work in and no result. A block may
    write it again and in part, and read what it makes no use of.

    Attributes:
        races: of threads in shared memory and of blocks in global memory; in scratch memory only
            two blocks that write one byte.
        written_once: no byte of global memory is written twice in a launch.
        written_whole: where an element of a tensor was written, all of its elements were.
        garbage: executed a second time with other garbage and the blocks in the opposite order,
            every result has the same bits.
    """

    races: bool = True
    written_once: bool = True
    written_whole: bool = True
    garbage: bool = True


class _Storage:
    """The bytes of one storage, and by byte which block (from 1) wrote and which read it, and
    whether it was read before it was written."""

    def __init__(self, tensor: torch.Tensor, is_scratch: bool) -> None:
        self.is_scratch = is_scratch
        storage = tensor.untyped_storage()
        self.keep = storage
        self.base, self.size = storage.data_ptr(), storage.nbytes()
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.base))
        self.writer = np.zeros(self.size, np.int32)
        self.reader = np.zeros(self.size, np.int32)
        self.is_input = np.zeros(self.size, bool)


class GlobalMemory:
    """Loads and stores by address, each checked.

    Args:
        tensors: the tensors that may be accessed, anywhere in their storages.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], checks: Checks) -> None:
        self.tensors = dict(tensors)
        self.checks = checks
        found = {t.untyped_storage().data_ptr(): t for t in tensors.values() if t.numel()}
        results = {
            t.untyped_storage().data_ptr() for name, t in tensors.items() if "scratch" not in name
        }
        self.storages = [_Storage(found[base], base not in results) for base in sorted(found)]
        self.bases = np.array([s.base for s in self.storages], np.int64)
        self.loaded_bytes = self.stored_bytes = 0

    def place(self, storage: _Storage, offset: int) -> str:
        """Where a byte of a storage is: `out_ptr[3, 5]`, or in no view that was passed."""
        names = []
        for name, tensor in self.tensors.items():
            if not tensor.numel() or tensor.untyped_storage().data_ptr() != storage.base:
                continue
            names.append(name)
            offset = int(offset)
            left = offset // tensor.element_size() - tensor.storage_offset()
            index = [0] * tensor.dim()
            strides = tensor.stride()
            for stride, axis in sorted(
                zip(strides, range(tensor.dim()), strict=True), reverse=True
            ):
                if stride and left >= 0:
                    index[axis] = min(left // stride, tensor.size(axis) - 1)
                    left -= index[axis] * stride
            if left == 0:
                return f"{name}{index}"
        return f"byte {offset} of the storage of {' and '.join(names)}, outside the view"

    def _find(
        self, what: str, address: np.ndarray, width: int, threads: np.ndarray
    ) -> list[tuple[_Storage, np.ndarray | slice, np.ndarray]]:
        """Parts of an access by storage: (storage, which of the addresses, bytes [k, width])."""
        address = address.astype(np.int64)
        if (wrong := address % width != 0).any():
            raise Fault(f"{what} of {width} bytes that is not aligned to them", threads[wrong])
        if not self.storages:
            raise Fault(f"{what} outside of every tensor: none was passed", threads)
        which = np.searchsorted(self.bases, address, "right") - 1
        nearest = np.maximum(which, 0)
        offset = address - self.bases[nearest]
        sizes = np.array([s.size for s in self.storages])
        wrong = (which < 0) | (offset + width > sizes[nearest])
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            storage = self.storages[nearest[at]]
            names = [
                n for n, t in self.tensors.items() if t.untyped_storage().data_ptr() == storage.base
            ]
            raise Fault(
                f"{what} outside of every tensor: {width} bytes at byte {offset[at]} of the "
                f"{storage.size} of {' and '.join(names)}",
                threads[wrong],
            )
        steps = np.arange(width)
        if (which == which[0]).all():
            return [(self.storages[which[0]], slice(None), offset[:, None] + steps)]
        return [
            (self.storages[s], which == s, offset[which == s][:, None] + steps)
            for s in np.unique(which)
        ]

    def load(self, address: np.ndarray, width: int, threads: np.ndarray, block: int) -> np.ndarray:
        """Bytes [k, width] at k addresses."""
        out = np.empty((address.size, width), np.uint8)
        if not address.size:
            return out
        self.loaded_bytes += out.size
        for storage, part, at in self._find("global load", address, width, threads):
            out[part] = storage.bytes[at]
            writer = storage.writer[at]
            storage.is_input[at] |= writer == 0
            judged = self.checks.races and not storage.is_scratch
            if judged and (wrong := (writer != 0) & (writer != block + 1)).any():
                row, column = np.argwhere(wrong)[0]
                raise Fault(
                    f"race of blocks: {self.place(storage, at[row, column])} is read after block "
                    f"number {writer[row, column] - 1} wrote it",
                    threads[part][wrong.any(1)],
                )
            reader = storage.reader[at]
            storage.reader[at] = np.where((reader == 0) | (reader == block + 1), block + 1, _MANY)
        return out

    def store(
        self, address: np.ndarray, values: np.ndarray, threads: np.ndarray, block: int
    ) -> None:
        """Stores bytes [k, width] at k addresses."""
        if not address.size:
            return
        self.stored_bytes += values.size
        for storage, part, at in self._find("global store", address, values.shape[1], threads):
            writer, reader = storage.writer[at], storage.reader[at]
            judged = self.checks.races and not storage.is_scratch
            if judged and (wrong := (reader != 0) & (reader != block + 1)).any():
                row, column = np.argwhere(wrong)[0]
                raise Fault(
                    f"race of blocks: {self.place(storage, at[row, column])} is written after "
                    "another block read it",
                    threads[part][wrong.any(1)],
                )
            if self.checks.written_once:
                # Of threads that write one byte in this very store the last one's number stays.
                mark = np.broadcast_to(np.arange(1, at.shape[0] + 1)[:, None], at.shape)
                storage.writer[at] = mark
                before = (writer != 0) & ~(storage.is_scratch & (writer == block + 1))
                if (wrong := before | (storage.writer[at] != mark)).any():
                    row, column = np.argwhere(wrong)[0]
                    raise Fault(
                        f"{self.place(storage, at[row, column])} is written twice"
                        + (
                            f", first by block number {writer[row, column] - 1}"
                            if writer[row, column]
                            else ", by two threads at once"
                        ),
                        threads[part][wrong.any(1)],
                    )
            storage.bytes[at] = values[part]
            storage.writer[at] = block + 1

    def check_written_whole(self) -> None:
        """Raises Fault where some elements of a tensor were written and others were not."""
        for storage in self.storages:
            if storage.is_scratch:
                continue
            written = torch.from_numpy(storage.writer != 0)
            for name, tensor in self.tensors.items():
                if not tensor.numel() or tensor.untyped_storage().data_ptr() != storage.base:
                    continue
                size = tensor.element_size()
                strides = [size * stride for stride in tensor.stride()]
                seen = written.as_strided(tensor.shape, strides, size * tensor.storage_offset())
                if seen.any() and not seen.all():
                    missing = (~seen).nonzero()
                    raise Fault(
                        f"{len(missing)} of {tensor.numel()} elements of {name} are never written, "
                        f"the first {missing[0].tolist()}"
                    )
