"""Tokens and their ids: the vocabulary, the special tokens and the added ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import Tensor

from w2vbert_fast.checkpoints.files import read_json
from w2vbert_fast.processing.added_tokens import (
    AddedToken,
    TokenSplitter,
    to_added_token,
    token_content,
)
from w2vbert_fast.processing.token_ids import to_list
from w2vbert_fast.processing.tokenizer_files import select_vocabulary


class _SpecialToken:
    """A special token of the tokenizer, as an attribute: `pad_token`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> _SpecialToken: ...
    @overload
    def __get__(self, tokenizer: Vocabulary, owner: type) -> str | None: ...
    def __get__(self, tokenizer: Vocabulary | None, owner: type) -> Any:
        return self if tokenizer is None else tokenizer._special_tokens.get(self.name)

    def __set__(self, tokenizer: Vocabulary, value: Any) -> None:
        token = None if value is None else token_content(value, self.name)
        tokenizer._special_tokens[self.name] = token


class _SpecialTokenId:
    """The id of a special token, as an attribute: `pad_token_id`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.token_name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> _SpecialTokenId: ...
    @overload
    def __get__(self, tokenizer: Vocabulary, owner: type) -> int | None: ...
    def __get__(self, tokenizer: Vocabulary | None, owner: type) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._special_tokens.get(self.token_name)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: Vocabulary, value: int | None) -> None:
        token = None if value is None else tokenizer.convert_ids_to_tokens(value)
        tokenizer._special_tokens[self.token_name] = token


class Vocabulary:
    """A vocabulary of characters with special and added tokens, and cutting text into them.

    Args:
        vocab_file: JSON file with the id of each token, or with such a vocabulary per language.
        special_tokens: Special tokens by name. Those that are missing in the vocabulary are added.
        extra_special_tokens: Special tokens without a name.
        file_tokens: Added tokens by id, as a checkpoint holds them.
        do_lower_case: Whether text is raised to upper case.
        split_special_tokens: Whether added tokens are cut into characters too.
        target_lang: Language of a vocabulary per language.

    Raises:
        OSError: The file cannot be read.
        TypeError: A token is no string.
        ValueError: The file is no vocabulary, has no such language, or has languages of which none
            was chosen.
    """

    bos_token = _SpecialToken()
    eos_token = _SpecialToken()
    unk_token = _SpecialToken()
    sep_token = _SpecialToken()
    pad_token = _SpecialToken()
    cls_token = _SpecialToken()
    mask_token = _SpecialToken()
    word_delimiter_token = _SpecialToken()
    bos_token_id = _SpecialTokenId()
    eos_token_id = _SpecialTokenId()
    unk_token_id = _SpecialTokenId()
    sep_token_id = _SpecialTokenId()
    pad_token_id = _SpecialTokenId()
    cls_token_id = _SpecialTokenId()
    mask_token_id = _SpecialTokenId()
    word_delimiter_token_id = _SpecialTokenId()

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        *,
        special_tokens: Mapping[str, Any],
        extra_special_tokens: Sequence[Any],
        file_tokens: Mapping[Any, Any],
        do_lower_case: bool,
        split_special_tokens: bool,
        target_lang: str | None,
    ) -> None:
        self.vocab: dict[str, Any] = read_json(vocab_file)
        self.encoder = select_vocabulary(self.vocab, target_lang, vocab_file)
        self.target_lang = target_lang
        self.do_lower_case = do_lower_case
        self.split_special_tokens = split_special_tokens
        self._special_tokens: dict[str, str | None] = {
            name: None if token is None else token_content(token, name)
            for name, token in special_tokens.items()
        }
        self.extra_special_tokens = [
            token_content(token, "additional_special_tokens") for token in extra_special_tokens
        ]
        self._file_tokens = {
            int(index): to_added_token(token, f"added_tokens_decoder[{index}]")
            for index, token in file_tokens.items()
        }
        self._user_tokens: list[AddedToken] = []
        self._rebuild()

    def _rebuild(self) -> None:
        """Derives the added tokens from the vocabulary, the file, and what callers added."""
        self.decoder = {index: token for token, index in self.encoder.items()}
        self._added_decoder = {
            index: token
            for index, token in self._file_tokens.items()
            if not self._is_of_another_language(token.content, index)
        }
        self._added_encoder = {t.content: index for index, t in self._added_decoder.items()}
        known = set(self._added_encoder)
        specials = [token for token in self.all_special_tokens if token not in known]
        self._add(AddedToken(token, special=True) for token in specials)
        self._add(
            AddedToken(token, lstrip=True, rstrip=True, normalized=False)
            for token in self.encoder
            if len(token) > 1
        )
        self._add(self._user_tokens)

    def _is_of_another_language(self, token: str, index: int) -> bool:
        """Whether a file's added token is there for the language that it was saved with."""
        languages = [value for value in self.vocab.values() if isinstance(value, Mapping)]
        if not languages or self.decoder.get(index) == token:
            return False
        return index in self.decoder or any(value.get(token) == index for value in languages)

    def _add(self, tokens: Iterable[AddedToken]) -> int:
        """Makes tokens unsplittable; gives those that are new an id. Returns how many are new."""
        vocabulary = self.get_vocab()
        used = {*self.decoder, *self._added_decoder}
        next_id = len(vocabulary)
        num_new = 0
        for token in tokens:
            if not token.content:
                continue
            if token.content not in vocabulary:
                while next_id in used:
                    next_id += 1
                vocabulary[token.content] = next_id
                used.add(next_id)
                num_new += 1
            index = vocabulary[token.content]
            self._added_decoder[index] = token
            self._added_encoder[token.content] = index
        self._splitter = TokenSplitter(
            self._added_decoder[index] for index in sorted(self._added_encoder.values())
        )
        self._tokens_by_id = {
            **{index: token.content for index, token in self._added_decoder.items()},
            **self.decoder,
        }
        return num_new

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens that are never split; ids of new ones follow the vocabulary's.

        Args:
            new_tokens: A string, an `AddedToken`, or several.
            special_tokens: Whether `skip_special_tokens` leaves them out.

        Returns:
            The number of tokens that were not in the vocabulary.

        Raises:
            TypeError: A token is no string.
        """
        if isinstance(new_tokens, str) or not isinstance(new_tokens, Sequence):
            new_tokens = [new_tokens]
        tokens = [self._to_add(token, special_tokens) for token in new_tokens]
        known = set(self.all_special_tokens)
        self.extra_special_tokens += [
            token.content for token in tokens if token.special and token.content not in known
        ]
        self._user_tokens += tokens
        return self._add(tokens)

    def _to_add(self, token: Any, special: bool) -> AddedToken:
        """A caller's token, special if it says so itself or `special` does."""
        added = to_added_token(token, "new_tokens")
        special = special or added.special
        lowered = self.do_lower_case and added.normalized and not special
        content = added.content.lower() if lowered else added.content
        return replace(added, content=content, special=special)

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Sets special tokens and adds those that the vocabulary does not hold.

        Args:
            special_tokens_dict: Tokens by name, e.g. `{"pad_token": "[PAD]"}`;
                `additional_special_tokens` is a list.

        Returns:
            The number of tokens that were not in the vocabulary.

        Raises:
            TypeError: A token is no string.
            ValueError: There is no such special token.
        """
        tokens: list[Any] = []
        for name, value in special_tokens_dict.items():
            if name in ("additional_special_tokens", "extra_special_tokens"):
                self.extra_special_tokens = [token_content(token, name) for token in value]
                tokens += value
            elif name in self._special_tokens:
                self._special_tokens[name] = token_content(value, name)
                tokens.append(value)
            else:
                names = ", ".join([*self._special_tokens, "additional_special_tokens"])
                raise ValueError(f"special_tokens_dict must name some of {names}, got {name!r}")
        return self.add_tokens(tokens, special_tokens=True)

    def set_target_lang(self, target_lang: str) -> None:
        """Chooses the language of a vocabulary per language.

        Raises:
            ValueError: The vocabulary has no languages, or not this one.
        """
        self.encoder = select_vocabulary(self.vocab, target_lang, "this tokenizer's vocabulary")
        self.target_lang = target_lang
        self._rebuild()

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.get_vocab())

    @property
    def vocab_size(self) -> int:
        """Number of ids in the vocabulary, without added ones."""
        return len(self.decoder)

    def get_vocab(self) -> dict[str, int]:
        """The id of each token, added ones included."""
        added = {token.content: index for index, token in sorted(self._added_decoder.items())}
        return {**self.encoder, **added}

    def get_added_vocab(self) -> dict[str, int]:
        """The id of each added token, those that the vocabulary holds included."""
        return dict(self._added_encoder)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The id of each added token, in the order of ids."""
        return {token.content: i for i, token in sorted(self._added_decoder.items())}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added token of each id."""
        return dict(sorted(self._added_decoder.items()))

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name, without the additional ones."""
        return {name: token for name, token in self._special_tokens.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        tokens = [*self.special_tokens_map.values(), *self.extra_special_tokens]
        return list(dict.fromkeys(tokens))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        """Cuts a text into tokens.

        Args:
            text: Any text. Characters outside the vocabulary are kept.

        Raises:
            TypeError: `text` is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        if self.split_special_tokens:
            return self._characters(text)
        tokens: list[str] = []
        for piece in self._splitter.split(text):
            tokens += [piece] if piece in self._splitter else self._characters(piece)
        return tokens

    def _characters(self, text: str) -> list[str]:
        delimiter = self.word_delimiter_token
        if self.do_lower_case:
            text = text.upper()
        if delimiter is None:
            return list(text)
        if len(delimiter) <= 1:
            return list(text.replace(" ", delimiter))
        return [delimiter if character == " " else character for character in text]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str] | tuple[str, ...]) -> int | list[int]:
        """The id of a token, or of each of several.

        Raises:
            ValueError: A token is not in the vocabulary and there is no `unk_token` that is.
        """
        if isinstance(tokens, str):
            return self._token_to_id(tokens)
        return [self._token_to_id(token) for token in tokens]

    def _token_to_id(self, token: str) -> int:
        for vocabulary in (self._added_encoder, self.encoder):
            if token in vocabulary:
                return vocabulary[token]
        unknown = self.unk_token
        for vocabulary in (self.encoder, self._added_encoder):
            if unknown is not None and unknown in vocabulary:
                return vocabulary[unknown]
        raise ValueError(
            f"token {token!r} is not in the vocabulary, and neither is unk_token "
            f"({self.unk_token!r}), which would stand for it"
        )

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...
    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = False
    ) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of several.

        Args:
            ids: An id; or a list, array or tensor of ids.
            skip_special_tokens: Whether to leave special tokens out; for several only.

        Returns:
            A string or a list of strings. An id outside the vocabulary gives `unk_token`.

        Raises:
            TypeError: `ids` are no integers.
        """
        ids = to_list(ids)
        unknown = self.unk_token or ""
        if isinstance(ids, int):
            return self._tokens_by_id.get(ids, unknown)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._tokens_by_id.get(index, unknown) for index in ids if index not in skipped]
