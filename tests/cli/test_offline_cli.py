"""The commands that run jobs: their options, messages and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.helpers.offline import clips, table, write_manifest
from tests.helpers.training import make_model
from w2vbert_fast.cli import app as cli, jobs
from w2vbert_fast.cli.transcribe import Search
from w2vbert_fast.inference import Embedder, load_pipeline, transcribe
from w2vbert_fast.inference.jobs.job import Summary
from w2vbert_fast.inference.runner import Flow
from w2vbert_fast.inference.tasks import TASKS


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


def test_transcribe_into_a_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 4, seconds=0.6)
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"audio": p, "id": p[-8:]} for p in paths])
    command = ["transcribe", manifest, tmp_path / "clips", "--model", tiny_checkpoint]
    command += ["--out", tmp_path / "out", "--format", "srt", "--frame-budget", "500"]
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert "8 rows, 0.00 h of audio; 8 in" in result.stderr
    expected = [row.text for row in transcribe(paths, load_pipeline(tiny_checkpoint))]
    rows = table(tmp_path / "out")
    assert [row["text"] for row in rows] == expected * 2
    assert rows[0]["id"] == "0000.wav"
    assert rows[0]["words"][0]["confidence"] <= 1
    assert (tmp_path / "out" / rows[0]["srt_file"]).exists()
    more = invoke(*command, "--timestamps", "character")
    assert (more.exit_code, "8 rows, 0.00 h of audio; 8 in" in more.stderr) == (0, True)
    assert table(tmp_path / "out")[0]["words"][0]["characters"]
    again = invoke(*command, "--timestamps", "character", "--max-seconds", "30")
    assert again.exit_code == 2
    assert "options.max_seconds: 300.0 before, 30.0 now" in again.stderr
    # Behind what the two names were taken for.
    assert again.stderr.count("\n") == 3


def test_what_is_said_of_one_row_and_of_many() -> None:
    content = {"audio_hours": 0.1, "this_run": {"rows": 0}, "passed_over": {}}
    one, none = {"rows": 1, "examples": ["a.wav"]}, {"rows": 0, "examples": []}
    found = Summary(1, {"OSError": 1}, {**content, "changed": one, "vanished": none})
    assert jobs._ending(found, "out").startswith(
        "1 row, 0.10 h of audio; 1 row changed and done again (a.wav); 1 error (1 OSError), see"
    )
    found = Summary(2000, {}, {**content, "changed": none, "vanished": one})
    assert (
        jobs._ending(found, "out") == "2,000 rows, 0.10 h of audio; 1 row no longer there (a.wav)"
    )


def test_rows_with_errors_are_exit_status_1(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (good,) = clips(tmp_path / "clips", 1)
    command = ["transcribe", "no.wav", good, "nor this.wav", "--model", tiny_checkpoint]
    result = invoke(*command, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "2 errors (2 FileNotFoundError), see" in result.stderr
    result = invoke(*command, "--out", tmp_path / "few", "--max-errors", "1")
    assert result.exit_code == 2
    assert "2 rows failed, more than the 1 of max_errors" in result.stderr


def test_embed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 3)
    command = ["embed", tmp_path / "clips", "--model", tiny_checkpoint, "--layer", "1"]
    command += ["--pool", "mean", "--format", "npy", "--out", tmp_path / "out"]
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    found = Embedder(tiny_checkpoint, layer=1, pool="mean")(paths)
    for row, expected in zip(table(tmp_path / "out"), found, strict=True):
        assert expected.embedding is not None
        values = np.load(tmp_path / "out" / row["npy_file"])
        np.testing.assert_allclose(values, expected.embedding.numpy(), rtol=1e-5)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_window_of_a_job_is_as_long_as_the_task_says(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        pass

    def make_runner(made: object, flow: Flow) -> None:
        raise Made(flow.window_seconds)

    monkeypatch.setattr(jobs.Job, "make_runner", lambda job, device: make_runner)
    with pytest.raises(Made) as found:
        jobs.run_job(task, jobs.Inputs(inputs=[]), "out", {"model": "demo"}, jobs.Job())
    seconds = {"transcribe": 1800.0, "align": 1800.0, "embed": 600.0, "classify": 1800.0}
    assert found.value.args[0] == seconds[task]


@pytest.mark.parametrize(
    ("head", "columns"),
    [
        ("Wav2Vec2BertForSequenceClassification", {"label", "scores"}),
        ("Wav2Vec2BertForAudioFrameClassification", {"segments"}),
        ("Wav2Vec2BertForXVector", {"embedding"}),
    ],
)
@pytest.mark.parametrize("table_format", ["jsonl", "parquet"])
def test_classify(tmp_path: Path, head: str, columns: set[str], table_format: str) -> None:
    model = make_model(tmp_path / "model", head)
    clips(tmp_path / "clips", 3, seconds=0.8)
    command = ["classify", tmp_path / "clips", "--model", model, "--out", tmp_path / "out"]
    result = invoke(*command, "--format", table_format)
    assert result.exit_code == 0, result.stderr
    for row in table(tmp_path / "out"):
        assert columns <= set(row)
        if "scores" in row:
            assert sum(dict(row["scores"]).values()) == pytest.approx(1, abs=1e-3)
        if "segments" in row:
            assert row["segments"][0]["start"] == 0


def test_a_hotword_with_a_slash_is_no_file(tmp_path: Path) -> None:
    search = Search(hotwords=["and/or, a b", str(tmp_path / "words")])
    with pytest.raises(FileNotFoundError):
        search.of_task()
    (tmp_path / "words").write_text("c d\n\ne\n")
    assert search.of_task()["hotwords"] == ("and/or", "a b", "c d", "e")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transcribe", "a.wav", "--format", "parquet"], "--format parquet needs --out DIR"),
        (["transcribe", "a.wav", "--format", "csv"], "format 'csv' is not one of transcribe's"),
        (["transcribe", "a.wav", "--lm", "x"], "lm needs a beam search"),
        (["transcribe", "a.wav", "--hotwords", "x"], "hotwords needs a beam search"),
        (["transcribe", "a.wav", "--beam", "9", "--hotword-weight", "2"], "needs hotwords"),
        (["transcribe", "a.wav", "--beam", "9", "--lm-weight", "2"], "needs a language model"),
        (["transcribe", "a.wav", "--beam", "9", "--unigrams", "x"], "needs a language model"),
        (["transcribe", "a.wav", "--beam", "9", "--hotwords", "no.txt"], "No such file"),
        (["transcribe", "a.wav", "--vad", "--overlap-seconds", "2"], "no effect with vad"),
        (["transcribe", "a.wav", "--timestamps", "word"], "no effect on what is printed"),
        (["transcribe", "a.wav", "--retry-errors"], "--retry-errors needs --out DIR"),
        (["transcribe", "a.wav", "--overwrite"], "--overwrite needs --format or --out"),
        (["transcribe", "a.wav", "--max-errors", "0"], "--max-errors needs --out DIR"),
        (["transcribe", "a.wav", "--beam", "9", "--hotwords", " ,"], "' ,' holds no words"),
        (["transcribe", "a.wav", "--engine", "ray"], "--engine needs --out DIR"),
        (["transcribe", "a.wav", "--format", "srt", "--timestamps", "none"], "needs timestamps"),
        (["transcribe", "a.wav", "--out", "a.srt", "--format", "vtt"], "is not of --format vtt"),
        (["transcribe", "a.wav", "b.wav", "--out", "a.srt"], "one file for 2 recordings"),
        (["transcribe", "a.wav", "--out", "no/a.srt"], "the folder of no/a.srt is not there"),
        (["transcribe", "a.wav", "b.wav", "--format", "srt"], "2 recordings need --out DIR, "),
        (["transcribe", "a.wav", "a.mp3", "--format", "srt", "--beside"], "be written to a.srt"),
        (["transcribe", "a.txt", "--format", "txt"], "is read itself"),
        (["transcribe", "a.wav", "--json", "--out", "OUT"], "a job has --log-json"),
        (["transcribe", "a.wav", "--out", "OUT", "--lm", "x"], "lm needs a beam search"),
        (["transcribe", "a.wav", "--out", "OUT", "--format", "npy"], "format 'npy' is not one"),
        (["transcribe", "a.wav", "--out", "OUT", "--frame-budget", "all"], "--frame-budget must"),
        (["transcribe", "a.wav", "--out", "OUT", "--workers", "0"], "workers must be at least 1"),
        (["transcribe", "*.none", "--out", "OUT"], "finds no files"),
        (["transcribe", "no.jsonl", "--out", "OUT"], "No such file or directory"),
        (["embed", "a.wav", "--model", "nowhere", "--out", "OUT"], "nowhere"),
        (["embed", "a.wav", "--out", "OUT"], "--model"),
        (["classify", "a.wav", "--model", "demo", "--out", "OUT"], "classifying needs one of"),
    ],
)
def test_wrong_usage_is_exit_status_2(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("OUT/part-*"))


def test_progress_as_json(tiny_checkpoint: Path, tmp_path: Path) -> None:
    clips(tmp_path / "clips", 3)
    command = ["transcribe", tmp_path / "clips", "--model", tiny_checkpoint, "--log-json"]
    result = invoke(*command, "--out", tmp_path / "out")
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [event["event"] for event in events] == ["input", "shard", "summary"]
    assert events[0]["parts"] == [f"{tmp_path / 'clips'}: folder of recordings, 3 rows"]
    assert events[-1]["this_run"]["rows"] == 3
