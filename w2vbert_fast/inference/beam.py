"""CTC beam search with an n-gram language model and hotwords.

The search is that of the ctc-beam-decoder package (extra ``beam``): prefix beam search in C++ with
shallow fusion of a KenLM word n-gram, the behaviour of pyctcdecode. This module maps a tokenizer to
its labels, reads the words of the language model, and aligns the text that was found with the
frames, so that its words have the same times and confidences as those of greedy decoding.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.inference.timestamps import Delay, Word, check_log_probs, word_timestamps
from w2vbert_fast.tokenization import Wav2Vec2CTCTokenizer

# What ARPA files hold beside words.
_MARKERS = frozenset(("<s>", "</s>", "<unk>", "<UNK>"))
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
        lm_weight: of the language model's logarithm ("alpha").
        word_bonus: for each word, which makes up for the language model's preference for few words
            ("beta"). Counts with a language model only.
        beam_width: texts that are kept a frame.
        hotwords: words and phrases that are more probable than usual, such as names. What begins
            like one is favoured in part.
        hotword_weight: how much.
        unigrams: the words that the language model knows; None: read from an ARPA file. With a
            binary one they should be given: without, each beginning of a word counts as unknown.
        unknown_word_penalty: taken off the base-10 logarithm of a word that the language model does
            not know, before the weight.
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
        lm_weight: float = 0.5,
        word_bonus: float = 1.5,
        beam_width: int = 100,
        hotwords: Iterable[str] = (),
        hotword_weight: float = 10.0,
        unigrams: Iterable[str] | None = None,
        unknown_word_penalty: float = 10.0,
        frame_seconds: float = 0.02,
        delay: Delay | None = None,
        token_min_log_prob: float = -5.0,
        beam_prune_log_prob: float = -10.0,
    ) -> None:
        for name, value in (
            ("lm_weight", lm_weight),
            ("hotword_weight", hotword_weight),
            ("unknown_word_penalty", unknown_word_penalty),
        ):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be 0 or more and finite, got {value}")
        if not math.isfinite(word_bonus):
            raise ValueError(f"word_bonus must be finite, got {word_bonus}")
        if beam_width < 1:
            raise ValueError(f"beam_width must be positive, got {beam_width}")
        if isinstance(hotwords, str):
            raise TypeError("hotwords must be several words, got a single string")
        self.tokenizer = tokenizer
        self.lm_path = None if lm_path is None else Path(lm_path)
        self.lm_weight = lm_weight
        self.word_bonus = word_bonus
        self.beam_width = beam_width
        self.hotwords = [" ".join(word.split()) for word in hotwords]
        self.hotword_weight = hotword_weight
        self.unigrams = None if unigrams is None else list(unigrams)
        self.unknown_word_penalty = unknown_word_penalty
        self.frame_seconds = frame_seconds
        self.delay = delay
        self.token_min_log_prob = token_min_log_prob
        self.beam_prune_log_prob = beam_prune_log_prob
        self._columns, self._labels = _alphabet(tokenizer)
        self._search = self._build()

    def _build(self) -> Any:
        package = require("ctc_beam_decoder", "beam")
        arguments: dict[str, Any] = {}
        if self.lm_path is not None:
            with self.lm_path.open("rb"):
                # An error of the operating system rather than one of the library.
                pass
            words = self.unigrams
            if words is None and self.lm_path.name.endswith((".arpa", ".arpa.gz")):
                words = _unigrams(self.lm_path)
            spelt = set("".join(self._labels))
            if words is not None and not any(spelt.issuperset(word) for word in words):
                raise ValueError(
                    f"lm_path: none of the {len(words)} words of {str(self.lm_path)!r} is spelt "
                    "with the tokenizer's characters; do upper and lower case agree?"
                )
            arguments = {
                "kenlm_model_path": str(self.lm_path),
                "unigrams": words,
                "alpha": self.lm_weight,
                "beta": self.word_bonus,
                "unk_score_offset": -self.unknown_word_penalty,
            }
        try:
            return package.build_ctcdecoder(self._labels, **arguments)
        except (RuntimeError, ValueError) as error:
            named = "tokenizer" if self.lm_path is None else f"lm_path: {str(self.lm_path)!r}"
            raise ValueError(f"{named} cannot be used: {error}") from error

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
        check_log_probs(log_probs)
        if log_probs.shape[1] <= max(self._columns):
            raise ValueError(
                f"log_probs must have {max(self._columns) + 1} columns or more, as the tokenizer's "
                f"ids need, got {log_probs.shape[1]}"
            )
        if len(log_probs) == 0:
            return BeamResult("", [], 0.0)
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
            return BeamResult("", [], -math.inf)
        text, _, _, _, score = beams[0]
        words = word_timestamps(
            log_probs.clamp(min=_LOWEST),
            self.tokenizer,
            self.frame_seconds,
            text=text,
            delay=self.delay,
        )
        return BeamResult(text, words, score)


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


def _alphabet(tokenizer: Wav2Vec2CTCTokenizer) -> tuple[list[int], list[str]]:
    """The ids that a text can be made of, the blank first, and what each stands for."""
    blank = tokenizer.pad_token_id
    if blank is None:
        raise ValueError("tokenizer has no pad_token, which CTC needs as its blank")
    delimiter = tokenizer.word_delimiter_token
    special = set(tokenizer.all_special_tokens) - {delimiter}
    spelt: dict[str, int] = {}
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        if index == blank or token in special:
            continue
        label = " " if token == delimiter else token
        if tokenizer.do_lower_case:
            label = label.lower()
        if label in spelt:
            raise ValueError(f"tokenizer spells {label!r} with two ids: {spelt[label]} and {index}")
        spelt[label] = index
    return [blank, *spelt.values()], ["", *spelt]


def _unigrams(path: Path) -> list[str]:
    """The words of an ARPA file."""
    words: list[str] = []
    reader: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with reader(path, "rt", encoding="utf-8") as lines:
            inside = False
            for line in lines:
                if line.startswith("\\"):
                    if inside:
                        break
                    inside = line.strip() == "\\1-grams:"
                elif inside and line.strip():
                    # Log-probability, word, and back-off weight if longer n-grams begin with it.
                    words.append(line.split()[1])
    except (EOFError, IndexError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"lm_path: {str(path)!r} is damaged: {error}") from error
    words = [word for word in words if word not in _MARKERS]
    if not words:
        raise ValueError(f"lm_path: {str(path)!r} holds no words; is it an ARPA file?")
    return words
