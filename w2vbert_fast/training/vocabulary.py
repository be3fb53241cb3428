"""A CTC vocabulary from transcripts, and the names of classes from labels."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from w2vbert_fast._files import make_folder, write_text
from w2vbert_fast.tokenization import Wav2Vec2CTCTokenizer

BLANK = "[PAD]"
UNKNOWN = "[UNK]"
WORD_DELIMITER = "|"
BACKGROUND = "none"
"""Class of the frames that no segment covers."""


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
    """A tokenizer of the characters of transcripts.

    The blank has id 0, then come the unknown token, the word delimiter and the characters.

    Args:
        transcripts: texts with single spaces between words.
        folder: gets `vocab.json`; made when it is missing.
        min_count: rarer characters become unknown.

    Raises:
        ValueError: see `characters_of`.
    """
    tokens = [BLANK, UNKNOWN, WORD_DELIMITER, *characters_of(transcripts, min_count)]
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


def unknown_characters(
    tokenizer: Wav2Vec2CTCTokenizer, transcripts: Iterable[str]
) -> dict[str, int]:
    """The characters that a tokenizer does not hold, and how often they occur."""
    counts = Counter(character for text in transcripts for character in text)
    counts.pop(" ", None)
    missing = {}
    for character, count in sorted(counts.items()):
        try:
            ids = tokenizer(character)["input_ids"]
        except ValueError:  # no unknown token either
            ids = []
        if not ids or tokenizer.unk_token_id in ids:
            missing[character] = count
    return missing


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
