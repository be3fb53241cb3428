"""Characters to ids and CTC paths to text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.hub import FilesMixin
from w2vbert_fast.checkpoints.keywords import TOKENIZERS
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.processing.added_tokens import AddedToken, is_special_token
from w2vbert_fast.processing.batch import BatchFeature
from w2vbert_fast.processing.text import (
    Wav2Vec2CTCTokenizerOutput,
    clean_up_spaces,
    collapse,
    word_offsets,
)
from w2vbert_fast.processing.token_ids import (
    NO_LIMIT,
    collect_ids,
    is_id_list,
    pad_ids,
    to_list,
    truncate_ids,
    wanted_lengths,
)
from w2vbert_fast.processing.tokenizer_files import read_arguments, write_files
from w2vbert_fast.processing.vocabulary import Vocabulary

__all__ = ["AddedToken", "Wav2Vec2CTCTokenizer", "Wav2Vec2CTCTokenizerOutput"]


class Wav2Vec2CTCTokenizer(FilesMixin, Vocabulary):
    """Character tokenizer for CTC models.

    A token is a character of the vocabulary, or one of the added tokens, which are never split: the
    special tokens and the vocabulary's tokens of several characters. White space beside a token of
    several characters is dropped. The padding token is the CTC blank.

    Names, arguments and file formats are those of `Wav2Vec2CTCTokenizer` in transformers. It gives
    the same ids and texts, except where the reference goes wrong:

    * `skip_special_tokens=True` drops blanks after merging repeats, so "l", blank, "l" stays "ll",
      and offsets still count all frames;
    * a `word_delimiter_token` of a file counts; one of several characters, or None, works;
    * a character outside the vocabulary gets the id of `unk_token` also where `vocab.json` does not
      hold it, and is an error where there is none, instead of None;
    * `decode` of a single id gives its token, and of a 2-D array a list of texts;
    * `set_target_lang` gives the same tokenizer as loading with that language;
    * new ids never collide with ids of a vocabulary that has gaps.

    Args:
        vocab_file: JSON file with the id of each token, or with such a vocabulary per language.
        bos_token: Beginning of a sentence. Not added to texts.
        eos_token: End of a sentence. Not added to texts.
        unk_token: Stands for what the vocabulary does not hold.
        pad_token: Fills up ids, and is the CTC blank.
        word_delimiter_token: Stands for a space between words.
        replace_word_delimiter_char: What decoding puts for `word_delimiter_token`.
        do_lower_case: Whether the vocabulary is upper case for lower-case text: encoding raises the
            text to upper case, decoding lowers it.
        target_lang: Language of a vocabulary per language.
        **kwargs: Further entries of a `tokenizer_config.json`: `model_max_length`, `padding_side`,
            `truncation_side`, `clean_up_tokenization_spaces`, `split_special_tokens`,
            `additional_special_tokens`, other `..._token` entries, which are special tokens too;
            the rest is kept and saved.

    Raises:
        OSError: The file cannot be read.
        TypeError: A special token is no string.
        ValueError: The file is no vocabulary, has no such language, or has languages of which none
            was chosen; or another argument is impossible.
    """

    _keywords = TOKENIZERS

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        unk_token: Any = "<unk>",
        pad_token: Any = "<pad>",
        word_delimiter_token: Any = "|",
        replace_word_delimiter_char: str = " ",
        do_lower_case: bool = False,
        target_lang: str | None = None,
        **kwargs: Any,
    ) -> None:
        named = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "sep_token": kwargs.pop("sep_token", None),
            "pad_token": pad_token,
            "cls_token": kwargs.pop("cls_token", None),
            "mask_token": kwargs.pop("mask_token", None),
            "word_delimiter_token": word_delimiter_token,
        }
        model_specific = dict(kwargs.pop("model_specific_special_tokens", None) or {})
        for name in [name for name, value in kwargs.items() if is_special_token(name, value)]:
            named[name] = kwargs.pop(name)
        extra = kwargs.pop("extra_special_tokens", None)
        additional = kwargs.pop("additional_special_tokens", None)
        extra = additional if extra is None else extra
        if isinstance(extra, Mapping):
            model_specific.update(extra)
            extra = None
        named.update(model_specific)
        super().__init__(
            vocab_file,
            special_tokens=named,
            extra_special_tokens=extra or (),
            file_tokens=kwargs.pop("added_tokens_decoder", None) or {},
            do_lower_case=do_lower_case,
            split_special_tokens=bool(kwargs.pop("split_special_tokens", False)),
            target_lang=target_lang,
        )
        self.replace_word_delimiter_char = replace_word_delimiter_char
        names = kwargs.pop("model_input_names", ("input_ids", "attention_mask"))
        self.model_input_names: list[str] = list(names)
        self.model_max_length = int(kwargs.pop("model_max_length", None) or NO_LIMIT)
        self.padding_side = _side("padding_side", kwargs.pop("padding_side", "right"))
        self.truncation_side = _side("truncation_side", kwargs.pop("truncation_side", "right"))
        self.clean_up_tokenization_spaces = bool(kwargs.pop("clean_up_tokenization_spaces", False))
        self.processor_class: str | None = kwargs.pop("processor_class", None)
        self.further_entries: dict[str, Any] = kwargs

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map})"
        )

    @property
    def is_fast(self) -> bool:
        """`False`: offsets and words of encodings, which that promises in transformers, are not
        kept."""
        return False

    @classmethod
    def _from_repository(
        cls, repository: Repository, overrides: dict[str, Any]
    ) -> Wav2Vec2CTCTokenizer:
        return cls(**read_arguments(repository, overrides))

    def _write_files(self, folder: Path) -> list[str]:
        """`vocab.json`, `tokenizer_config.json`, `special_tokens_map.json` and, if there are tokens
        beyond the vocabulary, `added_tokens.json`."""
        arguments: dict[str, Any] = {
            **self.further_entries,
            **{name: t for name, t in self._special_tokens.items() if name.endswith("_token")},
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "do_lower_case": self.do_lower_case,
            "model_max_length": self.model_max_length,
            "model_input_names": self.model_input_names,
            "padding_side": self.padding_side,
            "replace_word_delimiter_char": self.replace_word_delimiter_char,
            "split_special_tokens": self.split_special_tokens,
            "target_lang": self.target_lang,
            "truncation_side": self.truncation_side,
        }
        # Named in a dictionary of extra tokens, where names are free.
        model_specific = {
            name: token
            for name, token in self.special_tokens_map.items()
            if not name.endswith("_token")
        }
        if model_specific:
            arguments["model_specific_special_tokens"] = model_specific
        if self.processor_class is not None:
            arguments["processor_class"] = self.processor_class
        special_tokens: dict[str, Any] = dict(self.special_tokens_map)
        if self.extra_special_tokens:
            arguments["additional_special_tokens"] = self.extra_special_tokens
            special_tokens["additional_special_tokens"] = self.extra_special_tokens
        return write_files(
            folder,
            vocabulary=self.vocab,
            arguments=arguments,
            special_tokens=special_tokens,
            added_tokens=self.added_tokens_decoder,
            ids_in_vocabulary=self.vocab_size,
        )

    def __call__(
        self,
        text: str | Sequence[Any],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Encodes a text or a batch of texts.

        Args:
            text: A string or a list of ids; for a batch, a list of those.
            padding: True or "longest": to the longest text; "max_length": to `max_length`; False or
                "do_not_pad": not at all.
            truncation: Whether to cut ids to `max_length`; None: only if that is given and nothing
                is padded. "longest_first" and "only_first" mean True, "do_not_truncate" False.
            max_length: Number of ids for truncation and "max_length"; None: `model_max_length`.
            pad_to_multiple_of: Padded lengths are rounded up to a multiple of this.
            padding_side: "right" or "left"; None: as constructed.
            return_tensors: "pt", "np", or None for lists. With it, a single text is a batch of one.
            return_attention_mask: Whether to return `attention_mask`; None: yes.
            add_special_tokens: Without effect: CTC texts have none around them.

        Returns:
            `input_ids` and `attention_mask` (1 for an id, 0 for padding); int64 ``[batch,
            num_tokens]`` as tensors.

        Raises:
            TypeError: `text` holds something else.
            ValueError: A character has no id; texts of different lengths are to become a tensor; or
                another argument is impossible.
        """
        del add_special_tokens
        length, strategy, cut = wanted_lengths(
            padding, truncation, max_length, self.model_max_length, pad_to_multiple_of
        )
        is_single = isinstance(text, str) or is_id_list(text)
        texts = [text] if is_single else list(text)
        rows = [self._encode(item) for item in texts]
        if cut is not None:
            rows = [truncate_ids(row, cut, self.truncation_side) for row in rows]
        return pad_ids(
            {"input_ids": rows},
            strategy=strategy,
            length=length,
            multiple=pad_to_multiple_of,
            return_tensors=return_tensors,
            unwrap=is_single and return_tensors is None,
            **self._padding(padding_side, return_attention_mask),
        )

    def _encode(self, text: Any) -> list[int]:
        if isinstance(text, str):
            return self.convert_tokens_to_ids(self.tokenize(text))
        if is_id_list(text):
            return list(text)
        raise TypeError(f"text must be strings or lists of ids, got a {type(text).__name__} in it")

    def encode(self, text: str | Sequence[Any], **kwargs: Any) -> Any:
        """The `input_ids` of `__call__`, which see for the arguments."""
        return self(text, **kwargs)["input_ids"]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pads ids to one length, as a collate function does.

        Args:
            encoded_inputs: A mapping with `input_ids`, the ids of one text or of several, or a
                sequence of mappings that hold those of one each. Lists, arrays or tensors. An
                `attention_mask` is padded with zeros; other entries are passed on.
            padding: As in `__call__`.
            max_length: Number of ids for "max_length".
            pad_to_multiple_of: Padded lengths are rounded up to a multiple of this.
            padding_side: "right" or "left"; None: as constructed.
            return_attention_mask: Whether to return `attention_mask`; None: yes.
            return_tensors: "pt", "np" or None: the kind of the input.

        Returns:
            `input_ids`, `attention_mask` and the other entries.

        Raises:
            ValueError: `input_ids` is missing, entries have different batch sizes, there is no
                padding token, or an argument is impossible.
        """
        entries, kind, is_single = collect_ids(encoded_inputs)
        length, strategy, _ = wanted_lengths(
            padding, False, max_length, self.model_max_length, pad_to_multiple_of
        )
        kind = kind if return_tensors is None else return_tensors
        return pad_ids(
            entries,
            strategy=strategy,
            length=length,
            multiple=pad_to_multiple_of,
            return_tensors=kind,
            unwrap=is_single,
            **self._padding(padding_side, return_attention_mask),
        )

    def _padding(self, side: str | None, return_mask: bool | None) -> dict[str, Any]:
        """Arguments of `pad_ids`; None: as constructed."""
        masked = "attention_mask" in self.model_input_names
        return {
            "side": self.padding_side if side is None else _side("padding_side", side),
            "pad_id": self.pad_token_id,
            "return_mask": masked if return_mask is None else return_mask,
        }

    def convert_tokens_to_string(
        self,
        tokens: Sequence[str],
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> dict[str, Any]:
        """Joins the tokens of CTC frames to a text.

        Args:
            tokens: The token of each frame.
            group_tokens: Whether to merge repeats, as CTC does.
            spaces_between_special_tokens: Whether to put a space between all tokens.
            output_char_offsets: Whether to return `char_offsets`.
            output_word_offsets: Whether to return `word_offsets`.

        Returns:
            `text`, `char_offsets` and `word_offsets`, None if not asked for.
        """
        return self._join(
            tokens,
            range(len(tokens)),
            group_tokens,
            spaces_between_special_tokens,
            output_char_offsets,
            output_word_offsets,
        )

    def _join(
        self,
        tokens: Sequence[str],
        frames: Sequence[int],
        group_tokens: bool,
        spaces_between_special_tokens: bool,
        output_char_offsets: bool,
        output_word_offsets: bool,
    ) -> dict[str, Any]:
        offsets = collapse(tokens, frames, group_tokens=group_tokens, blank=self.pad_token)
        for offset in offsets:
            if offset["char"] == self.word_delimiter_token:
                offset["char"] = self.replace_word_delimiter_char
        joint = " " if spaces_between_special_tokens else ""
        text = joint.join(offset["char"] for offset in offsets).strip()
        words = word_offsets(offsets, self.replace_word_delimiter_char)
        return {
            "text": text.lower() if self.do_lower_case else text,
            # As in the reference, a path without frames has empty offsets, asked for or not.
            "char_offsets": offsets if output_char_offsets or not tokens else None,
            "word_offsets": words if output_word_offsets or not tokens else None,
        }

    # The name by which transformers' pipelines ask for words.
    _get_word_offsets = staticmethod(word_offsets)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
    ) -> Any:
        """The text of a CTC path.

        Args:
            token_ids: The id of each frame: a list, array or tensor, or a single id. Of a batch,
                `batch_decode` is returned.
            skip_special_tokens: Whether to leave out special tokens, `unk_token` included. Their
                frames do not separate repeats, those of the blank do. `word_delimiter_token`
                stays.
            clean_up_tokenization_spaces: Whether to remove spaces before punctuation and English
                contractions; None: as constructed.
            output_char_offsets: Whether to return the frames of each character.
            output_word_offsets: Whether to return the frames of each word.
            group_tokens: Whether to merge repeats, as CTC does. False for ids of a text.
            spaces_between_special_tokens: Whether to put a space between all tokens.

        Returns:
            The text; with offsets, a `Wav2Vec2CTCTokenizerOutput`. Offsets count frames of
            `token_ids`.

        Raises:
            TypeError: `token_ids` are no integers.
        """
        ids = to_list(token_ids)
        if isinstance(ids, list) and ids and not isinstance(ids[0], int):
            return self.batch_decode(
                ids,
                skip_special_tokens,
                clean_up_tokenization_spaces,
                output_char_offsets,
                output_word_offsets,
                group_tokens=group_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids)
        skipped: set[str | None] = set(self.all_special_tokens) if skip_special_tokens else set()
        skipped -= {self.word_delimiter_token, self.pad_token}
        frames = [frame for frame, token in enumerate(tokens) if token not in skipped]
        joined = self._join(
            [tokens[frame] for frame in frames],
            frames,
            group_tokens,
            spaces_between_special_tokens,
            output_char_offsets,
            output_word_offsets,
        )
        clean_up = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean_up is None else clean_up:
            joined["text"] = clean_up_spaces(joined["text"])
        if output_char_offsets or output_word_offsets:
            return Wav2Vec2CTCTokenizerOutput(**joined)
        return joined["text"]

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The texts of several CTC paths.

        Args:
            sequences: The ids of each: a 2-D array or tensor ``[batch, num_frames]``, or a list of
                what `decode` takes.
            skip_special_tokens: As in `decode`, and so are the others.
            **kwargs: `group_tokens` and `spaces_between_special_tokens`.

        Returns:
            A list of texts; with offsets, one `Wav2Vec2CTCTokenizerOutput` of lists.

        Raises:
            TypeError: `sequences` are no integers.
        """
        decoded = [
            self.decode(
                sequence,
                skip_special_tokens,
                clean_up_tokenization_spaces,
                output_char_offsets,
                output_word_offsets,
                **kwargs,
            )
            for sequence in sequences
        ]
        if not (output_char_offsets or output_word_offsets):
            return decoded
        return Wav2Vec2CTCTokenizerOutput(
            text=[output.text for output in decoded],
            char_offsets=[o.char_offsets for o in decoded] if output_char_offsets else None,
            word_offsets=[o.word_offsets for o in decoded] if output_word_offsets else None,
        )


def _side(name: str, value: Any) -> str:
    if value not in ("right", "left"):
        raise ValueError(f"{name} must be 'right' or 'left', got {value!r}")
    return str(value)
