"""What the tests of offline inference share: recordings, a task without a model, and jobs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import soundfile
import torch

from tests.helpers.signals import speech_like
from w2vbert_fast.inference import Flow, Transcription
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.jobs.job import Job, JobOptions, Summary
from w2vbert_fast.inference.jobs.results import read_results
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.inference.tasks.base import Piece, Task, identity
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.recordings.inputs import open_inputs


@dataclass
class Stub(Task):
    """Says how many samples a recording has; nothing is loaded."""

    limit: int | None = None  # samples of a batch that fit into its memory

    name = "stub"
    result = Transcription

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batches: list[int] = []

    def load(self) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        return {"stub": "1"}

    @property
    def extractor(self) -> SeamlessM4TFeatureExtractor:
        return SeamlessM4TFeatureExtractor()

    @property
    def network(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def run(self, pieces: Sequence[Piece]) -> list[Any]:
        total = sum(piece.samples.numel() for piece in pieces)
        if self.limit is not None and total > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(pieces))
        if any(piece.samples[0] == 0.75 for piece in pieces):
            raise ValueError("utterance 0 begins with 0.75")
        return [piece.samples.numel() for piece in pieces]

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Transcription:
        return Transcription(**identity(loaded), text=" ".join(map(str, outputs)))

    def columns(self) -> list[tuple[str, Any]]:
        return [("text", pyarrow.string())]

    def options(self) -> dict[str, Any]:
        return self.common_options()


def clips(folder: Path, count: int, seconds: float = 0.2) -> list[str]:
    """Short recordings, no two of one length."""
    folder.mkdir(parents=True, exist_ok=True)
    signal = speech_like(seconds + count * 0.001, 16_000)
    paths = []
    for index in range(count):
        path = folder / f"{index:04d}.wav"
        soundfile.write(path, signal[: round((seconds + index * 0.001) * 16_000)], 16_000)
        paths.append(str(path))
    return paths


def encoded(container: str, seconds: float = 0.3, **options: Any) -> bytes:
    """A recording as a file's content."""
    file = io.BytesIO()
    soundfile.write(file, speech_like(seconds, 16_000), 16_000, format=container, **options)
    return file.getvalue()


def write_manifest(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """A JSONL manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def job(
    names: Sequence[str],
    out: Path,
    task: Task | None = None,
    formats: Sequence[str] = (),
    flow: Flow | None = None,
    stream: Any = None,
    how: Mapping[str, Any] | None = None,
    **options: Any,
) -> Job:
    """A job, with a stub unless told otherwise, in small windows and shards."""
    runner: Runner[Any] = Runner(
        task or Stub(), flow or Flow(frame_budget=400, workers=2, window_rows=5)
    )
    values = {"shard_rows": 5, "shard_seconds": math.inf, **options}
    return Job(
        runner,
        open_inputs(names),
        out,
        formats,
        JobOptions(**values),
        stream or io.StringIO(),
        **(how or {}),
    )


def run(names: Sequence[str], out: Path, *arguments: Any, **options: Any) -> Summary:
    """Run such a job."""
    return job(names, out, *arguments, **options).run()


def table(out: Path) -> list[dict[str, Any]]:
    """A job's rows by their index; there must be one for each."""
    rows = sorted(read_results(out), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return rows
