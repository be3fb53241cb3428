"""What of folders, patterns and tar files is read, what is not, and how one learns of it."""

from __future__ import annotations

import importlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.offline import encoded, run, table, write_manifest
from tests.helpers.signals import write_container
from w2vbert_fast.cli.jobs import Inputs, Job, run_job
from w2vbert_fast.recordings import which_files
from w2vbert_fast.recordings.inputs import open_inputs
from w2vbert_fast.recordings.rows import Row

WAV, FLAC = encoded("WAV"), encoded("FLAC")


def rows(*names: str | Path) -> list[Row]:
    return list(open_inputs([str(name) for name in names]).rows())


def names_in(folder: Path) -> list[str]:
    return [os.path.relpath(row.audio, folder) for row in rows(folder)]


def passed_over(*names: str | Path) -> dict[str, Any]:
    return open_inputs([str(name) for name in names]).passed_over.as_json()


def video(container_format: str, codec: str) -> bytes:
    file = io.BytesIO()
    write_container(file, codec, 44_100, seconds=0.3, container_format=container_format)
    return file.getvalue()


# --- folders ------------------------------------------------------------------------------------


def test_what_is_read_when_it_is_named_is_read_in_a_folder(tmp_path: Path) -> None:
    contents = {
        "call.3gp": video("3gp", "aac"),
        "clip.avi": video("avi", "mp2"),
        "d.ac3": video("ac3", "ac3"),
        "lecture.m4v": video("mp4", "aac"),
        "meet.wmv": video("asf", "wmav2"),
        "tv.flv": video("flv", "aac"),
        "tv.mpg": video("mpeg", "mp2"),
        "v.ts": video("mpegts", "aac"),
        "without": FLAC,
        "odd.ending": WAV,
        "nist": encoded("NIST"),
        "UPPER.WAV": WAV,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert names_in(tmp_path) == sorted(contents)
    run([str(tmp_path)], tmp_path / "out")
    assert all(row.get("error") is None for row in table(tmp_path / "out"))


def test_what_is_passed_over_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents: dict[str, bytes] = {
        "a.wav": WAV,
        "broken.wav": b"",  # its name says that it should be a recording
        "notes.txt": b"what was said",
        "notes": "what was said, ä".encode()[:-1],
        "code.ts": b"export const x = 1;\n",
        "b/photo.jpg": b"\xff\xd8\xff\xe0" + bytes(100),
        "b/numbers": np.arange(1000).tobytes(),
        "b/nothing": b"",
        "rows.jsonl": b'{"audio": "a.wav"}\n',
        "c/shard.tar": bytes(10_240),
        ".hidden.wav": WAV,
        "._a.wav": b"\0\5\x16\7" + bytes(100),
        ".trash/old.wav": WAV,
        "__MACOSX/a.wav": WAV,
    }
    for name, content in contents.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    odd = os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff")
    Path(odd).write_bytes(b"text")
    os.mkfifo(tmp_path / "in" / "pipe")
    assert names_in(tmp_path / "in") == ["a.wav", "broken.wav"]
    found = passed_over(tmp_path / "in")
    assert {reason: entry["files"] for reason, entry in found.items()} == {
        which_files.NO_AUDIO: 6,
        which_files.EMPTY: 1,
        which_files.MANIFEST: 1,
        which_files.TAR: 1,
        which_files.NO_FILE: 1,
    }
    assert found[which_files.NO_AUDIO]["examples"] == [
        str(tmp_path / "in" / name) for name in ("code.ts", "notes", "notes.txt")
    ]
    # In the summary, and at the end of the run; a second run that has nothing to do says it too.
    for _ in range(2):
        names, out = [str(tmp_path / "in")], str(tmp_path / "out")
        status = run_job(
            "transcribe", Inputs(inputs=names), out, {"model": "demo"}, Job(frame_budget="1000")
        )
        lines = capsys.readouterr().err.splitlines()
        assert status == 1
        assert "passed over: 6 hold no audio (code.ts, notes, notes.txt, ...)" in lines[-1]
        assert "1 are empty (nothing)" in lines[-1]
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["passed_over"] == found


def test_folders_that_cannot_be_opened_are_rows_that_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.wav").write_bytes(WAV)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = {os.path.basename(row.name): (row.audio is None, row.problem) for row in rows(tmp_path)}
    assert found == {
        "a.wav": (False, None),
        "secret": (True, "the folder cannot be opened: Permission denied"),
    }
    assert passed_over(tmp_path) == {}


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    (folder / ".store").mkdir()
    (elsewhere / "deep").mkdir(parents=True)
    for path in (folder / "sub/a.wav", elsewhere / "b.wav", elsewhere / "deep/c.wav"):
        path.write_bytes(WAV)
    (folder / ".store/0a1b").write_bytes(FLAC)
    (folder / "1 folder").symlink_to(elsewhere)
    (folder / "2 again").symlink_to(elsewhere / "deep")
    (folder / "3 file.wav").symlink_to(elsewhere / "b.wav")
    (folder / "4 stored.flac").symlink_to(folder / ".store/0a1b")
    (folder / "5 circle").symlink_to(folder)
    (elsewhere / "circle").symlink_to(elsewhere)
    (folder / "6 inside.wav").symlink_to("sub/a.wav")
    (folder / "7 nothing").symlink_to("nowhere")
    (folder / "8 nothing.wav").symlink_to("nowhere.wav")
    (folder / "9 itself").symlink_to("9 itself")
    found = names_in(folder)
    assert found == [
        "3 file.wav",
        "4 stored.flac",
        "8 nothing.wav",
        "2 again/c.wav",
        "sub/a.wav",
    ]
    counted = {reason: entry["files"] for reason, entry in passed_over(folder).items()}
    # `1 folder/b.wav` and `1 folder/deep` among them, which have other names already.
    assert counted == {which_files.TWICE: 5, which_files.NO_FILE: 2}
    assert open_inputs([str(folder)]).total == len(found)


def test_a_folder_that_changes_while_it_is_read_keeps_its_rows(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(WAV)
    (tmp_path / "b").write_bytes(b"text")
    inputs = open_inputs([str(tmp_path)])
    (tmp_path / "b").write_bytes(WAV)
    assert [row.name for row in inputs.rows()] == [str(tmp_path / "a")]


# --- patterns and what is empty -----------------------------------------------------------------


def test_a_pattern_finds_folders_tar_files_and_manifests(tmp_path: Path) -> None:
    (tmp_path / "x1").mkdir()
    (tmp_path / "x1/a.wav").write_bytes(WAV)
    tar_of(tmp_path / "x2.tar", {"b.wav": WAV})
    write_manifest(tmp_path / "x3.jsonl", [{"audio": "c.wav"}])
    (tmp_path / "x4.wav").write_bytes(WAV)
    found = [os.path.relpath(row.name, tmp_path) for row in rows(f"{tmp_path}/x*")]
    assert found == ["x1/a.wav", "x2.tar/b.wav", "c.wav", "x4.wav"]
    # What is in a folder that it finds is read once.
    for pattern in ("**", "**/*"):
        again = [os.path.relpath(row.name, tmp_path) for row in rows(f"{tmp_path}/{pattern}")]
        assert sorted(again) == sorted(found)
    assert [row.name for row in rows(f"{tmp_path}/**/*1")] == [f"{tmp_path}/x1/a.wav"]
    assert [row.name for row in rows(f"{tmp_path}/**/a.*")] == [f"{tmp_path}/x1/a.wav"]
    # What is none of the user's only if the pattern asks for it.
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/a.wav").write_bytes(WAV)
    assert [row.name for row in rows(f"{tmp_path}/**/a.*")] == [f"{tmp_path}/x1/a.wav"]
    asked = f"{tmp_path}/__MACOSX/a.wav"
    assert [row.name for row in rows(f"{tmp_path}/__MACOSX/*.wav")] == [asked]


def test_an_empty_input_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder holds no recordings$"):
        open_inputs([str(tmp_path / "folder")])
    (tmp_path / "folder/a.txt").write_text("text")
    (tmp_path / "folder/b.tar").write_bytes(bytes(10_240))
    with pytest.raises(ValueError, match=r"no recordings: 1 hold no audio \(a.txt\); 1 are tar"):
        open_inputs([str(tmp_path / "folder")])
    with pytest.raises(ValueError, match="finds no files"):
        open_inputs([f"{tmp_path}/*.ogg"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no r"):
        open_inputs([str(tmp_path / "empty.jsonl")])
    (tmp_path / "empty.csv").write_text("audio,text\n")
    with pytest.raises(ValueError, match=r"empty\.csv holds no r"):
        open_inputs([str(tmp_path / "empty.csv")])
    for members in ({}, {"a.txt": b"text", "b.json": b"{}"}):
        with pytest.raises(ValueError, match=r"s\.tar holds no recordings"):
            open_inputs([tar_of(tmp_path / "s.tar", members)])


# --- tar files ----------------------------------------------------------------------------------


def tar_of(path: Path, members: dict[str, bytes] | Sequence[tuple[str, bytes]]) -> str:
    pairs = list(members.items()) if isinstance(members, dict) else members
    with tarfile.open(path, "w") as shard:
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return str(path)


def read_tar(tmp_path: Path, members: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Ids and columns of the rows; each recording's content must be its own."""
    name = tar_of(tmp_path / "s.tar", members)
    found = rows(name)
    for row in found:
        assert members[os.path.relpath(row.name, name)] == row.audio
    for wanted in range(len(found)):
        (one,) = open_inputs([name]).rows({wanted}.__contains__)
        assert one == found[wanted]
    assert [row.index for row in found] == list(range(len(found)))
    return {row.id: dict(row.columns) for row in found}


def test_names_with_further_full_stops_are_recordings_of_their_own(tmp_path: Path) -> None:
    takes = {f"spk1.take{i}.flac": encoded("FLAC", 0.3 + i / 100) for i in range(1, 5)}
    assert list(read_tar(tmp_path, takes)) == [f"spk1.take{i}" for i in range(1, 5)]
    dates = {f"calls/2024.01.0{i}.wav": encoded("WAV", 0.3 + i / 100) for i in range(1, 4)}
    assert list(read_tar(tmp_path, dates)) == [f"calls/2024.01.0{i}" for i in range(1, 4)]


def test_what_is_written_beside_a_recording_belongs_to_it(tmp_path: Path) -> None:
    assert read_tar(
        tmp_path,
        {
            "x.json": b'{"id": "one", "text": "a"}',
            "x.flac": FLAC,
            "y.flac": FLAC,
            "y.txt": b"b",
            "y.normal.txt": b"B",
            "z.mel.npy": b"\x93NUMPY" + bytes(100),
            "z.wav": WAV,
            "0001.audio.flac": FLAC,
            "0001.json": b'{"id": 7, "speaker": "s"}',
            "0001.transcript.txt": b"c",
        },
    ) == {
        "one": {"text": "a"},
        "y": {"txt": "b", "normal.txt": "B"},
        "z": {},
        "7": {"speaker": "s", "transcript.txt": "c"},
    }


def test_what_is_written_beside_several_recordings(tmp_path: Path) -> None:
    members = {
        "s.json": b'{"speaker": "s", "id": "never", "take": 0}',
        "s.1.flac": FLAC,
        "s.1.txt": b"one",
        "s.2.flac": WAV,
        "s.2.json": b'{"id": "second", "take": 2}',
        "s.3.txt": b"a recording that is not there",
        "s.txt": b"both",
        "t.flac": FLAC,
        "t.wav": WAV,
    }
    assert read_tar(tmp_path, members) == {
        "s.1": {"speaker": "s", "take": 0, "txt": "one"},
        "second": {"speaker": "s", "take": 2, "txt": "both"},
        "t.flac": {},
        "t.wav": {},
    }
    inputs = open_inputs([str(tmp_path / "s.tar")])
    list(inputs.rows())
    assert inputs.passed_over.as_json() == {
        "belong to no recording": {"files": 1, "examples": [f"{tmp_path}/s.tar/s.3.txt"]}
    }


def test_members_that_are_no_recordings_are_counted(tmp_path: Path) -> None:
    members = {
        "c/._a.flac": b"\0\5\x16\7" + bytes(200),
        "c/a.flac": FLAC,
        "__MACOSX/a.flac": b"\0",
        "c/b": WAV,
        "c/b.jpg": b"\xff\xd8",
        "c/d.weird": np.arange(1000).tobytes(),
        "readme.md": b"text",
    }
    assert list(read_tar(tmp_path, members)) == ["c/a", "c/b"]
    summary = run([str(tmp_path / "s.tar")], tmp_path / "out")
    found = summary.content["passed_over"]
    assert found == {
        which_files.NO_AUDIO: {
            "files": 3,
            "examples": [
                f"{tmp_path}/s.tar/{name}" for name in ("c/b.jpg", "c/d.weird", "readme.md")
            ],
        }
    }
    assert run([str(tmp_path / "s.tar")], tmp_path / "out").content["passed_over"] == found


def test_names_of_tar_members_may_begin_with_their_folder(tmp_path: Path) -> None:
    members = {
        "./a.wav": WAV,
        "./a.txt": b"one",
        "../b.wav": WAV,
        "./.c.wav": WAV,
        "./._a.wav": WAV,
    }
    found = rows(tar_of(tmp_path / "s.tar", members))
    assert [(row.id, row.columns) for row in found] == [("./a", {"txt": "one"}), ("../b", {})]


def test_texts_in_tar_files_with_a_mark_or_none_of_utf8(tmp_path: Path) -> None:
    members = {"a.wav": WAV, "a.txt": b"\xef\xbb\xbfone\r\n", "b.wav": WAV, "b.txt": b"caf\xe9"}
    found = rows(tar_of(tmp_path / "s.tar", members))
    assert [row.columns for row in found] == [{"txt": "one\r\n"}, {"txt": "caf\udce9"}]


def test_a_name_that_is_there_twice_has_the_texts_beside_it(tmp_path: Path) -> None:
    members = [("a.wav", WAV), ("a.txt", b"one"), ("a.wav", WAV), ("a.txt", b"two")]
    found = rows(tar_of(tmp_path / "s.tar", members))
    assert [(row.id, row.columns) for row in found] == [
        ("a", {"txt": "one"}),
        ("a", {"txt": "two"}),
    ]


@pytest.mark.parametrize("module", ["", "gzip", "bz2", "lzma"])
def test_joined_tar_files_are_read_to_the_end_of_the_last(tmp_path: Path, module: str) -> None:
    compress = importlib.import_module(module).compress if module else bytes
    contents = [
        Path(tar_of(tmp_path / "one.tar", {f"{name}.wav": WAV})).read_bytes() for name in "ab"
    ]
    path = tmp_path / "all.tar"
    path.write_bytes(b"".join(map(compress, contents)))
    assert [row.id for row in rows(path)] == ["a", "b"]
    # A compressed stream may end anywhere.
    half = len(contents[0]) // 2
    path.write_bytes(compress(contents[0][:half]) + compress(contents[0][half:]))
    assert [(row.id, row.problem) for row in rows(path)] == [("a", None)]
    if module:
        path.write_bytes(compress(contents[0])[:-20])
        assert "damaged tar file" in str(rows(path)[-1].problem)
        path.write_bytes(compress(contents[0]) + b"\1" + compress(contents[1])[1:])
        assert "damaged tar file" in str(rows(path)[-1].problem)


def test_a_large_sample_is_handed_out_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from w2vbert_fast.recordings.datasets import tar as tar_files

    members = {"s.json": b'{"speaker": "s"}'}
    members |= {f"s.{i}.flac": FLAC for i in range(6)}
    whole = read_tar(tmp_path, members)
    monkeypatch.setattr(tar_files, "_LARGEST_SAMPLE", len(FLAC))
    assert read_tar(tmp_path, members) == whole == {f"s.{i}": {"speaker": "s"} for i in range(6)}


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma"])
def test_compressed_recordings_in_front_of_a_cut_are_kept(tmp_path: Path, module: str) -> None:
    noise = np.random.default_rng(0)  # nothing that could be compressed
    content = {f"s.{i}.wav": WAV[:44] + noise.bytes(4_000) for i in range(6)}
    tar = Path(tar_of(tmp_path / "s.tar", content)).read_bytes()
    path = tmp_path / "cut.tar"
    path.write_bytes(importlib.import_module(module).compress(tar)[:-2_500])
    if module == "bz2":  # unpacked as one block or not at all
        assert ["damaged tar file" in str(row.problem) for row in rows(path)] == [True]
        return
    found = rows(path)
    assert [row.id for row in found[:-1]] == [f"s.{i}" for i in range(5)]
    assert "damaged tar file" in str(found[-1].problem)


@pytest.mark.parametrize("where", ["header", "content"])
def test_recordings_in_front_of_damage_are_kept(tmp_path: Path, where: str) -> None:
    path = Path(tar_of(tmp_path / "s.tar", {"s.1.wav": WAV, "s.2.wav": WAV, "s.3.wav": WAV}))
    content = bytearray(path.read_bytes())
    last = content.index(b"s.3.wav")
    if where == "header":
        content[last + 100 : last + 200] = b"\xff" * 100
    else:
        del content[last + 1_000 :]
    path.write_bytes(content)
    found = rows(path)
    assert [row.id for row in found[:2]] == ["s.1", "s.2"]
    assert len(found) == 3 and "damaged tar file" in str(found[2].problem)
    for wanted in range(3):
        (one,) = open_inputs([str(path)]).rows({wanted}.__contains__)
        assert (one.index, one.problem) == (wanted, found[wanted].problem)
