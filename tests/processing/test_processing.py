"""The processor: features and labels together, files of both layouts, documented examples."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from numpy.typing import NDArray

from w2vbert_fast import (
    AutoProcessor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertProcessor,
    Wav2Vec2CTCTokenizer,
)

DATA = Path(__file__).parents[1] / "data"
CLIPS = [json.loads(line) for line in (DATA / "manifest.jsonl").read_text().splitlines()]
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
Reference = transformers.Wav2Vec2BertProcessor


def clip(index: int) -> NDArray[np.float32]:
    return np.asarray(soundfile.read(DATA / CLIPS[index]["file"], dtype="float32")[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in the layout of 2024: one file for each part."""
    path = tmp_path / "published"
    path.mkdir()
    contents: dict[str, Any] = {
        "preprocessor_config": {
            "feature_extractor_type": "SeamlessM4TFeatureExtractor",
            "feature_size": 80,
            "num_mel_bins": 80,
            "padding_side": "right",
            "padding_value": 1,
            "processor_class": "Wav2Vec2BertProcessor",
            "return_attention_mask": True,
            "sampling_rate": 16000,
            "stride": 2,
        },
        "tokenizer_config": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "[PAD]",
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "unk_token": "[UNK]",
            "word_delimiter_token": "|",
        },
        "vocab": {token: i for i, token in enumerate([*LETTERS, "|", "[UNK]", "[PAD]"])},
        "added_tokens": {"<s>": 30, "</s>": 31},
    }
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def assert_equal(ours: Any, wanted: Any) -> None:
    assert sorted(ours) == sorted(wanted)
    for name, value in wanted.items():
        assert type(ours[name]) is type(value)
        if name == "input_features":
            assert ours[name].dtype == value.dtype
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=2e-5)
        else:
            np.testing.assert_array_equal(ours[name], value)


CALLS: list[dict[str, Any]] = [
    {"padding": True},
    {"padding": True, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 700, "return_tensors": "np"},
    {"padding": True, "return_attention_mask": False, "return_tensors": "pt"},
    {"text_kwargs": {"padding": True, "pad_to_multiple_of": 8}, "return_tensors": "pt"},
    {"text_kwargs": {"padding": True}, "audio_kwargs": {"pad_to_multiple_of": 64}},
    {"common_kwargs": {"return_tensors": "pt"}, "padding": True},
]


@pytest.mark.parametrize("kwargs", CALLS, ids=str)
def test_calls(folder: Path, kwargs: dict[str, Any]) -> None:
    ours = Wav2Vec2BertProcessor.from_pretrained(folder)
    reference = Reference.from_pretrained(folder)
    audio = [clip(index) for index in (0, 1, 3)]
    text = [CLIPS[index]["text"] for index in (0, 1, 3)]
    for given in ({"audio": audio}, {"text": text}, {"audio": audio, "text": text}):
        assert_equal(
            ours(**given, sampling_rate=16000, **kwargs),
            reference(**given, sampling_rate=16000, **kwargs),
        )


def test_single_utterance(folder: Path) -> None:
    ours = Wav2Vec2BertProcessor.from_pretrained(folder)
    reference = Reference.from_pretrained(folder)
    for kwargs in ({}, {"return_tensors": "pt"}):
        wanted = reference(clip(1), "is in use", sampling_rate=16000, **kwargs)
        assert_equal(ours(clip(1), "is in use", sampling_rate=16000, **kwargs), wanted)
        assert_equal(ours(text="is in use", **kwargs), reference(text="is in use", **kwargs))


def test_arguments_of_one_part(folder: Path) -> None:
    ours = Wav2Vec2BertProcessor.from_pretrained(folder)
    raw = ours(clip(0), sampling_rate=16000, do_normalize_per_mel_bins=False)
    wanted = ours.feature_extractor(clip(0), sampling_rate=16000, do_normalize_per_mel_bins=False)
    assert_equal(raw, wanted)
    both = ours(
        [clip(0), clip(1)], ["five", "is"], sampling_rate=16000, padding=True, padding_side="left"
    )
    assert both["labels"] == [[5, 8, 21, 4], [29, 29, 8, 18]]


def test_impossible_calls(folder: Path) -> None:
    processor = Wav2Vec2BertProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="audio or text is needed"):
        processor()
    with pytest.raises(ValueError, match="input_features or labels are needed"):
        processor.pad()
    with pytest.raises(TypeError, match="sampling_ratio: no argument of"):
        processor(clip(0), sampling_ratio=16000)
    with pytest.raises(TypeError, match="pading: no argument of"):
        processor.pad([{"input_features": np.zeros((2, 160))}], pading=True)
    with pytest.raises(ValueError, match="padding was given directly and in text_kwargs"):
        processor(text="a", padding=True, text_kwargs={"padding": False})
    with pytest.raises(ValueError, match=r"must be 16000 Hz"):
        processor(clip(0), sampling_rate=8000)
    with pytest.raises(
        TypeError, match=r"tokenizer must be a w2vbert_fast.Wav2Vec2CTCTokenizer, got .*str"
    ):
        Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(), "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"feature_extractor must be a .*SeamlessM4T.* got .*int"):
        Wav2Vec2BertProcessor(1, processor.tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kwargs", [{}, {"padding": "max_length", "max_length": 110}, {"pad_to_multiple_of": 8}], ids=str
)
def test_collating(folder: Path, kwargs: dict[str, Any]) -> None:
    """What a data collator does with features and labels that were computed before."""
    ours = Wav2Vec2BertProcessor.from_pretrained(folder)
    reference = Reference.from_pretrained(folder)
    examples = []
    for index in (0, 1, 2):
        features = ours(clip(index), sampling_rate=16000)["input_features"][0]
        labels = ours(text=CLIPS[index]["text"])["input_ids"]
        examples.append({"input_features": features, "labels": labels})
    inputs = [{"input_features": example["input_features"]} for example in examples]
    labels = [{"input_ids": example["labels"]} for example in examples]
    kwargs = {"return_tensors": "pt", **kwargs}
    assert_equal(ours.pad(inputs, **kwargs), reference.pad(inputs, **kwargs))
    assert_equal(ours.pad(labels=labels, **kwargs), reference.pad(labels=labels, **kwargs))
    both = ours.pad(input_features=inputs, labels=labels, **kwargs)
    assert_equal(both, reference.pad(input_features=inputs, labels=labels, **kwargs))
    assert_equal(
        ours.pad(inputs, truncation=True, max_length=20, return_tensors="pt"),
        reference.pad(inputs, truncation=True, max_length=20, return_tensors="pt"),
    )


def test_decoding(folder: Path) -> None:
    ours = Wav2Vec2BertProcessor.from_pretrained(folder)
    reference = Reference.from_pretrained(folder)
    paths = torch.tensor(
        [[7, 7, 4, 29, 11, 11, 29, 11, 14, 27], [0, 27, 27, 1, 29, 29, 1, 2, 2, 2]]
    )
    assert ours.batch_decode(paths) == reference.batch_decode(paths) == ["hello", "a bbc"]
    assert ours.decode(paths[0]) == "hello"
    assert ours.decode(paths[1], group_tokens=False) == reference.decode(
        paths[1], group_tokens=False
    )
    assert ours.model_input_names == reference.model_input_names


# Files


def same(ours: Wav2Vec2BertProcessor, other: Any) -> None:
    assert other.feature_extractor.padding_value == ours.feature_extractor.padding_value
    assert other.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    assert other.tokenizer.all_special_tokens == ours.tokenizer.all_special_tokens
    kwargs: dict[str, Any] = {"sampling_rate": 16000, "padding": True, "return_tensors": "pt"}
    audio, text = [clip(0), clip(2)], [CLIPS[0]["text"], CLIPS[2]["text"]]
    assert_equal(ours(audio, text, **kwargs), other(audio, text, **kwargs))


def test_ours_to_the_reference_and_back(folder: Path, tmp_path: Path) -> None:
    ours = Wav2Vec2BertProcessor.from_pretrained(folder)
    same(ours, Reference.from_pretrained(folder))
    paths = ours.save_pretrained(tmp_path / "ours")
    assert sorted(Path(path).name for path in paths) == [
        "added_tokens.json",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    for path in paths[:1] + paths[2:3]:
        assert json.loads(Path(path).read_text())["processor_class"] == "Wav2Vec2BertProcessor"
    reference = Reference.from_pretrained(tmp_path / "ours")
    same(ours, reference)
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path / "ours")) is Reference
    reference.save_pretrained(tmp_path / "theirs")
    written = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert "processor_config.json" in written
    assert "preprocessor_config.json" not in written
    again = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert type(again) is Wav2Vec2BertProcessor
    same(ours, again)
    assert again.feature_extractor.stride == 2


def test_saving_over_the_new_layout(folder: Path, tmp_path: Path) -> None:
    """A nested feature extractor wins over a file of its own, so it must not stay behind."""
    Reference.from_pretrained(folder).save_pretrained(tmp_path / "x")
    ours = Wav2Vec2BertProcessor.from_pretrained(tmp_path / "x", padding_value=7)
    ours.save_pretrained(tmp_path / "x")
    for cls in (Wav2Vec2BertProcessor, Reference):
        assert cls.from_pretrained(tmp_path / "x").feature_extractor.padding_value == 7


def test_saving_leaves_the_parts_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        entries = json.loads((folder / name).read_text())
        entries.pop("processor_class", None)
        (folder / name).write_text(json.dumps(entries))
    processor = Wav2Vec2BertProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "x")
    assert processor.feature_extractor.processor_class is None
    assert processor.tokenizer.processor_class is None


def test_overrides(folder: Path) -> None:
    processor = Wav2Vec2BertProcessor.from_pretrained(
        folder, padding_value=0, do_lower_case=True, padding_side="left"
    )
    assert processor.feature_extractor.padding_value == 0
    assert processor.feature_extractor.padding_side == "left"
    assert processor.tokenizer.do_lower_case
    assert processor.tokenizer.padding_side == "left"
    with pytest.raises(TypeError, match="paddingvalue"):
        Wav2Vec2BertProcessor.from_pretrained(folder, paddingvalue=0)


def test_parts_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Wav2Vec2BertProcessor.from_pretrained(tmp_path / "nowhere")
    (folder / "preprocessor_config.json").rename(tmp_path / "moved.json")
    with pytest.raises(OSError, match="holds no feature extractor"):
        Wav2Vec2BertProcessor.from_pretrained(folder)
    (tmp_path / "moved.json").rename(folder / "preprocessor_config.json")
    (folder / "vocab.json").unlink()
    with pytest.raises(OSError, match=r"holds no tokenizer .*take SeamlessM4TFeatureExtractor"):
        Wav2Vec2BertProcessor.from_pretrained(folder)


# The reference's documentation, with the import line changed


@pytest.fixture
def dataset() -> list[dict[str, Any]]:
    """Rows of the shape that the documentation's speech data set has."""
    return [
        {"audio": {"array": clip(index).astype(np.float64)}, "text": CLIPS[index]["text"].upper()}
        for index in range(3)
    ]


def test_documented_ctc_example(tiny_checkpoint: Path, dataset: list[dict[str, Any]]) -> None:
    from w2vbert_fast import AutoProcessor, Wav2Vec2BertForCTC

    sampling_rate = 16000
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = Wav2Vec2BertForCTC.from_pretrained(tiny_checkpoint)

    inputs = processor(
        dataset[0]["audio"]["array"], sampling_rate=sampling_rate, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_ids = torch.argmax(logits, dim=-1)

    transcription = processor.batch_decode(predicted_ids)

    inputs["labels"] = processor(text=dataset[0]["text"].lower(), return_tensors="pt").input_ids
    loss = model(**inputs).loss

    theirs = transformers.AutoProcessor.from_pretrained(tiny_checkpoint)
    their_model = transformers.Wav2Vec2BertForCTC.from_pretrained(tiny_checkpoint)
    their_inputs = theirs(dataset[0]["audio"]["array"], sampling_rate=16000, return_tensors="pt")
    their_inputs["labels"] = theirs(text=dataset[0]["text"].lower(), return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = their_model(**their_inputs)
    assert transcription == theirs.batch_decode(wanted.logits.argmax(-1))
    assert transcription[0]
    torch.testing.assert_close(loss, wanted.loss, rtol=1e-4, atol=1e-4)


def test_documented_base_model_example(
    tiny_checkpoint: Path, dataset: list[dict[str, Any]]
) -> None:
    from w2vbert_fast import AutoFeatureExtractor, Wav2Vec2BertModel

    feature_extractor = AutoFeatureExtractor.from_pretrained(tiny_checkpoint)
    model = Wav2Vec2BertModel.from_pretrained(tiny_checkpoint)
    inputs = feature_extractor(
        [d["audio"]["array"] for d in dataset[:2]],
        sampling_rate=16000,
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert list(last_hidden_states.shape) == [2, *inputs.input_features.shape[1:2], 32]


def test_documented_word_times(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    from w2vbert_fast import SeamlessM4TFeatureExtractor, Wav2Vec2BertForCTC, Wav2Vec2CTCTokenizer

    model = Wav2Vec2BertForCTC.from_pretrained(tiny_checkpoint)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tiny_checkpoint)
    feature_extractor = SeamlessM4TFeatureExtractor.from_pretrained(tiny_checkpoint)
    with caplog.at_level(logging.WARNING):
        input_features = feature_extractor(clip(4), return_tensors="pt").input_features
    assert "sampling_rate" in caplog.text
    with torch.no_grad():
        logits = model(input_features).logits[0]
    pred_ids = torch.argmax(logits, axis=-1)
    outputs = tokenizer.decode(pred_ids, output_word_offsets=True)
    time_offset = model.config.inputs_to_logits_ratio / feature_extractor.sampling_rate
    word_offsets = [
        {
            "word": d["word"],
            "start_time": round(d["start_offset"] * time_offset, 2),
            "end_time": round(d["end_offset"] * time_offset, 2),
        }
        for d in outputs.word_offsets
    ]
    assert word_offsets
    assert [d["word"] for d in word_offsets] == outputs.text.split()


def test_example_with_two_parts(tmp_path: Path, folder: Path) -> None:
    """Building a processor for a new vocabulary, as fine-tuning begins."""
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(
        folder, unk_token="[UNK]", pad_token="[PAD]", word_delimiter_token="|"
    )
    extractor = SeamlessM4TFeatureExtractor(
        feature_size=80, num_mel_bins=80, sampling_rate=16000, padding_value=0.0
    )
    processor = Wav2Vec2BertProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    processor.save_pretrained(tmp_path / "new")
    same(processor, Wav2Vec2BertProcessor.from_pretrained(tmp_path / "new"))
    assert "padding_value" in repr(processor)
