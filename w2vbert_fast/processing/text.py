"""From the tokens of CTC frames to text, with the frames of each character and word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

Offset = dict[str, Any]
"""`char` or `word`, and `start_offset` and `end_offset` in frames, the end exclusive."""


@dataclass
class Wav2Vec2CTCTokenizerOutput(Mapping[str, Any]):
    """Decoded text with offsets: a mapping with attributes that can also be indexed by position.

    What is None is no entry.

    Attributes:
        text: The text; a list of texts for a batch.
        char_offsets: For each character `char`, `start_offset` and `end_offset`, in frames; a list
            of those for a batch. None unless asked for.
        word_offsets: For each word `word`, `start_offset` and `end_offset`, in frames; a list of
            those for a batch. None unless asked for.
    """

    text: str | list[str]
    char_offsets: Any = None
    word_offsets: Any = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries that are there."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        return self._entries()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    def _entries(self) -> dict[str, Any]:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}


def collapse(
    tokens: Sequence[str], frames: Sequence[int], *, group_tokens: bool, blank: str | None
) -> list[Offset]:
    """The characters of a path: repeats merged, then blanks dropped.

    Args:
        tokens: The token of each frame.
        frames: The number of each frame.
        group_tokens: Whether to merge repeats.
        blank: The CTC blank.

    Returns:
        An offset for each character; `end_offset` is the frame after its last one.
    """
    numbered = zip(tokens, frames, strict=True)
    if group_tokens:
        runs = [list(run) for _, run in groupby(numbered, key=lambda pair: pair[0])]
    else:
        runs = [[pair] for pair in numbered]
    return [
        {"char": run[0][0], "start_offset": run[0][1], "end_offset": run[-1][1] + 1}
        for run in runs
        if run[0][0] != blank
    ]


def word_offsets(char_offsets: Sequence[Offset], delimiter: str) -> list[Offset]:
    """The words of a sequence of characters.

    Args:
        char_offsets: Offsets of the characters.
        delimiter: The character between words.

    Returns:
        An offset for each word.
    """
    words: list[Offset] = []
    for is_delimiter, run in groupby(char_offsets, key=lambda offset: offset["char"] == delimiter):
        if not is_delimiter:
            characters = list(run)
            words.append(
                {
                    "word": "".join(offset["char"] for offset in characters),
                    "start_offset": characters[0]["start_offset"],
                    "end_offset": characters[-1]["end_offset"],
                }
            )
    return words


def clean_up_spaces(text: str) -> str:
    """Removes the space before punctuation and English contractions."""
    for mark in (".", "?", "!", ","):
        text = text.replace(f" {mark}", mark)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
