"""CTC beam search with an n-gram language model and hotwords.

The search is that of the ctc-beam-decoder package (extra ``beam``): prefix beam search in C++ with
shallow fusion of a KenLM word n-gram, the behaviour of pyctcdecode. This module maps a tokenizer to
its labels, spells hotwords as the tokenizer does, reads the words of the language model, and aligns
the text that was found with the frames, so that its words have the same times and confidences as
those of greedy decoding. What has no effect is logged as a warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.inference.ctc.language_model import words_of
from w2vbert_fast.inference.ctc.timestamps import Delay, Word, check_log_probs, word_timestamps
from w2vbert_fast.processing.scripts import is_unspaced
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer

_log = logging.getLogger(__name__)

LM_WEIGHT = 0.5
WORD_BONUS = 1.5
HOTWORD_WEIGHT = 10.0
UNKNOWN_WORD_PENALTY = 10.0

# Log-probabilities of 0 are raised to this before the alignment, as the search raises them.
_LOWEST = math.log(1e-15)


@dataclass(frozen=True)
class BeamResult:
    """What a beam search found.

    Attributes:
        text: the best text, words separated by single spaces.
        words: its words with times and confidences, from aligning the text with the frames.
        score: natural logarithm of the text's probability, summed over the paths that were kept,
            plus the weighted scores of the language model and the bonuses. Comparable between
            texts of one utterance only.
    """

    text: str
    words: list[Word]
    score: float


class BeamDecoder:
    """CTC prefix beam search over a tokenizer's vocabulary.

    A text's score is ``ln P(text | audio) + lm_weight * ln P(words) + word_bonus * words``, with
    the language model's probability including the end of the sentence, plus `hotword_weight` a
    hotword. Without a language model it is the first term and the hotwords'. Weights are best tuned
    on transcribed recordings that nothing was trained on.

    Special tokens other than the word delimiter, such as ``[UNK]``, are never part of a text.

    A decoder can be pickled, if its language model is at the same path on the other side, and used
    by several threads at once.

    Args:
        tokenizer: of the checkpoint. Its padding token is the blank, its `word_delimiter_token` the
            space.
        lm_path: word n-gram in ARPA format (``.arpa``, ``.arpa.gz``) or KenLM's binary format,
            spelt as the tokenizer spells; None: no language model.
        lm_weight: of the language model's logarithm ("alpha"); None: 0.5.
        word_bonus: for each word, which makes up for the language model's preference for few words
            ("beta"); None: 1.5. Counts with a language model only.
        beam_width: texts that are kept a frame.
        hotwords: words and phrases that are more probable than usual, such as names. What begins
            like one is favoured in part. Where the vocabulary has one case, or one form of accents,
            they take it. They count from the beginning of a word on.
        hotword_weight: how much; None: 10.
        unigrams: the words that the language model knows, in any case, as hotwords; None: as its
            file says. Binary files say so too, unless they were built without (``build_binary
            -v``): then each beginning of a word counts as unknown, and the answer is worse.
        unknown_word_penalty: taken off the base-10 logarithm of a word that the language model does
            not know, before the weight; None: 10.
        score_boundary: whether the language model scores beginning and end of the text.
        labels: how each token is spelt in texts and in the language model, by id; None: as the
            tokenizer spells it.
        frame_seconds: seconds from one frame to the next, for the words' times.
        delay: emission delay to take off the words' times: `timestamps.measure_delay`.
        token_min_log_prob: tokens below this are not tried in a frame, but for its best.
        beam_prune_log_prob: texts this much below the best are dropped.

    Raises:
        ImportError: ctc-beam-decoder is not installed.
        OSError: the language model cannot be read.
        ValueError: the tokenizer has no padding token, or two tokens of one spelling; the language
            model is damaged or spells none of its words with the tokenizer's characters; or another
            argument is impossible.
    """

    def __init__(
        self,
        tokenizer: Wav2Vec2CTCTokenizer,
        lm_path: str | os.PathLike[str] | None = None,
        *,
        lm_weight: float | None = None,
        word_bonus: float | None = None,
        beam_width: int = 100,
        hotwords: Iterable[str] = (),
        hotword_weight: float | None = None,
        unigrams: Iterable[str] | None = None,
        unknown_word_penalty: float | None = None,
        score_boundary: bool = True,
        labels: Sequence[str] | None = None,
        frame_seconds: float = 0.02,
        delay: Delay | None = None,
        token_min_log_prob: float = -5.0,
        beam_prune_log_prob: float = -10.0,
    ) -> None:
        without_effect = {
            "lm_weight": lm_weight,
            "word_bonus": word_bonus,
            "unigrams": unigrams,
            "unknown_word_penalty": unknown_word_penalty,
        }
        self.lm_weight = LM_WEIGHT if lm_weight is None else lm_weight
        self.word_bonus = WORD_BONUS if word_bonus is None else word_bonus
        self.hotword_weight = HOTWORD_WEIGHT if hotword_weight is None else hotword_weight
        self.unknown_word_penalty = (
            UNKNOWN_WORD_PENALTY if unknown_word_penalty is None else unknown_word_penalty
        )
        for name in ("lm_weight", "hotword_weight", "unknown_word_penalty"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be 0 or more and finite, got {value}")
        if not math.isfinite(self.word_bonus):
            raise ValueError(f"word_bonus must be finite, got {self.word_bonus}")
        if beam_width < 1:
            raise ValueError(f"beam_width must be positive, got {beam_width}")
        for name, words in (("hotwords", hotwords), ("unigrams", unigrams)):
            if isinstance(words, str):
                raise TypeError(f"{name} must be several words, got a single string")
        self.tokenizer = tokenizer
        self.lm_path = None if lm_path is None else Path(lm_path)
        self.beam_width = beam_width
        self.score_boundary = score_boundary
        self.frame_seconds = frame_seconds
        self.delay = delay
        self.token_min_log_prob = token_min_log_prob
        self.beam_prune_log_prob = beam_prune_log_prob
        self._columns, self._labels, self._tokens = _alphabet(tokenizer, labels)
        self._characters = frozenset("".join(self._labels))
        self.hotwords = self._spelt_hotwords(hotwords, hotword_weight)
        self.unigrams: list[str] | None = None
        if self.lm_path is not None:
            self.unigrams = self._known_words(self.lm_path, unigrams)
        elif given := [name for name, value in without_effect.items() if value is not None]:
            _log.warning("without a language model %s has no effect", ", ".join(given))
        self._search = self._build()

    def _spelt_hotwords(self, hotwords: Iterable[str], weight: float | None) -> list[str]:
        """Hotwords as the labels spell them, without those that cannot be."""
        given = list(dict.fromkeys(" ".join(word.split()) for word in hotwords))
        given = [word for word in given if word]
        spelt, lost, lacking = _spelt(given, self._characters)
        if lost:
            _log.warning(
                "hotwords that have no effect: %s; the vocabulary lacks %s",
                _some(lost),
                _some(lacking),
            )
        if spelt and (" " not in self._labels or any(map(is_unspaced, "".join(spelt)))):
            _log.warning(
                "hotwords count at the beginning of a text and behind a word delimiter only, which "
                "this vocabulary or script has not between words"
            )
        if spelt and self.hotword_weight == 0:
            _log.warning("with a hotword_weight of 0 hotwords have no effect")
        if weight is not None and not given:
            _log.warning("without hotwords hotword_weight has no effect")
        return spelt

    def _known_words(self, path: Path, unigrams: Iterable[str] | None) -> list[str] | None:
        """The words of a language model, as far as the labels spell them; None: nobody knows."""
        own = words_of(path)
        found = own
        if unigrams is not None:
            found, lost, lacking = _spelt(list(unigrams), self._characters)
            if lost:
                _log.warning(
                    "unigrams: %d of %d have no effect, such as %s; the vocabulary lacks %s",
                    *(len(lost), len(lost) + len(found), _some(lost), _some(lacking)),
                )
        if found is None:
            _log.warning(
                "%s: this binary language model does not say which words it knows, so that every "
                "beginning of a word counts as unknown and more words are wrong (in a trial 13.9 "
                "instead of 5.6 %%); give them as unigrams (--unigrams FILE, one a line)",
                path,
            )
            return None
        if not (own or found):
            raise ValueError("unigrams: none of them is spelt with the tokenizer's characters")
        known = [word for word in own or found if self._characters.issuperset(word)]
        if not known:
            raise ValueError(
                f"lm_path: none of the {len(own or found)} words of {str(path)!r} is spelt "
                "with the tokenizer's characters; do upper and lower case agree?"
            )
        if own is not None and 2 * len(known) < len(own):
            lost = [word for word in own if not self._characters.issuperset(word)]
            lacking = sorted(set("".join(lost)) - self._characters)
            _log.warning(
                "%s: %d of %d words, such as %s, cannot be found; the vocabulary lacks %s",
                *(path, len(lost), len(own), _some(lost), _some(lacking)),
            )
        if own is not None and unigrams is not None and not set(own).intersection(found):
            raise ValueError(f"unigrams: none of them is a word of {str(path)!r}")
        if " " not in self._labels:
            _log.warning(
                "%s: the vocabulary has no word delimiter, so that the whole text is one word to "
                "the language model",
                path,
            )
        return found

    def _build(self) -> Any:
        package = require("ctc_beam_decoder", "beam")
        arguments: dict[str, Any] = {}
        if self.lm_path is not None:
            with self.lm_path.open("rb"):
                # An error of the operating system rather than one of the library.
                pass
            arguments = {
                "kenlm_model_path": str(self.lm_path),
                "unigrams": self.unigrams,
                "alpha": self.lm_weight,
                "beta": self.word_bonus,
                "unk_score_offset": -self.unknown_word_penalty,
                "lm_score_boundary": self.score_boundary,
            }
        try:
            return package.build_ctcdecoder(self._labels, **arguments)
        except (RuntimeError, ValueError) as error:
            named = "tokenizer" if self.lm_path is None else f"lm_path: {str(self.lm_path)!r}"
            raise ValueError(f"{named} cannot be used: {error}") from error

    def reweighted(self, lm_weight: float, word_bonus: float) -> BeamDecoder:
        """The same search with other weights.

        The language model is read once more, without KenLM's progress bar: what the process writes
        to standard error meanwhile is lost.
        """
        other = object.__new__(type(self))
        with _silent():
            other.__setstate__(
                {**self.__getstate__(), "lm_weight": lm_weight, "word_bonus": word_bonus}
            )
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_search"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._search = self._build()

    def decode(self, log_probs: Tensor) -> BeamResult:
        """The best text of an utterance.

        Args:
            log_probs: floating point ``[num_frames, vocab]``, log-softmax of its valid frames, on
                any device.

        Returns:
            The text, its words, and its score.

        Raises:
            TypeError: `log_probs` is not a floating-point tensor.
            ValueError: it has another shape, fewer columns than the tokenizer has ids, or is not a
                log-softmax.
        """
        text, score = self.search(log_probs)
        return BeamResult(text, self.align(log_probs, text, delay=self.delay), score)

    def search(self, log_probs: Tensor) -> tuple[str, float]:
        """The best text of an utterance and its score, without the times of its words.

        Args:
            log_probs: as for `decode`.

        Raises:
            TypeError, ValueError: as `decode`.
        """
        check_log_probs(log_probs)
        if log_probs.shape[1] <= max(self._columns):
            raise ValueError(
                f"log_probs must have {max(self._columns) + 1} columns or more, as the tokenizer's "
                f"ids need, got {log_probs.shape[1]}"
            )
        if len(log_probs) == 0:
            return "", 0.0
        columns = torch.tensor(self._columns, device=log_probs.device)
        chosen = log_probs.index_select(1, columns).float().cpu().clamp(min=_LOWEST)
        if self.lm_path is not None and " " in self._labels:
            delimiter = self._labels.index(" ")
            _silence_delimiters_at_the_ends(chosen, delimiter, self.token_min_log_prob)
        beams = self._search.decode_beams(
            chosen.contiguous().numpy(),
            beam_width=self.beam_width,
            beam_prune_logp=self.beam_prune_log_prob,
            token_min_logp=self.token_min_log_prob,
            # It would drop texts whose last words are those of a better one, with all their paths.
            prune_history=False,
            hotwords=self.hotwords or None,
            hotword_weight=self.hotword_weight,
        )
        if not beams:
            return "", -math.inf
        text, _, _, _, score = beams[0]
        return text, score

    def align(
        self, log_probs: Tensor, text: str, *, offset: float = 0.0, delay: Delay | None = None
    ) -> list[Word]:
        """The words of a text that was found, with times and confidences.

        Args:
            log_probs: as for `decode`.
            text: from `search`.
            offset: seconds that are added to all times.
            delay: as `word_timestamps` takes it.
        """
        if not text:
            return []
        spoken = str.maketrans(self._tokens)
        written = str.maketrans({token: label for label, token in self._tokens.items()})
        words = word_timestamps(
            log_probs.clamp(min=_LOWEST),
            self.tokenizer,
            self.frame_seconds,
            offset,
            text=text.translate(spoken),
            delay=delay,
        )
        if not self._tokens:
            return words
        return [
            replace(
                word,
                text=word.text.translate(written),
                characters=[replace(c, text=c.text.translate(written)) for c in word.characters],
            )
            for word in words
        ]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what libraries in C++ write from standard error."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _silence_delimiters_at_the_ends(
    log_probs: Tensor, delimiter: int, token_min_log_prob: float
) -> None:
    """Count delimiters in front of the first and behind the last character as blanks, in place.

    They separate nothing, but the search has the language model score an empty word at a text's
    end, and charges it as an unknown one. Only frames count in which the search tries no character,
    so that no text is lost.

    Args:
        log_probs: ``[num_frames, num_labels]``, the blank first.
        delimiter: column of the delimiter.
        token_min_log_prob: what the search tries.
    """
    characters = [c for c in range(1, log_probs.shape[1]) if c != delimiter]
    if not characters:
        return
    spoken = (log_probs[:, characters] >= token_min_log_prob).any(-1).nonzero()[:, 0].tolist()
    first, last = (spoken[0], spoken[-1]) if spoken else (len(log_probs), len(log_probs))
    for end in (log_probs[:first], log_probs[last + 1 :]):
        end[:, 0] = torch.logaddexp(end[:, 0], end[:, delimiter])
        end[:, delimiter] = _LOWEST


def _alphabet(
    tokenizer: Wav2Vec2CTCTokenizer, labels: Sequence[str] | None
) -> tuple[list[int], list[str], dict[str, str]]:
    """What a text can be made of.

    Returns:
        The ids, the blank first; what each stands for; and for characters that `labels` spell
        otherwise than the tokenizer, how the tokenizer does.
    """
    blank = tokenizer.pad_token_id
    if blank is None:
        raise ValueError("tokenizer has no pad_token, which CTC needs as its blank")
    delimiter = tokenizer.word_delimiter_token
    special = set(tokenizer.all_special_tokens) - {delimiter}
    spelt: dict[str, int] = {}
    tokens: dict[str, str] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if index == blank or token in special:
            continue
        own = " " if token == delimiter else token
        if tokenizer.do_lower_case:
            own = own.lower()
        label = own
        if labels is not None and own != " ":
            if index >= len(labels):
                raise ValueError(f"labels must have an entry for every id, got {len(labels)}")
            label = labels[index]
        if label != own:
            if len(label) != 1 or len(own) != 1 or label == " ":
                raise ValueError(f"labels spell the token {token!r} as {label!r}")
            tokens[label] = own
        if label in spelt:
            raise ValueError(f"tokenizer spells {label!r} with two ids: {spelt[label]} and {index}")
        spelt[label] = index
    return [blank, *spelt.values()], ["", *spelt], tokens


def _spelt(
    words: Iterable[str], characters: frozenset[str]
) -> tuple[list[str], list[str], list[str]]:
    """Words in the case, and with the accents composed or not, that some characters allow.

    Returns:
        Those that can be spelt; those that cannot; and the characters that these lack.
    """
    found: dict[str, None] = {}
    lost: list[str] = []
    lacking: set[str] = set()
    for word in words:
        spelt = {c: _spelt_character(c, characters) for c in unicodedata.normalize("NFC", word)}
        missing = {c for c, form in spelt.items() if form is None}
        if characters.issuperset(word):
            found[word] = None
        elif missing:
            lost.append(word)
            lacking |= missing
        else:
            found["".join(spelt[c] or "" for c in unicodedata.normalize("NFC", word))] = None
    return list(found), lost, sorted(lacking)


def _spelt_character(character: str, characters: frozenset[str]) -> str | None:
    for cased in (character, character.lower(), character.upper()):
        for form in (cased, unicodedata.normalize("NFD", cased)):
            if characters.issuperset(form):
                return form
    return None


def _some(items: Sequence[str], most: int = 5) -> str:
    """The first of some items, for a message."""
    return ", ".join(map(repr, items[:most])) + (", ..." if len(items) > most else "")
