"""What fine-tuning makes of manifests, lengths, transcripts and options, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers

from tests.helpers.signals import speech_like, write_container
from tests.helpers.training import STILL, RandomSource, config, make_model, metrics, write_clips
from w2vbert_fast import SeamlessM4TFeatureExtractor
from w2vbert_fast.cli import app as cli
from w2vbert_fast.inference.pipeline import DEMO_FOLDER
from w2vbert_fast.recordings.manifest import ColumnNames
from w2vbert_fast.training import FinetuneConfig, ManifestError, UtteranceSource, finetune
from w2vbert_fast.training.batches import BUCKET_RATIO, BatchPlan, frame_budget_batches
from w2vbert_fast.training.data import ManifestSource, UtteranceError
from w2vbert_fast.training.logs import JsonLines, ProgressBar
from w2vbert_fast.training.manifest import read_manifest
from w2vbert_fast.training.scores import error_rates, is_better
from w2vbert_fast.training.tasks import TASKS, normalise_transcript
from w2vbert_fast.training.vocabulary import build_tokenizer, characters_of, class_names


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    write_container(folder / "a.m4a", "aac", 48_000, 1.0)
    (folder / "text.wav").write_text("no audio\n" * 50)
    return folder


def manifest_of(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# Manifests.


def test_rows_of_a_manifest(clips: Path) -> None:
    path = manifest_of(
        clips,
        {"audio": "0.wav", "text": "  Cafe\u0301 \t au lait "},
        "",
        {"file": str(clips / "1.wav"), "text": "", "duration": 12.5},
        {"audio_filepath": "a.m4a", "text": "X"},
    )
    rows = read_manifest(path, TASKS["ctc"]).rows
    assert [row.target for row in rows] == ["Cafe\u0301 au lait", "", "X"]
    assert [row.seconds for row in rows] == [0.8, 12.5, pytest.approx(1.0, abs=0.1)]
    assert [row.name.split(" ")[0] for row in rows] == [f"rows.jsonl:{n}" for n in (1, 3, 4)]
    assert [Path(row.audio).name for row in rows] == ["0.wav", "1.wav", "a.m4a"]
    assert read_manifest(path, TASKS["ctc"], lower_case=True).rows[0].target == "cafe\u0301 au lait"
    assert normalise_transcript("\u00a0A\u2003b\n") == "A b"


BAD_ROWS: tuple[tuple[str, Any, str], ...] = (
    ("ctc", '{"audio": ', "not JSON: "),
    ("ctc", "[1]", "not a JSON object but a list"),
    ("ctc", {"text": "a"}, "no column audio_filepath, audio, file"),
    ("ctc", {"audio": 3, "text": "a"}, "audio must be the name of a file, got 3"),
    ("ctc", {"audio": "0.wav", "file": "1.wav", "text": "a"}, "audio and file are two recordings"),
    ("ctc", {"file": "no.wav", "text": "a"}, "there is no file "),
    ("ctc", {"audio": "a\0b", "text": "a"}, "there is no file "),
    ("ctc", {"audio": "0.wav"}, "no column text, sentence, "),
    ("ctc", {"audio": "0.wav", "text": 5}, "text must be a text, got 5"),
    ("ctc", {"audio": "0.wav", "text": "a", "sentence": "b"}, "text and sentence are two transcr"),
    ("ctc", {"audio": "0.wav", "text": "\udce9"}, "the transcript is not UTF-8: "),
    ("ctc", {"audio": "0.wav", "text": "a", "duration": -1}, "duration must be seconds above 0"),
    ("ctc", {"audio": "0.wav", "text": "a", "duration": True}, "duration must be seconds above"),
    ("ctc", {"audio": "0.wav", "text": "a", "offset": -1}, "offset must be seconds of at least 0"),
    ("ctc", {"audio": "0.wav", "text": "a", "offset": 0.9}, "offset is 0.9 s, and "),
    (
        "ctc",
        {"audio": "0.wav", "text": "a", "offset": 0.1, "duration": 1.3},
        "the part from 0.1 to 1.4 s is not there: ",
    ),
    ("xvector", {"audio": "0.wav"}, "label is missing"),
    ("classification", {"audio": "0.wav", "label": 0.5}, "label must be the name of a class, got"),
    ("frames", {"audio": "0.wav"}, "segments is missing"),
    ("frames", {"audio": "0.wav", "segments": "a"}, "segments must be a list, got a str"),
    ("frames", {"audio": "0.wav", "segments": [3]}, "segments[0] must be an object, got a int"),
    (
        "frames",
        {"audio": "0.wav", "segments": [{"start": 1, "end": 0.5, "label": "a"}]},
        "segments[0] must have seconds, 0 <= start < end, got start 1 and end 0.5",
    ),
    (
        "frames",
        {"audio": "0.wav", "segments": [{"start": 0, "end": 1}]},
        "segments[0]: label is missing",
    ),
    (
        "frames",
        {
            "audio": "0.wav",
            "segments": [
                {"start": 0.5, "end": 1, "label": "a"},
                {"start": 0, "end": 0.6, "label": "b"},
            ],
        },
        "segments from 0.0 s and from 0.5 s overlap",
    ),
    (
        "frames",
        {"audio": "0.wav", "offset": 0.4, "segments": [{"start": 0, "end": 0.4, "label": "a"}]},
        "no segment reaches into the part from 0.4 to 0.8 s",
    ),
)


@pytest.mark.parametrize(("task", "row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_line_and_column(
    task: Any, row: Any, message: str, clips: Path
) -> None:
    good = {"audio": "0.wav", "text": "a", "label": "a", "segments": []}
    path = manifest_of(clips, good, row, good)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, TASKS[task])
    first, second = str(caught.value).splitlines()
    assert first == f"{path} has rows that cannot be used:"
    assert second.startswith(f"  line 2: {message}")


def test_a_broken_recording_stays_until_it_is_loaded(clips: Path) -> None:
    parts = ({}, {"duration": 1}, {"offset": 1}, {"offset": 1, "duration": 1})
    segments = [{"start": 1.2, "end": 1.5, "label": "a"}]
    rows = [{"audio": "text.wav", "segments": segments, **part} for part in parts]
    good = {"audio": "0.wav", "segments": []}
    source = source_of(manifest_of(clips, *rows, good), "frames", label2id={"none": 0})
    assert len(source) == 5
    assert set(source.load(4, 0).labels.tolist()) == {0}
    for index in range(4):
        assert source.num_frames(index, 0) >= 1
        with pytest.raises(UtteranceError, match="cannot be read as audio"):
            source.load(index, 0)


def test_all_bad_rows_are_listed_up_to_a_limit(clips: Path) -> None:
    path = manifest_of(clips, *[{"audio": "0.wav"}] * 23)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, TASKS["ctc"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[20].startswith("  line 20: no column text, sentence, transcription, transcript")
    assert lines[21] == "  and 3 more"


def test_recordings_within_a_data_set_are_unpacked_once(clips: Path, tmp_path: Path) -> None:
    audio = {"bytes": (clips / "0.wav").read_bytes(), "path": "calls/0.wav"}
    table = pyarrow.table({"audio": [audio, audio], "said": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ManifestError, match="row 1: it holds the recording itself, and there is"):
        read_manifest(
            tmp_path / "rows.parquet", TASKS["ctc"], columns=ColumnNames({"text": "said"})
        )
    for _ in range(2):
        rows = read_manifest(
            tmp_path / "rows.parquet",
            TASKS["ctc"],
            columns=ColumnNames({"text": "said"}),
            unpack=tmp_path / "out",
        ).rows
        (file,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
        assert [row.target for row in rows] == ["a", "b"]
        assert {row.audio for row in rows} == {str(file)} and file.suffix == ".wav"
        assert file.read_bytes() == audio["bytes"]
        assert rows[0].seconds == pytest.approx(soundfile.info(clips / "0.wav").duration)


def test_what_a_data_set_was_taken_for_is_logged(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wav.scp").write_text(f"u1 {clips / '0.wav'}\n")
    (tmp_path / "text").write_text("u1 a\n")
    with caplog.at_level("INFO"):
        (row,) = read_manifest(tmp_path, TASKS["ctc"]).rows
    assert (row.target, row.audio) == ("a", str(clips / "0.wav"))
    assert caplog.messages == [f"{tmp_path}: Kaldi data folder, 1 row"]
    (tmp_path / "text").write_text("u2 a\n")
    with pytest.raises(ManifestError, match=r"wav.scp, line 1: no column text, sentence"):
        read_manifest(tmp_path, TASKS["ctc"])


def test_a_manifest_without_rows_or_with_other_bytes_is_refused(clips: Path) -> None:
    with pytest.raises(ManifestError, match="holds no rows"):
        read_manifest(manifest_of(clips, "", ""), TASKS["ctc"])
    path = clips / "latin1.jsonl"
    path.write_bytes(b"\n\n{\xe9}\n")
    with pytest.raises(ManifestError, match="line 3: not UTF-8"):
        read_manifest(path, TASKS["ctc"])
    with pytest.raises(FileNotFoundError):
        read_manifest(clips / "missing.jsonl", TASKS["ctc"])


# Utterances.


def source_of(path: Path, task: Any, **options: Any) -> ManifestSource:
    extractor = SeamlessM4TFeatureExtractor(padding_value=1.0)
    manifest = read_manifest(path, TASKS[task])
    return ManifestSource(manifest.rows, manifest.digest, TASKS[task], extractor, **options)


def test_features_are_those_of_the_reference(clips: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["abc "], tmp_path)
    path = manifest_of(clips, {"audio": "1.wav", "text": "cab"})
    source = source_of(path, "ctc", tokenizer=tokenizer)
    assert isinstance(source, UtteranceSource)
    utterance = source.load(0, 0)
    samples, _ = soundfile.read(clips / "1.wav", dtype="float32")
    extractor = transformers.SeamlessM4TFeatureExtractor(padding_value=1.0)
    wanted = extractor(samples, sampling_rate=16_000, return_tensors="pt")
    frames = int(wanted["attention_mask"].sum())
    assert utterance.input_features.shape == (frames, 160)
    reference = wanted["input_features"][0, :frames]
    torch.testing.assert_close(utterance.input_features, reference, rtol=0, atol=2e-3)
    assert utterance.labels.tolist() == [5, 3, 4]
    assert abs(source.num_frames(0, 0) - frames) <= 1


def test_speed_changes_length_and_pitch(clips: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["abc"], tmp_path)
    path = manifest_of(clips, {"audio": "2.wav", "text": "a"})
    plain = source_of(path, "ctc", tokenizer=tokenizer).load(0, 0)
    speeds = (0.8, 1.25)
    source = source_of(path, "ctc", tokenizer=tokenizer, speeds=speeds, seed=3)
    seen = set()
    for epoch in range(12):
        speed = source.speed(0, epoch)
        seen.add(speed)
        utterance = source.load(0, epoch)
        frames = len(utterance.input_features)
        assert frames == pytest.approx(len(plain.input_features) / speed, abs=1.5)
        assert abs(source.num_frames(0, epoch) - frames) <= 1
        assert torch.equal(utterance.input_features, source.load(0, epoch).input_features)
    assert seen == set(speeds)


def test_frames_take_the_class_at_their_middle(clips: Path) -> None:
    spans = [{"start": 0.105, "end": 0.31, "label": "b"}, {"start": 0.5, "end": 0.52, "label": "a"}]
    path = manifest_of(clips, {"audio": "0.wav", "segments": spans})
    ids = {"none": 0, "a": 1, "b": 2}
    labels = source_of(path, "frames", label2id=ids).load(0, 0).labels.tolist()
    assert len(labels) == 39
    wanted = [0] * 39
    wanted[5:15] = [2] * 10  # middles at 0.11 ... 0.29 s; 0.31 s is the end
    wanted[25] = 1
    assert labels == wanted
    # Twice as fast, the same classes come in half the time.
    fast = source_of(path, "frames", label2id=ids, speeds=(2.0,)).load(0, 0).labels.tolist()
    assert fast[:9] == [0, 0, 0, 2, 2, 2, 2, 2, 0]  # middles at 0.14 ... 0.30 s
    with pytest.raises(UtteranceError, match="no class 'b'"):
        source_of(path, "frames", label2id={"none": 0, "a": 1}).load(0, 0)


# Batches.


def test_batches_keep_the_budget_hold_all_once_and_similar_lengths() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 1500) for _ in range(2000)]
    batches = frame_budget_batches(lengths, 6000, random.Random(1))
    assert sorted(i for batch in batches for i in batch) == list(range(2000))
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(sums) <= 6000
    assert np.mean(sums) > 0.9 * 6000
    ratios = [
        max(lengths[i] for i in b) / min(lengths[i] for i in b) for b in batches if len(b) > 1
    ]
    # A batch lies in one bucket or reaches into the next one, but for the few short utterances.
    assert np.quantile(ratios, 0.9) < BUCKET_RATIO**2
    assert batches != frame_budget_batches(lengths, 6000, random.Random(2))
    assert frame_budget_batches([50, 7, 9], 10, random.Random(0)).count([0]) == 1


def test_processes_share_the_batches_of_a_step() -> None:
    source = RandomSource(40)
    plan = BatchPlan(source, 70, num_processes=3, accumulate=2, seed=5)
    steps = plan.steps(4)
    for epoch in (0, 4):
        count = len(plan.steps(epoch))
        shares = [list(plan.keys(process, epoch, 0)) for process in range(3)]
        assert [len(share) for share in shares] == [2 * count] * 3
        seen = [index for share in shares for batch in share for index, _ in batch]
        assert len(seen) == len(set(seen)) > 25
        assert {e for share in shares for batch in share for _, e in batch} == {epoch}
    rest = [list(plan.keys(process, 4, len(steps) - 1)) for process in range(3)]
    last = [[index for index, _ in batch] for share in rest for batch in share]
    assert sorted(last) == sorted(steps[-1])
    assert plan.num_steps(5) == sum(len(plan.steps(epoch)) for epoch in range(5))
    assert plan.steps(4) == steps != plan.steps(3)
    # Fewer batches than processes: some are taken twice rather than none trained on.
    assert len(BatchPlan(RandomSource(2), 1000, num_processes=4).steps(0)[0]) == 4
    with pytest.raises(ValueError, match="nothing to train on"):
        BatchPlan(RandomSource(0), 100)


# Vocabulary and classes.


def test_vocabulary_of_transcripts(tmp_path: Path) -> None:
    texts = ["b a", "a \u00e9", "z a b"]
    assert characters_of(texts, min_count=2) == ["a", "b"]
    tokenizer = build_tokenizer(texts, tmp_path, min_count=2)
    assert tokenizer("ab z").input_ids == [3, 4, 2, 1]
    tokenizer.save_pretrained(tmp_path)
    reference = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert reference("ab z").input_ids == [3, 4, 2, 1]
    assert (reference.pad_token_id, len(reference)) == (0, 5)
    for texts, message in (([" "], "no characters"), (["a|b"], "stands for the space")):
        with pytest.raises(ValueError, match=message):
            characters_of(texts)
    assert class_names(["10", "b", "9", "a", "9"]) == ["9", "10", "a", "b"]
    with pytest.raises(ValueError, match="one class only, 'a'"):
        class_names(["a", "a"])


def test_the_vocabulary_of_a_checkpoint_is_kept_or_replaced(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL, feature_projection_input_dim=160, vocab_size=29)
    manifest = write_clips(tmp_path / "clips", [{"text": "Abc"}, {"text": "c"}])
    common = {"train": manifest, "eval": manifest, "steps": 1}
    with pytest.raises(ValueError, match=r"lacks characters .*'A' \(1 times\)"):
        finetune(config(model, tmp_path / "a", **common))
    head = "lm_head.weight"
    load = transformers.Wav2Vec2BertForCTC.from_pretrained
    before = load(model).state_dict()[head]
    # A step of this size leaves what was there to be recognised.
    small = {"learning_rate": 1e-9, **common}
    kept = finetune(config(model, tmp_path / "b", lower_case=True, **small))
    torch.testing.assert_close(load(kept.last).state_dict()[head], before)
    # 26 letters again, so that the old head would fit by its shape.
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    write_clips(tmp_path / "clips", [{"text": letters}])
    new = finetune(config(model, tmp_path / "c", vocabulary="new", **small))
    weights = load(new.last).state_dict()[head]
    assert weights.shape == before.shape
    assert (weights - before).norm() > 0.5 * before.norm()
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(new.last)
    assert tokenizer("AbC").input_ids == [3, 1, 5]


# Scores, options, logs.


def test_error_rates_count_all_utterances_together() -> None:
    pairs = [("a b c d", "a x c"), ("e", "e"), ("", "f g"), ("h", "")]
    rates = error_rates(pairs)
    # One substitution, two deletions, two insertions over six words.
    assert rates["wer"] == pytest.approx(5 / 6)
    # "b" to "x", " d" lost; "f g" put in; "h" lost; over 7 + 1 + 1 characters.
    assert rates["cer"] == pytest.approx((1 + 2 + 3 + 1) / 9)
    assert error_rates([("", "")]) == {"wer": 0.0, "cer": 0.0}
    # Composed characters and their parts are the same text.
    composed, parts = "\u1ebft caf\u00e9", "e\u0302\u0301t cafe\u0301"
    assert error_rates([(composed, parts), (parts, composed)]) == {"wer": 0.0, "cer": 0.0}
    assert error_rates([("e\u0301", "e\u0300")])["cer"] == 1.0
    assert is_better("wer", 0.1, None) and is_better("cer", 0.1, 0.2)
    assert is_better("accuracy", 0.2, 0.1) and not is_better("accuracy", 0.1, 0.1)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(decay: Any, wanted: list[float]) -> None:
    options = FinetuneConfig("m", "t", "e", "o", warmup=2, decay=decay, learning_rate=3.0)
    rates = [options.learning_rate_at(step, 6) / 3.0 for step in range(6)]
    assert rates == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("task", "asr", ValueError, "task must be one of ctc, classification, frames, xvector"),
        ("model", 3, TypeError, "model must be a path, got a int"),
        ("steps", 0, ValueError, "steps must be at least 1, got 0"),
        ("steps", 1.5, TypeError, "steps must be an integer, got 1.5"),
        ("epochs", True, TypeError, "epochs must be an integer, got True"),
        ("learning_rate", float("nan"), ValueError, "learning_rate must be above 0, got nan"),
        ("learning_rate", "1", TypeError, "learning_rate must be a number, got '1'"),
        ("average", 1.0, ValueError, "average must be between 0 and 1, got 1.0"),
        ("betas", (0.9, 1.0), ValueError, "betas must be two numbers from 0 to below 1"),
        ("speeds", (), ValueError, "speeds must be numbers from 0.25 to 4"),
        ("speeds", 1.0, TypeError, "speeds must be a tuple, got 1.0"),
        ("device", "cuda:1", ValueError, "device must be None or 'cpu', got 'cuda:1'"),
        ("lower_case", 1, TypeError, "lower_case must be True or False, got 1"),
        ("gradient_checkpointing", "some", ValueError, "one of none, layer, attention, auto, got"),
        ("gradient_checkpointing", 1, ValueError, "gradient_checkpointing must be True, False or"),
        ("model_overrides", ["a"], TypeError, "model_overrides must be a mapping"),
        ("weight_decay", -1, ValueError, "weight_decay must be 0 or above, got -1"),
        ("lora_dropout", 1, ValueError, "lora_dropout must be from 0 to below 1, got 1"),
    ],
)
def test_an_impossible_option_is_named(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    paths = {name: name for name in ("model", "train", "eval", "out")}
    with pytest.raises(error, match=message):
        FinetuneConfig(**{**paths, field: value})


def test_rows_after_the_saved_step_leave_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": null}\nnoise\n{"step": 3}\n{"step": 4, "l')
    log = JsonLines(path, 2)
    log.write({"step": 3, "loss": float("nan")})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": null}\n{"step": 3, "loss": null}\n'


def test_a_missing_package_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, options in (
        ("accelerate", {}),
        ("jiwer", {}),
        ("tensorboard", {"tensorboard": True}),
        ("peft", {"lora": 4}),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"{module} is not.*w2vbert_fast\[train\]"):
                finetune(config(tmp_path / "none", tmp_path / "out", **options))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_and_the_lines_show_step_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": 3, "loss": 0.51234, "learning_rate": 1e-4}
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("COLUMNS", "120")
        bar = ProgressBar(2, 5)
        bar.show(row)
        bar.advance(3)
        bar.close()
    assert "3/5" in terminal.getvalue() and "loss 0.5123" in terminal.getvalue()
    assert file.getvalue() == "step 3/5  loss 0.5123  learning_rate 0.0001\n"


def test_epochs_instead_of_steps(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(7)
    options = config(model, tmp_path / "out", epochs=3)
    result = finetune(options, train=source, evaluation=source)
    assert result.steps == BatchPlan(source, 100).num_steps(3)
    rows = [row for row in metrics(tmp_path / "out") if "loss" in row]
    assert sum(row["utterances"] for row in rows) == 3 * 7
    assert rows[-1]["epoch"] == 3


# The command.


@pytest.fixture
def usage() -> Iterator[Any]:
    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "w2vbert_fast.cli", "finetune", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"},
        )

    yield run


def test_the_command_knows_the_demo_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = []

    def finetune(config: FinetuneConfig) -> None:
        models.append(config.model)
        raise ValueError("enough")

    monkeypatch.setattr("w2vbert_fast.training.trainer.finetune", finetune)
    for model in ("demo", str(tmp_path)):
        options = ["--model", model, "--train", "a", "--eval", "b", "--out", "c"]
        monkeypatch.setattr(sys, "argv", ["w2vbert-fast", "finetune", *options])
        with pytest.raises(SystemExit):
            cli.main()
    assert models == [str(DEMO_FOLDER), str(tmp_path)]


def test_the_command_reports_what_keeps_it_from_starting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", **STILL)
    soundfile.write(tmp_path / "a.wav", speech_like(1, 16_000), 16_000)
    bad = manifest_of(tmp_path, {"audio": "a.wav"})
    common = ["--model", model, "--train", bad, "--eval", bad, "--out", tmp_path / "out"]
    for more, message in (
        ((), f"{bad} has rows that cannot be used:\n  line 1: no column text"),
        (("--task", "asr"), "task must be one of ctc, classification, frames, xvector, got 'asr'"),
        (("--set", "x"), "--set must be NAME=VALUE, got 'x'"),
        (("--option", "colour=1"), "--option: FinetuneConfig has no field colour"),
        (("--speeds", "a"), "--speeds must be numbers separated by commas, got 'a'"),
        (("--train", tmp_path / "none"), "No such file or directory"),
    ):
        monkeypatch.setattr(sys, "argv", ["w2vbert-fast", "finetune", *map(str, (*common, *more))])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_help_names_every_option(usage: Any) -> None:
    result = usage("--help")
    assert result.returncode == 0, result.stderr
    for name in ("--model", "--train", "--eval", "--out", "--task", "--lora", "--set"):
        assert name in result.stdout
    assert '{"audio": "a.flac", "text"' in result.stdout
