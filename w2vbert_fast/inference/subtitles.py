"""Words with times to subtitles: SubRip (.srt), WebVTT (.vtt) and plain text.

A cue is what is on the screen at once. Cues are made as subtitlers make them (BBC, Netflix and
EBU guidelines agree on the numbers): at most two lines of 42 characters, at most 7 seconds, ended
at pauses and after sentences. A cue that would be shorter than a second stays on the screen longer
if the next one allows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from w2vbert_fast.inference.timestamps import Word

_SENTENCE_ENDS = (".", "?", "!", "…", "。", "？", "！")  # noqa: RUF001 - full-width marks
_MILLISECONDS = 1000


@dataclass(frozen=True)
class Layout:
    """The limits of a cue.

    Attributes:
        line_length: characters in a line.
        max_lines: lines in a cue.
        max_seconds: longest time on the screen.
        min_seconds: a shorter cue stays on the screen up to this long, or until the next one.
        pause_seconds: a silence this long between two words ends a cue.
    """

    line_length: int = 42
    max_lines: int = 2
    max_seconds: float = 7.0
    min_seconds: float = 1.0
    pause_seconds: float = 0.6

    def __post_init__(self) -> None:
        for name in ("line_length", "max_lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("max_seconds", "pause_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"min_seconds must be from 0 to max_seconds ({self.max_seconds}), "
                f"got {self.min_seconds}"
            )


@dataclass(frozen=True)
class Cue:
    """What is on the screen at once.

    Attributes:
        start: when it appears, in seconds.
        end: when it disappears, in seconds.
        lines: its lines.
    """

    start: float
    end: float
    lines: list[str]


DEFAULT_LAYOUT = Layout()


def cues(words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT) -> list[Cue]:
    """Put words into cues.

    Args:
        words: in order of time, from `word_timestamps`. A word longer than a line or than
            `max_seconds` is cut between characters, as text without spaces needs it.
        layout: the limits.

    Returns:
        The cues in order; they do not overlap.

    Raises:
        ValueError: a word begins before the one before it, ends before it begins, or has a time
            that is negative or not finite.
    """
    pieces = [piece for word in _checked(words) for piece in _pieces(word, layout)]
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups and _goes_on(groups[-1], piece, layout):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    made = []
    for i, group in enumerate(groups):
        start, end = group[0].start, min(group[-1].end, group[0].start + layout.max_seconds)
        following = groups[i + 1][0].start if i + 1 < len(groups) else math.inf
        end = min(max(end, start + layout.min_seconds), max(following, start))
        made.append(Cue(start, end, _lines(group, layout)))
    return made


def srt(words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT) -> str:
    """SubRip: numbered cues with times as ``00:01:02,345``.

    Args:
        words: as in `cues`.
        layout: the limits of a cue.

    Returns:
        The content of a file, to be written as UTF-8; empty without words.

    Raises:
        ValueError: as `cues`.
    """
    blocks = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n" + "\n".join(lines) + "\n"
        for number, (start, end, lines) in enumerate(_in_milliseconds(cues(words, layout)), 1)
    ]
    return "\n".join(blocks)


def vtt(words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT) -> str:
    """WebVTT: cues with times as ``00:01:02.345`` behind the header.

    Args:
        words: as in `cues`.
        layout: the limits of a cue.

    Returns:
        The content of a file, to be written as UTF-8.

    Raises:
        ValueError: as `cues`.
    """
    blocks = ["WEBVTT\n"]
    for start, end, lines in _in_milliseconds(cues(words, layout)):
        # The three characters that begin markup.
        text = "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text}\n")
    return "\n".join(blocks)


def txt(words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT) -> str:
    """Plain text without times: a line a cue.

    Args:
        words: as in `cues`.
        layout: the limits of a cue.

    Returns:
        The content of a file, to be written as UTF-8; empty without words.

    Raises:
        ValueError: as `cues`.
    """
    return "".join(" ".join(cue.lines) + "\n" for cue in cues(words, layout))


@dataclass(frozen=True)
class _Piece:
    """A word or a part of one that fits into a line.

    Attributes:
        text: what is shown.
        start: in seconds.
        end: in seconds.
        glued: whether it goes on the word of the piece before, without a space.
    """

    text: str
    start: float
    end: float
    glued: bool


def _checked(words: Iterable[Word]) -> list[Word]:
    checked = list(words)
    last = 0.0
    for i, word in enumerate(checked):
        if not last <= word.start <= word.end < math.inf:
            raise ValueError(
                f"words[{i}] {word.text!r} is from {word.start} to {word.end} s; words must be in "
                "order of time, with finite times that are not negative"
            )
        last = word.start
    return checked


def _pieces(word: Word, layout: Layout) -> list[_Piece]:
    seconds = word.end - word.start
    if len(word.text) <= layout.line_length and seconds <= layout.max_seconds:
        return [_Piece(word.text, word.start, word.end, False)]
    pieces: list[_Piece] = []
    for character in word.characters:
        last = pieces[-1] if pieces else None
        if (
            last is not None
            and len(last.text) + len(character.text) <= layout.line_length
            and character.end - last.start <= layout.max_seconds
        ):
            text = last.text + character.text
            pieces[-1] = dataclasses.replace(last, text=text, end=character.end)
        else:
            pieces.append(_Piece(character.text, character.start, character.end, bool(pieces)))
    return pieces or [_Piece(word.text, word.start, word.end, False)]


def _goes_on(group: Sequence[_Piece], piece: _Piece, layout: Layout) -> bool:
    """Whether a piece belongs to the cue of those before it."""
    if piece.end - group[0].start > layout.max_seconds:
        return False
    if piece.start - group[-1].end >= layout.pause_seconds and not piece.glued:
        return False
    if group[-1].text.endswith(_SENTENCE_ENDS) and not piece.glued:
        return False
    return len(_filled([*group, piece], layout.line_length)) <= layout.max_lines


def _filled(pieces: Sequence[_Piece], width: int) -> list[str]:
    """Lines of at most `width` characters, each as full as can be."""
    lines: list[str] = []
    for piece in pieces:
        joint = "" if piece.glued else " "
        if lines and len(lines[-1]) + len(joint) + len(piece.text) <= width:
            lines[-1] += joint + piece.text
        else:
            lines.append(piece.text)
    return lines


def _lines(pieces: Sequence[_Piece], layout: Layout) -> list[str]:
    """The fewest lines, of nearly equal length: the narrowest width that needs no more."""
    count = len(_filled(pieces, layout.line_length))
    width = min(
        w
        for w in range(1, layout.line_length + 1)
        if w == layout.line_length or len(_filled(pieces, w)) == count
    )
    return _filled(pieces, width)


def _in_milliseconds(made: Iterable[Cue]) -> list[tuple[int, int, list[str]]]:
    """Start, end and lines; rounding keeps the order and shows every cue for a millisecond."""
    rows = []
    last = 0
    for cue in made:
        start = max(round(cue.start * _MILLISECONDS), last)
        last = max(round(cue.end * _MILLISECONDS), start + 1)
        rows.append((start, last, cue.lines))
    return rows


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, _MILLISECONDS)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{rest:03d}"
