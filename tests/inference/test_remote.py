"""Recordings from elsewhere: URLs of fsspec's, and standard input."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from tests.helpers.offline import Stub, encoded, run, table, write_manifest
from w2vbert_fast.inference import AudioError, load_audio
from w2vbert_fast.inference.jobs import sidecars
from w2vbert_fast.recordings import remote
from w2vbert_fast.recordings.inputs import open_inputs
from w2vbert_fast.recordings.which_files import UNKNOWN

CLIP = encoded("FLAC", 0.5)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a folder; it knows no ranges, as many do not."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.flac").write_bytes(CLIP)
    (folder / "empty.wav").write_bytes(b"")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as served:
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def bucket() -> Iterator[str]:
    """A store with folders, as S3 has."""
    files = fsspec.filesystem("memory")
    for name in ("calls/b.flac", "calls/a.flac", "calls/deep/c.flac", "calls/notes.txt"):
        files.pipe(f"/bucket/{name}", CLIP if name.endswith("flac") else b"text")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_names_of_files_are_no_urls() -> None:
    for name in ("a.wav", "./http:/a.wav", "C:\\a.wav", "/a:b/c.wav", "-", "a b://c"):
        assert not remote.is_remote(name), name
    for name in ("https://a/b.wav", "s3://b/c", "simplecache::https://a/b.wav", "hf://d/e"):
        assert remote.is_remote(name), name


def test_a_url_is_read_as_a_file_is(server: str) -> None:
    audio = load_audio(f"{server}/a.flac")
    assert torch.equal(audio.samples, load_audio(CLIP).samples)
    part = load_audio(f"{server}/a.flac", offset=0.25)
    assert part.seconds == pytest.approx(0.25)


def test_what_cannot_be_had_is_an_error_with_its_reason(server: str) -> None:
    with pytest.raises(AudioError, match=r"/none\.wav: not found"):
        load_audio(f"{server}/none.wav")
    with pytest.raises(AudioError, match="the file is empty"):
        load_audio(f"{server}/empty.wav")
    with pytest.raises(AudioError, match=r"nobody://x: cannot be fetched: .*nobody"):
        load_audio("nobody://x")
    with pytest.raises(AudioError, match="cannot be fetched: Cannot connect"):
        load_audio("http://127.0.0.1:9/a.wav")


def test_a_missing_back_end_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(url: str, mode: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", without)
    with pytest.raises(ImportError, match=r"Install s3fs.*'w2vbert_fast\[remote\]'"):
        load_audio("s3://bucket/a.wav")


def test_a_failure_is_a_row_and_the_others_go_on(server: str, tmp_path: Path) -> None:
    (tmp_path / "here.flac").write_bytes(CLIP)
    urls = [f"{server}/a.flac", f"{server}/none.wav"]
    manifest = write_manifest(
        tmp_path / "rows.jsonl", [{"audio": url} for url in [*urls, "here.flac"]]
    )
    run([*urls, manifest], tmp_path / "out", Stub())
    rows = table(tmp_path / "out")
    assert [row.get("error") for row in rows] == [None, "not found", None, "not found", None]
    assert [row["audio_filepath"] for row in rows[:2]] == urls
    assert rows[1]["error_type"] == "FileNotFoundError"
    assert len({row["text"] for row in rows if "text" in row}) == 1


def test_folders_and_patterns_elsewhere(bucket: str, tmp_path: Path) -> None:
    def names(*inputs: str) -> list[str]:
        return [row.name.partition("bucket/")[2] for row in open_inputs(inputs).rows()]

    everything = ["calls/a.flac", "calls/b.flac", "calls/deep/c.flac"]
    assert names(f"{bucket}/calls/") == everything
    assert names(f"{bucket}/calls/*.flac") == everything[:2]
    assert names(f"{bucket}/calls/b.flac") == ["calls/b.flac"]
    passed_over = open_inputs([f"{bucket}/calls/"]).passed_over
    assert passed_over.as_json()[UNKNOWN]["files"] == 1
    with pytest.raises(ValueError, match="holds no recordings"):
        open_inputs([f"{bucket}/other/"])
    run([f"{bucket}/calls/"], tmp_path / "out", Stub())
    assert [row.get("error") for row in table(tmp_path / "out")] == [None] * 3


def test_nothing_is_written_beside_what_is_elsewhere(bucket: str, tmp_path: Path) -> None:
    inputs = open_inputs([f"{bucket}/calls/a.flac"])
    with pytest.raises(ValueError, match="URLs and standard input name a folder"):
        sidecars.plan(inputs, ["srt"])
    found = sidecars.plan(inputs, ["srt"], str(tmp_path / "a.srt"))
    assert list(found.values()) == [[tmp_path / "a.srt"]]


def test_standard_input(tmp_path: Path) -> None:
    sample = Path(__file__).parents[2] / "w2vbert_fast" / "demo" / "samples" / "dir-welcome.flac"
    command = [sys.executable, "-m", "w2vbert_fast.cli", "transcribe", "-"]
    done = subprocess.run(command, input=sample.read_bytes(), capture_output=True, check=True)
    name, text, *_ = done.stdout.decode().split("\t")
    assert (name, text) == ("-", "welcome to the directory")
    beside = subprocess.run(
        [*command, "--format", "srt"], input=b"", capture_output=True, check=False
    )
    assert beside.returncode == 2 and b"standard input name a folder" in beside.stderr
    command += ["--out", str(tmp_path / "a.srt")]
    subprocess.run(command, input=sample.read_bytes(), capture_output=True, check=True)
    assert "welcome to the directory" in (tmp_path / "a.srt").read_text()
    failed = subprocess.run(command[:5], input=b"", capture_output=True, check=False)
    assert failed.returncode == 1 and b"empty" in failed.stderr


def test_a_job_tells_what_comes_through_standard_input_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, ran in ((0.5, 1), (0.5, 0), (0.75, 1)):
        content = io.TextIOWrapper(io.BytesIO(encoded("FLAC", seconds)))
        monkeypatch.setattr(sys, "stdin", content)
        summary = run(["-"], tmp_path / "out", Stub())
        (row,) = table(tmp_path / "out")
        assert (row["audio_filepath"], row["seconds"]) == ("-", seconds)
        assert summary.content["this_run"]["rows"] == ran
