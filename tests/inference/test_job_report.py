"""The page of a job: every row is in it, good or bad, and of what a job has done so far."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.offline import clips, run, write_manifest
from tests.report.test_page import rows_of, scripts
from w2vbert_fast.inference import Flow
from w2vbert_fast.inference.jobs.job import Job, JobOptions
from w2vbert_fast.inference.jobs.journal import JobError
from w2vbert_fast.inference.jobs.report import REPORT_FILE, write_report
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.inference.tasks import Transcribe
from w2vbert_fast.recordings.inputs import open_inputs

SAMPLES = Path(__file__).parents[2] / "w2vbert_fast" / "demo" / "samples"


@pytest.mark.parametrize("table", ["jsonl", "parquet"])
def test_every_row_is_in_the_page_of_a_job(tmp_path: Path, table: str) -> None:
    names = clips(tmp_path / "clips", 12)
    rows = [
        {"audio_filepath": name, "id": f"id {i}", "town": "Ulm"} for i, name in enumerate(names)
    ]
    rows[3]["audio_filepath"] = str(tmp_path / "missing.wav")
    (tmp_path / "clips" / "0005.wav").write_text("no audio")
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    run([manifest], out, None, [table])
    found = {row[0][-1]: row for row in rows_of(out / REPORT_FILE)}
    assert sorted(found) == list(range(12))
    assert [index for index, row in sorted(found.items()) if row[1]] == [3, 5]
    cells, failed, audio, offset, seconds = found[0]
    assert cells[0] == "id 0" and failed == 0 and offset == 0.0
    assert cells[1] == seconds == 0.2 and cells[3] == "3200"
    assert "town: Ulm" in cells[7]
    assert audio == "../clips/0000.wav"
    assert found[3][2] is None  # there is no such file
    (page,) = scripts(out / REPORT_FILE, "page")
    facts = {fact["name"]: fact["value"] for fact in page["facts"]}
    assert facts["Rows"] == "12" and facts["Failed"] == "2" and facts["Audio"] == "0:00:02"
    failed_kinds = {name: count for name, count, _ in page["findings"][0]["entries"]}
    assert failed_kinds == {"AudioError": 1, "FileNotFoundError": 1}
    assert len(page["charts"][0]["lines"]["speed"]) == 3  # shards of five rows


def test_words_and_confidence_of_a_transcript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SAMPLES.parent)
    task = Transcribe("demo", timestamps="word")
    runner = Runner(task, Flow(frame_budget=1000, workers=1))
    Job(runner, open_inputs(["samples"]), tmp_path / "out", (), JobOptions()).run()
    monkeypatch.chdir(tmp_path)  # the page is written anew from elsewhere
    path = write_report("out")
    table = (tmp_path / "out" / "part-000000.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [json.loads(line) for line in table]
    for row, words, result in zip(rows_of(path), scripts(path, "words")[0], expected, strict=True):
        assert words[::4] == [word["word"] for word in result["words"]]
        confidences = [word["confidence"] for word in result["words"]]
        assert row[0][2] == pytest.approx(sum(confidences) / len(confidences))
        assert (tmp_path / "out" / row[2]).resolve() == SAMPLES.parent / result["audio_filepath"]
    (page,) = scripts(path, "page")
    assert (page["sort"], page["descending"]) == (2, False)  # the least certain first


def test_a_job_that_was_stopped_and_one_without_a_page(tmp_path: Path) -> None:
    names = clips(tmp_path / "clips", 6)
    out = tmp_path / "out"
    run(names, out, page=False)
    assert not (out / REPORT_FILE).exists()
    (out / "summary.json").unlink()
    lines = (out / "journal.jsonl").read_text().splitlines()
    (out / "journal.jsonl").write_text(lines[0] + '\n{"shard": 1, "fil')  # being written
    assert len(rows_of(write_report(out))) == 5
    (page,) = scripts(out / REPORT_FILE, "page")
    assert {"name": "State", "value": "not at its end"} in page["facts"]
    # Journals of older versions have no times: no curve then.
    entry = json.loads(lines[0])
    del entry["seconds"]
    (out / "journal.jsonl").write_text(json.dumps(entry) + "\n")
    write_report(out)
    assert scripts(out / REPORT_FILE, "page")[0]["charts"][0]["lines"] == {"speed": []}


def test_a_page_is_written_anew_only_where_rows_were_done_since(tmp_path: Path) -> None:
    names = clips(tmp_path / "clips", 6)
    out = tmp_path / "out"
    page = out / REPORT_FILE
    run(names, out)
    page.write_text("as it was")
    run(names, out)
    assert page.read_text() == "as it was"
    os.utime(out / "journal.jsonl")  # as a killed run leaves it
    run(names, out)
    assert len(rows_of(page)) == 6


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no rows of a job: there is no job"):
        write_report(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    (name,) = clips(tmp_path / "clips", 1)
    strange = os.path.join(os.fsencode(tmp_path / "clips"), b"caf\xe9.wav")
    shutil.move(os.fsencode(name), strange)
    out = tmp_path / "out"
    run([str(tmp_path / "clips")], out)
    ((cells, _, audio, _, _),) = rows_of(out / REPORT_FILE)
    assert cells[0].endswith("caf\\xe9.wav") and audio == "../clips/caf%E9.wav"
