"""`Transcriber`, `Embedder` and `Classifier`: any number of recordings in, results out, lazily."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from w2vbert_fast.inference.batching import Batcher, checked_budget
from w2vbert_fast.inference.reading import (
    LONGEST_SECONDS,
    Decoder,
    Loaded,
    ReadAhead,
    default_workers,
    overlaps,
    windows,
)
from w2vbert_fast.inference.rows import Result, as_items, as_row
from w2vbert_fast.inference.tasks.base import Task
from w2vbert_fast.inference.tasks.classify import Classification, Classify
from w2vbert_fast.inference.tasks.embed import Embed, Embedding
from w2vbert_fast.inference.tasks.transcribe import Transcribe, Transcription
from w2vbert_fast.recordings.rows import Row

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Flow:
    """How recordings are read and batched; none of it changes a result by more than rounding.

    Attributes:
        frame_budget: encoder frames of a batch, 50 a second; "auto": found by a probe of some 10
            seconds; None: 2,000 on a CPU, 32,000 on a GPU.
        workers: threads that decode; None: one for each CPU, at most 8.
        window_rows: recordings that are sorted by length and batched together.
        window_seconds: a window is full when it holds so much audio; as much again is read ahead.
        longest: recordings of more seconds are errors.
        overlap: decode while the model runs; None: unless it runs on a CPU and there are at most 8.
        processes: that compute, each on a part of PyTorch's threads, with one copy of the weights;
            1: this one. For models on a CPU.
    """

    frame_budget: int | str | None = None
    workers: int | None = None
    window_rows: int = 256
    window_seconds: float = Task.window_seconds
    longest: float = LONGEST_SECONDS
    overlap: bool | None = None
    processes: int = 1

    def __post_init__(self) -> None:
        checked_budget(self.frame_budget)
        for name in ("workers", "window_rows", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("window_seconds", "longest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class Runner(Generic[R]):
    """A task with everything that feeds it. Picklable: a copy loads the model again when needed.

    Args:
        task: what is done.
        flow: how recordings are read and batched.

    Attributes:
        waited: seconds that the model has waited for recordings, in all.
    """

    def __init__(self, task: Task, flow: Flow | None = None) -> None:
        self.task = task
        self.flow = flow or Flow()
        self.batcher = Batcher(task, self.flow.frame_budget, self.flow.processes)
        self.waited = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"task": self.task, "flow": self.flow}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Runner.__init__(self, state["task"], state["flow"])

    @property
    def decoder(self) -> Decoder:
        """What reads the audio of a row; the model must be loaded, or is."""
        task = self.task
        return Decoder(task.extractor.sampling_rate, self.flow.longest, task.selection)

    def __call__(self, items: Any, *, ordered: bool = True) -> Iterator[R]:
        """Process recordings, lazily; what is wrong with one becomes an error in its result.

        Args:
            items: paths, open binary files, file contents as bytes, samples at 16 kHz, pairs of
                samples and sampling rate, or `Row`s; or one of them. Taken up to two windows ahead,
                in another thread.
            ordered: results come in the order of the items; else as they finish, an item's place
                being its `index`.

        Yields:
            A result for every item.

        Raises:
            TypeError: an item is none of these.
            ImportError: a package of the ``audio`` extra is needed and not installed.
        """
        rows = (as_row(index, item) for index, item in enumerate(as_items(items)))
        for window in self.windows(rows):
            results = cast(Iterator[R], self.batcher.run(window))
            if ordered:
                yield from self.in_order(window, results)
            else:
                yield from results

    def windows(self, rows: Iterable[Row]) -> Iterator[list[Loaded]]:
        """Windows of recordings that have been read; closing the iterator ends the threads."""
        flow = self.flow
        ahead = ReadAhead(
            iter(rows),
            self.decoder,
            flow.workers or default_workers(),
            flow.window_rows,
            flow.window_seconds,
            overlap=self._overlap(),
        )
        try:
            found = windows(iter(ahead), flow.window_rows, flow.window_seconds)
            while True:
                start = time.perf_counter()
                ahead.wait(True)
                window = next(found, None)
                ahead.wait(False)
                self.waited += time.perf_counter() - start
                if window is None:
                    return
                yield window
        finally:
            ahead.close()

    def _overlap(self) -> bool:
        if self.flow.overlap is not None:
            return self.flow.overlap
        return overlaps(next(self.task.network.parameters()).device.type)

    def process(self, rows: Sequence[Row]) -> list[R]:
        """Results of some rows, in their order: for frameworks that hand out rows in batches."""
        return list(self(rows))

    @staticmethod
    def in_order(window: Sequence[Loaded], results: Iterable[R]) -> list[R]:
        """Results in the order of the window."""
        by_index = {result.index: result for result in results}
        return [by_index[loaded.row.index] for loaded in window]


class Transcriber(Runner[Transcription]):
    """Speech to text: `for result in Transcriber("demo")(paths): result.text`.

    Args:
        model: "demo", a folder or a hub id.
        flow: how recordings are read and batched.
        **options: of `Transcribe`: device, dtype, timestamps, max_seconds, beam, lm, ...

    Raises:
        TypeError: an option is unknown.
        ValueError: an option has an impossible value.
    """

    def __init__(self, model: Any = "demo", *, flow: Flow | None = None, **options: Any) -> None:
        super().__init__(Transcribe(model, **options), flow)


class Embedder(Runner[Embedding]):
    """Hidden states: `for result in Embedder(model, layer=17)(paths): result.embedding`.

    As `Transcriber`, with the options of `Embed`: layer, stats, pool, embedding_dtype, device, ...
    """

    def __init__(self, model: Any, *, flow: Flow | None = None, **options: Any) -> None:
        super().__init__(Embed(model, **options), flow)


class Classifier(Runner[Classification]):
    """Classes, or x-vectors, by the model's head: `for result in Classifier(model)(paths): ...`.

    As `Transcriber`, of a classification, frame or x-vector model, with the options of `Classify`:
    device, dtype, max_seconds, ...
    """

    def __init__(self, model: Any, *, flow: Flow | None = None, **options: Any) -> None:
        super().__init__(Classify(model, **options), flow)
