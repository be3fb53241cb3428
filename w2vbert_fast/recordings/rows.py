"""A row of the input: one recording, or a part of one, and what was said of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Row:
    """A recording that is to be processed.

    Attributes:
        index: its place in the input, from 0.
        audio: a path, the content of a file, or samples as `to_mono_16khz` takes them; None where
            `problem` says why there is none.
        name: what tables and messages call the recording.
        id: the manifest's `id`, or else the name.
        sampling_rate: of samples; files state theirs.
        offset: where the part begins, in seconds.
        duration: length of the part in seconds; None: to the end.
        columns: other columns of the manifest, carried through.
        problem: why the row cannot be used; None: it can.
        place: where it stands in its manifest, such as "line 7"; empty: in none.
    """

    index: int
    audio: Any
    name: str
    id: str
    sampling_rate: int | None = None
    offset: float = 0.0
    duration: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None
    place: str = ""


def how_many(count: int, what: str = "row") -> str:
    """A number of rows, or of something else, for a message: "1 row", "2,000 rows"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


Wanted = Callable[[int], bool]
Rows = Generator[Row, None, int]
"""Rows, and at the end the index after the last one, wanted or not."""


def everything(index: int) -> bool:
    """Every row is wanted."""
    return True


class Part(Protocol):
    """A part of the input.

    Attributes:
        kind: what it was taken for, such as "JSON lines".
        sealed: it holds its recordings, so that they are what they were as long as it is.
    """

    @property
    def kind(self) -> str: ...

    @property
    def sealed(self) -> bool: ...

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        """How many rows there are (None: nobody knows yet), and what tells this part from others.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        ...

    def rows(self, start: int, wanted: Wanted) -> Rows:
        """The rows whose index is wanted, the first of all being `start`."""
        ...
