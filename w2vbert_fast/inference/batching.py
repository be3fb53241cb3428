"""Batches that fill a budget of frames, and what is done when one does not fit into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.pipeline import is_out_of_memory
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.rows import Result
from w2vbert_fast.inference.tasks.base import Piece, Task
from w2vbert_fast.inference.workers import ProcessEndedError, Workers
from w2vbert_fast.ops import tuned

logger = logging.getLogger(__name__)

USUAL_BUDGET = {"cpu": 2_000, "cuda": 32_000}
"""Frames of a batch where nothing else is said or was measured, by the kind of device."""

_PROBE_SECONDS = 10.0  # of audio in each of the probe's utterances
_SMALLEST_BUDGET = 1_000
_LARGEST_BUDGET = {"cpu": 16_000, "cuda": 256_000}
# A larger budget has to pay: it costs memory, and the end of a window waits for it.
_WORTH_DOUBLING = 1.05
_LONGEST_PROBE_SECONDS = 10.0


@dataclass
class _Recording:
    """A recording of a window on its way through the model: of each channel chunks and outputs."""

    loaded: Loaded
    chunks: list[list[Chunk]]
    outputs: list[list[Any]]
    missing: int
    failure: tuple[str, str] | None = None


@dataclass(frozen=True)
class _Unit:
    """A piece in a batch: the recording's place in the window, and the chunk's in a channel."""

    recording: int
    channel: int
    chunk: int
    piece: Piece


class Batcher:
    """Runs windows of recordings through a task's model.

    Args:
        task: the task.
        frame_budget: encoder frames of a batch, 50 a second; "auto": found by a probe at first use,
            of some 10 seconds; None: `usual_budget`. A single piece that is longer makes a batch of
            its own.
        processes: so many are forked to compute, each on a part of PyTorch's threads, of which this
            one then keeps one; 1: none. For models on a CPU.

    Attributes:
        frame_budget: as a number, once it is known; halved whenever a batch did not fit into
            memory.
        seconds: time spent in the model, in seconds.
        batches: how many batches were run.
        watch: called after each batch with the seconds of audio of the window that have gone
            through the model, and those of the whole window; None: nobody is.

    Raises:
        ValueError: the budget or the number of processes is not positive.
    """

    def __init__(
        self, task: Task, frame_budget: int | str | None = None, processes: int = 1
    ) -> None:
        checked_budget(frame_budget)
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        self.task = task
        self.processes = processes
        self._workers: Workers | None = None
        self._computing: dict[int, Sequence[_Unit]] = {}
        self.probes = frame_budget == "auto"
        self.frame_budget = frame_budget if isinstance(frame_budget, int) else None
        self.seconds = 0.0
        self.batches = 0
        self.watch: Callable[[float, float], None] | None = None

    def prepare(self) -> int:
        """Load the model and find the budget, where that has not been done; the budget.

        Raises:
            ValueError: there are to be several processes, and the model is not on a CPU.
        """
        if self.processes > 1 and self._workers is None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            self.task.load()
            self._workers = Workers(self.task, self.processes, max(1, threads // self.processes))
        self.task.load()
        if self.frame_budget is None:
            self.frame_budget = probe(self.task) if self.probes else usual_budget(self.task.network)
        return self.frame_budget

    def run(self, window: Sequence[Loaded]) -> Iterator[Result]:
        """Results of a window's rows, as they finish; every row has one.

        Raises:
            RuntimeError: the model failed for another reason than memory.
        """
        budget = self.prepare()
        recordings: list[_Recording | None] = []
        units: list[_Unit] = []
        for place, loaded in enumerate(window):
            if not loaded.channels:
                recordings.append(None)
                yield self.task.failed(loaded, loaded.error_type or "Error", loaded.error or "")
                continue
            cut = [self.task.chunks(samples) for samples in loaded.channels]
            outputs: list[list[Any]] = [[None] * len(chunks) for chunks in cut]
            recordings.append(_Recording(loaded, cut, outputs, sum(map(len, cut))))
            for channel, (samples, chunks) in enumerate(zip(loaded.channels, cut, strict=True)):
                for number, chunk in enumerate(chunks):
                    piece = Piece(samples[chunk.start : chunk.end], len(chunks) == 1)
                    units.append(_Unit(place, channel, number, piece))
        # The longest first: what does not fit into memory shows at once.
        units.sort(key=lambda unit: unit.piece.samples.numel(), reverse=True)
        batches = self._batches(units, budget)
        rate = self.task.extractor.sampling_rate if self.watch is not None else 1
        total = sum(unit.piece.samples.numel() for unit in units)
        finished = 0
        self._computing = {}
        while batches or self._computing:
            batch, outcome = self._next(batches)
            if isinstance(outcome, Exception) and len(batch) > 1:
                if is_out_of_memory(outcome):
                    self._halve(batch)
                    rest = [unit for later in reversed(batches) for unit in later]
                    batches = self._batches([*batch, *rest], self.prepare())
                else:
                    batches += [[unit] for unit in reversed(batch)]
                continue
            made = [None] if isinstance(outcome, Exception) else outcome
            finished += sum(unit.piece.samples.numel() for unit in batch)
            if self.watch is not None:
                self.watch(finished / rate, total / rate)
            for unit, output in zip(batch, made, strict=True):
                recording = recordings[unit.recording]
                assert recording is not None
                recording.outputs[unit.channel][unit.chunk] = output
                recording.missing -= 1
                if isinstance(outcome, Exception) and recording.failure is None:
                    recording.failure = _describe(outcome, recording.loaded)
                if recording.missing == 0:
                    recordings[unit.recording] = None
                    yield self._finish(recording)

    def _batches(self, units: Sequence[_Unit], budget: int) -> list[list[_Unit]]:
        """Batches in the order of the units, the first one last."""
        batches: list[list[_Unit]] = []
        room = -1
        for unit in units:
            frames = self._frames(unit)
            if frames > room:
                batches.append([])
                room = budget
            batches[-1].append(unit)
            room -= frames
        return batches[::-1]

    def _frames(self, unit: _Unit) -> int:
        return unit.piece.samples.numel() // self.task.samples_per_frame + 1

    def _next(self, batches: list[list[_Unit]]) -> tuple[Sequence[_Unit], list[Any] | Exception]:
        """A batch, the last one where nobody else computes, and what the model makes of it; the
        error of one that has to be run in parts."""
        start = time.perf_counter()
        outcome: list[Any] | Exception
        if self._workers is None:
            batch: Sequence[_Unit] = batches.pop()
            try:
                outcome = self.task.run([unit.piece for unit in batch])
            except (MemoryError, RuntimeError, ValueError) as error:
                # The traceback holds the batch's tensors.
                outcome = error.with_traceback(None)
        else:
            while batches and self._workers.free:
                batch = batches.pop()
                number = self._workers.submit([unit.piece for unit in batch])
                self._computing[number] = batch
            number, outcome = self._workers.result()
            while number not in self._computing:  # of a window that was given up
                number, outcome = self._workers.result()
            batch = self._computing.pop(number)
        if isinstance(outcome, Exception):
            of_batch = isinstance(outcome, ValueError | ProcessEndedError)
            if not (of_batch or is_out_of_memory(outcome)):
                raise outcome
            return batch, outcome
        self.batches += 1
        self.seconds += time.perf_counter() - start
        return batch, outcome

    def _halve(self, batch: Sequence[_Unit]) -> None:
        assert self.frame_budget is not None
        frames = sum(map(self._frames, batch))
        self.frame_budget = min(self.frame_budget, frames // 2)
        logger.warning(
            "out of memory with %d frames; batches have up to %d from now on",
            frames,
            self.frame_budget,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _finish(self, recording: _Recording) -> Result:
        loaded = recording.loaded
        if recording.failure is not None:
            return self.task.failed(loaded, *recording.failure)
        try:
            channels = zip(recording.chunks, recording.outputs, strict=True)
            results = [self.task.finish(loaded, chunks, outputs) for chunks, outputs in channels]
            return self.task.join(results)
        except ValueError as error:
            return self.task.failed(loaded, "ValueError", str(error))


def checked_budget(frame_budget: int | str | None) -> None:
    """Raise ValueError for a frame budget that is none."""
    if frame_budget is None or frame_budget == "auto":
        return
    if isinstance(frame_budget, str | bool) or frame_budget < 1:
        raise ValueError(f"frame_budget must be at least 1, 'auto' or None, got {frame_budget!r}")


def _describe(error: Exception, loaded: Loaded) -> tuple[str, str]:
    if is_out_of_memory(error):
        return "OutOfMemoryError", f"not enough memory for {loaded.seconds:.0f} seconds of audio"
    return type(error).__name__, str(error)


def usual_budget(network: Any) -> int:
    """Frames of a batch where nobody says: what was measured on this GPU, or `USUAL_BUDGET`."""
    parameter = next(network.parameters())
    usual = USUAL_BUDGET.get(parameter.device.type, USUAL_BUDGET["cuda"])
    if parameter.device.type != "cuda":
        return usual
    case = tuned.model_case(tuned.FRAME_BUDGET, network.config, parameter.dtype)
    return tuned.number(parameter.device, case) or usual


def probe(task: Task) -> int:
    """Find a frame budget: doubled while that is faster and fits into memory.

    Runs noise through the model, for some 10 seconds at most.
    """
    device = next(task.network.parameters()).device
    largest = _LARGEST_BUDGET.get(device.type, _LARGEST_BUDGET["cuda"])
    count = round(_PROBE_SECONDS * task.extractor.sampling_rate)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, generator=generator, device="cpu") * 0.1
    frames = count // task.samples_per_frame
    start = time.perf_counter()

    def seconds_a_frame(budget: int) -> float:
        pieces = [Piece(noise)] * max(1, budget // frames)
        # The first run warms up: allocations, kernels that are made when they are needed.
        return min(_timed(task, pieces) for _ in range(2)) / (len(pieces) * frames)

    best = doubled(
        seconds_a_frame, largest, lambda: time.perf_counter() - start >= _LONGEST_PROBE_SECONDS
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return best


def doubled(
    seconds_a_frame: Callable[[int], float], largest: int, is_over: Callable[[], bool]
) -> int:
    """The frame budget that is reached by doubling while that pays and fits into memory.

    Args:
        seconds_a_frame: runs a batch of so many frames.
        largest: budget.
        is_over: whether time is up.
    """
    best, best_rate = _SMALLEST_BUDGET, 0.0
    budget = _SMALLEST_BUDGET
    while budget <= largest and not is_over():
        try:
            rate = 1 / seconds_a_frame(budget)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if rate < _WORTH_DOUBLING * best_rate:
            break
        best, best_rate = budget, rate
        budget *= 2
    return best


def _timed(task: Task, pieces: Sequence[Piece]) -> float:
    start = time.perf_counter()
    task.run(pieces)  # The results are on the CPU: the device has finished.
    return time.perf_counter() - start
