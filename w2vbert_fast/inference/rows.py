"""What comes of a recording, and the rows of what callers hand over."""

from __future__ import annotations

import io
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from w2vbert_fast.recordings.audio import Audio, Salvaged
from w2vbert_fast.recordings.rows import Row

_CONTENT = (bytes, bytearray, memoryview)


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
        salvaged: what is wrong with a file of which was taken what decodes; None: nothing.
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
    salvaged: Salvaged | None = None

    def fields(self) -> dict[str, Any]:
        """The columns that the task adds to a table."""
        return {}

    def salvage_fields(self) -> dict[str, Any]:
        """The columns of a recording of which was taken what decodes; of others none."""
        return {} if self.salvaged is None else self.salvaged.fields()

    @property
    def tensor(self) -> Tensor | None:
        """What formats hold as numbers, beside the columns or as one; None: nothing."""
        return None


def as_items(items: Any) -> Iterable[Any]:
    """What callers hand over as several recordings; one by itself is a list of one.

    Raises:
        TypeError: it is neither; or an array of which nobody can tell.
    """
    if _is_array(items) and _is_samples(items) and items.ndim != 1:
        raise TypeError(
            f"an array of shape {list(items.shape)} by itself may be one recording, [array], or "
            "several, list(array)"
        )
    if _is_recording(items):
        return [items]
    if isinstance(items, Mapping):
        raise TypeError(
            f"recordings must be iterable or one recording, got a mapping of {list(items)}; a pair "
            "(array, sampling rate) is a recording"
        )
    if not isinstance(items, Iterable):
        raise TypeError(f"recordings must be iterable or one recording, got {type(items).__name__}")
    return items


def _is_recording(item: Any) -> bool:
    if isinstance(item, (str, os.PathLike, Row, Audio, *_CONTENT)):
        return True
    if _is_array(item):
        return _is_samples(item)
    return hasattr(item, "read") or _is_pair(item)


def _is_pair(item: Any) -> bool:
    """Whether it is a pair of samples and their sampling rate."""
    pair = isinstance(item, tuple) and len(item) == 2 and _is_array(item[0])
    return pair and isinstance(item[1], numbers.Number)


def as_row(index: int, item: Any) -> Row:
    """A row of what callers name recordings with.

    Args:
        index: its place among the others.
        item: a row; a path; a file that is open for reading bytes, which is read at once; the
            content of one; samples at 16 kHz, `Audio` too; or a pair of samples and their sampling
            rate. Samples are arrays or tensors, `[num_samples]` or `[channels, num_samples]`.

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
    if isinstance(item, _CONTENT):
        return Row(index, bytes(item), name, name)
    if hasattr(item, "read"):
        return _row_of_file(index, item, name)
    rate = 16_000
    if isinstance(item, Audio):
        seen = len(item.samples) / max(item.seconds, 1e-9)
        if not math.isclose(seen, rate, rel_tol=0.02):
            raise TypeError(
                f"item {index} is Audio of about {seen:.0f} Hz; other than 16 kHz has to be a pair "
                "of samples and their sampling rate"
            )
        item = item.samples
    elif _is_pair(item):
        item, rate = item
        if isinstance(rate, bool) or int(rate) != rate:
            raise TypeError(f"item {index}: the sampling rate must be an integer, got {rate!r}")
        rate = int(rate)
    if not _is_array(item):
        raise TypeError(
            f"item {index} must be a path, an open binary file, bytes, an array or (array, "
            f"sampling rate), got {type(item).__name__}"
        )
    return Row(index, item, name, name, sampling_rate=rate)


def _row_of_file(index: int, file: Any, name: str) -> Row:
    """The row of an open file. It is read now: whoever opened it may close it after this."""
    if isinstance(file, io.TextIOBase):
        raise TypeError(f"item {index} is a file that is open for text; open it in mode 'rb'")
    stated = getattr(file, "name", None)
    if isinstance(stated, str | bytes) and stated:
        name = os.fsdecode(stated)
    try:
        content = file.read()
    except (OSError, ValueError) as error:
        return Row(index, None, name, name, problem=f"cannot be read: {error}")
    if not isinstance(content, bytes):
        got = type(content).__name__
        raise TypeError(f"item {index}: read() must return bytes, got {got}")
    return Row(index, content, name, name)


def _is_array(item: Any) -> bool:
    return isinstance(item, np.ndarray | Tensor)


def _is_samples(array: Any) -> bool:
    """Whether an array holds numbers, and not names of files."""
    return isinstance(array, Tensor) or array.dtype.kind in "fiu"
