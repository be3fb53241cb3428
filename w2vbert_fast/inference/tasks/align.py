"""Aligning: recordings and their transcripts to times, and to where they differ."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from w2vbert_fast._extras import require
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.tasks.base import identity
from w2vbert_fast.inference.tasks.transcribe import Transcribe, Transcription
from w2vbert_fast.recordings.manifest import transcript
from w2vbert_fast.recordings.rows import Row


@dataclass
class Align(Transcribe):
    """Times for known transcripts, which rows have in a column: `text`, `sentence`, ...

    Attributes:
        timestamps: "word" or "character".
    """

    timestamps: str = "word"

    name = "align"
    column_names: ClassVar[tuple[str, ...]] = ("text", "channels", "words", "unwritten", "unsaid")
    splits = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestamps == "none":
            raise ValueError("timestamps must be word or character, got 'none'")
        if self.beam > 0:
            raise ValueError(f"beam must be 0, since the text is known, got {self.beam}")

    def depends_on(self, row: Row) -> str:
        with contextlib.suppress(ValueError):
            return transcript(row.columns)
        return ""

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Transcription:
        from w2vbert_fast.inference.ctc.known_text import align_text
        from w2vbert_fast.inference.ctc.timestamps import frame_seconds

        text = transcript(loaded.row.columns).strip()
        found = align_text(
            self.merged(chunks, outputs),
            text,
            self.pipeline.processor.tokenizer,
            frame_seconds(self.network.config),
            loaded.row.offset,
            delay=self.delay,
        )
        return Transcription(
            **identity(loaded),
            text=text,
            words=found.words,
            characters=self.timestamps == "character",
            unwritten=found.unwritten,
            unsaid=found.unsaid,
        )

    def columns(self) -> list[tuple[str, Any]]:
        arrow = require("pyarrow", "offline")
        times = [("start", arrow.float64()), ("end", arrow.float64())]
        stretch = arrow.struct([*times, ("text", arrow.string())])
        more = [("unwritten", arrow.list_(stretch)), ("unsaid", arrow.list_(arrow.int64()))]
        return [*super().columns(), *more]
