"""What comes out of offline inference, and the rows of what callers hand over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from w2vbert_fast.recordings.rows import Row

if TYPE_CHECKING:
    from w2vbert_fast.inference.timestamps import Word


@dataclass(frozen=True)
class Result:
    """What came of a row.

    Attributes:
        index: the row's place in the input.
        id: the row's id.
        audio: name of the recording.
        offset: where the part begins, in seconds.
        columns: the manifest's other columns.
        seconds: length of the audio; None when it could not be read.
        error_type: kind of the error, such as "AudioError" or "FileNotFoundError"; None: none.
        error: what is wrong; None: nothing.
        louder_channel: the channel that was taken, from 0, because in the mean of all of them what
            is said cancels; None: the mean.
    """

    index: int
    id: str
    audio: str
    offset: float = 0.0
    columns: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    error_type: str | None = None
    error: str | None = None
    louder_channel: int | None = None

    def fields(self) -> dict[str, Any]:
        """The columns that the task adds to a table."""
        return {}


@dataclass(frozen=True)
class Transcription(Result):
    """A recording's text.

    Attributes:
        text: what was said; None after an error.
        words: words with their characters, where timestamps were asked for.
        characters: whether tables have the characters too.
    """

    text: str | None = None
    words: tuple[Word, ...] | None = None
    characters: bool = True

    def fields(self) -> dict[str, Any]:
        if self.words is None:
            return {"text": self.text}
        return {"text": self.text, "words": [_word(word, self.characters) for word in self.words]}


@dataclass(frozen=True)
class Embedding(Result):
    """A recording's hidden state.

    Attributes:
        embedding: `[frames, hidden_size]`, or `[hidden_size]` where frames were pooled; float16 or
            float32 on the CPU. None after an error.
    """

    embedding: Tensor | None = None

    def fields(self) -> dict[str, Any]:
        return {} if self.embedding is None else {"shape": list(self.embedding.shape)}


@dataclass(frozen=True)
class Segment:
    """Successive frames of one class.

    Attributes:
        start: where it begins, in seconds from the recording's start.
        end: where it ends.
        label: the class.
        score: mean probability of the class over the frames.
    """

    start: float
    end: float
    label: str
    score: float


@dataclass(frozen=True)
class Classification(Result):
    """A recording's classes.

    Attributes:
        label: the likeliest class of a sequence classifier.
        scores: probability of every class of a sequence classifier.
        segments: stretches of one class, of a frame classifier.
        embedding: float32 `[xvector_output_dim]` on the CPU, of an x-vector model.
    """

    label: str | None = None
    scores: Mapping[str, float] | None = None
    segments: tuple[Segment, ...] | None = None
    embedding: Tensor | None = None

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.scores is not None:
            found = {"label": self.label, "scores": dict(self.scores)}
        if self.segments is not None:
            found["segments"] = [vars(segment).copy() for segment in self.segments]
        if self.embedding is not None:
            found["embedding"] = self.embedding.tolist()
        return found


def _word(word: Word, characters: bool) -> dict[str, Any]:
    """A word as tables hold it: times to a millisecond."""
    entry: dict[str, Any] = {
        "word": word.text,
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "confidence": round(word.confidence, 4),
    }
    if characters and word.characters:
        entry["characters"] = [
            {
                "character": character.text,
                "start": round(character.start, 3),
                "end": round(character.end, 3),
                "confidence": round(character.confidence, 4),
            }
            for character in word.characters
        ]
    return entry


def as_row(index: int, item: Any) -> Row:
    """A row of what callers name recordings with.

    Args:
        index: its place among the others.
        item: a row; a path; the content of a file as bytes; samples at 16 kHz; or a pair of samples
            and their sampling rate. Samples are arrays or tensors, `[num_samples]` or
            `[channels, num_samples]`.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(item, Row):
        return item
    if isinstance(item, str | os.PathLike):
        path = os.fspath(item)
        name = os.fsdecode(path)
        return Row(index, name, name, name)
    name = f"item {index}"
    if isinstance(item, bytes):
        return Row(index, item, name, name)
    rate = 16_000
    if isinstance(item, tuple) and len(item) == 2 and _is_array(item[0]):
        item, rate = item
        if isinstance(rate, bool) or int(rate) != rate:
            raise TypeError(f"item {index}: the sampling rate must be an integer, got {rate!r}")
        rate = int(rate)
    if not _is_array(item):
        raise TypeError(
            f"item {index} must be a path, bytes, an array or (array, sampling rate), "
            f"got {type(item).__name__}"
        )
    return Row(index, item, name, name, sampling_rate=rate)


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray | Tensor)
