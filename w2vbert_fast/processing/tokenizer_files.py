"""The files of a tokenizer.

`vocab.json` holds the vocabulary; `tokenizer_config.json` the arguments and, since 2023, all added
tokens as `added_tokens_decoder`. Older checkpoints keep the special tokens in
`special_tokens_map.json` and tokens beyond the vocabulary in `added_tokens.json`, which count only
where `added_tokens_decoder` is missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import make_folder, write_json
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.processing.added_tokens import AddedToken, is_special_token, token_content

VOCABULARY_FILE = "vocab.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TOKENIZER_CLASS = "Wav2Vec2CTCTokenizer"

# "Wav2Vec2Tokenizer" is what the class was called at first.
_READABLE_CLASSES = (TOKENIZER_CLASS, TOKENIZER_CLASS + "Fast", "Wav2Vec2Tokenizer")
# Arguments of the tokenizer that files need not hold.
_KNOWN_ENTRIES = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "clean_up_tokenization_spaces",
    "do_lower_case",
    "extra_special_tokens",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "padding_side",
    "processor_class",
    "replace_word_delimiter_char",
    "split_special_tokens",
    "target_lang",
    "truncation_side",
)
# What other writers leave about how they themselves loaded the files.
_FOREIGN_ENTRIES = (
    "added_tokens_file",
    "backend",
    "files_loaded",
    "init_inputs",
    "is_local",
    "local_files_only",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_config_file",
    "tokenizer_file",
    "vocab_file",
)


def select_vocabulary(
    vocabulary: Mapping[str, Any], target_lang: str | None, source: object
) -> dict[str, int]:
    """The ids of a vocabulary, of one language where it has several.

    Args:
        vocabulary: Ids by token, or vocabularies by language.
        target_lang: The language, None if there is but one.
        source: Where the vocabulary is from, for messages.

    Raises:
        ValueError: There is no such language, none was chosen, or an id is no integer from 0 on.
    """
    languages = [name for name, value in vocabulary.items() if isinstance(value, Mapping)]
    if languages:
        if target_lang not in languages:
            raise ValueError(
                f"target_lang must be one of {', '.join(sorted(languages))}, the languages of "
                f"{source}, got {target_lang!r}"
            )
        vocabulary = vocabulary[target_lang]
    elif target_lang is not None:
        raise ValueError(f"target_lang is {target_lang!r}, but {source} has no languages")
    for token, index in vocabulary.items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(
                f"ids in {source} must be integers from 0 on, got {index!r} for {token!r}"
            )
    return dict(vocabulary)


def read_arguments(repository: Repository, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the tokenizer that a checkpoint holds, `vocab_file` among them.

    Args:
        repository: Where the files are.
        overrides: Arguments that replace those of the files.

    Raises:
        OSError: There is no `vocab.json`.
        TypeError: An override is no argument.
        ValueError: A file is broken or belongs to another kind of tokenizer.
    """
    vocab_file = repository.find(VOCABULARY_FILE)
    if vocab_file is None:
        raise OSError(f"{repository.path_or_id} holds no tokenizer: no {VOCABULARY_FILE}")
    arguments = repository.read_json(CONFIG_FILE) or {}
    kind = arguments.get("tokenizer_class") or TOKENIZER_CLASS
    if kind not in _READABLE_CLASSES:
        raise ValueError(
            f"tokenizer_class in {CONFIG_FILE} of {repository.path_or_id} must be "
            f"{TOKENIZER_CLASS!r}, got {kind!r}: these files belong to another kind of tokenizer"
        )
    for name, value in overrides.items():
        is_known = name in arguments or name in _KNOWN_ENTRIES
        if not is_known and not is_special_token(name, value):
            raise TypeError(f"{name}: no argument of {TOKENIZER_CLASS}")
    for name in _FOREIGN_ENTRIES:
        arguments.pop(name, None)
    if "added_tokens_decoder" not in arguments:
        special_tokens = repository.read_json(SPECIAL_TOKENS_FILE) or {}
        arguments.update(special_tokens)
        specials = {
            token_content(token, name)
            for name, token in {**arguments, **overrides}.items()
            if is_special_token(name, token) and token is not None
        }
        added = repository.read_json(ADDED_TOKENS_FILE) or {}
        arguments["added_tokens_decoder"] = {
            index: AddedToken(token, normalized=False, special=token in specials)
            for token, index in added.items()
        }
    return {**arguments, **overrides, "vocab_file": vocab_file}


def write_files(
    save_directory: str | os.PathLike[str],
    *,
    vocabulary: Mapping[str, Any],
    arguments: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    added_tokens: Mapping[int, AddedToken],
    ids_in_vocabulary: int,
) -> list[str]:
    """Writes a tokenizer's files, in the forms that all versions of transformers read.

    Args:
        save_directory: The folder, which is made if it is missing.
        vocabulary: Content of `vocab.json`.
        arguments: Content of `tokenizer_config.json` but for the added tokens.
        special_tokens: Content of `special_tokens_map.json`.
        added_tokens: Added tokens by id.
        ids_in_vocabulary: Added tokens from this id on go into `added_tokens.json`.

    Returns:
        The paths of the files.

    Raises:
        NotADirectoryError: `save_directory` is a file.
    """
    folder = make_folder(save_directory)
    decoder = {str(index): token.to_dict() for index, token in added_tokens.items()}
    beyond = {t.content: index for index, t in added_tokens.items() if index >= ids_in_vocabulary}
    contents: dict[str, Mapping[str, Any]] = {
        VOCABULARY_FILE: vocabulary,
        CONFIG_FILE: {
            **arguments,
            "added_tokens_decoder": decoder,
            "tokenizer_class": TOKENIZER_CLASS,
        },
        SPECIAL_TOKENS_FILE: special_tokens,
    }
    if beyond:
        contents[ADDED_TOKENS_FILE] = beyond
    else:
        Path(folder, ADDED_TOKENS_FILE).unlink(missing_ok=True)
    for filename, content in contents.items():
        write_json(folder / filename, content)
    return [str(folder / filename) for filename in contents]
