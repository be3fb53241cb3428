"""Text on a screen: how wide it is, what its characters are, and where a line of it may end.

Python's own tables (`unicodedata`) decide. Widths are those of East Asian Width (Unicode Standard
Annex 11); characters and places to break are the parts of Annexes 29 and 14 that matter for text
without spaces, such as Chinese, Japanese, Thai, Lao, Khmer and Burmese.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

# Scripts whose words are not separated, as the names of their characters begin. What is wide and no
# Hangul is one too: Han, Yi, Bopomofo, full-width forms, emoji.
_UNSPACED = (
    *("HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "CJK", "HALFWIDTH KATAKANA", "HALFWIDTH IDEOGRAPHIC"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI ", "NEW TAI", "JAVANESE", "BALINESE"),
)
# Letters that end a syllable and begin no line: small kana, the long vowel, signs of repetition.
_NEVER_FIRST = ("LETTER SMALL", "SOUND MARK", "ITERATION MARK", "MAIYAMOK", "LAO KO LA")
# Letters that are written in front of the consonant that they follow.
_LEADING_VOWELS = frozenset("เแโใไເແໂໃໄ")
# Signs that put the next consonant below the one before.
_STACKERS = frozenset("\u1039\u17d2")
_JOINERS = frozenset("\u200c\u200d")
# Vowels behind a consonant that are letters of their own in Unicode.
_TRAILING_VOWELS = frozenset("\u0e33\u0eb3\uff9e\uff9f")

_SENTENCE_ENDS = frozenset(
    ".!?…‼⁇⁈⁉"
    "。．｡！？︒︕︖﹒﹖﹗"  # noqa: RUF001 - full-width and vertical forms
    "։؟۔।॥။។།༎።፧"  # noqa: RUF001 - Armenian to Ethiopic
)
_QUOTATION_MARKS = frozenset("\"'")
_POINTS = frozenset(".．")  # noqa: RUF001 - full-width form
# Colours of the emoji before them.
_EMOJI_MODIFIERS = frozenset("🏻🏼🏽🏾🏿")


def columns(text: str) -> int:
    """The width of a text: two columns a wide character, none a combining mark, else one."""
    return sum(_columns(character) for character in text)


@lru_cache(maxsize=4096)
def _columns(character: str) -> int:
    category = unicodedata.category(character)
    if category in ("Mn", "Me", "Cf", "Cc") or character in _EMOJI_MODIFIERS:
        return 0
    if _is_trailing_jamo(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _is_trailing_jamo(character: str) -> bool:
    """Whether it is a vowel or a final consonant of a Korean syllable in several characters."""
    return "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7ff"


@lru_cache(maxsize=4096)
def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces between words."""
    name = unicodedata.name(character, "")
    if name.startswith(_UNSPACED):
        return True
    return unicodedata.east_asian_width(character) in "WF" and "HANGUL" not in name


def graphemes(text: str) -> Iterator[str]:
    """What a reader calls characters: letters with their marks, syllables of several parts."""
    found = ""
    for character in text:
        if found and not _joined(found[-1], character):
            yield found
            found = ""
        found += character
    if found:
        yield found


def _joined(last: str, character: str) -> bool:
    return (
        unicodedata.category(character)[0] == "M"
        or character in _JOINERS
        or character in _TRAILING_VOWELS
        or character in _EMOJI_MODIFIERS
        or _is_trailing_jamo(character)
        or (last in _LEADING_VOWELS and character not in _LEADING_VOWELS)
        or last in _STACKERS
        or last == "\u200d"
    )


def may_break(before: str, after: str) -> bool:
    """Whether a line may end between two graphemes that no space separates.

    It may beside a character of a script without spaces; but not in front of a mark of punctuation
    that closes, a small kana or a sign of repetition, nor behind a mark that opens, nor behind the
    point of a number or an abbreviation, be they of full width.
    """
    if before[-1] in _POINTS and unicodedata.normalize("NFKC", after[0]).isascii():
        return False
    if not (is_unspaced(before[-1]) or is_unspaced(before[0]) or is_unspaced(after[0])):
        return False
    return not (_is_opening(before[0]) or _begins_no_line(after[0]))


def _is_opening(character: str) -> bool:
    return unicodedata.category(character) in ("Ps", "Pi")


@lru_cache(maxsize=4096)
def _begins_no_line(character: str) -> bool:
    if unicodedata.category(character)[0] == "P":
        return not _is_opening(character)
    name = unicodedata.name(character, "")
    return is_unspaced(character) and any(part in name for part in _NEVER_FIRST)


def ends_sentence(text: str) -> bool:
    """Whether a text ends with the mark of a sentence's end, closing brackets and quotes apart."""
    for character in reversed(text):
        if character in _SENTENCE_ENDS:
            return True
        if character not in _QUOTATION_MARKS and unicodedata.category(character) not in (
            "Pe",
            "Pf",
        ):
            return False
    return False
