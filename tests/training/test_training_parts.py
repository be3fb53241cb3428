"""Rows with `offset` and `duration`: fine-tuning reads each part of a recording, and that alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from tests.helpers.signals import speech_like
from tests.helpers.training import STILL, config, make_model, metrics, read_rows
from w2vbert_fast import SeamlessM4TFeatureExtractor
from w2vbert_fast.training import ManifestError, UtteranceError, finetune
from w2vbert_fast.training.data import ManifestSource
from w2vbert_fast.training.manifest import read_manifest
from w2vbert_fast.training.tasks import TASKS

RATE = 16_000
SPANS = ((0.0, 0.6), (0.8, 1.1), (2.5, 0.5))
SIGNAL = speech_like(3.0, RATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    soundfile.write(path / "long.wav", SIGNAL, RATE)
    soundfile.write(path / "long.mp3", SIGNAL, RATE, format="MP3")
    return path


def manifest_of(folder: Path, *rows: dict[str, Any], suffix: str = "jsonl") -> Path:
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        comma = "," if suffix == "csv" else "\t"
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        path.write_text("\n".join(comma.join(map(str, line)) for line in lines))
    return path


def source_of(path: Path, task: Any, **options: Any) -> ManifestSource:
    manifest = read_manifest(path, TASKS[task])
    extractor = SeamlessM4TFeatureExtractor(padding_value=1.0)
    return ManifestSource(manifest.rows, manifest.digest, TASKS[task], extractor, **options)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_the_features_of_a_part_are_those_of_its_samples(folder: Path, suffix: str) -> None:
    rows = [{"file": "long.wav", "offset": o, "duration": d, "label": "a"} for o, d in SPANS]
    source = source_of(manifest_of(folder, *rows, suffix=suffix), "xvector", label2id={"a": 0})
    samples, _ = soundfile.read(folder / "long.wav", dtype="float32")
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1.0)
    for index, (offset, duration) in enumerate(SPANS):
        part = samples[round(offset * RATE) : round((offset + duration) * RATE)]
        wanted = extractor(part, sampling_rate=RATE, return_tensors="pt")
        frames = int(wanted["attention_mask"].sum())
        found = source.load(index, 0).input_features
        assert found.shape[0] == frames
        reference = wanted["input_features"][0, :frames]
        torch.testing.assert_close(found, reference, rtol=0, atol=2e-3)
        assert abs(source.num_frames(index, 0) - frames) <= 1


def test_a_part_to_the_end_and_one_that_ends_a_little_behind_it(folder: Path) -> None:
    path = manifest_of(
        folder,
        {"audio": "long.wav", "offset": 2.25, "text": "a"},
        {"audio": "long.wav", "offset": 2.5, "duration": 0.9, "text": "b"},
        {"audio": "long.mp3", "offset": "1", "duration": "0.5", "text": "c"},
        {"audio": "long.wav", "duration": 3, "text": "d"},
    )
    rows = read_manifest(path, TASKS["ctc"]).rows
    assert [row.seconds for row in rows] == [0.75, 0.5, 0.5, 3.0]


def test_the_length_of_a_recording_whose_recorder_died(folder: Path) -> None:
    content = bytearray((folder / "long.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = bytes(4)
    (folder / "died.wav").write_bytes(content)
    part = {"audio": "died.wav", "offset": 2, "duration": 0.5}
    path = manifest_of(folder, {"audio": "died.wav", "text": "a"}, {**part, "text": "b"})
    assert [row.seconds for row in read_manifest(path, TASKS["ctc"]).rows] == [3.0, 0.5]


def test_frame_classes_of_a_part_are_those_of_the_recording_there(folder: Path) -> None:
    spans = [{"start": 0.3, "end": 1.0, "label": "a"}, {"start": 1.5, "end": 2.2, "label": "b"}]
    common = {"audio": "long.wav", "segments": spans}
    path = manifest_of(folder, common, {**common, "offset": 0.8, "duration": 1.0})
    ids = {"none": 0, "a": 1, "b": 2}
    source = source_of(path, "frames", label2id=ids)
    whole, part = (source.load(index, 0).labels.tolist() for index in (0, 1))
    assert set(part) == {0, 1, 2}
    assert part == whole[40 : 40 + len(part)]
    # At twice the speed every second frame.
    fast = source_of(path, "frames", label2id=ids, speeds=(2.0,)).load(1, 0).labels.tolist()
    assert fast[:23] == [max(part[2 * i : 2 * i + 2]) for i in range(23)]


def test_a_part_is_read_without_what_lies_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "x.flac", np.tile(SIGNAL, 100), RATE)
    path = manifest_of(tmp_path, {"audio": "x.flac", "offset": 290, "duration": 1, "label": "a"})
    read: list[int] = []
    original = soundfile.SoundFile.read

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = original(self, *args, **kwargs)
        read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    source = source_of(path, "xvector", label2id={"a": 0})
    assert read == []
    assert len(source.load(0, 0).input_features) == 49
    assert sum(read) <= 10 * RATE


def test_a_part_that_is_not_there_is_named(folder: Path) -> None:
    path = manifest_of(folder, {"audio": "long.wav", "offset": 3.5, "duration": 1, "text": "a"})
    with pytest.raises(ManifestError, match=r"line 1: the part from 3.5 to 4.5 s is not .*3.00 s"):
        read_manifest(path, TASKS["ctc"])
    # What no header states exactly is found out when it is read.
    path = manifest_of(folder, {"audio": "long.mp3", "offset": 5, "duration": 1, "label": "a"})
    with pytest.raises(UtteranceError, match=r"the part from 5.00 to 6.00 is not there"):
        source_of(path, "xvector", label2id={"a": 0}).load(0, 0)


def test_a_duration_without_an_offset_is_the_length_of_the_recording(folder: Path) -> None:
    path = manifest_of(folder, {"audio": "long.wav", "duration": 1.0, "label": "a"})
    with pytest.raises(UtteranceError, match=r"1.0 s by the manifest, and it is 3.0 s long"):
        source_of(path, "xvector", label2id={"a": 0}).load(0, 0)
    path = manifest_of(folder, {"audio": "long.wav", "duration": 2.6, "label": "a"})
    assert len(source_of(path, "xvector", label2id={"a": 0}).load(0, 0).input_features) == 149


def test_parts_change_the_fingerprint(folder: Path) -> None:
    # A run that took whole recordings for the parts must not go on with the parts.
    row = {"audio": "long.wav", "label": "a"}
    for more, end in (({}, ":1"), ({"duration": 3}, ":1"), ({"offset": 1}, ":1:parts")):
        source = source_of(manifest_of(folder, {**row, **more}), "xvector")
        assert source.fingerprint() == source.digest + end


def test_a_run_trains_on_parts_and_scores_them(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL, feature_projection_input_dim=160)
    rows = [
        {"audio": "long.wav", "offset": o, "duration": d, "text": text}
        for (o, d), text in zip((*SPANS, (0.0, 3.0)), ("a", "b", "c", "d"), strict=True)
    ]
    path = manifest_of(folder, *rows)
    options = {"train": path, "eval": path, "steps": 1, "max_seconds": 2, "speeds": (1.0,)}
    options["frame_budget"] = 1000
    finetune(config(model, tmp_path / "out", **options))
    row = metrics(tmp_path / "out")[0]
    # 20 ms frames of the three parts; the fourth is too long.
    assert (row["utterances"], row["frames"]) == (3, 29 + 54 + 24)
    predictions = read_rows(tmp_path / "out" / "predictions.jsonl")
    assert [row["reference"] for row in predictions] == ["a", "b", "c", "d"]
