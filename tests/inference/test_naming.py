"""Files of single recordings: named as those, in the input's tree, never outside of the folder."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from tests.helpers.offline import clips, encoded, run, table, write_manifest
from tests.inference.test_formats import Spoken, files_of
from w2vbert_fast.inference.jobs.journal import Journal
from w2vbert_fast.inference.jobs.naming import in_tree
from w2vbert_fast.recordings.inputs import Files

HOSTILE = (
    "../../evil.wav",
    "/evil/evil.wav",
    "C:\\evil\\evil.wav",
    "..\\..\\evil.wav",
    "a\0b.wav",
    "line\nend.wav",
    "x" * 5000 + ".wav",
    "y/" * 3000 + "evil.wav",
    "é" * 300 + ".wav",
    "..",
    ".wav",
    "https://example.org/../evil.wav?a=b/../c",
    "\udcff.wav",
)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A folder for a job, three below one in which nothing else changes."""
    folder = tmp_path / "a" / "b" / "out"
    folder.mkdir(parents=True)
    yield folder
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert [path.name for path in folder.parent.parent.iterdir()] == ["b"]
    assert not Path("/evil").exists()


def named(out: Path, kind: str = "srt") -> list[str]:
    """What the rows call their files, which are there and hold what was said."""
    names = [row[f"{kind}_file"] for row in table(out)]
    assert len({*names}) == len(names)
    assert all("well said" in (out / name).read_text() for name in names)
    return names


@pytest.mark.parametrize(
    ("name", "roots", "expected"),
    [
        ("calls/monday/a.wav", ["calls"], "monday/a.wav"),
        ("calls/monday/a.wav", ["calls/"], "monday/a.wav"),
        ("calls/monday/a.wav", ["calls/monday", "calls"], "a.wav"),
        ("callsigns/a.wav", ["calls"], "callsigns/a.wav"),
        ("/data/x/a b (1).wav", ["."], "data/x/a b (1).wav"),
        ("calls/../x/a.wav", ["calls"], "x/a.wav"),
        ("s3://bucket/calls/a.mp3", [], "bucket/calls/a.mp3"),
        ("s3://bucket/calls/a.mp3", ["s3://bucket"], "calls/a.mp3"),
        ("simplecache::https://host/a.mp3?key=1", [], "host/a.mp3_key=1"),
        ("C:\\x\\a.wav", [], "C_/x/a.wav"),
        ("x . /...\\a.wav", [], "x/a.wav"),
        ("录音/会议。mp3", [], "录音/会议。mp3"),
        ("-", ["."], "-"),
        ("..", [], "recording"),
    ],
)
def test_the_tree_of_a_name(name: str, roots: list[str], expected: str) -> None:
    assert in_tree(name, roots).as_posix() == expected


@given(st.text(st.characters(exclude_categories=[]), max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_name_is_absolute_leads_upwards_or_is_too_long(name: str) -> None:
    path = in_tree(name, ["x"])
    assert not path.is_absolute() and path.parts
    assert not {"..", ".", ""} & {*path.parts}
    assert all(len(part.encode()) <= 180 for part in path.parts) and "\0" not in str(path)


def test_the_folder_of_files() -> None:
    for paths, expected in (
        (["talk.wav"], ""),
        (["a/talk.wav"], "a"),
        (["a/b/x.wav", "a/c/y.wav"], "a"),
        (["ab/x.wav", "ac/y.wav"], ""),
        (["/x.wav", "a.wav"], ""),
        (["s3://bucket/a/x.wav", "s3://bucket/b/x.wav"], "s3://bucket"),
    ):
        assert Files(paths).root == expected


def test_a_job_keeps_the_tree_of_its_input(tmp_path: Path, out: Path) -> None:
    calls = tmp_path / "calls"
    for name in ("monday/talk.wav", "tuesday/talk.wav", "tuesday/talk.flac", "talk.v2.wav"):
        (calls / name).parent.mkdir(parents=True, exist_ok=True)
        (calls / name).write_bytes(encoded("wav"))
    run([str(calls)], out, Spoken(), ["srt", "txt"])
    expected = ["talk.v2", "monday/talk", "tuesday/talk", "tuesday/talk.wav"]
    assert named(out) == [f"srt/{name}.srt" for name in expected]
    assert named(out, "txt") == [f"txt/{name}.txt" for name in expected]
    # Patterns and several files from the folder on that holds them all; one by its name.
    run([str(calls / "*" / "*.wav")], out, Spoken(), ["srt"], overwrite=True)
    assert named(out) == ["srt/monday/talk.srt", "srt/tuesday/talk.srt"]
    run([str(calls / "monday" / "talk.wav")], out, Spoken(), ["srt"], overwrite=True)
    assert named(out) == ["srt/talk.srt"]
    assert not (out / "srt" / "monday").exists() and not (out / "txt").exists()


def test_parts_of_a_recording_have_numbers(tmp_path: Path, out: Path) -> None:
    (tmp_path / "talk.wav").write_bytes(encoded("wav", 0.9))
    rows = [{"audio": "talk.wav", "offset": i * 0.3, "duration": 0.3} for i in range(3)]
    run([write_manifest(tmp_path / "rows.jsonl", rows)], out, Spoken(), ["srt"])
    numbers = ["", ".000000001", ".000000002"]
    assert named(out) == [f"srt/talk{number}.srt" for number in numbers]


def test_names_of_others_never_lead_out_of_the_folder(tmp_path: Path, out: Path) -> None:
    content = encoded("wav")
    names = [name.encode("utf-8", "replace").decode() for name in HOSTILE]
    rows = pyarrow.table({"audio": [{"bytes": content, "path": name} for name in names]})
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in HOSTILE:
            if "\0" not in name and Path(name).suffix == ".wav":
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    inputs = [str(tmp_path / "rows.parquet"), str(tmp_path / "0.tar")]
    run(inputs, out, Spoken(), ["srt"])
    assert len(named(out)) > 20
    inside = (out / "srt").resolve()
    assert all((out / name).resolve().is_relative_to(inside) for name in named(out))


def test_links_in_the_folder_are_not_followed(tmp_path: Path, out: Path) -> None:
    calls, elsewhere = tmp_path / "calls", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.srt").write_text("mine")
    for name in ("linked/a.wav", "b.wav", "c.wav", "file/d.wav"):
        (calls / name).parent.mkdir(parents=True, exist_ok=True)
        (calls / name).write_bytes(encoded("wav"))
    (out / "srt").mkdir()
    (out / "srt" / "linked").symlink_to(elsewhere)
    (out / "srt" / "b.srt").symlink_to(elsewhere / "new.srt")
    (out / "srt" / ".c.srt.tmp").symlink_to(elsewhere / "mine.srt")
    (out / "srt" / "file").write_text("no folder")
    run([str(calls)], out, Spoken(), ["srt"])
    assert named(out) == [
        *("srt/b.wav.srt", "srt/c.srt", "srt/000000002.srt", "srt/000000003.srt"),
    ]
    assert files_of(elsewhere) == {"mine.srt"} and (elsewhere / "mine.srt").read_text() == "mine"


def test_what_a_killed_run_has_left_is_removed(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a shard have their names already, and no line of the journal counts them."""
    recordings = clips(tmp_path / "calls", 7)

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "write", killed)
        run(recordings, out, Spoken(), ["srt"])
    assert len(files_of(out / "srt")) == 5
    run(recordings, out, Spoken(), ["srt"])
    expected = [f"srt/{index:04d}.srt" for index in range(7)]
    assert named(out) == expected and files_of(out / "srt") == {n[4:] for n in expected}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # While it forgets the other job.
        patch.setattr("w2vbert_fast.inference.jobs.job.remove_announced", killed)
        run(recordings, out, Spoken(), ["srt"], overwrite=True)
    run(recordings, out, Spoken(), ["srt"])
    assert named(out) == expected and files_of(out / "srt") == {n[4:] for n in expected}
    assert not [path for path in out.iterdir() if path.name.endswith(".names")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_beside_the_recordings(tmp_path: Path, out: Path, kind: str) -> None:
    first, second = clips(tmp_path / "calls", 2)
    shutil.copy(first, Path(first).with_suffix(".wave"))
    (tmp_path / "calls" / "0001.srt").write_text("mine")
    calls, beside = tmp_path / "calls", {"beside": True}
    run([str(calls)], out, Spoken(), [kind, "srt"], how=beside)
    expected = [calls / name for name in ("0000.srt", "0000.wave.srt", "0001.wav.srt")]
    assert named(out) == list(map(str, expected))
    assert (calls / "0001.srt").read_text() == "mine"
    assert not (out / "srt").exists()
    # Overwriting removes what the job has written.
    run([second], out, Spoken(), ["srt"], overwrite=True)
    assert sorted(path.name for path in calls.iterdir()) == [
        *("0000.wav", "0000.wave", "0001.srt", "0001.wav"),
    ]
    manifest = write_manifest(tmp_path / "rows.jsonl", [{"audio": first}])
    for name in (manifest, "-", "https://example.org/a.wav"):
        with pytest.raises(ValueError, match="beside the recordings can be written for files and"):
            run([name], out, Spoken(), ["srt"], how=beside)
