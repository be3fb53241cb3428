"""The registry of formats: what it names is written, stated in rows, offered, and cleaned up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch

from tests.helpers.offline import Stub, clips, job, run, table
from w2vbert_fast.inference import Embedding, Transcript, Transcription
from w2vbert_fast.inference.ctc.chunks import Chunk
from w2vbert_fast.inference.ctc.subtitles import Layout
from w2vbert_fast.inference.ctc.timestamps import Word
from w2vbert_fast.inference.jobs.formats import (
    BESIDE,
    FORMATS,
    FilePerRecording,
    Formats,
    JsonTable,
    help_text,
    own_columns,
    usual_timestamps,
)
from w2vbert_fast.inference.jobs.journal import JobError
from w2vbert_fast.inference.reading import Loaded
from w2vbert_fast.inference.tasks import Task
from w2vbert_fast.inference.tasks.base import identity

WORDS = (Word("well", 0.1, 0.2, 0.9, []), Word("said", 0.3, 0.4, 0.8, []))


@dataclass
class Spoken(Stub):
    """Every recording says the same."""

    timestamps: str = "word"

    name = "transcribe"

    def finish(
        self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]
    ) -> Transcription:
        return Transcription(**identity(loaded), text="well said", words=WORDS)


@dataclass
class Vectors(Stub):
    """Every recording is a vector."""

    name = "embed"
    result = Embedding
    has_tensors = True

    def finish(self, loaded: Loaded, chunks: Sequence[Chunk], outputs: Sequence[Any]) -> Embedding:
        return Embedding(**identity(loaded), embedding=torch.arange(4.0))

    def columns(self) -> list[tuple[str, Any]]:
        return [("embedding", pyarrow.list_(pyarrow.float32(), 4))]


def task_of(name: str) -> Task:
    """A task whose results can be asked for in a format."""
    (found, *_) = [task for task in (Spoken(), Vectors()) if FORMATS[name].goes_with(task)]
    return found


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


BOOKS = {"job.json", "journal.jsonl", "summary.json", "report.html", ".lock"}
IN_JOBS = [name for name, kind in FORMATS.items() if kind.in_jobs]


@pytest.mark.parametrize("name", IN_JOBS)
def test_a_job_writes_it_states_it_in_its_rows_and_overwriting_removes_it(
    name: str, tmp_path: Path
) -> None:
    recordings, out = clips(tmp_path / "clips", 7), tmp_path / "out"
    run(recordings, out, task_of(name), [name])
    files = {path for path in files_of(out) - BOOKS if not path.startswith("known-")}
    written = {path for path in files if path.endswith(f".{name}")}
    # Two shards of five rows.
    assert len(written) == (7 if FORMATS[name].per_recording else 2)
    assert all((out / path).stat().st_size > 0 for path in written)
    if not FORMATS[name].is_table:
        assert {row[f"{name}_file"] for row in table(out)} == written
    if FORMATS[name].per_recording:
        assert written == {f"{name}/{Path(path).stem}.{name}" for path in recordings}
        (out / name / "mine.txt").write_text("not the job's")
    (out / "mine.txt").write_text("not the job's")
    run(recordings[:1], out, Stub(), ["jsonl"], overwrite=True)
    kept = {"mine.txt", f"{name}/mine.txt"} if FORMATS[name].per_recording else {"mine.txt"}
    assert files_of(out) - BOOKS == {"part-000000.jsonl", "known-000000.jsonl", *kept}


def test_another_one_is_written_offered_and_removed_wherever_formats_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shouted(FilePerRecording):
        name = "loud"
        of = "transcripts"
        beside = True

        @classmethod
        def content(
            cls, result: Any, characters: bool = False, layout: Layout | None = None
        ) -> str:
            return str(result.text).upper()

    monkeypatch.setitem(FORMATS, Shouted.name, Shouted)
    recordings, out = clips(tmp_path / "clips", 2), tmp_path / "out"
    run(recordings, out, Spoken(), ["parquet", "loud"])
    files = [row["loud_file"] for row in table(out)]
    assert [(out / file).read_text() for file in files] == ["WELL SAID"] * 2
    run(recordings, out, Spoken(), overwrite=True)
    assert not (out / "loud").exists()
    assert "srt, vtt, txt, TextGrid, ctm and loud of transcripts" in help_text()
    with pytest.raises(ValueError, match="'loud' is not one of stub's: jsonl, parquet"):
        Formats.of_task(Stub(), ["loud"])


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_a_recording_ends_with_its_line(name: str) -> None:
    row = Transcript("a.wav", "well said", 1.0, 0.5, words=WORDS)
    content = BESIDE[name].content(row)
    assert "well" in content
    assert content.endswith("\n") and not content.endswith("\n\n")
    silent = BESIDE[name].content(Transcript("a.wav", "", 1.0, 0.5, words=()))
    # A file of lines has none.
    assert silent.endswith("\n") or (name, silent) == ("ctm", "")


def test_words_have_times_where_a_format_shows_them() -> None:
    assert {name: usual_timestamps(["jsonl", name]) for name in FORMATS} == {
        **dict.fromkeys(FORMATS, "none"),
        **dict.fromkeys(("srt", "vtt", "json", "TextGrid", "ctm"), "word"),
    }
    for name in ("srt", "vtt"):
        with pytest.raises(ValueError, match=f"'{name}' needs timestamps 'word' or 'character'"):
            Formats.of_task(Spoken(timestamps="none"), [name])
    assert Formats.of_task(Spoken(timestamps="none"), ["txt"]).names == ("jsonl", "txt")


def test_subtitles_of_a_job_have_the_layout_that_is_asked_for(tmp_path: Path) -> None:
    (recording,), out = clips(tmp_path / "clips", 1), tmp_path / "out"
    job([recording], out, Spoken(), ["srt", "vtt"], how={"layout": Layout(max_words=1)}).run()
    (row,) = table(out)
    for name in ("srt", "vtt"):
        cues = (out / row[f"{name}_file"]).read_text().strip().split("\n\n")
        assert [cue.split("\n")[-1] for cue in cues][-2:] == ["well", "said"]
    # Another layout is another job; what had none before knows itself.
    with pytest.raises(JobError, match=r"options\.layout: .* before, null now"):
        run([recording], out, Spoken(), ["srt", "vtt"])


def test_what_does_not_go_together_is_refused() -> None:
    assert Formats.of_task(Spoken(), []).names == ("jsonl",)
    assert Formats.of_task(Vectors(), []).names == ("parquet",)
    assert Formats.of_task(Vectors(), ["npy"]).names == (JsonTable.name, "npy")
    for task, names, message in (
        (Spoken(), ["npy"], "'npy' is not one of transcribe's: jsonl, parquet, srt, vtt, txt"),
        (Spoken(), ["json"], "'json' is not one of transcribe's"),
        (Vectors(), ["jsonl"], "'jsonl' is not one of embed's: parquet, npy, safetensors"),
        (Vectors(), ["npy", "parquet"], "embeddings have one format, got npy, parquet"),
        (Spoken(), ["jsonl", "parquet"], "the table is either jsonl or parquet, got both"),
    ):
        with pytest.raises(ValueError, match=message):
            Formats.of_task(task, names)


def test_columns_that_are_carried_keep_the_names_that_they_had() -> None:
    """A job that is continued must call them as it did: these get the prefix `input_`."""
    assert own_columns() == {
        *("index", "id", "audio_filepath", "offset", "seconds", "louder_channel"),
        *("salvaged", "expected_seconds", "channels", "unwritten", "unsaid"),
        *("TextGrid_file", "ctm_file"),
        *("text", "words", "shape", "embedding", "label", "scores", "segments"),
        *("error_type", "error", "extra"),
        *("npy_file", "srt_file", "vtt_file", "txt_file", "safetensors_file"),
    }
