"""A CTC vocabulary from transcripts, and the names of classes from labels."""

from __future__ import annotations

import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from w2vbert_fast.checkpoints.files import make_folder, write_text
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer

BLANK = "[PAD]"
UNKNOWN = "[UNK]"
WORD_DELIMITER = "|"


def characters_of(transcripts: Iterable[str], min_count: int = 1) -> list[str]:
    """The characters of transcripts but for spaces, in code point order.

    Args:
        transcripts: texts with single spaces between words.
        min_count: rarer characters are left out.

    Raises:
        ValueError: no character is left, or one is "|", which stands for the space.
    """
    counts = Counter(character for text in transcripts for character in text)
    counts.pop(" ", None)
    characters = sorted(character for character, count in counts.items() if count >= min_count)
    if not characters:
        raise ValueError("the transcripts hold no characters, so there is no vocabulary to build")
    if WORD_DELIMITER in characters:
        raise ValueError(
            f"a transcript holds {WORD_DELIMITER!r}, which stands for the space between words in a "
            "CTC vocabulary; take it out of the transcripts"
        )
    return characters


def build_tokenizer(
    transcripts: Iterable[str], folder: str | os.PathLike[str], min_count: int = 1
) -> Wav2Vec2CTCTokenizer:
    """A tokenizer of the characters of transcripts, in NFC.

    The blank has id 0, then come the unknown token, the word delimiter and the characters.

    Args:
        transcripts: texts with single spaces between words.
        folder: gets `vocab.json`; made when it is missing.
        min_count: rarer characters become unknown.

    Raises:
        ValueError: see `characters_of`.
    """
    composed = (unicodedata.normalize("NFC", text) for text in transcripts)
    tokens = [BLANK, UNKNOWN, WORD_DELIMITER, *characters_of(composed, min_count)]
    path: Path = make_folder(folder) / "vocab.json"
    entries = {token: index for index, token in enumerate(tokens)}
    write_text(path, json.dumps(entries, ensure_ascii=False, indent=2) + "\n")
    return Wav2Vec2CTCTokenizer(
        path,
        bos_token=None,
        eos_token=None,
        unk_token=UNKNOWN,
        pad_token=BLANK,
        word_delimiter_token=WORD_DELIMITER,
    )


class Spelling:
    """Brings texts into the Unicode form that a vocabulary is in.

    Tokenizers do not normalise: an "e" with an acute accent is one code point in NFC and two in
    NFD, and a vocabulary has the one or the others. A vocabulary that NFC leaves as it is takes
    NFC; one that NFD leaves as it is and that has combining marks or conjoining jamo takes NFD; one
    with characters that are in neither form (U+09DF is not) takes texts as they are. A character
    that it lacks then is spelled with those that it has, where these make a canonically equivalent
    one.

    Args:
        tokenizer: whose vocabulary it is.
    """

    def __init__(self, tokenizer: Wav2Vec2CTCTokenizer) -> None:
        self.tokenizer = tokenizer
        self._tokens = frozenset(tokenizer.get_vocab())
        self._known = {" "} | {token for token in self._tokens if len(token) == 1}
        decomposed = {token: unicodedata.normalize("NFD", token) for token in self._tokens}
        is_nfc = all(unicodedata.normalize("NFC", token) == token for token in self._tokens)
        is_nfd = all(token == parts for token, parts in decomposed.items())
        has_marks = any(map(_is_mark, itertools.chain.from_iterable(self._tokens)))
        self._form: Literal["NFC", "NFD"] | None = "NFC" if is_nfc else None
        if is_nfd and (has_marks or not is_nfc):
            self._form = "NFD"
        self._composed = {
            parts: token
            for token, parts in decomposed.items()
            if parts != token and parts not in self._tokens
        }
        self._longest = max(map(len, self._composed), default=0)

    def __call__(self, text: str) -> str:
        """The text in the vocabulary's form."""
        if self._form is not None:
            text = unicodedata.normalize(self._form, text)
        if not self.unknown(text):
            return text
        return "".join(map(self._known_spelling, _with_marks(text)))

    def unknown(self, text: str) -> list[str]:
        """What the vocabulary lacks of a text, in the text's order."""
        if self._known.issuperset(text):
            return []
        delimiters = (" ", self.tokenizer.word_delimiter_token)
        return [
            token
            for token in self.tokenizer.tokenize(text)
            if token not in self._tokens and token not in delimiters
        ]

    def _known_spelling(self, piece: str) -> str:
        """A character and its marks as the vocabulary has them; as they are where it has not."""
        composed = unicodedata.normalize("NFC", piece)
        for spelled in (piece, composed, self._made_of_tokens(piece)):
            if not self.unknown(spelled):
                return spelled
        return piece

    def _made_of_tokens(self, text: str) -> str:
        """The equivalent text: tokens where they are, decomposed characters elsewhere."""
        text = unicodedata.normalize("NFD", text)
        parts: list[str] = []
        start = 0
        while start < len(text):
            size = self._longest
            while size > 0 and text[start : start + size] not in self._composed:
                size -= 1
            piece = text[start : start + max(size, 1)]
            parts.append(self._composed.get(piece, piece))
            start += len(piece)
        return "".join(parts)


def _is_mark(character: str) -> bool:
    """Whether a character can join with the one before it: a mark, or a vowel or final jamo."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


def _with_marks(text: str) -> Iterator[str]:
    """The characters of a text, each with the marks behind it."""
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or not _is_mark(text[end]):
            yield text[start:end]
            start = end


def unknown_characters(spelling: Spelling, transcripts: Iterable[str]) -> dict[str, int]:
    """The characters that a vocabulary lacks of transcripts, and how often they occur."""
    missing = Counter(token for text in transcripts for token in spelling.unknown(spelling(text)))
    return dict(sorted(missing.items()))


def class_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels, sorted: numbers by value, then names.

    Raises:
        ValueError: there is only one, so that nothing can be learnt.
    """
    names = set(labels)
    if len(names) < 2:
        raise ValueError(
            f"the training manifest names one class only, {''.join(names)!r}; two are needed"
        )
    return sorted(names, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
