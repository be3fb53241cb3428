"""The same command again: on an input that has grown, and whose recordings have changed or gone."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from tests.helpers.offline import Stub, clips, encoded, run, table, write_manifest
from w2vbert_fast.inference import Transcription
from w2vbert_fast.inference.ctc.timestamps import Character, Word
from w2vbert_fast.inference.jobs import shard
from w2vbert_fast.inference.jobs.job import JobError
from w2vbert_fast.inference.jobs.results import read_results
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.tasks import Transcribe


@dataclass
class Texts(Stub):
    """A stub whose results may be files of single recordings, and have times."""

    timestamps: str = "none"

    name = "transcribe"

    def finish(self, loaded: Loaded, *arguments: Any) -> Transcription:
        found = super().finish(loaded, *arguments)
        if self.timestamps == "none":
            return found
        characters = [Character(c, i / 10, i / 10 + 0.1, 0.5) for i, c in enumerate("ab")]
        words = (Word(found.text or "", 0.0, 0.2, 0.25, characters),)
        return replace(found, words=words, characters=self.timestamps == "character")

    def options(self) -> dict[str, Any]:
        return {**super().options(), "timestamps": self.timestamps}

    def columns(self) -> list[tuple[str, Any]]:
        return Transcribe(timestamps=self.timestamps).columns()


def sound(path: Path, samples: int) -> Path:
    """A recording that its text tells from others: the stub says how many samples it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(samples) / 9).astype(np.float32) / 3, 16_000)
    return path


def texts(out: Path) -> dict[str, str]:
    """What was said, by the names of recordings; each is there once, under one index."""
    rows = list(read_results(out))
    assert sorted(row["index"] for row in rows) == list(range(len(rows)))
    found = {Path(row["audio_filepath"]).name: row.get("text", row.get("error")) for row in rows}
    assert len(found) == len(rows)
    return found


def counts(summary: Any) -> tuple[int, int, int, int]:
    """Rows, those of this run, changed, vanished."""
    content = summary.content
    return (
        summary.rows,
        content["this_run"]["rows"],
        content["changed"]["rows"],
        content["vanished"]["rows"],
    )


def test_new_files_of_a_folder_are_done(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for name, samples in (("b", 1000), ("d", 2000)):
        sound(folder / f"{name}.wav", samples)
    assert counts(run([str(folder)], out)) == (2, 2, 0, 0)
    # In front, in between, in a folder of its own, and behind.
    for name, samples in (("a", 3000), ("c", 4000), ("deep/x", 5000), ("z", 6000)):
        sound(folder / f"{name}.wav", samples)
    assert counts(run([str(folder)], out)) == (6, 4, 0, 0)
    said = {"a": 3000, "b": 1000, "c": 4000, "d": 2000, "x": 5000, "z": 6000}
    assert texts(out) == {f"{name}.wav": str(samples) for name, samples in said.items()}
    by_name = {Path(row["audio_filepath"]).stem: row["index"] for row in read_results(out)}
    assert (by_name["b"], by_name["d"]) == (0, 1)


def test_a_job_with_nothing_new_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips(tmp_path / "in", 3)
    run([str(tmp_path / "in")], tmp_path / "out")
    monkeypatch.setattr(Stub, "load", lambda self: pytest.fail("loaded"))
    assert counts(run([str(tmp_path / "in")], tmp_path / "out")) == (3, 0, 0, 0)
    # From elsewhere, by a name that is relative there.
    monkeypatch.chdir(tmp_path)
    assert counts(run(["in"], tmp_path / "out")) == (3, 0, 0, 0)


def test_recordings_that_have_changed_are_done_again_and_said(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(8):
        sound(folder / f"{i}.wav", 1000 + i)
    run([str(folder)], out)
    sound(folder / "2.wav", 2000)
    sound(folder / "5.wav", 1005)  # the same size at another time
    os.utime(folder / "5.wav", ns=(1, 1))
    summary = run([str(folder)], out)
    assert counts(summary) == (8, 2, 2, 0)
    examples = [Path(name).name for name in summary.content["changed"]["examples"]]
    assert examples == ["2.wav", "5.wav"]
    assert texts(out) == {f"{i}.wav": str(2000 if i == 2 else 1000 + i) for i in range(8)}
    assert counts(run([str(folder)], out)) == (8, 0, 0, 0)
    # Tables of which nothing counts any more are removed.
    for i in range(8):
        sound(folder / f"{i}.wav", 3000 + i)
    assert counts(run([str(folder)], out)) == (8, 8, 8, 0)
    assert texts(out) == {f"{i}.wav": str(3000 + i) for i in range(8)}
    lines = [line for path in out.glob("part-*") for line in path.read_text().splitlines()]
    assert len(lines) == 8


def test_what_vanished_stays_in_the_tables_and_is_said(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(6):
        sound(folder / f"{i}.wav", 1000 + i)
    run([str(folder)], out)
    (folder / "0.wav").unlink()
    sound(folder / "6.wav", 1006)
    summary = run([str(folder)], out)
    assert counts(summary) == (7, 1, 0, 1)
    assert summary.content["vanished"]["examples"] == [str(folder / "0.wav")]
    assert texts(out) == {f"{i}.wav": str(1000 + i) for i in range(7)}
    folder.rename(tmp_path / "away")
    with pytest.raises(JobError, match=f"{folder} is not there; {out} holds what was made of it"):
        run([str(folder)], out)
    (tmp_path / "away").rename(folder)
    # It comes back.
    sound(folder / "0.wav", 1000)
    os.utime(folder / "0.wav", ns=(1, 1))
    assert counts(run([str(folder)], out)) == (7, 1, 1, 0)


def test_rows_of_a_manifest_whose_recordings_vanished_stay_as_they_are(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        sound(folder / f"{i}.wav", 1000 + i)
    rows = [{"audio": f"in/{i}.wav"} for i in (0, 1, 2, 2, 3)]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    assert counts(run([manifest], out)) == (5, 5, 0, 0)
    said = [str(1000 + i) for i in (0, 1, 2, 2)]
    # As where a disk is not there for once.
    folder.rename(tmp_path / "away")
    summary = run([manifest], out)
    assert counts(summary) == (5, 0, 0, 4)
    assert [row["text"] for row in read_results(out) if "text" in row] == said
    (tmp_path / "away").rename(folder)
    (folder / "2.wav").unlink()
    sound(folder / "3.wav", 1003)
    assert counts(run([manifest], out)) == (5, 1, 1, 2)
    assert [row["text"] for row in read_results(out)] == [*said, "1003"]


def test_a_recording_that_was_missing_is_done_when_it_is_there(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 1000)
    rows = [{"audio": "a.wav"}, {"audio": "b.wav"}, {"audio": "a.wav", "offset": 0.03}]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    summary = run([manifest], tmp_path / "out")
    assert (summary.errors["FileNotFoundError"], summary.content["good"]) == (1, 1)
    sound(tmp_path / "b.wav", 2000)
    summary = run([manifest], tmp_path / "out")
    assert "FileNotFoundError" not in summary.errors
    assert counts(summary)[:3] == (3, 1, 1)
    assert [row.get("text") for row in table(tmp_path / "out")] == ["1000", "2000", None]


def test_rows_of_a_manifest_that_name_a_recording_more_than_once(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 1000)
    entries: list[dict[str, Any]] = [{"audio": "a.wav", "id": str(i)} for i in range(3)]
    manifest = write_manifest(tmp_path / "rows.jsonl", entries)
    run([manifest], tmp_path / "out")
    write_manifest(tmp_path / "rows.jsonl", [*entries, {"audio": "a.wav", "id": "3"}])
    assert counts(run([manifest], tmp_path / "out")) == (4, 1, 0, 0)
    # Fewer of them: one is not there any more.
    write_manifest(tmp_path / "rows.jsonl", entries)
    assert counts(run([manifest], tmp_path / "out")) == (4, 0, 0, 1)
    sound(tmp_path / "a.wav", 2000)
    assert counts(run([manifest], tmp_path / "out")) == (4, 3, 3, 1)


def test_by_content_a_recording_may_be_called_anything(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        sound(folder / f"{i}.wav", 1000 + i)
    run([str(folder)], out, by_content=True)
    (folder / "1.wav").rename(folder / "moved.wav")
    os.utime(folder / "0.wav", ns=(1, 1))
    assert counts(run([str(folder)], out, by_content=True)) == (3, 0, 0, 0)
    sound(folder / "2.wav", 2000)
    assert counts(run([str(folder)], out, by_content=True)) == (4, 1, 0, 1)
    with pytest.raises(JobError, match=r"options.by_content: true before, null now"):
        run([str(folder)], out)


def test_by_content_what_is_missing_for_once_costs_nothing(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    sound(folder / "0.wav", 1000)
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"audio": f"in/{i}.wav"} for i in range(2)])
    assert counts(run([manifest], out, by_content=True)) == (2, 2, 0, 0)
    sound(folder / "1.wav", 1001)
    assert counts(run([manifest], out, by_content=True)) == (2, 1, 1, 0)
    folder.rename(tmp_path / "away")
    assert counts(run([manifest], out, by_content=True)) == (2, 0, 0, 2)
    (tmp_path / "away").rename(folder)
    assert counts(run([manifest], out, by_content=True)) == (2, 0, 0, 0)
    assert [(row["index"], row["text"]) for row in read_results(out)] == [(0, "1000"), (1, "1001")]


def tar_of(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = encoded("WAV", 0.1 + len(name) / 1000)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_files_that_hold_recordings_are_read_where_they_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, out = str(tmp_path / "*.tar"), tmp_path / "out"
    tar_of(tmp_path / "1.tar", "a.wav", "bb.wav")
    run([pattern], out)
    tar_of(tmp_path / "0.tar", "ccc.wav")
    tar_of(tmp_path / "2.tar", "dddd.wav", "eeeee.wav")
    assert counts(run([pattern], out)) == (5, 3, 0, 0)
    assert [Path(row["audio_filepath"]).name for row in table(out)][:2] == ["a.wav", "bb.wav"]
    # One that was read to its end is not read again.
    opened: list[str] = []
    whole = tarfile.open

    def watched(*arguments: Any, **options: Any) -> Any:
        opened.append(str(options["fileobj"].name))
        return whole(*arguments, **options)

    monkeypatch.setattr(tarfile, "open", watched)
    assert counts(run([pattern], out)) == (5, 0, 0, 0)
    surveys = len(opened)
    assert surveys == 3
    monkeypatch.undo()
    # With one more in front, all of a file is done again, under the old indices.
    tar_of(tmp_path / "2.tar", "new.wav", "dddd.wav", "eeeee.wav")
    assert counts(run([pattern], out)) == (6, 3, 2, 0)
    assert len(texts(out)) == 6


def test_recordings_within_parquet(tmp_path: Path) -> None:
    cells = [{"bytes": encoded("WAV", 0.1 + i / 100), "path": f"{i}.wav"} for i in range(4)]
    for shard_, some in enumerate((cells[:2], cells[2:])):
        name = tmp_path / f"train-{shard_:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"audio": some}), name)
    held = tmp_path / "train-00001-of-00002.parquet"
    shutil.move(held, tmp_path / "away")
    pattern = str(tmp_path / "train-*.parquet")
    assert counts(run([pattern], tmp_path / "out")) == (2, 2, 0, 0)
    shutil.move(tmp_path / "away", held)
    assert counts(run([pattern], tmp_path / "out")) == (4, 2, 0, 0)
    assert counts(run([pattern], tmp_path / "out")) == (4, 0, 0, 0)


def test_files_of_single_recordings_follow_theirs(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        sound(folder / f"{i}.wav", 1000 + i)
    run([str(folder)], out, Texts(), ["txt"])
    names = {row["index"]: row["txt_file"] for row in read_results(out)}
    sound(folder / "1.wav", 2000)
    sound(folder / "3.wav", 1003)
    run([str(folder)], out, Texts(), ["txt"])
    rows = table(out)
    assert {row["index"]: row["txt_file"] for row in rows[:3]} == names
    assert [(out / row["txt_file"]).read_text() for row in rows] == [
        "1000\n",
        "2000\n",
        "1002\n",
        "1003\n",
    ]
    assert len(list((out / "txt").rglob("*.txt"))) == 4


# More is asked for.


def more(out: Path, *formats: str, timestamps: str = "word", **options: Any) -> Any:
    """The same command with other formats."""
    names = [str(out.parent / "in")]
    return run(names, out, Texts(timestamps=timestamps), formats, **options)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_of_another_format_come_from_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = tmp_path / "out"
    for i in range(7):
        sound(tmp_path / "in" / f"{i}.wav", 1000 + i)
    (tmp_path / "in" / "3.wav").write_bytes(b"no audio")
    rows = [{"audio": f"in/{i}.wav", "text": f"t{i}", "deep": {"a": [i]}} for i in range(7)]
    names = [write_manifest(tmp_path / "rows.jsonl", rows)]
    run(names, out, Texts(timestamps="character"), [form])
    before = list(read_results(out))
    monkeypatch.setattr(Stub, "load", lambda self: pytest.fail("loaded"))
    summary = run(names, out, Texts(timestamps="character"), [form, "srt", "txt"])
    assert counts(summary) == (7, 0, 0, 0)
    assert summary.content["this_run"]["rewritten_rows"] == 6
    after = sorted(read_results(out), key=lambda row: row["index"])
    for row in after:
        if row.get("error") is None:
            text = str(1000 + row["index"])
            srt, txt = ((out / row.pop(f"{kind}_file")).read_text() for kind in ("srt", "txt"))
            assert (text in srt, "00:00:00,000 -->" in srt, txt) == (True, True, f"{text}\n")
    # All else is as it was.
    assert after == sorted(before, key=lambda row: row["index"])
    summary = run(names, out, Texts(timestamps="character"), [form, "srt", "txt"])
    assert (counts(summary)[1], summary.content["this_run"]["rewritten_rows"]) == (0, 0)
    assert len(list(out.glob("part-*"))) == 2


def test_times_that_are_missing_are_computed_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for i in range(7):
        sound(tmp_path / "in" / f"{i}.wav", 1000 + i)
    (tmp_path / "in" / "3.wav").write_bytes(b"no audio")
    more(out, timestamps="none")
    assert not any("words" in row for row in table(out))
    summary = more(out, "srt")
    assert counts(summary) == (7, 6, 0, 0)
    good = [row for row in table(out) if "error" not in row]
    assert [row["words"][0]["word"] for row in good] == [row["text"] for row in good]
    assert all((out / row["srt_file"]).is_file() for row in good)
    # The tables of before are gone, but for the errors.
    lines = [line for path in out.glob("part-*") for line in path.read_text().splitlines()]
    assert (len(lines), len(list(out.glob("errors-*")))) == (6, 1)
    assert counts(more(out, "srt")) == (7, 0, 0, 0)
    for wrong in ({"timestamps": "none"}, {"formats": ("parquet", "srt")}):
        formats = wrong.pop("formats", ())
        with pytest.raises(JobError, match=r"options\.(formats|timestamps)"):
            more(out, *formats, **wrong)


def test_a_format_is_added_while_the_input_grows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for i in range(4):
        sound(tmp_path / "in" / f"{i}.wav", 1000 + i)
    more(out)
    sound(tmp_path / "in" / "1.wav", 2000)
    sound(tmp_path / "in" / "00.wav", 700)
    summary = more(out, "vtt")
    assert counts(summary) == (5, 2, 1, 0)
    assert texts(out) == {f"{i}.wav": str(2000 if i == 1 else 1000 + i) for i in range(4)} | {
        "00.wav": "700"
    }
    for row in table(out):
        assert row["text"] in (out / row["vtt_file"]).read_text()


# Killed on the way.


class Killed(BaseException):
    """Stands for the end of the process: nothing that is in memory is kept."""


@contextlib.contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The `step`-th time that something is made permanent is not reached."""
    left = [step]

    def stopping(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopping(os.replace))
        patched.setattr(os, "fsync", stopping(os.fsync))
        # What a process that is gone does not do either.
        patched.setattr(shard.Shard, "discard", lambda self: None)
        yield left


def test_kills_while_an_input_that_has_grown_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, with a format besides: what is known, changed and new is there once, whenever
    the process ended."""
    begun = tmp_path / "begun"
    for i in range(3):
        sound(begun / "in" / f"{i}.wav", 1000 + i)
    more(begun / "out", "txt", shard_rows=2, page=False)
    wanted = {f"{i}.wav": str(1000 + i) for i in range(3)} | {"1.wav": "2000", "00.wav": "700"}
    wanted |= {"z.wav": "600"}
    step, finished = 0, False
    while not finished:
        step += 1
        folder = tmp_path / str(step)
        shutil.copytree(begun, folder)
        out = folder / "out"

        def again(out: Path = out) -> Any:
            task = Texts(timestamps="word")
            return run([str(begun / "in")], out, task, ["txt", "srt"], shard_rows=3, page=False)

        if step == 1:
            for name, samples in (("1", 2000), ("00", 700), ("z", 600)):
                sound(begun / "in" / f"{name}.wav", samples)
        with killed_at(step, monkeypatch):
            try:
                again()
                finished = True
            except Killed:
                pass
        assert texts(out).keys() <= wanted.keys()
        again()
        assert texts(out) == wanted
        for kind in ("txt", "srt"):
            for row in read_results(out):
                content = (out / row[f"{kind}_file"]).read_text().split("\n")
                assert wanted[Path(row["audio_filepath"]).name] in content
            files = [path for path in (out / kind).rglob("*") if path.is_file()]
            assert len(files) == len(wanted), "files of nobody"
        assert not list(out.glob(".*.tmp"))
    assert step > 12
