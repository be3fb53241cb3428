"""The tokenizer against the reference's, loaded from the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st

from w2vbert_fast import Wav2Vec2CTCTokenizer

Reference = transformers.Wav2Vec2CTCTokenizer
LETTERS = "abcdefghijklmnopqrstuvwxyz'"


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def ids_of(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def make_folders(root: Path) -> dict[str, Path]:
    """Checkpoints of the kinds that are published."""
    bracketed = {
        "bos_token": "<s>",
        "do_lower_case": False,
        "eos_token": "</s>",
        "pad_token": "[PAD]",
        "replace_word_delimiter_char": " ",
        "target_lang": None,
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "unk_token": "[UNK]",
        "word_delimiter_token": "|",
    }
    characters = ids_of(*LETTERS, "|", "[UNK]", "[PAD]")
    beyond = len(characters)
    added = {"<s>": beyond, "</s>": beyond + 1}
    plain = ids_of("<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS.upper(), "É", "ß")
    digraphs = ids_of("|", *LETTERS, "ch", "sch", "scha", "é", "<unk>", "<pad>")
    everything = {
        "content": "[PAD]",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    folders = {
        "fine-tuned": write(
            root / "finetuned",
            vocab=characters,
            tokenizer_config=bracketed,
            added_tokens=added,
            special_tokens_map={"bos_token": "<s>", "pad_token": {**everything}},
        ),
        "upper case": write(
            root / "upper",
            vocab=plain,
            tokenizer_config={"do_lower_case": True, "clean_up_tokenization_spaces": True},
        ),
        "vocabulary alone": write(root / "alone", vocab=plain),
        "digraphs": write(root / "digraphs", vocab=digraphs, tokenizer_config={"bos_token": None}),
        "repeated ids": write(
            root / "repeated",
            vocab=plain,
            tokenizer_config={},
            added_tokens={"<s>": len(plain), "</s>": len(plain) + 1, "word": len(plain) + 2},
        ),
        "extra specials": write(
            root / "extra",
            vocab=characters,
            tokenizer_config={
                **bracketed,
                "additional_special_tokens": ["<laugh>", "a"],
                "mask_token": "<mask>",
                "noise_token": "~",
            },
        ),
        "single words": write(
            root / "words",
            vocab=characters,
            tokenizer_config={
                **bracketed,
                "added_tokens_decoder": {
                    "40": {**everything, "content": "uh", "single_word": True},
                    "41": {**everything, "content": "mm", "lstrip": True},
                },
            },
        ),
        "cut specials": write(
            root / "cut",
            vocab=plain,
            tokenizer_config={"split_special_tokens": True, "replace_word_delimiter_char": "_"},
        ),
    }
    saved = root / "saved by the reference"
    Reference.from_pretrained(folders["fine-tuned"]).save_pretrained(saved)
    return {**folders, "saved by the reference": saved}


Pair = tuple[Wav2Vec2CTCTokenizer, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, Pair]:
    return {
        name: (
            Wav2Vec2CTCTokenizer.from_pretrained(folder),
            Reference.from_pretrained(folder),
        )
        for name, folder in folders.items()
    }


pieces = st.one_of(
    st.sampled_from(
        [
            "l",
            "ll",
            "a",
            "ch",
            "sch",
            "scha",
            "é",
            "É",
            "ß",
            "|",
            "||",
            "'",
            "[PAD]",
            "[UNK]",
            "<s>",
        ],
    ),
    st.sampled_from(
        ["</s>", "<pad>", "<unk>", "<", "s>", "<laugh>", "~", "uh", "mm", "word", "<mask>"],
    ),
    st.sampled_from(
        [" ", "  ", "\n", "\u00a0", " word ", " ch ", "e\u0301", "\ufb01", "日本", "🙂"],
    ),
    st.text(max_size=5),
    st.text(alphabet=LETTERS + LETTERS.upper() + " ", max_size=8),
)
texts = st.lists(pieces, max_size=10).map("".join)
# Few different ids, so that there are repeats, and the special ones are frequent.
paths = st.lists(
    st.one_of(st.integers(0, 5), st.integers(24, 36), st.integers(-1, 45)), max_size=30
)


def test_vocabularies(pairs: dict[str, Pair]) -> None:
    for ours, reference in pairs.values():
        assert ours.get_vocab() == reference.get_vocab()
        assert ours.get_added_vocab() == reference.get_added_vocab()
        assert ours.added_tokens_encoder == reference.added_tokens_encoder
        for index, token in reference.added_tokens_decoder.items():
            own = ours.added_tokens_decoder[index]
            for flag in ("content", "lstrip", "rstrip", "single_word"):
                assert getattr(own, flag) == getattr(token, flag)
        assert len(ours) == len(reference)
        assert ours.vocab_size == reference.vocab_size
        assert ours.all_special_tokens == reference.all_special_tokens
        assert ours.all_special_ids == reference.all_special_ids
        assert ours.special_tokens_map == reference.special_tokens_map
        for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "word_delimiter"):
            assert getattr(ours, f"{name}_token") == getattr(reference, f"{name}_token")
            assert getattr(ours, f"{name}_token_id") == getattr(reference, f"{name}_token_id")


@given(text=texts)
@settings(deadline=None, max_examples=300)
def test_text_to_ids(pairs: dict[str, Pair], text: str) -> None:
    for ours, reference in pairs.values():
        tokens = ours.tokenize(text)
        assert tokens == reference.tokenize(text)
        ids = ours(text).input_ids
        assert ids == reference(text).input_ids
        assert ours.encode(text) == ids
        assert ours.convert_tokens_to_ids(tokens) == ids
        assert ours.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)


@given(
    path=paths,
    group=st.booleans(),
    spaces=st.booleans(),
    clean_up=st.sampled_from([None, True, False]),
    char_offsets=st.booleans(),
    word_offsets=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_ids_to_text(
    pairs: dict[str, Pair],
    path: list[int],
    group: bool,
    spaces: bool,
    clean_up: bool | None,
    char_offsets: bool,
    word_offsets: bool,
) -> None:
    kwargs: dict[str, Any] = {
        "group_tokens": group,
        "spaces_between_special_tokens": spaces,
        "clean_up_tokenization_spaces": clean_up,
        "output_char_offsets": char_offsets,
        "output_word_offsets": word_offsets,
    }
    for ours, reference in pairs.values():
        output, wanted = ours.decode(path, **kwargs), reference.decode(path, **kwargs)
        if char_offsets or word_offsets:
            assert output.to_tuple() == wanted.to_tuple()
            assert dict(output.items()) == dict(wanted.items())
        else:
            assert output == wanted
        assert ours.convert_ids_to_tokens(path) == reference.convert_ids_to_tokens(path)
        assert ours.convert_ids_to_tokens(path, True) == reference.convert_ids_to_tokens(path, True)


@given(path=paths, group=st.booleans())
@settings(deadline=None, max_examples=300)
def test_skipping_special_tokens(pairs: dict[str, Pair], path: list[int], group: bool) -> None:
    for ours, reference in pairs.values():
        tokens = reference.convert_ids_to_tokens(path)
        skipped = set(reference.all_special_tokens)
        skipped -= {reference.pad_token, reference.word_delimiter_token}
        kept = [token for token in tokens if token not in skipped]
        wanted = reference.convert_tokens_to_string(kept, group_tokens=group)["text"]
        output = ours.decode(
            path,
            skip_special_tokens=True,
            group_tokens=group,
            clean_up_tokenization_spaces=False,
            output_char_offsets=True,
        )
        assert output.text == wanted
        delimiter = (reference.word_delimiter_token, reference.replace_word_delimiter_char)
        for offset in output.char_offsets:
            run = set(tokens[offset["start_offset"] : offset["end_offset"]]) - skipped
            (token,) = run
            assert offset["char"] == (delimiter[1] if token == delimiter[0] else token)


def test_blanks_separate_repeats_when_special_tokens_are_skipped(pairs: dict[str, Pair]) -> None:
    ours, _ = pairs["fine-tuned"]
    path = [ours.convert_tokens_to_ids(token) for token in ["<s>", *"hel", "[PAD]", *"loo", "</s>"]]
    assert ours.decode(path, skip_special_tokens=True) == "hello"
    output = ours.decode(path, skip_special_tokens=True, output_word_offsets=True)
    assert output.word_offsets == [{"word": "hello", "start_offset": 1, "end_offset": 8}]
    assert output.char_offsets is None
    assert list(output) == ["text", "word_offsets"]
    assert output["word_offsets"] == output[1] == output.word_offsets


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor])
def test_kinds_of_ids(pairs: dict[str, Pair], convert: Any) -> None:
    ours, reference = pairs["fine-tuned"]
    rows = [[7, 4, 11, 29, 11, 14], [0, 27, 1, 1, 27, 29], [28, 31, 32, 2, 99, -1]]
    wanted = reference.batch_decode(rows)
    assert ours.batch_decode(convert(rows)) == wanted
    assert ours.batch_decode([convert(row) for row in rows]) == wanted
    assert [ours.decode(convert(row)) for row in rows] == wanted
    assert ours.decode(convert(rows)) == wanted
    batch = ours.batch_decode(convert(rows), output_word_offsets=True, output_char_offsets=True)
    theirs = reference.batch_decode(rows, output_word_offsets=True, output_char_offsets=True)
    assert batch.to_tuple() == (theirs.text, theirs.char_offsets, theirs.word_offsets)
    assert batch.text == wanted


def test_single_ids(pairs: dict[str, Pair]) -> None:
    ours, reference = pairs["fine-tuned"]
    for index in (0, np.int64(0), torch.tensor(0)):
        assert ours.convert_ids_to_tokens(index) == "a"
        assert ours.decode(index) == "a"
    assert ours.decode(28) == "[UNK]"
    assert ours.convert_ids_to_tokens(77) == reference.convert_ids_to_tokens(77) == "[UNK]"
    assert ours.convert_tokens_to_ids("[PAD]") == 29


@pytest.mark.parametrize("ids", [torch.zeros(3, 4), np.zeros(3), 0.5, [0, None], "abc", [["a"]]])
def test_ids_must_be_integers(pairs: dict[str, Pair], ids: Any) -> None:
    with pytest.raises(TypeError, match="token ids must be integers"):
        pairs["fine-tuned"][0].decode(ids)


def test_empty_paths(pairs: dict[str, Pair]) -> None:
    ours, _ = pairs["fine-tuned"]
    assert ours.decode([]) == ""
    assert ours.batch_decode([]) == []
    assert ours.batch_decode([[], torch.empty(0, dtype=torch.int64), np.array([])]) == [""] * 3
    output = ours.batch_decode([], output_char_offsets=True)
    assert output.text == output.char_offsets == []
    assert output.word_offsets is None


CALLS: list[dict[str, Any]] = [
    {},
    {"padding": True},
    {"padding": "longest", "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 9, "return_tensors": "np"},
    {"padding": "max_length", "max_length": 3},
    {"padding": "max_length", "max_length": 4, "truncation": True, "return_tensors": "pt"},
    {"padding": True, "pad_to_multiple_of": 4, "padding_side": "left"},
    {"max_length": 2},
    {"max_length": 2, "truncation": False},
    {"max_length": 2, "truncation": "only_first", "padding": True},
    {"max_length": 2, "truncation": "do_not_truncate"},
    {"truncation": True},
    {"return_attention_mask": False, "add_special_tokens": False},
]


def assert_equal_batches(ours: Any, wanted: Any) -> None:
    assert sorted(ours) == sorted(wanted)
    for name, value in wanted.items():
        assert type(ours[name]) is type(value)
        if isinstance(value, list):
            assert ours[name] == value
        else:
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize("kwargs", CALLS, ids=str)
@pytest.mark.parametrize("text", ["hello you", ["hello", "you there", ""], [""], ["a"], [[3, 4]]])
def test_calls(pairs: dict[str, Pair], kwargs: dict[str, Any], text: Any) -> None:
    for name in ("fine-tuned", "upper case"):
        ours, reference = pairs[name]
        assert_equal_batches(ours(text, **kwargs), reference(text, **kwargs))


def test_single_text_as_tensors(pairs: dict[str, Pair]) -> None:
    ours, reference = pairs["fine-tuned"]
    for kind in ("pt", "np"):
        for text in ("hi there", "", [3, 4]):
            assert_equal_batches(
                ours(text, return_tensors=kind), reference(text, return_tensors=kind)
            )


def test_limits_of_the_model(folders: dict[str, Path]) -> None:
    kwargs: dict[str, Any] = {
        "model_max_length": 4,
        "truncation_side": "left",
        "padding_side": "left",
    }
    ours = Wav2Vec2CTCTokenizer.from_pretrained(folders["fine-tuned"], **kwargs)
    reference = Reference.from_pretrained(folders["fine-tuned"], **kwargs)
    for call in ({"truncation": True}, {"padding": "max_length", "truncation": True}):
        batch = ["hello", "a"]
        assert_equal_batches(ours(batch, **call), reference(batch, **call))


PADS: list[dict[str, Any]] = [
    {},
    {"padding": "max_length", "max_length": 7},
    {"padding": False},
    {"pad_to_multiple_of": 4, "return_tensors": "pt"},
    {"padding_side": "left", "return_tensors": "np"},
    {"return_attention_mask": False},
]


@pytest.mark.parametrize("kwargs", PADS, ids=str)
@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_pad(pairs: dict[str, Pair], kwargs: dict[str, Any], convert: Any) -> None:
    ours, reference = pairs["fine-tuned"]
    rows = [[3, 4, 5], [6], [7, 8]]
    if kwargs == {"padding": False} and convert is not list:
        rows = [[3, 4], [5, 6]]
    examples = [{"input_ids": convert(row)} for row in rows]
    wanted = reference.pad([dict(example) for example in examples], **kwargs)
    assert_equal_batches(ours.pad(examples, **kwargs), wanted)
    together = {"input_ids": [convert(row) for row in rows]}
    assert_equal_batches(ours.pad(together, **kwargs), wanted)
    single = {"input_ids": [1, 2], "attention_mask": [1, 0]}
    wanted = reference.pad(dict(single), **kwargs)
    if kwargs == {"return_attention_mask": False}:
        # The reference returns it, unpadded.
        del wanted["attention_mask"]
    assert_equal_batches(ours.pad(single, **kwargs), wanted)


def test_pad_passes_other_entries_on(pairs: dict[str, Pair]) -> None:
    ours, reference = pairs["fine-tuned"]
    examples = [{"input_ids": [1, 2], "attention_mask": [1, 0], "n": 2}, {"input_ids": [3]}]
    examples[1] |= {"attention_mask": [1], "n": 1}
    wanted = reference.pad([dict(e) for e in examples], return_tensors="pt")
    assert_equal_batches(ours.pad(examples, return_tensors="pt"), wanted)


def test_impossible_arguments(pairs: dict[str, Pair], tmp_path: Path) -> None:
    ours, _ = pairs["fine-tuned"]
    for kwargs, message in (
        ({"padding": "left"}, "padding must be"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"truncation": "middle"}, "truncation must be"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"return_tensors": "tf"}, "return_tensors must be"),
        ({"return_tensors": "pt"}, "input_ids has rows of different lengths"),
        ({"padding_side": "top"}, "padding_side must be"),
        (
            {"padding": True, "truncation": True, "max_length": 5, "pad_to_multiple_of": 4},
            "must be a multiple of pad_to_multiple_of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ours(["hello", "a"], **kwargs)
    with pytest.raises(TypeError, match="got a float"):
        ours([0.5])
    with pytest.raises(TypeError, match="text must be a string, got int"):
        ours.tokenize(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="paddding"):
        ours("a", paddding=True)
    with pytest.raises(ValueError, match="must hold input_ids"):
        ours.pad({"labels": [1]})
    with pytest.raises(ValueError, match="got an empty list"):
        ours.pad([])
    with pytest.raises(TypeError, match="got int"):
        ours.pad(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n has 1 entries, input_ids has 2"):
        ours.pad({"input_ids": [[1], [2]], "n": [1]})
    with pytest.raises(ValueError, match="attention_mask of text 0 has 2 entries"):
        ours.pad({"input_ids": [[1]], "attention_mask": [[1, 1]]})
    vocab = write(tmp_path, vocab=ids_of(*LETTERS)) / "vocab.json"
    unpadded = Wav2Vec2CTCTokenizer(vocab, pad_token=None)
    with pytest.raises(ValueError, match="padding needs a pad_token"):
        unpadded(["a"], padding=True)
