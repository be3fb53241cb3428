"""Padding computed features, the extractor's files, and the dictionary that calls return."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from w2vbert_fast import AutoFeatureExtractor, SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.batch import BatchFeature

Reference = transformers.SeamlessM4TFeatureExtractor


def noise(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(num_samples)).astype(np.float32)


# Padding computed features


def frames(length: int, seed: int = 0) -> NDArray[np.float32]:
    return noise(length * 6, seed).reshape(length, 6)


PAD_ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"padding": "max_length", "max_length": 9},
    {"truncation": True, "max_length": 4},
    {"truncation": True, "max_length": 3, "pad_to_multiple_of": 4},
    {"pad_to_multiple_of": 8, "return_tensors": "pt"},
    {"return_attention_mask": False, "return_tensors": "np"},
]


@pytest.mark.parametrize("kwargs", PAD_ARGUMENTS, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, lambda x: x.tolist()])
def test_pad(kwargs: dict[str, Any], side: str, convert: Any) -> None:
    rows = [convert(frames(n, n)) for n in (5, 2, 7)]
    config = {"padding_side": side, "padding_value": 1}
    wanted = Reference(**config).pad([{"input_features": row} for row in rows], **kwargs)
    extractor = SeamlessM4TFeatureExtractor(**config)
    for given in ([{"input_features": row} for row in rows], {"input_features": rows}):
        ours = extractor.pad(given, **kwargs)
        assert sorted(ours) == sorted(wanted)
        for name, value in wanted.items():
            assert type(ours[name]) is type(value)
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value)


def test_pad_keeps_masks_and_other_entries() -> None:
    examples = [
        {"input_features": frames(3), "attention_mask": [1, 1, 0], "speaker": 7},
        {"input_features": frames(2), "attention_mask": [1, 1], "speaker": 8},
    ]
    wanted = Reference().pad(examples, return_tensors="pt")
    ours = SeamlessM4TFeatureExtractor().pad(examples, return_tensors="pt")
    for name in ("input_features", "attention_mask", "speaker"):
        np.testing.assert_array_equal(ours[name], wanted[name])


def test_pad_without_padding_keeps_tensors() -> None:
    rows = [torch.from_numpy(frames(n)) for n in (2, 3)]
    output = SeamlessM4TFeatureExtractor().pad({"input_features": rows}, padding=False)
    assert all(torch.equal(a, b) for a, b in zip(output["input_features"], rows, strict=True))


def test_pad_refuses_what_it_cannot_pad() -> None:
    extractor = SeamlessM4TFeatureExtractor()
    with pytest.raises(ValueError, match=r"must hold input_features, got \['input_values'\]"):
        extractor.pad({"input_values": [frames(2)]})
    with pytest.raises(ValueError, match="got an empty list"):
        extractor.pad([])
    with pytest.raises(TypeError, match="got int"):
        extractor.pad(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"of utterance 0 must have shape .* got \[6\]"):
        extractor.pad({"input_features": frames(2)})
    with pytest.raises(ValueError, match="attention_mask has 1 entries, input_features has 2"):
        extractor.pad({"input_features": [frames(2)] * 2, "attention_mask": [[1, 1]]})
    with pytest.raises(ValueError, match=r"attention_mask of utterance 0 must have shape \[2\]"):
        extractor.pad({"input_features": [frames(2)], "attention_mask": [[1, 1, 1]]})


# Files

PUBLISHED = {
    "feature_extractor_type": "SeamlessM4TFeatureExtractor",
    "feature_size": 80,
    "num_mel_bins": 80,
    "padding_side": "right",
    "padding_value": 1,
    "processor_class": "Wav2Vec2BertProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "stride": 2,
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_published_file(tmp_path: Path) -> None:
    path = write(tmp_path / "preprocessor_config.json", PUBLISHED)
    for source in (tmp_path, str(tmp_path), path):
        extractor = AutoFeatureExtractor.from_pretrained(source)
        assert type(extractor) is SeamlessM4TFeatureExtractor
        assert extractor.to_dict() == PUBLISHED
    batch = extractor([noise(2000), noise(600)], sampling_rate=16000)
    assert (batch["input_features"][1, 1:] == 1).all()


def test_ours_to_the_reference_and_back(tmp_path: Path) -> None:
    entries = {"padding_value": 1, "stride": 4, "padding_side": "left", "note": {"a": [1, "é"]}}
    ours = SeamlessM4TFeatureExtractor(**entries)
    assert ours.save_pretrained(tmp_path / "ours") == [
        str(tmp_path / "ours" / "preprocessor_config.json")
    ]
    reference = Reference.from_pretrained(tmp_path / "ours")
    for name, value in entries.items():
        assert getattr(reference, name) == value
    reference.save_pretrained(tmp_path / "theirs")
    again = SeamlessM4TFeatureExtractor.from_pretrained(tmp_path / "theirs")
    assert again.to_dict() == ours.to_dict()
    assert again.note == entries["note"]
    assert pickle.loads(pickle.dumps(again)).to_dict() == ours.to_dict()
    ours.to_json_file(tmp_path / "file.json")
    assert SeamlessM4TFeatureExtractor.from_json_file(tmp_path / "file.json").to_dict() == (
        ours.to_dict()
    )


def test_nested_in_a_processor_config(tmp_path: Path) -> None:
    write(tmp_path / "preprocessor_config.json", {**PUBLISHED, "padding_value": 5})
    path = write(tmp_path / "processor_config.json", {"feature_extractor": PUBLISHED, "x": 1})
    extractor = SeamlessM4TFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.padding_value == 1
    extractor.padding_value = 3
    extractor.save_pretrained(tmp_path)
    assert SeamlessM4TFeatureExtractor.from_pretrained(tmp_path).padding_value == 3
    assert Reference.from_pretrained(tmp_path).padding_value == 3
    assert json.loads(path.read_text())["x"] == 1
    write(path, {"processor_class": "Wav2Vec2BertProcessor"})
    assert SeamlessM4TFeatureExtractor.from_pretrained(tmp_path).padding_value == 3


def test_overrides(tmp_path: Path) -> None:
    write(tmp_path / "preprocessor_config.json", {**PUBLISHED, "extra": 1})
    load = SeamlessM4TFeatureExtractor.from_pretrained
    assert load(tmp_path, padding_value=0, extra=2).to_dict() == {
        **PUBLISHED,
        "padding_value": 0,
        "extra": 2,
    }
    with pytest.raises(TypeError, match="paddingvalue"):
        load(tmp_path, paddingvalue=0)


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    load = SeamlessM4TFeatureExtractor.from_pretrained
    with pytest.raises(OSError, match=r"holds no feature extractor.*preprocessor_config\.json"):
        load(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"stride": 2')
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not a JSON file"):
        load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not a JSON file"):
        load(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        load(tmp_path)
    write(path, {**PUBLISHED, "feature_extractor_type": "Wav2Vec2FeatureExtractor"})
    with pytest.raises(ValueError, match="'Wav2Vec2FeatureExtractor'"):
        load(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"preprocessor_config\.json"):
        SeamlessM4TFeatureExtractor().save_pretrained(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feature_size", 0),
        ("sampling_rate", "16000"),
        ("sampling_rate", 0),
        ("num_mel_bins", 1.5),
        ("stride", 0),
        ("stride", True),
        ("padding_side", "top"),
        ("padding_value", None),
    ],
)
def test_impossible_configurations(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        SeamlessM4TFeatureExtractor(**{name: value})


# BatchFeature


def test_batch_feature() -> None:
    batch = BatchFeature({"input_features": [[1.0, 2.0]], "labels": [[3, 4]], "names": ["x"]})
    assert batch.labels == [[3, 4]]
    batch.convert_to_tensors("pt")
    assert batch.names == ["x"]
    assert batch.to(torch.float16) is batch
    assert batch.input_features.dtype == torch.float16
    assert batch.labels.dtype == torch.int64
    batch.to("cpu", dtype=torch.float64)
    assert batch["input_features"].dtype == torch.float64
    batch.extra = [torch.ones(1)]
    assert batch.to(torch.bfloat16)["extra"][0].dtype == torch.bfloat16
    assert dict(**batch).keys() == batch.keys()
    again = pickle.loads(pickle.dumps(batch))
    assert type(again) is BatchFeature
    assert torch.equal(again.labels, batch.labels)
    with pytest.raises(AttributeError, match="no entry 'logits'"):
        _ = batch.logits
    with pytest.raises(TypeError, match="device and a dtype"):
        batch.to(None)
    with pytest.raises(ValueError, match="labels cannot become one tensor"):
        BatchFeature({"labels": [[1], [1, 2]]}, tensor_type="pt")
    arrays = BatchFeature({"a": torch.ones(2), "b": [torch.ones(2)] * 3}, tensor_type="np")
    assert arrays.a.shape == (2,)
    assert arrays.b.shape == (3, 2)
