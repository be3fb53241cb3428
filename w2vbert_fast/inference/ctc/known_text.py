"""Times for a transcript as people write it, and where it and the recording differ.

The alignment is CTC segmentation (Kürzinger et al. 2020, https://arxiv.org/abs/2007.09127): the
most probable path through the transcript's tokens, which may begin and end anywhere.
Two kinds of states are added to it, both of which emit whatever is most probable in a frame, as the
wildcard of torchaudio's `forced_align` and of MMS (Pratap et al. 2023, section 3.1.4) does:

* one for each run of characters that the vocabulary lacks, digits for instance, which the path has
  to pass;
* one in front of each word and behind the last, which the path may pass at a price: speech that the
  transcript lacks.

Scores that fall far behind the best are given up, so that time and memory grow with the recording
and not with its product with the transcript; where that loses the end, the search is exact.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from w2vbert_fast.inference.ctc.alignment import Graph, best_path
from w2vbert_fast.inference.ctc.timestamps import (
    Character,
    Delay,
    Word,
    checked_blank,
    place_words,
)
from w2vbert_fast.processing.scripts import graphemes, is_unspaced
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer

# In nats: what it costs to leave the transcript, once and a frame. Speech that it lacks is seldom
# less improbable than this as a part of it; of what is about as probable either way, the transcript
# is right.
_PRICE = 8.0
_PRICE_A_FRAME = 0.02
# States whose scores are further behind are given up; the next ones are tried where that fails.
# What a path has passed counts for it: more than it costs where it is right, less where it is not.
_BEAMS = (150.0, 1000.0, math.inf)
_PROGRESS = 3.0
# A word of whose characters the model has seen so little, in nats, is probably not there.
_UNSAID = 5.0

_ANYTHING = -1
# Marks that are spoken, though Unicode calls them punctuation; and one that is where it stands
# alone, "press *", and elsewhere is not, "*press*".
_SPOKEN_MARKS = frozenset("%&@#‰٪")
_SPOKEN_ALONE = "*"


@dataclass(frozen=True)
class Stretch:
    """Speech that a transcript lacks.

    Attributes:
        start: where it begins, in seconds.
        end: where it ends, in seconds.
        text: what the model hears there.
    """

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Alignment:
    """A transcript with times, and where it differs from what is said.

    Attributes:
        words: all words of the transcript in order, as they are written: what is between white
            space, with marks. A mark that stands alone belongs to the word before it. Of characters
            that the vocabulary lacks the confidence is that of whatever the model hears.
        unwritten: speech that the transcript lacks, in order of time; in front of the first word
            and behind the last one, too.
        unsaid: places in `words` of those that are probably not said.
    """

    words: tuple[Word, ...]
    unwritten: tuple[Stretch, ...]
    unsaid: tuple[int, ...]


def align_text(
    log_probs: Tensor,
    text: str,
    tokenizer: Wav2Vec2CTCTokenizer,
    frame_seconds: float,
    offset: float = 0.0,
    *,
    delay: Delay | None = None,
) -> Alignment:
    """Find a transcript in a recording: when each of its words is said.

    Args:
        log_probs: floating point ``[num_frames, vocab]``, log-softmax of the frames of the
            recording, on any device.
        text: the transcript. Case and accents become the vocabulary's where it has but one;
            punctuation lies between its neighbours; other characters that the vocabulary lacks,
            such as digits, take the time that what is around them leaves.
        tokenizer: of the same checkpoint. Its padding token is the blank.
        frame_seconds: seconds from one frame to the next: `timestamps.frame_seconds(config)`.
        offset: seconds that are added to all times.
        delay: of the model, `timestamps.measure_delay`, taken off the times. None: times are those
            of the frames.

    Returns:
        The words with their times, and what differs.

    Raises:
        TypeError: `log_probs` is not a floating-point tensor.
        ValueError: it has another shape or is not a log-softmax; the tokenizer has no padding
            token; `frame_seconds` is not positive; or `text` has nothing that can be said, or more
            than fits into the frames.
    """
    blank = checked_blank(log_probs, tokenizer, frame_seconds, offset)
    written = _Spelling(tokenizer).words(text)
    if not written:
        raise ValueError(f"text has nothing that can be said: {text!r:.200}")
    chain = _Chain(written, blank, tokenizer.word_delimiter_token_id)
    if len(log_probs) < chain.shortest:
        raise ValueError(
            f"text needs at least {chain.shortest} frames, log_probs has {len(log_probs)}"
        )
    best = log_probs.max(-1)
    emitted = chain.emitted(log_probs, best.values)
    for beam in _BEAMS:
        path = best_path(emitted, chain.graph(), beam)
        if path is not None:
            break
    else:
        raise ValueError("text has probability 0 in log_probs")
    reading = _Reading(chain, path, emitted, best.indices.cpu().numpy(), tokenizer, frame_seconds)
    words = [reading.word(number) for number in range(len(written))]
    moved = delay or Delay()
    return Alignment(
        tuple(place_words(words, delay, frame_seconds, offset)),
        tuple(
            Stretch(
                offset + max(0.0, found.start - moved.start),
                offset + max(0.0, found.end - moved.end),
                found.text,
            )
            for found in reading.unwritten()
        ),
        tuple(reading.unsaid()),
    )


@dataclass(frozen=True)
class _Unit:
    """A character as it is written: its tokens; `_ANYTHING` for one that the vocabulary lacks; none
    for a mark that is not spoken."""

    text: str
    tokens: tuple[int, ...]


class _Spelling:
    """Characters to the tokens that spell them.

    Args:
        tokenizer: its vocabulary decides about case, accents and forms.
    """

    def __init__(self, tokenizer: Wav2Vec2CTCTokenizer) -> None:
        self._known = {
            token: index
            for token, index in tokenizer.get_vocab().items()
            if index not in (tokenizer.pad_token_id, tokenizer.word_delimiter_token_id)
        }
        self._found: dict[str, tuple[int, ...]] = {}

    def words(self, text: str) -> list[list[_Unit]]:
        """The words of a text; what cannot be said belongs to the one before, or to the first."""
        found: list[list[_Unit]] = []
        silent: list[_Unit] = []
        for word in text.split():
            units = [_Unit(grapheme, self._tokens(grapheme)) for grapheme in graphemes(word)]
            if word == _SPOKEN_ALONE:
                units = [_Unit(word, (_ANYTHING,))]
            if any(unit.tokens for unit in units):
                found.append([*silent, *units])
                silent = []
            elif found:
                found[-1] += [_Unit(" ", ()), *units]
            else:
                silent += [*units, _Unit(" ", ())]
        return found

    def _tokens(self, grapheme: str) -> tuple[int, ...]:
        if grapheme not in self._found:
            self._found[grapheme] = self._look_up(grapheme)
        return self._found[grapheme]

    def _look_up(self, grapheme: str) -> tuple[int, ...]:
        for form in _forms(grapheme):
            if form in self._known:
                return (self._known[form],)
            if form and all(character in self._known for character in form):
                return tuple(self._known[character] for character in form)
        return (_ANYTHING,) if any(map(_is_spoken, grapheme)) else ()


def _forms(grapheme: str) -> Iterator[str]:
    """Other ways to write a character, the most faithful first."""
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        normal = unicodedata.normalize(form, grapheme)
        yield from (normal, normal.lower(), normal.upper(), normal.casefold())
    bare = "".join(
        character
        for character in unicodedata.normalize("NFKD", grapheme)
        if unicodedata.category(character) != "Mn"
    )
    yield from (bare, bare.lower(), bare.upper())


def _is_spoken(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNS" or character in _SPOKEN_MARKS


@dataclass(frozen=True)
class _Sound:
    """A state that has to be passed: a token of a unit, or a run of units that are anything."""

    word: int
    first: int
    last: int
    token: int


class _Chain:
    """The states of a transcript in a row.

    anything*, blank, token, blank, token, ..., blank, delimiter, blank, anything*, token, ...,
    blank, anything*: what has an asterisk may be passed at a price.

    Args:
        words: of the transcript.
        blank: id of the blank.
        delimiter: id of the word delimiter; None: there is none.

    Attributes:
        sounds: what has to be passed, in order.
        owners: of each state its place in `sounds`; `BLANK` or `OPTIONAL` for others.
        shortest: frames that the path has at least.
    """

    BLANK, OPTIONAL = -1, -2

    def __init__(self, words: list[list[_Unit]], blank: int, delimiter: int | None) -> None:
        self.words, self.blank, self.delimiter = words, blank, delimiter
        self.sounds: list[_Sound] = []
        self.owners: list[int] = []
        self._tokens: list[int] = []
        self._skips: list[int] = []
        self._entry: list[float] = []
        self._add(_ANYTHING, 0, self.OPTIONAL)
        self._add(blank, 0, self.BLANK)
        before = None
        self.shortest = 0
        for number in range(len(words)):
            begins = first = True
            for sound in self._sounds(number):
                if before is not None and begins:
                    if delimiter is not None and first:
                        self._add(delimiter, 1, self.BLANK)
                        self._add(blank, 0, self.BLANK)
                        before = delimiter
                        self.shortest += 1
                    self._add(_ANYTHING, 1, self.OPTIONAL)
                follows = before is not None and before != sound.token
                if begins:
                    # One: the optional state; two: the blank in front of it, too.
                    skips = 1 + 2 * (follows and self.owners[-1] == self.OPTIONAL)
                else:
                    skips = int(follows)
                self.shortest += 1 + (before == sound.token)
                self.sounds.append(sound)
                self._add(sound.token, skips, len(self.sounds) - 1)
                self._add(blank, 0, self.BLANK)
                before = sound.token
                unit = words[number][sound.last - 1].text
                begins, first = is_unspaced(unit[-1]), False
        self._add(_ANYTHING, 1, self.OPTIONAL)

    def _add(self, token: int, skips: int, owner: int) -> None:
        self._tokens.append(token)
        self._skips.append(skips)
        self._entry.append(_PRICE if owner == self.OPTIONAL else 0.0)
        self.owners.append(owner)

    def _sounds(self, number: int) -> Iterator[_Sound]:
        """What is to be passed of a word; neighbours that are anything are one."""
        pending: tuple[int, int] | None = None
        for place, unit in enumerate(self.words[number]):
            if unit.tokens == (_ANYTHING,):
                pending = (place if pending is None else pending[0], place + 1)
                continue
            if unit.tokens and pending is not None:
                yield _Sound(number, *pending, _ANYTHING)
                pending = None
            for token in unit.tokens:
                yield _Sound(number, place, place + 1, token)
        if pending is not None:
            yield _Sound(number, *pending, _ANYTHING)

    def emitted(self, log_probs: Tensor, best: Tensor) -> npt.NDArray[np.float32]:
        """Log-probabilities ``[num_frames, num_columns]`` of the distinct tokens, anything last."""
        self._columns = sorted({*self._tokens} - {_ANYTHING})
        kept = log_probs[:, torch.tensor(self._columns, device=log_probs.device)]
        found = torch.cat([kept, (best - _PRICE_A_FRAME)[:, None]], 1)
        array: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return array

    def graph(self) -> Graph:
        """The states, as the search takes them; `emitted` comes first."""
        column = {token: place for place, token in enumerate([*self._columns, _ANYTHING])}
        return Graph(
            np.array([column[token] for token in self._tokens]),
            np.array(self._skips, np.int8),
            np.array(self._entry),
            [-_PRICE, 0.0],
            3,
            np.cumsum(np.array(self.owners) >= 0, dtype=np.float64) * np.float64(_PROGRESS),
        )


@dataclass
class _Reading:
    """What a path says about the words."""

    chain: _Chain
    path: npt.NDArray[np.int64]
    emitted: npt.NDArray[np.float32]
    best: npt.NDArray[np.int64]
    tokenizer: Wav2Vec2CTCTokenizer
    frame_seconds: float
    _spans: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        chain = self.chain
        owners = np.array(chain.owners)[self.path]
        self._owners = owners
        self._silent = np.isin(self.best, [chain.blank, chain.delimiter or chain.blank])
        self._score = self.emitted[np.arange(len(self.path)), chain.graph().states[self.path]]
        self._most = self.emitted[:, -1] + _PRICE_A_FRAME
        starts = np.searchsorted(self.path, np.flatnonzero(np.array(chain.owners) >= 0))
        self._spans = []
        for sound, start in zip(chain.sounds, starts.tolist(), strict=True):
            end = start
            while end < len(owners) and owners[end] == len(self._spans):
                end += 1
            if sound.token == _ANYTHING:
                start, end = self._trimmed(start, end)
            self._spans.append((start, end))
        self._of_word: list[list[int]] = [[] for _ in chain.words]
        for place, sound in enumerate(chain.sounds):
            self._of_word[sound.word].append(place)

    def _trimmed(self, start: int, end: int) -> tuple[int, int]:
        """The part of some frames in which something is said; the first one where nothing is."""
        loud = np.flatnonzero(~self._silent[start:end])
        if not len(loud):
            return start, start + 1
        return start + int(loud[0]), start + int(loud[-1]) + 1

    def word(self, number: int) -> Word:
        """A word with the times of its frames."""
        units = self.chain.words[number]
        places: list[tuple[float, float, float] | None] = [None] * len(units)
        confidence, heard = 1.0, 1.0
        known = False
        for place in self._of_word[number]:
            sound, (start, end) = self.chain.sounds[place], self._spans[place]
            anything = sound.token == _ANYTHING
            scores = (self._most if anything else self._score)[start:end]
            sure = float(np.exp(np.minimum(scores, 0.0)).mean())
            count = sound.last - sound.first
            step = (end - start) / count
            for i in range(count):
                before = places[sound.first + i]
                first = start + i * step if before is None else before[0]
                certain = sure if before is None else sure * before[2]
                places[sound.first + i] = (first, start + (i + 1) * step, certain)
            if anything:
                heard *= sure
            else:
                confidence *= sure
                known = True
        characters: list[Character] = []
        spoken = [place for place in places if place is not None]
        now = spoken[0][0]
        for unit, found in zip(units, places, strict=True):
            begin, now, sure = found or (now, now, 1.0)
            characters.append(
                Character(unit.text, begin * self.frame_seconds, now * self.frame_seconds, sure)
            )
        return Word(
            "".join(unit.text for unit in units),
            characters[0].start,
            characters[-1].end,
            confidence if known else heard,
            characters,
        )

    def unsaid(self) -> Iterator[int]:
        """Words of which the model has heard next to nothing."""
        for number, places in enumerate(self._of_word):
            lost = []
            for place in places:
                start, end = self._spans[place]
                if self.chain.sounds[place].token == _ANYTHING:
                    lost.append(2 * _UNSAID if self._silent[start:end].all() else 0.0)
                else:
                    lost.append(float((self._most - self._score)[start:end].min()))
            if sum(lost) > _UNSAID * len(lost):
                yield number

    def unwritten(self) -> Iterator[Stretch]:
        """Speech on the path that is of no word, with the times of its frames."""
        optional = np.flatnonzero(self._owners == self.chain.OPTIONAL)
        runs = np.split(optional, np.flatnonzero(np.diff(self.path[optional])) + 1)
        for run in runs:
            if not len(run) or self._silent[run].all():
                continue
            start, end = self._trimmed(int(run[0]), int(run[-1]) + 1)
            text = str(self.tokenizer.decode(self.best[start:end].tolist())).strip()
            yield Stretch(start * self.frame_seconds, end * self.frame_seconds, text)
