"""Rows to waveforms, in threads that stay a bounded way ahead of the model."""

from __future__ import annotations

import atexit
import contextlib
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from w2vbert_fast.ops.fbank import FRAME_LENGTH, FRAME_SHIFT
from w2vbert_fast.recordings.audio import (
    EVERYTHING,
    Audio,
    AudioError,
    Salvaged,
    Selection,
    convert_array,
    load_channels,
)
from w2vbert_fast.recordings.rows import Row

_ANNOUNCED_BYTES = 16 << 20
_FEW_CPUS = 8
_GROUP_ROWS = 8
_FEEDER_PATIENCE = 5.0
"""Seconds that closing waits for the iterator of rows, which may be the caller's and block."""

LONGEST_SECONDS = 4 * 3600.0
"""Longest recording that is read unless another limit is set: 0.9 GB of samples."""


@dataclass(frozen=True)
class Loaded:
    """A row whose audio was read, or could not be.

    Attributes:
        row: the row.
        channels: of each channel that is computed by itself, float32 `[num_samples]` on the CPU;
            none after an error.
        seconds: length of the audio; None after an error.
        error_type: kind of the error; None: none.
        error: what is wrong; None: nothing.
        louder_channel: the channel that was taken because all of them cancel; None: their mean.
        salvaged: what is wrong with a file of which was taken what decodes; None: nothing.
    """

    row: Row
    channels: tuple[Tensor, ...] = ()
    seconds: float | None = None
    error_type: str | None = None
    error: str | None = None
    louder_channel: int | None = None
    salvaged: Salvaged | None = None


@dataclass(frozen=True)
class Decoder:
    """Reads the audio of rows. Whatever is wrong with a row becomes an error of this row.

    Attributes:
        sampling_rate: samples per second that the model reads.
        longest: recordings, or parts, of more seconds are errors.
        selection: what is taken of them.
    """

    sampling_rate: int = 16_000
    longest: float = LONGEST_SECONDS
    selection: Selection = EVERYTHING

    def __call__(self, row: Row) -> Loaded:
        """Read a row.

        Raises:
            ImportError: a package of the ``audio`` extra is needed and not installed.
        """
        if row.problem is not None:
            return Loaded(row, error_type="ManifestError", error=row.problem)
        try:
            audio = self._read(row)
        except ImportError:
            raise
        except AudioError as error:
            # What the operating system said tells more than that it is no audio.
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            return Loaded(row, error_type=type(cause).__name__, error=error.reason)
        except MemoryError:
            return Loaded(row, error_type="MemoryError", error="not enough memory to read it")
        except Exception as error:  # A row costs itself and never the job, whatever its bytes do.
            kind = type(error).__name__
            return Loaded(row, error_type=kind, error=str(error) or kind)
        first = audio[0]
        return Loaded(
            row,
            tuple(channel.samples for channel in audio),
            first.seconds,
            louder_channel=first.louder_channel,
            salvaged=first.salvaged,
        )

    def _read(self, row: Row) -> list[Audio]:
        if row.sampling_rate is None:
            return load_channels(
                row.audio,
                self.selection,
                sampling_rate=self.sampling_rate,
                offset=row.offset,
                duration=row.duration,
                longest=self.longest,
            )
        audio = convert_array(row.audio, row.sampling_rate, self.selection.channels)
        if audio[0].samples.numel() < FRAME_LENGTH + FRAME_SHIFT:
            raise AudioError(row.name, "too short: two analysis windows, 35 ms, are needed")
        return audio


def usable_cpus() -> int:
    """CPUs that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return count or 1


def default_workers() -> int:
    """Threads that decode: the CPUs that this process may use, at most 8."""
    return min(8, usable_cpus())


def overlaps(device_type: str) -> bool:
    """Whether decoding runs beside a model on a kind of device.

    On few CPUs it does not: a model's threads wait for each other at every operation, so one CPU
    that is taken away for a moment costs all of them that moment.
    """
    return device_type != "cpu" or usable_cpus() > _FEW_CPUS


@dataclass
class _Slot:
    """A row on its way through the threads that decode: its place, and what came of it."""

    row: Row
    number: int
    loaded: Loaded | None = None
    failure: BaseException | None = None


class ReadAhead:
    """Iterates over rows with their audio, in order, while threads decode what comes next.

    The rows ahead are bounded in number and, to within a recording a thread, in seconds of audio.
    Files ahead are announced to the operating system, which reads them meanwhile. What goes wrong
    with the iterator of rows is raised in the order in which it happened.

    Args:
        rows: taken in a thread of its own.
        decode: called in `workers` threads.
        workers: number of threads that decode.
        max_rows: rows ahead.
        max_seconds: seconds of audio ahead.
        overlap: decode at any time; False: only while somebody waits for a row, because all of the
            CPUs have other work in between.
    """

    def __init__(
        self,
        rows: Iterator[Row],
        decode: Decoder,
        workers: int,
        max_rows: int,
        max_seconds: float,
        *,
        overlap: bool = True,
    ) -> None:
        self._rows = rows
        self._decode = decode
        self._workers = workers
        self._max_rows = max_rows
        self._max_seconds = max_seconds
        self._overlap = overlap
        # Short recordings take less time than waking a thread does, so rows go from thread to
        # thread in groups; in none so large that the last one keeps the other threads waiting.
        self._group = max(1, min(_GROUP_ROWS, max_rows // (4 * workers)))
        self._waiting = False
        # One lock, and a condition for each thing that is waited for: nobody else wakes up.
        # It may be taken twice, where a thread of these collects garbage that closes them. It is
        # taken by itself: a condition's `__enter__`, interrupted when it has it, keeps it for good.
        lock = self._lock = threading.RLock()
        self._room = threading.Condition(lock)  # the feeder: for fewer rows ahead
        self._work = threading.Condition(lock)  # who decodes: for rows
        self._turn = threading.Condition(lock)  # who decodes: until it may
        self._done = threading.Condition(lock)  # who takes the rows: for the next one
        self._pending: deque[_Slot] = deque()  # not yet taken
        self._unclaimed: deque[_Slot] = deque()  # those of them that no thread has begun with
        self._taken = 0  # rows that were taken
        self._submitted = 0
        self._seconds = 0.0  # decoded and not yet taken
        self._ended = False  # there are no more rows
        self._closed = False
        self._failure: BaseException | None = None
        self._feeder = threading.Thread(target=self._feed, name="rows", daemon=True)
        self._decoders = [
            threading.Thread(target=self._decode_groups, name=f"decode-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in (*self._decoders, self._feeder):
            thread.start()
        # A thread that meets a tensor while the interpreter ends aborts the process, and one that
        # waits for rows would keep it from ending: where nobody closes them, its end does.
        atexit.register(self.close)

    def wait(self, waiting: bool) -> None:
        """Say whether somebody waits for rows now; without `overlap`, else nothing is decoded."""
        with self._lock:
            self._waiting = waiting
            self._turn.notify_all()

    def __iter__(self) -> Iterator[Loaded]:
        while True:
            with self._lock:
                while not (self._ready() or (self._ended and not self._pending)):
                    self._done.wait()
                if not self._pending:
                    if self._failure is not None:
                        raise self._failure
                    return
                slot = self._pending.popleft()
                self._taken += 1
                if slot.failure is not None:
                    raise slot.failure
                assert slot.loaded is not None
                self._seconds -= slot.loaded.seconds or 0.0
                self._turn.notify_all()
                if len(self._pending) <= self._max_rows - self._group:
                    self._room.notify()
            yield slot.loaded

    def close(self) -> None:
        """End the threads; what they are decoding is finished and thrown away.

        Where the iterator of rows blocks, its thread is left to it.
        """
        with self._lock:
            self._closed = True
            for condition in (self._room, self._work, self._turn):
                condition.notify_all()
        if threading.current_thread() in (*self._decoders, self._feeder):
            return  # nobody waits for itself
        for thread in self._decoders:
            thread.join()
        self._feeder.join(_FEEDER_PATIENCE)
        atexit.unregister(self.close)

    def _ready(self) -> bool:
        if not self._pending:
            return False
        return self._pending[0].loaded is not None or self._pending[0].failure is not None

    def _may_decode(self, number: int) -> bool:
        """Whether it is a row's turn. That of the next one always comes, or nobody would go on."""
        if not (self._overlap or self._waiting):
            return False
        return number == self._taken or self._seconds < self._max_seconds

    def _feed(self) -> None:
        try:
            for row in self._rows:
                announce(row)
                with self._lock:
                    while len(self._pending) >= self._max_rows and not self._closed:
                        self._room.wait()
                    if self._closed:
                        return
                    slot = _Slot(row, self._submitted)
                    self._submitted += 1
                    self._pending.append(slot)
                    self._unclaimed.append(slot)
                    self._work.notify()
        except BaseException as error:  # It belongs to the thread that takes the rows.
            self._failure = error
        finally:
            with self._lock:
                self._ended = True
                self._work.notify_all()
                self._done.notify_all()

    def _decode_groups(self) -> None:
        while True:
            with self._lock:
                while not (self._unclaimed or self._ended or self._closed):
                    self._work.wait()
                if self._closed or not self._unclaimed:
                    return
                share = -(-len(self._unclaimed) // self._workers)
                count = min(self._group, share)
                slots = [self._unclaimed.popleft() for _ in range(count)]
            self._decode_group(slots)

    def _decode_group(self, slots: Sequence[_Slot]) -> None:
        """Decode some rows, and hand them over together unless it has to wait in between."""
        finished: list[tuple[_Slot, Loaded | None, BaseException | None]] = []
        for slot in slots:
            with self._lock:
                if finished and not self._may_decode(slot.number):
                    self._hand_over(finished)
                while not self._closed and not self._may_decode(slot.number):
                    self._turn.wait()
                if self._closed:
                    return  # nobody will look at it
            loaded, failure = None, None
            try:
                loaded = self._decode(slot.row)
            except BaseException as error:  # It belongs to the thread that takes the rows.
                failure = error
            with self._lock:
                self._seconds += (loaded.seconds or 0.0) if loaded is not None else 0.0
            finished.append((slot, loaded, failure))
        with self._lock:
            self._hand_over(finished)

    def _hand_over(self, finished: list[tuple[_Slot, Loaded | None, BaseException | None]]) -> None:
        for slot, loaded, failure in finished:
            slot.loaded, slot.failure = loaded, failure
        finished.clear()
        if self._ready():
            self._done.notify()


def announce(row: Row) -> None:
    """Have the operating system read a row's file, if it can, before it is decoded."""
    if row.offset > 0 or not isinstance(row.audio, str) or not hasattr(os, "posix_fadvise"):
        return
    # Whatever is wrong with the file shows, and counts, when it is decoded.
    with contextlib.suppress(OSError, ValueError):
        # A pipe must not be opened twice.
        if not stat.S_ISREG(os.stat(row.audio).st_mode):
            return
        file = os.open(row.audio, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, _ANNOUNCED_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def windows(loaded: Iterator[Loaded], max_rows: int, max_seconds: float) -> Iterator[list[Loaded]]:
    """Successive rows, as many as are batched together.

    Where a window ends depends on the rows in it alone, so that a job that was stopped after a
    window makes the same ones, and the same batches, again.

    Args:
        loaded: rows in order.
        max_rows: rows of a window.
        max_seconds: a window ends with the row that reaches so many seconds of audio.
    """
    window: list[Loaded] = []
    seconds = 0.0
    for item in loaded:
        window.append(item)
        seconds += item.seconds or 0.0
        if len(window) >= max_rows or seconds >= max_seconds:
            yield window
            window, seconds = [], 0.0
    if window:
        yield window
