"""Global memory: the tensors that a launch was given, and what its blocks do to them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .block_order import BlockOrder, Ordering, in_turns
from .faults import Fault

_MANY = np.int32(-1)
_WRITES, _READS, _PLACES = range(3)
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
        written_once: no byte of global memory is written twice in a launch, but by atomics, and by
            blocks that these order.
        written_whole: where an element of a tensor was written, all of its elements were.
        garbage: executed a second time with other garbage and the blocks in the opposite order,
            every result has the same bits.
        register_fences: between a wgmma and what was done to its registers lies a wgmma.fence.
            Where one is missing ptxas puts it there, and says so.
        order: in a launch with atomics, the opposite order of blocks changes results in floating
            point alone, and by no more than rounding.
    """

    races: bool = True
    written_once: bool = True
    written_whole: bool = True
    garbage: bool = True
    register_fences: bool = True
    order: bool = True


class Storage:
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
        self._notes: tuple[np.ndarray, ...] = ()

    def notes(self, width: int) -> tuple[np.ndarray, ...]:
        """In launches with atomics, as rows of one width: stamps of writes and of reads, and which
        place of atomics it is (`BlockOrder`)."""
        if not self._notes:
            self._notes = (*np.zeros((2, self.writer.size), np.int64), self.writer * 0)
        return tuple(notes.reshape(-1, width // self.granule) for notes in self._notes)

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
        order: of the blocks, where a launch has atomics.
        backwards: in an atomic instruction the last thread comes first.

    Attributes:
        atomics: instructions there were, of blocks at once.
        changes: how often one of them, or a store, changed something, where there are atomics.
        remarks: what is told of a launch that goes well, by what it is about.

    The tensors get what was stored when `write_back` is called.
    """

    order: BlockOrder | None = None
    backwards = False
    atomics = changes = 0

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        checks: Checks,
        granule: int = 1,
        order: BlockOrder | None = None,
        backwards: bool = False,
    ) -> None:
        self.order, self.backwards = order, backwards
        self.remarks: dict[object, str] = {}
        self.tensors = dict(tensors)
        self.checks = checks
        found = {t.untyped_storage().data_ptr(): t for t in tensors.values() if t.numel()}
        results = {
            t.untyped_storage().data_ptr() for name, t in tensors.items() if "scratch" not in name
        }
        self.storages = [
            Storage(found[base], base not in results, granule) for base in sorted(found)
        ]
        self.bases = np.array([s.base for s in self.storages], np.int64)
        self.sizes = np.array([s.size for s in self.storages], np.int64)
        self.loaded_bytes = self.stored_bytes = 0
        self.loaded_sectors = self.stored_sectors = 0

    def place(self, storage: Storage, offset: int) -> str:
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
            both = storage.notes(storage.granule)[2][:, 0] != 0 if self.order else False
            for notes, is_load in ((storage.reader, True), (storage.writer, False)):
                parts = (before, storage.by_byte((notes != 0) | both), after)
                sectors = int(np.concatenate(parts).reshape(-1, SECTOR).any(1).sum())
                loaded, stored = loaded + is_load * sectors, stored + (not is_load) * sectors
        return loaded, stored

    def _find(
        self, what: str, address: np.ndarray, width: int, threads: np.ndarray
    ) -> list[tuple[Storage, np.ndarray | slice, np.ndarray]]:
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

    def _place_of(self, storage: Storage, row: int, width: int, cell: int) -> str:
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
            if (
                judged
                and writer.any()
                and (wrong := (writer != 0) & (writer != block)).any()
                and self._unordered(storage, _WRITES, rows, width, wrong, blocks[part])
            ):
                row, cell = np.argwhere(wrong)[0]
                raise Fault(
                    f"race of blocks: {self._place_of(storage, rows[row], width, cell)} is read "
                    f"after block number {writer[row, cell] - 1} wrote it",
                    threads[part][wrong.any(1)],
                )
            if self.order is not None:
                self._after_atomics("read", storage, rows, width, blocks[part], threads[part])
                self.order.note_read(storage.notes(width)[_READS], rows, blocks[part])
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
            if (
                judged
                and reader.any()
                and (wrong := (reader != 0) & (reader != block)).any()
                and self._unordered(storage, _READS, rows, width, wrong, blocks[part])
            ):
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
                if self.order is not None:
                    others = before & (writer != block)
                    before ^= others
                    self._unordered(storage, _WRITES, rows, width, others, blocks[part])
                    before |= others
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
            if self.order is not None:
                self._after_atomics("written", storage, rows, width, blocks[part], threads[part])
                stamps = self.order.stamps(blocks[part], threads[part])
                storage.notes(width)[_WRITES][rows] = stamps[:, None]
                old = data.take(rows).view(np.uint8).reshape(-1, width)
                self.changes += int((old != values[part]).any())
            data[rows] = np.ascontiguousarray(values[part]).view(data.dtype)[:, 0]
            writers[rows] = block

    def atomic(
        self,
        address: np.ndarray,
        function: Callable[..., np.ndarray],
        operands: np.ndarray,
        threads: np.ndarray,
        blocks: np.ndarray,
        how: Ordering,
    ) -> np.ndarray:
        """Puts function(what is there, *operands [operands, k]) at k addresses, one thread after
        another. Returns what each found, [k]."""
        found, width = np.empty(address.size, operands.dtype), operands.itemsize
        if not address.size:
            return found
        assert self.order is not None
        self.atomics += 1
        self.loaded_bytes += found.nbytes
        self.stored_bytes += found.nbytes
        sectors = _sectors(address, threads, blocks)
        self.loaded_sectors += sectors
        self.stored_sectors += sectors
        for storage, part, rows in self._find("atomic access", address, width, threads):
            block, thread, given = blocks[part], threads[part], operands[:, part]
            _, writers, readers, are_inputs = storage.at_width(width)
            writer, reader = writers.take(rows, 0), readers.take(rows, 0)
            are_inputs[rows] |= writer == 0
            mine = (block + 1)[:, None]
            for kind, by, done in ((_WRITES, writer, "wrote"), (_READS, reader, "read")):
                wrong = (by != 0) & (by != mine)
                if self._unordered(storage, kind, rows, width, wrong, block):
                    self._race(storage, rows, width, wrong, thread, f"changed after another {done}")
            sequence = np.arange(rows.size)[:: -1 if self.backwards else 1]
            places = storage.notes(width)[_PLACES]
            wrong = self.order.atomics(places, rows, block, thread, sequence, how, width)
            if wrong.any():
                self._race(storage, rows, width, wrong[:, None], thread, "changed at once")
            data = storage.copy.view(operands.dtype)
            before = data[rows].tobytes()
            found[part] = in_turns(data, rows, function, given, sequence)
            self.changes += data[rows].tobytes() != before
        return found

    def _unordered(
        self,
        storage: Storage,
        kind: int,
        rows: np.ndarray,
        width: int,
        others: np.ndarray,
        blocks: np.ndarray,
    ) -> bool:
        """Whether some of what other blocks wrote or read is in no order with what these do now.
        `others`, [k, granules], becomes that."""
        if self.order is not None and others.any():
            stamps = storage.notes(width)[kind].take(rows, 0)
            others &= self.order.unordered(stamps, others, blocks)
        return bool(others.any())

    def _after_atomics(
        self,
        what: str,
        storage: Storage,
        rows: np.ndarray,
        width: int,
        blocks: np.ndarray,
        threads: np.ndarray,
    ) -> None:
        assert self.order is not None
        places = storage.notes(width)[_PLACES].take(rows, 0)
        if places.any():
            wrong = self.order.after_atomics(places, blocks, stores=what == "written")
            if wrong.any():
                self._race(storage, rows, width, wrong, threads, f"{what} after another changed it")

    def _race(
        self,
        storage: Storage,
        rows: np.ndarray,
        width: int,
        wrong: np.ndarray,
        threads: np.ndarray,
        what: str,
    ) -> None:
        """Of an atomic access and another, where that is judged."""
        if self.checks.races and not storage.is_scratch:
            row, cell = np.argwhere(wrong)[0]
            raise Fault(
                f"race of blocks: {self._place_of(storage, rows[row], width, cell)} is {what}, and "
                "no release and acquire lies between",
                threads[wrong.any(1)],
            )

    def check_rounding(self, other: GlobalMemory) -> None:
        """Of a run with the blocks in another order. Raises Fault where it differs by more than
        floating point numbers do that are added up in another order, as many as there were blocks
        or atomic accesses to one address; less is a remark."""
        assert self.order is not None
        many = max(self.order.blocks, *(place.count for place in self.order.places))
        for storage, one in zip(self.storages, other.storages, strict=True):
            wrong = storage.bytes != one.bytes
            if storage.is_scratch or not wrong.any():
                continue
            name, tensor = next(
                (name, tensor)
                for name, tensor in self.tensors.items()
                if tensor.untyped_storage().data_ptr() == storage.base
            )
            size = tensor.element_size()
            here, there = (
                torch.from_numpy(s.bytes[: s.size // size * size].copy()).view(tensor.dtype)
                for s in (storage, one)
            )
            said = (
                f"the order of blocks: {int((here != there).sum())} of its {here.numel()} elements "
                "differ when the last block is first"
            )
            if tensor.is_floating_point():
                a, b = here.double(), there.double()
                apart = (a - b).abs().masked_fill(a.isnan() & b.isnan(), 0)
                said += f", the most by {float(apart.max()):.2g}"
                largest = a[a.isfinite()].abs().max() if a.isfinite().any() else 0
                rounding = torch.finfo(tensor.dtype).eps * math.sqrt(many) * largest
                if bool((apart <= rounding).all()):
                    self.remarks[name] = f"the last bits of {name} depend on {said}"
                    continue
            place = self.place(storage, int(np.flatnonzero(wrong)[0]))
            raise Fault(f"{place} depends on {said}, which is no rounding")

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
