"""Words with times as phoneticians and scoring programs read them: Praat TextGrid, NIST CTM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from w2vbert_fast.inference.ctc.timestamps import Character, Word
from w2vbert_fast.inference.ctc.turns import label


def textgrid(words: Iterable[Word], seconds: float, characters: bool = False) -> str:
    """A TextGrid of Praat (its manual, "TextGrid file formats", the long text format).

    Args:
        words: in order of time; each channel is a tier.
        seconds: length of the recording.
        characters: whether characters have tiers, too.

    Returns:
        The content of a file, to be written as UTF-8. What has no length is left out, and of words
        that overlap the later one begins later: intervals of a tier follow each other.
    """
    by_channel: dict[int | str | None, list[Word]] = {}
    for word in words:
        by_channel.setdefault(word.channel, []).append(word)
    tiers: list[tuple[str, Sequence[Word | Character]]] = []
    for channel, own in (by_channel or {None: []}).items():
        name = "" if channel is None else f" {label(channel)}"
        tiers.append((f"words{name}", own))
        if characters:
            tiers.append((f"characters{name}", [c for word in own for c in word.characters]))
    end = max([seconds, *(word.end for own in by_channel.values() for word in own)])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', ""]
    lines += ["xmin = 0", f"xmax = {end:.6f}", "tiers? <exists>", f"size = {len(tiers)}"]
    lines.append("item []:")
    for number, (name, entries) in enumerate(tiers, 1):
        intervals = _intervals(entries, end)
        lines += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f"        name = {_quoted(name)}",
            "        xmin = 0",
            f"        xmax = {end:.6f}",
            f"        intervals: size = {len(intervals)}",
        ]
        for place, (start, stop, text) in enumerate(intervals, 1):
            lines += [
                f"        intervals [{place}]:",
                f"            xmin = {start:.6f}",
                f"            xmax = {stop:.6f}",
                f"            text = {_quoted(text)}",
            ]
    return "\n".join(lines) + "\n"


def _intervals(entries: Iterable[Word | Character], end: float) -> list[tuple[float, float, str]]:
    """Entries and the silences between them, without gaps."""
    found: list[tuple[float, float, str]] = []
    now = 0.0
    for entry in entries:
        start, stop = max(now, round(entry.start, 6)), round(entry.end, 6)
        if stop <= start:
            continue
        if start > now:
            found.append((now, start, ""))
        found.append((start, stop, entry.text))
        now = stop
    if now < round(end, 6) or not found:
        found.append((now, end, ""))
    return found


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def ctm(words: Iterable[Word], name: str) -> str:
    """A time-marked conversation (CTM), as NIST's sclite and Kaldi read it.

    Args:
        words: in order of time.
        name: of the recording; white space in it becomes "_".

    Returns:
        The content of a file, a line a word: recording, channel (1 for the only one, else as it is
        named), start and length in seconds, the word, its confidence.
    """
    name = "_".join(name.split()) or "recording"
    lines = []
    for word in words:
        channel = 1 if word.channel is None else "_".join(str(word.channel).split())
        text = "".join(word.text.split())
        lines.append(
            f"{name} {channel} {word.start:.3f} {word.end - word.start:.3f} {text} "
            f"{word.confidence:.4f}\n"
        )
    return "".join(lines)
