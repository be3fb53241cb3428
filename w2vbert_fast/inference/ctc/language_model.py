"""n-gram language models for the beam search: finding them, and the words that they know."""

from __future__ import annotations

import gzip
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import read_json
from w2vbert_fast.checkpoints.repository import Repository

FOLDER = "language_model"
"""Folder of a checkpoint that pyctcdecode, and so transformers' Wav2Vec2ProcessorWithLM, writes."""

_ATTRIBUTES = "attrs.json"
_UNIGRAMS = "unigrams.txt"
_ALPHABET = "alphabet.json"
# What language models hold beside words.
_MARKERS = frozenset(("<s>", "</s>", "<unk>", "<UNK>"))
# KenLM's lm/binary_format: the magic bytes and test values, then order, multiplier, type, whether
# the words are at the end of the file, version, and the number of n-grams of each order.
_KENLM_MAGIC = b"mmap lm http://kheafield.com/code format version"
_KENLM_HEADER = struct.Struct("<88xBxxxfI?xxxIQ")
_GZIP_MAGIC = b"\x1f\x8b"
_FIRST_WORD = b"<unk>\0"


@dataclass(frozen=True)
class LanguageModel:
    """A language model's file, with what goes with it.

    Attributes:
        path: ARPA or KenLM's binary format.
        unigrams: file of the words that it knows, one a line; None: as its own file says.
        labels: how each token of the tokenizer is spelt, by id; None: as the tokenizer spells it.
        lm_weight: weight of its logarithm; None: the decoder's own, and so below.
        word_bonus: for each word.
        unknown_word_penalty: taken off the base-10 logarithm of an unknown word.
        score_boundary: whether beginning and end of a sentence count.
    """

    path: Path
    unigrams: Path | None = None
    labels: tuple[str, ...] | None = None
    lm_weight: float | None = None
    word_bonus: float | None = None
    unknown_word_penalty: float | None = None
    score_boundary: bool = True

    def arguments(self) -> dict[str, Any]:
        """What `BeamDecoder` takes besides the path; what is not known is left out.

        Raises:
            OSError: the file of words cannot be read.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        del given["path"]
        if self.unigrams is not None:
            given["unigrams"] = read_words(self.unigrams)
        return {name: value for name, value in given.items() if value is not None}


def find_language_model(
    model: str | os.PathLike[str], *, revision: str | None = None
) -> LanguageModel | None:
    """The language model in the folder `language_model` of a checkpoint.

    The files are those of pyctcdecode, which transformers' `Wav2Vec2ProcessorWithLM` saves: one
    language model, `attrs.json` with `alpha`, `beta`, `unk_score_offset` and `score_boundary`,
    `unigrams.txt`; and beside the folder `alphabet.json`.

    Args:
        model: a folder or a hub id.
        revision: branch, tag or commit on the hub.

    Returns:
        The language model, or None where the checkpoint has no such folder.

    Raises:
        OSError: the checkpoint is not to be had.
        ValueError: the folder holds no language model, or several; or a file in it is damaged.
    """
    folder = Repository(model, revision).find_folder(FOLDER, beside=(_ALPHABET,))
    if folder is None:
        return None
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in (_ATTRIBUTES, _UNIGRAMS)
        and not path.name.startswith((".", "__"))
    ]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{folder} must hold one language model beside {_ATTRIBUTES} and {_UNIGRAMS}, found "
            f"{names}; name the file to use"
        )
    given = _attributes(folder / _ATTRIBUTES)
    unigrams = folder / _UNIGRAMS
    return LanguageModel(
        found[0],
        # pyctcdecode writes an empty file where it knows no words.
        unigrams=unigrams if unigrams.is_file() and unigrams.stat().st_size else None,
        labels=_labels(folder.parent / _ALPHABET),
        **given,
    )


def _attributes(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    found: dict[str, Any] = {}
    for name, ours in (("alpha", "lm_weight"), ("beta", "word_bonus"), ("unk_score_offset", "")):
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name} must be a number, got {value!r}")
        found[ours or "unknown_word_penalty"] = float(value) if ours else -float(value)
    boundary = content.get("score_boundary")
    if boundary is not None:
        if not isinstance(boundary, bool):
            raise ValueError(f"{path}: score_boundary must be true or false, got {boundary!r}")
        found["score_boundary"] = boundary
    return found


def _labels(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("is_bpe"):
        raise ValueError(f"{path} has parts of words as labels; the beam search needs characters")
    labels = content.get("labels") or None
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: labels must be a list of texts")
    return tuple(labels)


def read_words(path: str | os.PathLike[str]) -> list[str]:
    """A file of words or phrases, one a line, as UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds no words.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is not UTF-8: {error}") from error
    words = [line.strip() for line in lines]
    words = [word for word in words if word and word not in _MARKERS]
    if not words:
        raise ValueError(f"{os.fspath(path)!r} holds no words, one a line")
    return words


def words_of(path: Path) -> list[str] | None:
    """The words of a language model's file; None where KenLM's binary format does not hold them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is an ARPA file that is damaged or without words.
    """
    with path.open("rb") as file:
        head = file.read(len(_KENLM_MAGIC))
        if head == _KENLM_MAGIC:
            return _words_of_binary(file)
    reader: Any = gzip.open if head.startswith(_GZIP_MAGIC) else open
    try:
        if not path.name.endswith((".arpa", ".arpa.gz")):
            with reader(path, "rb") as file:
                if not file.read(64).lstrip().startswith(b"\\data\\"):
                    return None
        with reader(path, "rt", encoding="utf-8") as lines:
            words = _words_of_arpa(lines)
    except (EOFError, IndexError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"lm_path: {str(path)!r} is damaged: {error}") from error
    if not words:
        raise ValueError(f"lm_path: {str(path)!r} holds no words; is it an ARPA file?")
    return words


def _words_of_binary(file: Any) -> list[str] | None:
    """The words at the end of a binary file, each with a zero byte, the first of them `<unk>`."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if len(content) < _KENLM_HEADER.size:
            return None
        *_, has_words, _, count = _KENLM_HEADER.unpack_from(content)
        place = content.rfind(_FIRST_WORD) if has_words else -1
        while place >= 0:
            # An ARPA file need not have counted `<unk>`.
            words = content[place:].split(b"\0")
            if words.pop() == b"" and len(words) in (count, count + 1):
                decoded = [word.decode("utf-8", "replace") for word in words]
                return [word for word in decoded if word not in _MARKERS]
            if len(words) > count + 1:
                return None
            place = content.rfind(_FIRST_WORD, 0, place)
    return None


def _words_of_arpa(lines: Iterable[str]) -> list[str]:
    words: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("\\"):
            if inside:
                break
            inside = line.strip() == "\\1-grams:"
        elif inside and line.strip():
            # Log-probability, word, and back-off weight if longer n-grams begin with it.
            words.append(line.split()[1])
    return [word for word in words if word not in _MARKERS]
