"""Global memory: the tensors that a launch was given, and what its blocks do to them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .faults import Fault

_MANY = np.int32(-1)
_ALIGNED = 16  # the widest access


SECTOR = 32
"""Bytes that memory moves at least, and at multiples of them."""
_WARPS = 32
"""More than a block has, of 32 threads."""


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
        register_fences: between a wgmma and what was done to its registers lies a wgmma.fence.
            Where one is missing ptxas puts it there, and says so.
    """

    races: bool = True
    written_once: bool = True
    written_whole: bool = True
    garbage: bool = True
    register_fences: bool = True


class _Storage:
    """One storage: its bytes, in a copy that begins and ends at a multiple of 16, and by granule
    which block (from 1) wrote and which read it, and whether it was read before it was written."""

    def __init__(self, tensor: torch.Tensor, is_scratch: bool, granule: int) -> None:
        self.is_scratch = is_scratch
        self.granule = granule
        storage = tensor.untyped_storage()
        self.keep = storage
        self.base, self.size = storage.data_ptr(), storage.nbytes()
        self.before = self.base % _ALIGNED
        total = -(-(self.before + self.size) // _ALIGNED) * _ALIGNED
        self.outside = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.base))
        self.copy = np.zeros(total, np.uint8)
        self.bytes = self.copy[self.before : self.before + self.size]
        self.bytes[:] = self.outside
        self.writer, self.reader = np.zeros((2, total // granule), np.int32)
        self.is_input = np.zeros(total // granule, bool)
        self._views: dict[int, tuple[np.ndarray, ...]] = {}

    def at_width(self, width: int) -> tuple[np.ndarray, ...]:
        """Bytes, writer, reader and is_input as rows of one width."""
        if width not in self._views:
            notes = (self.writer, self.reader, self.is_input)
            self._views[width] = (
                self.copy.view(f"V{width}"),
                *(note.reshape(-1, width // self.granule) for note in notes),
            )
        return self._views[width]

    def by_byte(self, notes: np.ndarray) -> np.ndarray:
        return notes.repeat(self.granule)[self.before : self.before + self.size]


def _sectors(address: np.ndarray, threads: np.ndarray, blocks: np.ndarray) -> int:
    """How many sectors the warps ask for, each for itself: an access lies in one, aligned."""
    warp = (blocks - blocks.min()) * _WARPS + threads // 32
    return int(np.unique(address.astype(np.int64) // SECTOR * 2**20 + warp).size)


class GlobalMemory:
    """Loads and stores by address, each checked.

    Args:
        tensors: the tensors that may be accessed, anywhere in their storages.
        granule: bytes of the narrowest access.

    The tensors get what was stored when `write_back` is called.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], checks: Checks, granule: int = 1
    ) -> None:
        self.tensors = dict(tensors)
        self.checks = checks
        found = {t.untyped_storage().data_ptr(): t for t in tensors.values() if t.numel()}
        results = {
            t.untyped_storage().data_ptr() for name, t in tensors.items() if "scratch" not in name
        }
        self.storages = [
            _Storage(found[base], base not in results, granule) for base in sorted(found)
        ]
        self.bases = np.array([s.base for s in self.storages], np.int64)
        self.sizes = np.array([s.size for s in self.storages], np.int64)
        self.loaded_bytes = self.stored_bytes = 0
        self.loaded_sectors = self.stored_sectors = 0

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

    def write_back(self) -> None:
        for storage in self.storages:
            storage.outside[:] = storage.bytes

    def touched(self) -> tuple[int, int]:
        """How many sectors were loaded, and how many stored, each counted once."""
        loaded = stored = 0
        for storage in self.storages:
            before = np.zeros(storage.base % SECTOR, bool)
            after = np.zeros(-(before.size + storage.size) % SECTOR, bool)
            for notes, is_load in ((storage.reader, True), (storage.writer, False)):
                parts = (before, storage.by_byte(notes != 0), after)
                sectors = int(np.concatenate(parts).reshape(-1, SECTOR).any(1).sum())
                loaded, stored = loaded + is_load * sectors, stored + (not is_load) * sectors
        return loaded, stored

    def _find(
        self, what: str, address: np.ndarray, width: int, threads: np.ndarray
    ) -> list[tuple[_Storage, np.ndarray | slice, np.ndarray]]:
        """Parts of an access by storage: (storage, which of the addresses, rows of its views)."""
        address = address.astype(np.int64)
        if (wrong := address % width != 0).any():
            raise Fault(f"{what} of {width} bytes that is not aligned to them", threads[wrong])
        if not self.storages:
            raise Fault(f"{what} outside of every tensor: none was passed", threads)
        which = np.searchsorted(self.bases, address, "right") - 1
        nearest = np.maximum(which, 0)
        offset = address - self.bases[nearest]
        wrong = (which < 0) | (offset + width > self.sizes[nearest])
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
        first = int(which[0])
        if (which == first).all():
            storage = self.storages[first]
            return [(storage, slice(None), (offset + storage.before) // width)]
        return [
            (
                self.storages[s],
                which == s,
                (offset[which == s] + self.storages[s].before) // width,
            )
            for s in np.unique(which)
        ]

    def _place_of(self, storage: _Storage, row: int, width: int, cell: int) -> str:
        return self.place(storage, row * width + cell * storage.granule - storage.before)

    def load(
        self, address: np.ndarray, width: int, threads: np.ndarray, blocks: np.ndarray
    ) -> np.ndarray:
        """Bytes [k, width] at k addresses, for threads of these blocks, [k]."""
        out = np.empty((address.size, width), np.uint8)
        if not address.size:
            return out
        self.loaded_bytes += out.size
        self.loaded_sectors += _sectors(address, threads, blocks)
        for storage, part, rows in self._find("global load", address, width, threads):
            data, writers, readers, are_inputs = storage.at_width(width)
            out[part] = data.take(rows).view(np.uint8).reshape(-1, width)
            block = (blocks[part] + 1).astype(np.int32)[:, None]
            writer = writers.take(rows, 0)
            if not (known := are_inputs.take(rows, 0)).all():
                are_inputs[rows] = known | (writer == 0)
            judged = self.checks.races and not storage.is_scratch
            if judged and writer.any() and (wrong := (writer != 0) & (writer != block)).any():
                row, cell = np.argwhere(wrong)[0]
                raise Fault(
                    f"race of blocks: {self._place_of(storage, rows[row], width, cell)} is read "
                    f"after block number {writer[row, cell] - 1} wrote it",
                    threads[part][wrong.any(1)],
                )
            reader = readers.take(rows, 0)
            if not ((reader == block) | (reader == _MANY)).all():
                note = np.where((reader == 0) | (reader == block), block, _MANY)
                readers[rows] = note
                # Several blocks read one granule in this very load.
                if (other := readers.take(rows, 0) != note).any():
                    row, cell = np.nonzero(other)
                    readers[rows[row], cell] = _MANY
        return out

    def store(
        self, address: np.ndarray, values: np.ndarray, threads: np.ndarray, blocks: np.ndarray
    ) -> None:
        """Stores bytes [k, width] at k addresses, from threads of these blocks, [k]."""
        if not address.size:
            return
        width = values.shape[1]
        self.stored_bytes += values.size
        self.stored_sectors += _sectors(address, threads, blocks)
        for storage, part, rows in self._find("global store", address, width, threads):
            data, writers, readers, _ = storage.at_width(width)
            writer, reader = writers.take(rows, 0), readers.take(rows, 0)
            block = (blocks[part] + 1).astype(np.int32)[:, None]
            judged = self.checks.races and not storage.is_scratch
            if judged and reader.any() and (wrong := (reader != 0) & (reader != block)).any():
                row, cell = np.argwhere(wrong)[0]
                raise Fault(
                    f"race of blocks: {self._place_of(storage, rows[row], width, cell)} is written "
                    "after another block read it",
                    threads[part][wrong.any(1)],
                )
            if self.checks.written_once:
                # Of threads that write one granule in this very store the last one's number stays.
                mark = np.arange(rows.size, dtype=np.int32)[:, None]
                writers[rows] = mark
                last = writers.take(rows, 0)
                before = (writer != 0) & ~(storage.is_scratch & (writer == block))
                if (wrong := before | (last != mark)).any():
                    row, cell = np.argwhere(wrong)[0]
                    first, other = writer[row, cell] - 1, blocks[part][last[row, cell]]
                    if not writer[row, cell]:
                        first = blocks[part][row]
                    at_once = not writer[row, cell] and other == first
                    raise Fault(
                        f"{self._place_of(storage, rows[row], width, cell)} is written twice, "
                        + (
                            "by two threads at once"
                            if at_once
                            else f"first by block number {first}"
                        ),
                        threads[part][wrong.any(1)],
                    )
            data[rows] = np.ascontiguousarray(values[part]).view(data.dtype)[:, 0]
            writers[rows] = block

    def check_written_whole(self) -> None:
        """Raises Fault where some elements of a tensor were written and others were not."""
        for storage in self.storages:
            if storage.is_scratch:
                continue
            written = torch.from_numpy(storage.by_byte(storage.writer != 0))
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
