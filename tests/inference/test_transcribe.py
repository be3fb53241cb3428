"""One recording is served as a job is: the same words, files beside it, in any form it comes in."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import soundfile
import torch
from typer.testing import CliRunner, Result

from tests.helpers.offline import clips, encoded, table, write_manifest
from tests.helpers.signals import speech_like, write_container
from w2vbert_fast.cli import app as cli
from w2vbert_fast.cli.transcribe import with_progress
from w2vbert_fast.inference import Transcriber, Transcript, load_audio, load_pipeline, transcribe
from w2vbert_fast.inference.batching import Batcher
from w2vbert_fast.inference.ctc.subtitles import Layout, vtt
from w2vbert_fast.inference.jobs.progress import Progress
from w2vbert_fast.models.optimized.packed import PackedLinear

LONG = ["--max-seconds", "3", "--overlap-seconds", "1", "--frame-budget", "300"]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "talk.wav"
    soundfile.write(path, speech_like(11, 16_000, seed=4), 16_000)
    return path


@pytest.fixture
def talk(recording: Path, tmp_path: Path) -> Path:
    """A copy in a folder of its own."""
    path = tmp_path / "talk.wav"
    path.write_bytes(recording.read_bytes())
    return path


@pytest.mark.parametrize("more", [[], ["--timestamps", "character"], ["--beam", "5"]])
def test_a_recording_has_the_words_that_a_job_gives_it(
    tiny_checkpoint: Path, recording: Path, tmp_path: Path, more: list[str]
) -> None:
    if "--beam" in more:
        pytest.importorskip("ctc_beam_decoder")
    command = ["transcribe", recording, "--model", tiny_checkpoint, *LONG, *more]
    printed = invoke(*command, "--json")
    assert printed.exit_code == 0, printed.stderr
    assert invoke(*command, "--out", tmp_path / "out").exit_code == 0
    (row,) = table(tmp_path / "out")
    found = json.loads(printed.stdout)
    assert len(found["text"]) > 50
    assert (found["text"], found.get("words")) == (row["text"], row.get("words"))
    assert found["seconds"] == row["seconds"] == 11
    if "--timestamps" in more:
        assert found["words"][0]["characters"]


def test_chunks_and_packed_weights(tiny_checkpoint: Path, recording: Path) -> None:
    runner = Transcriber(tiny_checkpoint, max_seconds=3, overlap_seconds=1)
    (expected,) = runner(recording)
    with torch.device("meta"):  # the default device is that of neither chunks nor features
        (row,) = runner(recording)
    assert (row.text, row.error) == (expected.text, None)
    assert any(isinstance(module, PackedLinear) for module in runner.task.network.modules())
    options: dict[str, Any] = {"max_seconds": 3, "overlap_seconds": 1}
    (row,) = transcribe(recording, tiny_checkpoint, **options)
    assert row.text == expected.text
    # A model of the caller's gets the same chunks and stays as it is.
    pipeline = load_pipeline(tiny_checkpoint)
    (row,) = transcribe(recording, pipeline, **options)
    assert row.text == expected.text
    assert not any(isinstance(module, PackedLinear) for module in pipeline.model.modules())
    assert pipeline.source == tiny_checkpoint


def test_whatever_a_recording_is_handed_over_as(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(tiny_checkpoint)
    (path,) = clips(tmp_path, 1, seconds=0.9)
    content, audio = Path(path).read_bytes(), load_audio(path)
    samples = audio.samples.numpy()
    (expected,) = transcribe([path], pipeline)
    assert expected.text

    def check(given: Any, *names: str) -> None:
        rows = list(transcribe(given, pipeline))
        assert [(row.file, row.text) for row in rows] == [(name, expected.text) for name in names]

    check(path, path)
    check(Path(path), path)
    check([path, Path(path)], path, path)
    for item in (content, bytearray(content), memoryview(content), io.BytesIO(content)):
        check(item, "item 0")
        check([item] if not isinstance(item, io.BytesIO) else [io.BytesIO(content)], "item 0")
    with open(path, "rb") as file:
        check(file, path)
    with gzip.open(io.BytesIO(gzip.compress(content))) as file:
        check(file, "item 0")  # its name is empty
    for item in (samples, audio.samples, (samples, 16_000), (audio.samples, 16_000.0), audio):
        check(item, "item 0")
    check(iter([path, content, samples, np.stack([samples])]), path, "item 1", "item 2", "item 3")
    check(np.array([path, path]), path, path)

    def opened() -> Iterator[Any]:
        for _ in range(3):
            with open(path, "rb") as file:
                yield file

    check(opened(), path, path, path)
    # The other runners take the same.
    (result,) = Transcriber(tiny_checkpoint)(path)
    assert (result.text, result.audio) == (expected.text, path)


def test_what_is_no_recording(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(tiny_checkpoint)
    (path,) = clips(tmp_path, 1)

    def first(given: Any) -> Transcript:
        return next(transcribe(given, pipeline))

    with open(path) as text, pytest.raises(TypeError, match="open for text; open it in mode 'rb'"):
        first(text)
    with pytest.raises(TypeError, match=r"shape \[2, 800\] by itself may be one recording"):
        first(np.zeros((2, 800)))
    with pytest.raises(TypeError, match="recordings must be iterable or one recording, got int"):
        first(3)
    with pytest.raises(TypeError, match=r"got a mapping of \['array', 'sampling_rate'\]"):
        first({"array": np.zeros(800), "sampling_rate": 8_000})
    with pytest.raises(TypeError, match=r"item 0 must be a path, .* got int"):
        first([3])
    with pytest.raises(TypeError, match="Audio of about 8000 Hz"):
        first(load_audio(path, sampling_rate=8_000))
    with pytest.raises(TypeError, match="no_such_option"):
        next(transcribe(path, pipeline, no_such_option=1))
    file = open(path, "rb")  # noqa: SIM115 - closed before it is read
    file.close()
    row = first([file])
    assert (row.file, row.text) == (path, None)
    assert row.error is not None and "closed file" in row.error


def test_files_beside_the_recording(tiny_checkpoint: Path, talk: Path) -> None:
    folder = talk.parent
    command = ["transcribe", talk, "--model", tiny_checkpoint]
    formats = [part for kind in ("srt", "vtt", "txt", "json") for part in ("--format", kind)]
    result = invoke(*command, *formats)
    assert (result.exit_code, result.stderr) == (0, "")
    paths = [folder / f"talk.{kind}" for kind in ("srt", "vtt", "txt", "json")]
    assert result.stdout.splitlines() == list(map(str, paths))
    assert sorted(folder.iterdir()) == sorted([*paths, talk])
    assert paths[0].read_text().startswith("1\n00:00:0")
    assert paths[1].read_text().startswith("WEBVTT\n\n00:00:0")
    content = json.loads(paths[3].read_text())
    (expected,) = Transcriber(tiny_checkpoint, timestamps="word")(talk)
    assert content["text"] == expected.text
    assert [word["word"] for word in content["words"]] == [word.text for word in expected.words]
    assert "".join(paths[2].read_text().split()) == expected.text.replace(" ", "")
    # What is there stays, unless it may be replaced.
    paths[0].write_text("mine")
    again = invoke(*command, "--format", "srt")
    assert again.exit_code == 2
    assert "talk.srt is there already; --overwrite replaces it" in again.stderr
    assert paths[0].read_text() == "mine"
    assert invoke(*command, "--format", "srt", "--overwrite").exit_code == 0
    assert paths[0].read_text().startswith("1\n")


def test_the_layout_of_subtitles(tiny_checkpoint: Path, talk: Path) -> None:
    command = ["transcribe", talk, "--model", tiny_checkpoint, "--format", "vtt", "--overwrite"]

    def written(*options: str) -> str:
        assert invoke(*command, *options).exit_code == 0
        return talk.with_suffix(".vtt").read_text()

    (expected,) = Transcriber(tiny_checkpoint, timestamps="word")(talk)
    layout = Layout(8, 1, 5, 0.5, 0.4, max_words=1, reading_speed=12, highlight_words=True)
    options = (
        *("--line-length", "8", "--max-lines", "1", "--max-words", "1", "--max-cue-seconds", "5"),
        *("--min-cue-seconds", "0.5", "--cue-pause-seconds", "0.4", "--reading-speed", "12"),
    )
    assert written(*options, "--highlight-words") == vtt(expected.words, layout)
    assert written() == vtt(expected.words) != vtt(expected.words, layout)
    for wrong, message in (
        (["--max-words", "0"], "max_words must be positive, got 0"),
        (["--format", "srt", "--highlight-words"], "--highlight-words needs --format vtt"),
        (["--format", "txt", "--max-lines", "1"], "--max-lines is for subtitles, --format srt or"),
    ):
        used = command if wrong[0] == "--max-words" else command[:4]
        result = invoke(*used, *wrong)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr


def test_a_file_that_out_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.v2.mp4"
    write_container(film, "aac", 48_000)
    command = ["transcribe", film, "--model", tiny_checkpoint]
    assert invoke(*command, "--out", tmp_path / "a.SRT").exit_code == 0
    assert invoke(*command, "--format", "srt").exit_code == 0
    written = (tmp_path / "film.v2.srt").read_text()
    assert written == (tmp_path / "a.SRT").read_text() != ""
    # A folder of such a name is a folder.
    (tmp_path / "b.srt").mkdir()
    assert invoke(*command, "--out", tmp_path / "b.srt").exit_code == 0
    assert (tmp_path / "b.srt" / "summary.json").is_file()


def test_several_recordings_and_a_broken_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, second = clips(tmp_path / "clips", 2, seconds=0.5)
    bad = tmp_path / "clips" / "bad.wav"
    bad.write_text("no audio")
    command = ["transcribe", tmp_path / "clips", "--model", tiny_checkpoint, "--format", "txt"]
    refused = invoke(*command)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "3 recordings need --out DIR" in refused.stderr and "or --beside," in refused.stderr
    assert len([*(tmp_path / "clips").iterdir()]) == 3
    result = invoke(*command, "--beside")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"{path[:-4]}.txt" for path in (first, second)]
    assert f"\nw2vbert-fast: {bad}: " in result.stderr
    assert not bad.with_suffix(".txt").exists()
    printed = invoke("transcribe", tmp_path / "clips", "--model", tiny_checkpoint)
    assert [line.split("\t")[0] for line in printed.stdout.splitlines()] == [first, second]
    assert printed.stderr.splitlines()[-1].startswith("w2vbert-fast: passed over: 2 hold no audio")
    manifest = write_manifest(
        tmp_path / "rows.jsonl", [{"audio": first, "offset": 0, "duration": 0.3}]
    )
    printed = invoke("transcribe", manifest, "--model", tiny_checkpoint, "--json")
    assert json.loads(printed.stdout)["seconds"] == 0.3
    refused = invoke("transcribe", manifest, "--model", tiny_checkpoint, "--format", "txt")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "for files and folders only" in refused.stderr


@pytest.mark.parametrize(("batches", "shown"), [(1, False), (4, True)])
def test_how_far_a_long_recording_is(batches: int, shown: bool) -> None:
    """Of one recording that takes several batches a bar is drawn, of a short one none."""
    drawn = io.StringIO()
    console = rich.console.Console(file=drawn, force_terminal=True, width=100)
    batcher = Batcher(Transcriber("demo").task)

    def rows() -> Iterator[Transcript]:
        for number in range(batches):
            assert batcher.watch is not None
            batcher.watch(number + 1, batches)
        yield Transcript("a", "b", 1.0, 1.0)

    found = list(with_progress(rows(), 1, batcher, console))  # type: ignore[arg-type]
    assert [row.text for row in found] == ["b"]
    assert ("transcribing" in drawn.getvalue()) is shown
    assert bool(re.search(r"100%", drawn.getvalue())) is shown


def test_batches_are_told(tiny_checkpoint: Path) -> None:
    runner = Transcriber(tiny_checkpoint, max_seconds=2, overlap_seconds=0)
    runner.batcher.frame_budget = 120
    told: list[tuple[float, float]] = []
    runner.batcher.watch = lambda seconds, of: told.append((seconds, of))
    list(runner(torch.from_numpy(speech_like(7, 16_000))))
    assert len(told) >= 3
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == pytest.approx(7, abs=0.5)


def test_a_job_shows_audio_of_rows_that_are_not_done() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = Progress(1, 0, 0, stream=terminal)
    progress.begin(1800)
    assert "0/1  0.50 h of audio" in terminal.getvalue()
    progress.update(1, 0, 3600)
    assert progress.state()["audio_hours"] == 1


def test_a_channel_that_was_taken_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    signal = speech_like(1, 16_000)
    soundfile.write(tmp_path / "a.wav", np.stack([signal, -0.95 * signal], 1), 16_000)
    soundfile.write(tmp_path / "b.wav", np.stack([-0.95 * signal, signal], 1), 16_000)
    expected = {result.index: result for result in Transcriber(tiny_checkpoint)(tmp_path.glob("*"))}
    rows = list(transcribe(tmp_path.glob("*"), tiny_checkpoint))
    assert [row.louder_channel for row in rows] == [e.louder_channel for e in expected.values()]
    assert {row.louder_channel for row in rows} == {0, 1}
    printed = invoke("transcribe", tmp_path / "b.wav", "--json", "--model", tiny_checkpoint)
    assert json.loads(printed.stdout)["louder_channel"] == 1


def test_content_of_a_file_in_a_list_with_arrays() -> None:
    rows = list(transcribe([encoded("FLAC", 0.5), (speech_like(0.5, 8_000), 8_000)]))
    assert [row.file for row in rows] == ["item 0", "item 1"]
    assert [row.audio_seconds for row in rows] == [0.5, 0.5]
