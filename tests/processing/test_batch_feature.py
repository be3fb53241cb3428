"""What extractor, tokenizer and processor return, where code of transformers reads it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import w2vbert_fast
from tests.processing.test_tokenization import LETTERS, ids_of, write
from w2vbert_fast.processing.batch import BatchFeature

ROWS = [np.full((n, 4), float(n), dtype=np.float32) for n in (3, 2)]
KINDS = pytest.mark.parametrize("kind", ["np", "pt", None])


def described(value: Any) -> Any:
    """Types, dtypes, shapes and values of an entry."""
    if isinstance(value, np.ndarray):
        rows = [described(row) for row in value] if value.dtype == object else value.tolist()
        return "array", str(value.dtype), value.shape, rows
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value


def outcome(function: Any) -> Any:
    try:
        return {name: described(value) for name, value in function().items()}
    except ValueError:
        return "ValueError"


@KINDS
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "max_length", "max_length": 2},
        {"padding": False},
        {"padding": True},
        {"padding": False, "truncation": True, "max_length": 2},
    ],
)
def test_padding_rows_of_different_lengths(arguments: dict[str, Any], kind: str | None) -> None:
    inputs = {
        "arrays": lambda: {"input_features": list(ROWS)},
        "lists": lambda: {"input_features": [row.tolist() for row in ROWS]},
        "dicts": lambda: [{"input_features": row, "labels": list(range(len(row)))} for row in ROWS],
    }
    for name, make in inputs.items():
        found, wanted = (
            outcome(
                lambda library=library, make=make: library.SeamlessM4TFeatureExtractor().pad(
                    make(), return_tensors=kind, **arguments
                )
            )
            for library in (w2vbert_fast, transformers)
        )
        assert found == wanted, name


@KINDS
def test_texts_of_different_lengths(kind: str | None, tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=ids_of(*LETTERS, "<unk>", "<pad>")) / "vocab.json"
    found, wanted = (
        outcome(
            lambda library=library: library.Wav2Vec2CTCTokenizer(vocab)(
                ["ab", "a"], return_tensors=kind
            )
        )
        for library in (w2vbert_fast, transformers)
    )
    assert found == wanted


@KINDS
def test_converting_ragged_entries(kind: str | None) -> None:
    def entries() -> dict[str, Any]:
        return {"a": [[1, 2], [3]], "b": [ROWS[0], ROWS[1]], "c": ["x", "y"], "d": [[1.0], [2.0]]}

    found = outcome(lambda: BatchFeature(entries()).convert_to_tensors(kind))
    assert found == outcome(lambda: transformers.BatchFeature(entries()).convert_to_tensors(kind))


def test_data_is_the_dictionary_of_the_entries() -> None:
    for kind in (BatchFeature, transformers.BatchFeature):
        batch = kind({"a": 1})
        assert batch.data == {"a": 1} and batch.data["a"] == 1
        batch.data["b"] = 2
        assert batch["b"] == batch.b == 2
        batch.data = {"c": 3}
        assert sorted(batch) == ["c"] and batch.data == {"c": 3}
        for twin in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
            assert type(twin) is kind and twin.data == {"c": 3}


@pytest.mark.parametrize(("bins", "rate"), [(80, 16000), (40, 8000)])
def test_the_filters_and_the_window(bins: int, rate: int) -> None:
    arguments = {"num_mel_bins": bins, "sampling_rate": rate}
    ours = w2vbert_fast.SeamlessM4TFeatureExtractor(**arguments)
    reference = transformers.SeamlessM4TFeatureExtractor(**arguments)
    for name in ("mel_filters", "window"):
        found, wanted = getattr(ours, name), getattr(reference, name)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        found[:] = 0.0  # a copy
        assert getattr(ours, name).any()
        with pytest.raises(AttributeError):
            setattr(ours, name, wanted)


def test_offsets_are_a_mapping(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=ids_of(*LETTERS, "|", "<unk>", "<pad>")) / "vocab.json"
    found, wanted = (
        library.Wav2Vec2CTCTokenizer(vocab).decode(
            library.Wav2Vec2CTCTokenizer(vocab)("ab  a").input_ids, output_char_offsets=True
        )
        for library in (w2vbert_fast, transformers)
    )
    assert dict(found) == dict(wanted)
    assert list(found) == list(wanted) and found.get("word_offsets") is None
    assert found[1] == found["char_offsets"] == found.char_offsets
    with pytest.raises(KeyError):
        found["word_offsets"]
    words = [
        library.Wav2Vec2CTCTokenizer(vocab)._get_word_offsets(found["char_offsets"], " ")
        for library in (w2vbert_fast, transformers)
    ]
    assert words[0] == words[1] and [word["word"] for word in words[0]] == ["ab", "a"]


def test_parts_of_transformers_are_refused_with_the_way_out(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=ids_of(*LETTERS, "<unk>", "<pad>")) / "vocab.json"
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1.0)
    tokenizer = w2vbert_fast.Wav2Vec2CTCTokenizer(vocab)
    with pytest.raises(TypeError, match=r"got transformers\..*from_dict\(feature_extractor"):
        w2vbert_fast.Wav2Vec2BertProcessor(extractor, tokenizer)
    ours = w2vbert_fast.SeamlessM4TFeatureExtractor.from_dict(extractor.to_dict())
    assert ours.padding_value == 1.0
    with pytest.raises(TypeError, match=r"got transformers\..*from_pretrained\(folder\) behind"):
        w2vbert_fast.Wav2Vec2BertProcessor(ours, transformers.Wav2Vec2CTCTokenizer(vocab))
    with pytest.raises(TypeError, match=r"got builtins\.str$"):
        w2vbert_fast.Wav2Vec2BertProcessor(ours, "vocab.json")  # type: ignore[arg-type]
    assert w2vbert_fast.Wav2Vec2BertProcessor(ours, tokenizer).tokenizer is tokenizer


def test_keywords_of_transformers_for_loading(tmp_path: Path) -> None:
    vocab = write(tmp_path, vocab=ids_of(*LETTERS, "<unk>", "<pad>")) / "vocab.json"
    w2vbert_fast.Wav2Vec2BertProcessor(
        w2vbert_fast.SeamlessM4TFeatureExtractor(), w2vbert_fast.Wav2Vec2CTCTokenizer(vocab)
    ).save_pretrained(tmp_path / "processor", push_to_hub=False)
    harmless = {"trust_remote_code": True, "force_download": True, "use_auth_token": "t"}
    for name, more in (
        ("AutoFeatureExtractor", {}),
        ("AutoTokenizer", {"use_fast": False}),
        ("AutoProcessor", {"use_fast": True}),
    ):
        kind = getattr(w2vbert_fast, name)
        loaded = kind.from_pretrained(
            pretrained_model_name_or_path=tmp_path / "processor", **harmless, **more
        )
        assert type(loaded) is kind
        with pytest.raises(TypeError, match="no_such"):
            kind.from_pretrained(tmp_path / "processor", no_such=1)
        with pytest.raises(ValueError, match="use_auth_token"):
            kind.from_pretrained(tmp_path / "processor", token="a", use_auth_token="b")
        with pytest.raises(TypeError, match="no_such"):
            loaded.save_pretrained(tmp_path / "again", no_such=1)
        assert not (tmp_path / "again").exists()
