"""Jobs: killed at any moment, started again, refused, and the tables that they leave."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import soundfile
import torch

from tests.helpers.offline import Stub, clips, job, run, table, write_manifest
from tests.helpers.signals import speech_like
from w2vbert_fast.inference import Embedder, Flow, load_pipeline, transcribe
from w2vbert_fast.inference.jobs.formats import JsonTable
from w2vbert_fast.inference.jobs.job import Interrupted, Job, TooManyErrors
from w2vbert_fast.inference.jobs.journal import Entry, JobError, Journal, Ranges, ranges_of
from w2vbert_fast.inference.jobs.results import read_results
from w2vbert_fast.inference.tasks import Embed, Transcribe

COMMAND = [sys.executable, "-m", "w2vbert_fast.cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def attempts(manifest: str, model: Path, out: Path, mode: str, shard_rows: int) -> int:
    """Kill a job again and again, then let it end; how often it was killed."""
    arguments = [manifest, str(model), str(out), mode, str(shard_rows)]
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.offline_attempts", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout.split()[-1])


@pytest.fixture(scope="module")
def manifest_500(tmp_path_factory: pytest.TempPathFactory) -> str:
    """500 rows, ten of them bad, with a column that is carried through."""
    folder = tmp_path_factory.mktemp("kill")
    paths = clips(folder / "clips", 125, seconds=0.3)
    rows = [{"audio_filepath": paths[i % 125], "speaker": f"s{i}"} for i in range(500)]
    for index in range(7, 500, 50):
        rows[index]["audio_filepath"] = f"missing {index}.wav"
    return write_manifest(folder / "rows.jsonl", rows)


def test_a_job_killed_over_and_over_ends_with_the_rows_of_an_undisturbed_one(
    tiny_checkpoint: Path, manifest_500: str, tmp_path: Path
) -> None:
    killed = attempts(manifest_500, tiny_checkpoint, tmp_path / "killed", "random", 5)
    assert killed == 24
    flow = Flow(frame_budget=400, workers=2, window_rows=10)
    task = Transcribe(tiny_checkpoint, timestamps="word")
    run([manifest_500], tmp_path / "whole", task, flow=flow, shard_rows=5)
    expected, found = table(tmp_path / "whole"), table(tmp_path / "killed")
    assert len(expected) == 500
    assert sum("error" in row for row in expected) == 10
    assert [json.dumps(row) for row in found] == [json.dumps(row) for row in expected]
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert not [name for name in left if name.endswith(".tmp")]
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert (summary["rows"], summary["errors"]) == (500, {"FileNotFoundError": 10})


def test_a_crash_at_every_step_of_finishing_a_shard(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 9)
    rows = [{"audio": path} for path in [*paths, "missing.wav"]]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    steps = attempts(manifest, tiny_checkpoint, tmp_path / "killed", "steps", 10)
    # job.json; two tables, their folder, the journal and its folder; summary.json.
    assert steps >= 10
    flow = Flow(frame_budget=400, workers=2, window_rows=10)
    task = Transcribe(tiny_checkpoint, timestamps="word")
    run([manifest], tmp_path / "whole", task, flow=flow, shard_rows=10)
    expected = table(tmp_path / "whole")
    for step in range(1, steps + 1):
        assert table(tmp_path / "killed" / str(step)) == expected


def test_what_a_power_cut_leaves_of_the_journals_last_line_is_cut_off(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 20)
    run(paths, tmp_path / "out")
    expected = table(tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for tail in (b"", lines[-1][:30], b"\0" * 40, b"\0" * 40 + b"\n"):
        journal.write_bytes(b"".join(lines[:-1]) + tail)
        run(paths, tmp_path / "out")
        assert table(tmp_path / "out") == expected
    journal.write_bytes(lines[0][:20] + b"\n" + b"".join(lines[1:]))
    with pytest.raises(JobError, match="line 1, is damaged"):
        run(paths, tmp_path / "out")


def test_what_a_killed_run_has_left_is_removed(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 6)
    run(paths, tmp_path / "out")
    left = ["part-000009.jsonl", "errors-000009.jsonl", ".part-000002.jsonl.tmp"]
    for name in left:
        (tmp_path / "out" / name).write_text("{}\n")
    run(paths, tmp_path / "out")
    assert not {path.name for path in (tmp_path / "out").iterdir()} & set(left)
    assert len(table(tmp_path / "out")) == 6


def test_results_that_were_changed_are_refused(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 6)
    run(paths, tmp_path / "out")
    part = tmp_path / "out" / "part-000000.jsonl"
    part.write_text(part.read_text() + "\n")
    with pytest.raises(JobError, match=r"part-000000.jsonl has \d+ bytes instead of \d+"):
        run(paths, tmp_path / "out")
    part.unlink()
    with pytest.raises(JobError, match=r"part-000000.jsonl is missing"):
        run(paths, tmp_path / "out")
    run(paths, tmp_path / "out", overwrite=True)
    assert len(table(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": Stub(max_seconds=30)}, r"options.max_seconds: 300.0 before, 30 now"),
        ({"task": Stub("other")}, r'model.name: "demo" before, "other" now'),
        ({"formats": ["parquet"]}, "options.formats"),
        ({"flow": Flow(longest=60)}, "options.longest: 14400.0 before, 60 now"),
    ],
)
def test_a_changed_option_is_refused_and_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    paths = clips(tmp_path / "clips", 6)
    run(paths, tmp_path / "out")
    before = table(tmp_path / "out")
    with pytest.raises(JobError, match=message):
        run(paths, tmp_path / "out", **change)
    assert table(tmp_path / "out") == before


def test_a_changed_input_or_model_is_refused_and_named(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    paths = clips(tmp_path / "clips", 6)
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"audio": path} for path in paths])
    run([manifest], tmp_path / "out")
    other = write_manifest(tmp_path / "other.jsonl", [{"audio": path} for path in paths[:5]])
    for names in ([other], [manifest, other], paths):
        with pytest.raises(JobError, match=r"input.names.*: .* before, .* now"):
            run(names, tmp_path / "out")
    model = tmp_path / "model"
    load_pipeline(tiny_checkpoint).model.save_pretrained(model)
    load_pipeline(tiny_checkpoint).processor.save_pretrained(model)
    run(paths, tmp_path / "texts", Transcribe(model))
    network = load_pipeline(model).model
    with torch.no_grad():
        network.lm_head.bias[3] += 1
    network.save_pretrained(model)
    with pytest.raises(JobError, match=r"model.files.model.safetensors: .* before, .* now"):
        run(paths, tmp_path / "texts", Transcribe(model))


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 3)
    run(paths, tmp_path / "out")
    lock = filelock.FileLock(tmp_path / "out" / ".lock")
    holder = (
        "import sys, filelock\n"
        "lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, lock.lock_file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(JobError, match="another process works in"):
            run(paths, tmp_path / "out")
        process.kill()
    assert run(paths, tmp_path / "out").rows == 3


def test_a_finished_job_does_not_load_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clips(tmp_path / "clips", 3)
    run(paths, tmp_path / "out")
    monkeypatch.setattr(Stub, "load", lambda self: pytest.fail("loaded"))
    assert run(paths, tmp_path / "out").rows == 3


def test_errors_are_retried_without_doubling_a_row(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 12)
    hidden = {}
    for index in (1, 6, 7, 11):
        hidden[index] = Path(paths[index]).read_bytes()
        Path(paths[index]).unlink()
    summary = run(paths, tmp_path / "out")
    assert summary.errors == {"FileNotFoundError": 4}
    assert run(paths, tmp_path / "out").errors == {"FileNotFoundError": 4}
    for index in (1, 7, 11):
        Path(paths[index]).write_bytes(hidden[index])
    summary = run(paths, tmp_path / "out", retry_errors=True)
    assert (summary.rows, summary.errors) == (12, {"FileNotFoundError": 1})
    assert summary.content["this_run"]["rows"] == 4
    rows = table(tmp_path / "out")
    assert [row["index"] for row in rows if "error" in row] == [6]
    assert len(list((tmp_path / "out").glob("errors-*"))) == 1
    Path(paths[6]).write_bytes(hidden[6])
    assert run(paths, tmp_path / "out", retry_errors=True).errors == {}
    assert [row["text"] for row in table(tmp_path / "out")] == [
        str(round((0.2 + i * 0.001) * 16_000)) for i in range(12)
    ]


def test_too_many_errors_end_the_job_and_keep_what_is_done(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 20)
    for path in paths[3:13]:
        Path(path).unlink()
    with pytest.raises(TooManyErrors, match="7 rows failed, more than the 4 of max_errors"):
        run(paths, tmp_path / "out", max_errors=4)
    assert len(table(tmp_path / "out")) == 10
    with pytest.raises(TooManyErrors):
        run(paths, tmp_path / "out", max_errors=4)
    assert run(paths, tmp_path / "out").rows == 20


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = clips(tmp_path / "clips", 20)
    whole, before = Stub.run, []

    def interrupted(self: Stub, pieces: Any) -> list[Any]:
        before.append(len(pieces))
        if sum(before) > 12:
            raise KeyboardInterrupt
        return whole(self, pieces)

    monkeypatch.setattr(Stub, "run", interrupted)
    with pytest.raises(Interrupted, match="the same command goes on"):
        run(paths, tmp_path / "out", shard_rows=100)
    assert len(table(tmp_path / "out")) == 10
    monkeypatch.setattr(Stub, "run", whole)
    assert run(paths, tmp_path / "out", shard_rows=100).rows == 20
    assert len(table(tmp_path / "out")) == 20


@pytest.mark.parametrize("step", ["_prepare", "_finish"])
def test_ctrl_c_before_and_behind_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupted(self: Job, *arguments: Any) -> None:
        raise KeyboardInterrupt

    paths = clips(tmp_path / "clips", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Job, step, interrupted)
        with pytest.raises(Interrupted, match="the same command goes on"):
            run(paths, tmp_path / "out")
    assert run(paths, tmp_path / "out").rows == 3
    assert len(table(tmp_path / "out")) == 3


def test_ctrl_c_while_results_are_taken_in_doubles_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has rows already that the shard has not counted: nothing of it may be kept."""
    paths = clips(tmp_path / "clips", 20)
    whole, tables = JsonTable.add, []

    def interrupted(self: JsonTable, *arguments: Any) -> None:
        whole(self, *arguments)
        tables.append(self)
        if len(tables) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonTable, "add", interrupted)
    with pytest.raises(Interrupted):
        run(paths, tmp_path / "out", shard_rows=100)
    assert run(paths, tmp_path / "out", shard_rows=100).rows == 20
    assert len(table(tmp_path / "out")) == 20


@pytest.mark.parametrize(("shard_rows", "kept"), [(5, 5), (100, 20)])
def test_ctrl_c_while_a_shard_is_finished_finishes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_rows: int, kept: int
) -> None:
    paths = clips(tmp_path / "clips", 20)
    whole = Journal.write

    def interrupted(self: Journal, entry: Entry) -> None:
        whole(self, entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", interrupted)
    with pytest.raises(Interrupted):
        run(paths, tmp_path / "out", shard_rows=shard_rows)
    monkeypatch.setattr(Journal, "write", whole)
    assert len(table(tmp_path / "out")) == kept
    assert run(paths, tmp_path / "out", shard_rows=shard_rows).rows == 20
    assert len(table(tmp_path / "out")) == 20


def test_a_line_of_the_journal_that_is_not_surely_on_the_disk_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = clips(tmp_path / "clips", 12)
    journal, whole = tmp_path / "out" / "journal.jsonl", os.fsync

    def failing(descriptor: int) -> None:
        written = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if written == 2 and os.path.samestat(os.fstat(descriptor), journal.stat()):
            raise OSError(errno.EIO, "Input/output error")
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run(paths, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", whole)
    assert len(table(tmp_path / "out")) == 5
    assert run(paths, tmp_path / "out").content["this_run"]["rows"] == 7
    assert len(table(tmp_path / "out")) == 12


def test_the_command_stops_on_sigterm_and_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 40, seconds=0.5)
    # Far more than is done by the time that the signal arrives, also on a busy machine.
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"audio": p} for p in paths * 500])
    command = [*COMMAND, "transcribe", manifest, "--model", str(tiny_checkpoint)]
    command += ["--out", str(tmp_path / "out"), "--shard-rows", "10", "--frame-budget", "500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        while not (tmp_path / "out" / "journal.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert (process.returncode, errors.decode().splitlines()[-1]) == (
        2,
        "w2vbert-fast: interrupted; the same command goes on",
    )
    done = len(table(tmp_path / "out"))
    assert 0 < done < 20_000


@pytest.mark.parametrize("formats", [["jsonl"], ["parquet"], ["safetensors"], ["npy"]])
def test_a_full_disk_ends_the_job_which_goes_on_later(
    tiny_checkpoint: Path, tmp_path: Path, formats: list[str]
) -> None:
    paths = clips(tmp_path / "clips", 30)
    embeds = formats != ["jsonl"]
    task: Any = Embed(tiny_checkpoint) if embeds else Transcribe(tiny_checkpoint)
    out = tmp_path / "out"
    out.mkdir()
    run(paths, out, task, formats, shard_rows=30)
    limit = max(path.stat().st_size for path in out.glob("part-*")) // 2
    assert limit > 400  # the journal's line is shorter
    for path in [*out.glob("part-*"), out / "journal.jsonl"]:
        path.unlink()
    # Writing fails as on a full disk, a part of it being written.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(paths, out, task, formats, shard_rows=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [p.name for p in out.rglob("*.tmp")]
    assert not list(out.glob("part-*"))
    assert run(paths, out, task, formats).rows == 30
    assert [row["index"] for row in read_results(out)] == list(range(30))


def test_progress_that_nobody_reads_ends_the_job_cleanly(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    paths = clips(tmp_path / "clips", 12)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [*COMMAND, "transcribe", *paths, "--model", str(tiny_checkpoint), "--log-json"]
    command += ["--out", str(tmp_path / "out"), "--shard-rows", "5"]
    # What cannot be written stays in a buffer until the end.
    buffered = {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, stderr=write_end, env=buffered)
    os.close(write_end)
    assert result.returncode == 2
    result = subprocess.run(command, capture_output=True, env=ENVIRONMENT)
    assert result.returncode == 0
    assert len(table(tmp_path / "out")) == 12
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [event["event"] for event in events[-2:]] == ["shard", "summary"]
    assert events[-1]["rows"] == 12


def test_the_line_of_progress_and_the_summary(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 10)
    stream = io.StringIO()
    work = job([*paths, "missing.wav"], tmp_path / "out", stream=stream)
    summary = work.run()
    line = work.progress.line()
    expected = r"11/11  0\.00 h of audio  RTF \d+\.\d{4}  ETA 0:00:00  1 error"
    assert re.fullmatch(expected, line), line
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content == summary.content
    assert content["good"] == 10
    assert content["audio_hours"] == pytest.approx(2.045 / 3600, abs=1e-6)
    assert {"python", "torch", "w2vbert_fast"} <= set(content["versions"])
    assert content["this_run"]["real_time_factor"] > 0


def test_texts_and_times_of_a_parquet_table(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 7, seconds=0.6)
    rows: list[dict[str, Any]] = [
        {"audio": path, "text": f"reference {i}", "speaker": i, "gain": i / 2 if i else 0}
        for i, path in enumerate(paths)
    ]
    rows[3]["tags"] = ["a", "b"]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    task = Transcribe(tiny_checkpoint, timestamps="character")
    run([manifest], tmp_path / "out", task, ["parquet", "srt", "txt"])
    expected = [row.text for row in transcribe(paths, load_pipeline(tiny_checkpoint))]
    found = table(tmp_path / "out")
    assert [row["text"] for row in found] == expected
    for i, row in enumerate(found):
        assert (row["input_text"], row["speaker"], row["gain"]) == (f"reference {i}", i, i / 2)
        assert " ".join(word["word"] for word in row["words"]) == row["text"]
        letters = [c["character"] for word in row["words"] for c in word["characters"]]
        assert "".join(letters) == row["text"].replace(" ", "")
        words = (tmp_path / "out" / row["txt_file"]).read_text().split()
        assert words == row["text"].split()
        assert "-->" in (tmp_path / "out" / row["srt_file"]).read_text()
    assert json.loads(found[3]["extra"]) == {"tags": ["a", "b"]}


def test_subtitles_of_a_vocabulary_without_spaces(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The tiny model with Han characters and a full stop: no spaces, two columns a character."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    tokens = json.loads((model / "vocab.json").read_text())
    han = {token: chr(0x4E00 + 7 * i) if token.isalpha() else token for token, i in tokens.items()}
    written = {han[token]: i for token, i in tokens.items() if token not in "|'"}
    written.update({"。": tokens["|"], "|": tokens["'"]})
    (model / "vocab.json").write_text(json.dumps(written))
    samples = speech_like(31, 16_000)
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    task = Transcribe(model, timestamps="word", max_seconds=10)
    run([str(tmp_path / "a.wav")], tmp_path / "out", task, ["srt", "txt"])
    (row,) = table(tmp_path / "out")
    assert "。" in row["text"] and len(row["text"]) > 100
    assert all("characters" not in word for word in row["words"])
    blocks = (tmp_path / "out" / row["srt_file"]).read_text().strip().split("\n\n")
    shown = [block.split("\n")[2:] for block in blocks]
    assert "".join("".join(lines) for lines in shown) == row["text"].replace(" ", "")
    for lines in shown:
        assert len(lines) <= 2
        assert all(len(line) + sum(c > "\u3000" for c in line) <= 42 for line in lines)
        assert not "".join(lines)[:-1].rstrip("。").count("。")
    assert any("".join(lines).endswith("。") for lines in shown)
    texts = (tmp_path / "out" / row["txt_file"]).read_text().splitlines()
    assert [t.replace(" ", "") for t in texts] == [
        "".join(lines).replace(" ", "") for lines in shown
    ]


@pytest.mark.parametrize("kind", ["parquet", "npy", "safetensors"])
@pytest.mark.parametrize("pool", ["none", "mean"])
def test_embeddings_in_every_format(
    tiny_checkpoint: Path, tmp_path: Path, kind: str, pool: str
) -> None:
    paths = [*clips(tmp_path / "clips", 6), "missing.wav"]
    task = Embed(tiny_checkpoint, pool=pool, embedding_dtype="float16")
    run(paths, tmp_path / "out", task, [kind])
    flow = Flow(frame_budget=400, window_rows=5)
    embedder = Embedder(tiny_checkpoint, pool=pool, embedding_dtype="float16", flow=flow)
    expected = [result.embedding for result in embedder(paths[:6])]
    found = []
    for row in table(tmp_path / "out")[:6]:
        if kind == "parquet":
            found.append(np.array(row["embedding"], np.float16))
        elif kind == "npy":
            found.append(np.load(tmp_path / "out" / row["npy_file"]))
        else:
            shard = safetensors.torch.load_file(tmp_path / "out" / row["safetensors_file"])
            found.append(shard[str(row["index"])].numpy())
    for ours, tensor in zip(found, expected, strict=True):
        assert tensor is not None
        np.testing.assert_array_equal(ours, tensor.numpy())
    if kind == "parquet":
        schema = pyarrow.parquet.read_schema(tmp_path / "out" / "part-000000.parquet")
        assert "halffloat" in str(schema.field("embedding").type)


@pytest.mark.parametrize(
    ("task", "formats", "message"),
    [
        (Transcribe(), ["npy"], "format 'npy' is not one of transcribe's"),
        (Transcribe(), ["jsonl", "parquet"], "either jsonl or parquet"),
        (Transcribe(), ["srt"], "needs timestamps"),
        (Embed(), ["npy", "parquet"], "embeddings have one format"),
        (Embed(), ["jsonl"], "format 'jsonl' is not one of embed's"),
    ],
)
def test_formats_that_do_not_go_with_a_task(
    tmp_path: Path, task: Any, formats: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(clips(tmp_path / "clips", 1), tmp_path / "out", task, formats)
    assert not (tmp_path / "out").exists()


def test_overwriting_removes_what_a_job_has_written_and_nothing_else(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 6)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(paths, tmp_path / "out")
    run(paths[:2], tmp_path / "out", overwrite=True)
    assert len(table(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_ranges_are_a_set_of_numbers() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        chosen = {numbers.randrange(60) for _ in range(numbers.randrange(50))}
        ranges = Ranges()
        for index in numbers.sample(sorted(chosen), len(chosen)):
            ranges.add(index, index + 1)
        assert {index for index in range(-2, 70) if index in ranges} == chosen
        assert len(ranges) == len(chosen)
        pairs = ranges_of(sorted(chosen))
        assert all(a[1] < b[0] for a, b in itertools.pairwise(pairs))
