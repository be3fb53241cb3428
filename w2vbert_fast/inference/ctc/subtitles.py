"""Words with times to subtitles: SubRip (.srt), WebVTT (.vtt) and plain text.

A cue is what is on the screen at once. Cues are made as subtitlers make them (BBC, Netflix and
EBU guidelines agree on the numbers): at most two lines of 42 columns, at most 7 seconds, ended at
pauses and after sentences. A cue that would be shorter than a second, or too short to be read,
stays on the screen longer if the next one allows.

What is a word between spaces may be a whole recording where a script has none between its words:
there cues and lines end between characters too, by the same rules (`_scripts`).

Channels that were transcribed each by itself have cues of their own, which may overlap, and show
who speaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from w2vbert_fast.inference.ctc.timestamps import Character, Word
from w2vbert_fast.inference.ctc.turns import label
from w2vbert_fast.processing.scripts import columns, ends_sentence, graphemes, may_break

_MILLISECONDS = 1000


@dataclass(frozen=True)
class Layout:
    """The limits of a cue.

    Attributes:
        line_length: columns of a line: a Chinese, Japanese or Korean character takes two, a
            combining mark none.
        max_lines: lines in a cue.
        max_seconds: longest time on the screen.
        min_seconds: a shorter cue stays on the screen up to this long, or until the next one.
        pause_seconds: a silence this long between two words ends a cue.
        max_words: words in a cue, where a script has no spaces its characters; None: any number.
        reading_speed: columns a second that are read at most: a cue stays on the screen until it
            can have been read, but no longer than `max_seconds` or until the next one; None: as
            long as it is spoken.
        highlight_words: WebVTT underlines each word while it is spoken.
    """

    line_length: int = 42
    max_lines: int = 2
    max_seconds: float = 7.0
    min_seconds: float = 1.0
    pause_seconds: float = 0.6
    max_words: int | None = None
    reading_speed: float | None = None
    highlight_words: bool = False

    def __post_init__(self) -> None:
        for name in ("line_length", "max_lines", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("max_seconds", "pause_seconds", "reading_speed"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
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
        channel: the channel of its words, as they have it.
    """

    start: float
    end: float
    lines: list[str]
    channel: int | str | None = None


DEFAULT_LAYOUT = Layout()


def cues(
    words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT, *, labels: bool = True
) -> list[Cue]:
    """Put words into cues.

    Args:
        words: in order of time, from `word_timestamps`. Where a script has no spaces, cues and
            lines may end between its characters; so they may in any other word that is longer than
            a line or than `max_seconds`. Times inside of a word are those of its characters, or
            evenly spread if they do not spell it.
        layout: the limits.
        labels: begin each cue with the name of its channel, if it has one.

    Returns:
        The cues in order of time; those of a channel do not overlap.

    Raises:
        ValueError: a word begins before the one before it, ends before it begins, or has a time
            that is negative or not finite.
    """
    return [
        Cue(shown.start, shown.end, [_joined(line) for line in shown.lines], shown.channel)
        for shown in _on_screen(words, layout, labels=labels)
    ]


def _on_screen(words: Iterable[Word], layout: Layout, *, labels: bool) -> list[_Shown]:
    """Cues in order of time, their lines in pieces."""
    made: list[_Shown] = []
    for channel, own in _by_channel(words).items():
        following = math.inf
        of_channel: list[_Shown] = []
        for group in reversed(_groups(own, layout, channel if labels else None)):
            # A word that lasts into the next one, and is cut, may have a part behind its beginning.
            start = min(group[0].start, following)
            readable = 0.0
            if layout.reading_speed is not None:
                readable = columns(_joined(group)) / layout.reading_speed
            end = min(max(group[-1].end, start + readable), start + layout.max_seconds)
            end = max(start, min(max(end, start + layout.min_seconds), following))
            of_channel.append(_Shown(start, end, _lines(group, layout), channel))
            following = start
        made += reversed(of_channel)
    return sorted(made, key=lambda cue: cue.start)


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
    shown = _in_milliseconds(_on_screen(words, layout, labels=True))
    blocks = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n"
        + "".join(f"{_joined(line)}\n" for line in cue.lines)
        for number, (start, end, cue) in enumerate(shown, 1)
    ]
    return "\n".join(blocks)


def vtt(words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT) -> str:
    """WebVTT: cues with times as ``00:01:02.345`` behind the header, and voices of channels.

    With `layout.highlight_words` a cue is there once for each of its words, which is underlined,
    and once more for each time between them: players need know nothing of styles.

    Arguments, result and errors as of `srt`.
    """
    blocks = ["WEBVTT\n"]
    for start, end, cue in _in_milliseconds(_on_screen(words, layout, labels=False)):
        voice = "" if cue.channel is None else f"<v {_escaped(label(cue.channel))}>"
        spoken = _spoken(cue, start, end) if layout.highlight_words else [(start, end, None)]
        for first, last, word in spoken:
            text = "\n".join(
                _joined([_marked(piece, piece is word) for piece in line]) for line in cue.lines
            )
            blocks.append(f"{_clock(first, '.')} --> {_clock(last, '.')}\n{voice}{text}\n")
    return "\n".join(blocks)


def _spoken(cue: _Shown, start: int, end: int) -> list[tuple[int, int, _Piece | None]]:
    """The time of a cue, in milliseconds, divided by which of its pieces is spoken, if any is."""
    found: list[tuple[int, int, _Piece | None]] = []
    now = start
    for piece in (piece for line in cue.lines for piece in line):
        first = min(max(round(piece.start * _MILLISECONDS), now), end)
        last = min(round(piece.end * _MILLISECONDS), end)
        if first > now:
            found.append((now, first, None))
        if last > first:
            found.append((first, last, piece))
        now = max(first, last)
    if end > now:
        found.append((now, end, None))
    return found


def _marked(piece: _Piece, underlined: bool) -> _Piece:
    text = _escaped(piece.text)
    return replace(piece, text=f"<u>{text}</u>" if underlined else text)


def _escaped(text: str) -> str:
    """Text without the three characters that begin markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def txt(words: Iterable[Word], layout: Layout = DEFAULT_LAYOUT) -> str:
    """Plain text without times, a line a cue; arguments, result and errors as of `srt`."""
    groups = [
        group
        for channel, own in _by_channel(words).items()
        for group in _groups(own, layout, channel)
    ]
    return "".join(_joined(group) + "\n" for group in sorted(groups, key=lambda g: g[0].start))


@dataclass(frozen=True)
class _Piece:
    """What is not divided: a word, a character of a script without spaces, a part of a long word.

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

    def __add__(self, following: _Piece) -> _Piece:
        return _Piece(self.text + following.text, self.start, following.end, self.glued)


@dataclass(frozen=True)
class _Shown:
    """A cue whose lines are still in pieces; else as `Cue`."""

    start: float
    end: float
    lines: list[list[_Piece]]
    channel: int | str | None


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


def _by_channel(words: Iterable[Word]) -> dict[int | str | None, list[Word]]:
    found: dict[int | str | None, list[Word]] = {}
    for word in words:
        found.setdefault(word.channel, []).append(word)
    return found


def _groups(words: Iterable[Word], layout: Layout, channel: int | str | None) -> list[list[_Piece]]:
    """What each cue of a channel holds, its name first."""
    groups: list[list[_Piece]] = []
    name = None if channel is None else f"{label(channel)}:"
    # What stands beside the name, where there is no other line for it.
    room = layout.line_length - (columns(name) + 1 if name and layout.max_lines == 1 else 0)
    of_piece = replace(layout, line_length=room) if room > 1 else layout
    for word in _checked(words):
        for piece in _pieces(word, of_piece):
            if groups and _goes_on(groups[-1], piece, layout, named=name is not None):
                groups[-1].append(piece)
            elif name is None:
                groups.append([piece])
            else:
                spoken = replace(piece, glued=False)
                groups.append([_Piece(name, piece.start, piece.start, False), spoken])
    return groups


def _pieces(word: Word, layout: Layout) -> list[_Piece]:
    """A word's pieces, none of them longer than a line or than `max_seconds` if it can be cut."""
    pieces: list[list[_Piece]] = []
    for character in _characters(word):
        if pieces and not may_break(pieces[-1][-1].text, character.text):
            pieces[-1].append(character)
        else:
            pieces.append([character])
    return [part for piece in pieces for part in _cut(piece, layout)]


def _characters(word: Word) -> list[_Piece]:
    """The graphemes of a word with their times."""
    tokens = word.characters
    if "".join(token.text for token in tokens) != word.text:
        tokens = [Character(word.text, word.start, word.end, word.confidence)]
    spans: list[tuple[float, float]] = []
    for token in tokens:
        step = (token.end - token.start) / max(1, len(token.text))
        inner = [token.start + i * step for i in range(1, len(token.text))]
        spans += zip([token.start, *inner], [*inner, token.end], strict=True)
    found: list[_Piece] = []
    place = 0
    for grapheme in graphemes(word.text):
        first, place = place, place + len(grapheme)
        found.append(_Piece(grapheme, spans[first][0], spans[place - 1][1], first > 0))
    return found


def _cut(characters: Sequence[_Piece], layout: Layout) -> list[_Piece]:
    """What is longer than a line or than `max_seconds` in parts, cut at pauses where it has any."""
    whole = characters[0]
    for character in characters[1:]:
        whole += character
    if _fits(whole, layout):
        return [whole]
    parts = [characters[0]]
    for character in characters[1:]:
        pause = character.start - parts[-1].end >= layout.pause_seconds
        if not pause and _fits(parts[-1] + character, layout):
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def _fits(piece: _Piece, layout: Layout) -> bool:
    """Whether a piece can be a line of a cue."""
    if piece.end - piece.start > layout.max_seconds:
        return False
    return columns(piece.text) <= layout.line_length


def _goes_on(group: Sequence[_Piece], piece: _Piece, layout: Layout, *, named: bool) -> bool:
    """Whether a piece belongs to the cue of those before it, the first of which may be a name."""
    if layout.max_words is not None and len(group) - named >= layout.max_words:
        return False
    if piece.end - group[0].start > layout.max_seconds:
        return False
    if piece.start - group[-1].end >= layout.pause_seconds:
        return False
    if ends_sentence(group[-1].text):
        return False
    return len(_filled([*group, piece], layout.line_length)) <= layout.max_lines


def _joined(pieces: Sequence[_Piece]) -> str:
    """Pieces as one line."""
    return "".join(("" if i == 0 or p.glued else " ") + p.text for i, p in enumerate(pieces))


def _filled(pieces: Sequence[_Piece], width: int) -> list[list[_Piece]]:
    """Lines of at most `width` columns, each as full as can be."""
    lines: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        wanted = columns(piece.text) + (not piece.glued)
        if lines and wanted <= room:
            lines[-1].append(piece)
            room -= wanted
        else:
            lines.append([piece])
            room = width - columns(piece.text)
    return lines


def _lines(pieces: Sequence[_Piece], layout: Layout) -> list[list[_Piece]]:
    """The fewest lines, of nearly equal length: the narrowest width that needs no more."""
    count = len(_filled(pieces, layout.line_length))
    width = min(
        w
        for w in range(1, layout.line_length + 1)
        if w == layout.line_length or len(_filled(pieces, w)) == count
    )
    return _filled(pieces, width)


def _in_milliseconds(made: Iterable[_Shown]) -> list[tuple[int, int, _Shown]]:
    """Starts and ends of cues; rounding keeps the order and shows each for a millisecond."""
    rows = []
    last: dict[int | str | None, int] = {}
    for cue in made:
        start = max(round(cue.start * _MILLISECONDS), last.get(cue.channel, 0))
        end = last[cue.channel] = max(round(cue.end * _MILLISECONDS), start + 1)
        rows.append((start, end, cue))
    return rows


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, _MILLISECONDS)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{rest:03d}"
