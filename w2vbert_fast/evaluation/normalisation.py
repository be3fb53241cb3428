"""How texts are made alike before they are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

AUTO = "auto"
NONE = "none"

_APOSTROPHES = str.maketrans("\u2019\u02bc\uff07", "'''")
# Within a word it is a part of its spelling.
_OTHER_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")


@dataclass(frozen=True)
class Normalisation:
    """What does not count when texts are compared; their Unicode form and spacing never do.

    Attributes:
        case: upper and lower case are the same.
        punctuation: punctuation and symbols (Unicode's categories P and S) are spaces, but for
            apostrophes within words.
    """

    case: bool = False
    punctuation: bool = False

    def __call__(self, text: str) -> str:
        """The text as it is compared."""
        text = unicodedata.normalize("NFC", text)
        if self.punctuation:
            text = text.translate(_APOSTROPHES)
            text = "".join(" " if _is_mark(c) and c != "'" else c for c in text)
            text = _OTHER_APOSTROPHE.sub(" ", text)
        if self.case:
            text = unicodedata.normalize("NFC", text.lower())
        return " ".join(text.split())

    def __str__(self) -> str:
        parts = ["NFC", "single spaces"]
        parts += ["lower case"] * self.case + ["no punctuation but apostrophes"] * self.punctuation
        return ", ".join(parts)


def chosen(choice: str, sides: Iterable[Iterable[str]]) -> Normalisation:
    """The normalisation that a name stands for.

    Args:
        choice: "none"; "case", "punctuation", or both with a comma between; or "auto": what one
            side writes and another one never does is nothing that they could agree in.
        sides: the texts of each side, references and hypotheses of each system, for "auto". A side
            without any letters does not count.

    Raises:
        ValueError: it is another name.
    """
    if choice == AUTO:
        read = []
        for texts in sides:
            written = _Written()
            for text in texts:
                written.read(text)
            if written.letters:
                read.append(written)
        return Normalisation(
            case=len({side.upper for side in read}) > 1 or len({side.lower for side in read}) > 1,
            punctuation=len({side.punctuation for side in read}) > 1,
        )
    names = [] if choice == NONE else [name.strip() for name in choice.split(",")]
    if not set(names) <= {"case", "punctuation"}:
        raise ValueError(
            f"normalise must be {AUTO}, {NONE}, case, punctuation or case,punctuation, "
            f"got {choice!r}"
        )
    return Normalisation(case="case" in names, punctuation="punctuation" in names)


class _Written:
    """What kinds of characters texts have."""

    def __init__(self) -> None:
        self.letters = self.upper = self.lower = self.punctuation = False

    def read(self, text: str) -> None:
        for character in set(text.translate(_APOSTROPHES)) - {"'"}:
            self.letters |= character.isalpha()
            self.upper |= character.isupper()
            self.lower |= character.islower()
            self.punctuation |= _is_mark(character)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"
