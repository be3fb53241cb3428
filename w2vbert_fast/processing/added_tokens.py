"""Tokens beyond the characters of a vocabulary, and their form in checkpoint files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """A token that is never split.

    Attributes:
        content: The token.
        lstrip: Whether white space on its left belongs to it and is dropped.
        rstrip: Whether white space on its right belongs to it and is dropped.
        single_word: Whether it only counts when nothing but spaces stand beside it.
        normalized: Whether a tokenizer with `do_lower_case` lowers it when it is added, unless it
            is special. None: whether it is not special.
        special: Whether `skip_special_tokens` leaves it out.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def to_dict(self) -> dict[str, Any]:
        """The entry of `added_tokens_decoder`."""
        return asdict(self)


def token_content(token: Any, name: str) -> str:
    """The text of a token that a file gives as a string or as an object with `content`.

    Raises:
        TypeError: It is neither; the message names it by `name`.
    """
    if isinstance(token, str):
        return token
    content = (
        token.get("content") if isinstance(token, Mapping) else getattr(token, "content", None)
    )
    if not isinstance(content, str):
        raise TypeError(f"{name} must be a string or an added token, got {token!r}")
    return content


def to_added_token(token: Any, name: str) -> AddedToken:
    """An `AddedToken` of a string, an entry of a file or any object with the same attributes.

    Raises:
        TypeError: It is none of these; the message names it by `name`.
    """
    content = token_content(token, name)
    if isinstance(token, str):
        return AddedToken(content, normalized=False)
    flags = token if isinstance(token, Mapping) else vars_of(token)
    return AddedToken(content, **{flag: bool(flags.get(flag, False)) for flag in _FLAGS})


def vars_of(token: Any) -> dict[str, Any]:
    """The flags of an added token of another library."""
    return {flag: getattr(token, flag, False) for flag in _FLAGS}


def is_special_token(name: str, value: Any) -> bool:
    """Whether an entry of a tokenizer's file is a special token, as `pad_token` is.

    `add_bos_token` is a flag, and so not.
    """
    has_content = isinstance(value, str | Mapping) or hasattr(value, "content")
    return name.endswith("_token") and (value is None or has_content)


class TokenSplitter:
    """Cuts text at added tokens: leftmost first, the longest of those that begin together.

    Args:
        tokens: The added tokens. Empty ones are ignored.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        contents = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents))) if contents else None

    def __contains__(self, text: str) -> bool:
        return text in self._tokens

    def split(self, text: str) -> list[str]:
        """The pieces of `text` in order: added tokens, and the text between them, never empty."""
        pieces: list[str] = []
        end = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            pieces += [text[end : match.start()], match.group()]
            end = match.end()
        pieces.append(text[end:])
        pieces = [piece for piece in pieces if piece]
        for index, piece in enumerate(pieces):
            token = self._tokens.get(piece)
            if token is not None:
                self._apply_flags(token, index, pieces)
        return [piece for piece in pieces if piece]

    @staticmethod
    def _apply_flags(token: AddedToken, index: int, pieces: list[str]) -> None:
        """Lets a token take white space from its neighbours, or become part of one."""
        left = pieces[index - 1] if index > 0 else ""
        right = pieces[index + 1] if index + 1 < len(pieces) else ""
        if token.rstrip and right:
            pieces[index + 1] = right.lstrip()
        if token.lstrip and left:
            pieces[index - 1] = left.rstrip()
        if not token.single_word:
            return
        # Spaces that the token takes make it a word of its own all the same.
        if left and left[-1] != " ":
            pieces[index - 1] += token.content
            pieces[index] = ""
        elif right and right[0] != " ":
            pieces[index + 1] = token.content + pieces[index + 1]
            pieces[index] = ""
