"""Scores of recognised texts: their errors, the rates of these, and which rate to go by."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

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


class Alignment(NamedTuple):
    """What makes a hypothesis of a reference.

    Attributes:
        length: words or characters of the reference.
        edits: reference's and hypothesis's word or character of each error; "" for the one that
            is not there, of an insertion or a deletion.
    """

    length: int
    edits: tuple[tuple[str, str], ...]


def align(pairs: Sequence[tuple[str, str]], score: str) -> list[Alignment]:
    """The errors of each utterance, as few as can be.

    Texts are compared in NFC: a composed character and its parts are the same.

    Args:
        pairs: reference and hypothesis of each. An empty reference is allowed, and what is
            recognised there counts as inserted.
        score: "wer", of words between spaces, or "cer", of characters.

    Raises:
        ImportError: jiwer is not installed.
    """
    jiwer = require("jiwer", "evaluate")
    process = jiwer.process_words if score == "wer" else jiwer.process_characters
    split: Callable[[str], list[str]] = str.split if score == "wer" else list
    pairs = [
        (unicodedata.normalize("NFC", reference), unicodedata.normalize("NFC", hypothesis))
        for reference, hypothesis in pairs
    ]
    found = [Alignment(0, tuple(("", unit) for unit in split(text))) for _, text in pairs]
    spoken = [i for i, (reference, _) in enumerate(pairs) if reference]
    if not spoken:
        return found
    output = process([pairs[i][0] for i in spoken], [pairs[i][1] for i in spoken])
    aligned = zip(spoken, output.references, output.hypotheses, output.alignments, strict=True)
    for i, reference, hypothesis, chunks in aligned:
        edits = [
            edit
            for chunk in chunks
            if chunk.type != "equal"
            for edit in zip_longest(
                reference[chunk.ref_start_idx : chunk.ref_end_idx],
                hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx],
                fillvalue="",
            )
        ]
        found[i] = Alignment(len(reference), tuple(edits))
    return found


def error_rates(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Word and character error rate over all utterances together.

    Args:
        pairs: as for `align`.

    Returns:
        `wer` and `cer`: substitutions, deletions and insertions over the length of the references.
    """
    rates = {}
    for name in ("wer", "cer"):
        found = align(pairs, name)
        errors = sum(len(alignment.edits) for alignment in found)
        rates[name] = errors / max(1, sum(alignment.length for alignment in found))
    return rates
