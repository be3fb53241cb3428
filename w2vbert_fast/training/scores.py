"""Scores of recognised texts: word error rate, character error rate, and which of them to go by."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from w2vbert_fast._extras import require


def separates_words(transcripts: Iterable[str]) -> bool:
    """Whether transcripts have spaces between words, and are mostly of a script that has them.

    A foreign name, or a stray space, does not separate the words of Chinese.
    """
    from w2vbert_fast.processing.scripts import is_unspaced

    count = Counter(
        "space" if c == " " else "unspaced" if is_unspaced(c) else "letter"
        for text in transcripts
        for c in text
    )
    return count["space"] > 0 and count["letter"] >= count["unspaced"]


def is_better(name: str, score: float, best: float | None) -> bool:
    """Whether a score beats the best so far: below it for error rates, above it for accuracy."""
    if best is None:
        return True
    return score > best if name == "accuracy" else score < best


def error_rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Word and character error rate over all utterances together.

    Texts are compared in NFC: a composed character and its parts are the same.

    Args:
        pairs: reference and hypothesis of each. An empty reference is allowed, and what is
            recognised there counts as inserted.

    Returns:
        `wer` and `cer`: substitutions, deletions and insertions over the length of the references.
    """
    jiwer = require("jiwer", "train")
    pairs = [
        (unicodedata.normalize("NFC", reference), unicodedata.normalize("NFC", hypothesis))
        for reference, hypothesis in pairs
    ]
    spoken = [pair for pair in pairs if pair[0]]
    silent = [hypothesis for reference, hypothesis in pairs if not reference]
    rates = {}
    for name, process, split in (
        ("wer", jiwer.process_words, str.split),
        ("cer", jiwer.process_characters, list),
    ):
        errors = sum(len(split(hypothesis)) for hypothesis in silent)
        total = 0
        if spoken:
            counts = process(*map(list, zip(*spoken, strict=True)))
            errors += counts.substitutions + counts.deletions + counts.insertions
            total = counts.hits + counts.substitutions + counts.deletions
        rates[name] = errors / max(1, total)
    return rates
