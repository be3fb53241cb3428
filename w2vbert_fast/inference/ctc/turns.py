"""The channels of a call in order of time: who said what when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from w2vbert_fast.inference.ctc.timestamps import Word

# A silence this long ends what is said in one go; what the other says meanwhile comes behind it.
_PAUSE_SECONDS = 0.6


def label(channel: int | str) -> str:
    """What a channel is called in texts: its name, or "channel 0"."""
    return channel if isinstance(channel, str) else f"channel {channel}"


def in_turns(channels: Mapping[int | str, Sequence[Word]]) -> tuple[tuple[Word, ...], str]:
    """Merge what was said on several channels.

    Args:
        channels: words in order of time, by the channel's number or name.

    Returns:
        All words in order of time, each with its channel; and the text, a line a turn: ``agent: how
        can I help``. A turn goes on until somebody else begins after a pause of it.
    """
    named = {
        name: [replace(word, channel=name) for word in words] for name, words in channels.items()
    }
    utterances = [utterance for words in named.values() for utterance in _utterances(words)]
    utterances.sort(key=lambda utterance: utterance[0].start)
    turns: list[list[Word]] = []
    for utterance in utterances:
        if turns and turns[-1][0].channel == utterance[0].channel:
            turns[-1] += utterance
        else:
            turns.append(utterance)
    lines = [
        f"{label(turn[0].channel)}: {' '.join(word.text for word in turn)}"
        for turn in turns
        if turn[0].channel is not None
    ]
    merged = sorted((w for words in named.values() for w in words), key=lambda word: word.start)
    return tuple(merged), "\n".join(lines)


def _utterances(words: Iterable[Word]) -> list[list[Word]]:
    """Words in a row, as far as there is no pause between them."""
    found: list[list[Word]] = []
    for word in words:
        if found and word.start - found[-1][-1].end < _PAUSE_SECONDS:
            found[-1].append(word)
        else:
            found.append([word])
    return found
