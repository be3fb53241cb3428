"""Layouts of data sets: what each is taken for, its rows, and what is wrong with bad ones."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from tests.helpers.offline import clips, encoded, run, table
from w2vbert_fast.recordings.datasets.formats import open_dataset
from w2vbert_fast.recordings.inputs import Folder, open_inputs
from w2vbert_fast.recordings.manifest import ColumnNames, transcript
from w2vbert_fast.recordings.rows import Row

SAVED = Path(__file__).parents[1] / "data" / "saved_to_disk"
BOM = "\ufeff"


def rows(path: Path | str, columns: str | None = None) -> list[Row]:
    """The rows of what must be one data set; its survey counts as many."""
    inputs = open_inputs([str(path)], ColumnNames.parse(columns))
    found = list(inputs.rows())
    assert inputs.total in (None, len(found))
    assert [row.index for row in found] == list(range(len(found)))
    # Again, and as far as they are wanted: nothing is used up.
    assert [row.name for row in inputs.rows(lambda index: index > 0)] == [r.name for r in found[1:]]
    assert not any(isinstance(part, Folder) for part in inputs.parts)
    return found


def kind(path: Path | str) -> str:
    (line,) = open_inputs([str(path)]).described
    return line.removeprefix(f"{path}: ")


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def said(found: list[Row], column: str = "text") -> list[Any]:
    return [row.columns.get(column) for row in found]


def places(found: list[Row], folder: Path) -> list[str]:
    return [os.path.relpath(row.audio, folder) for row in found]


# Manifests.


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_of_csv(tmp_path: Path, delimiter: str, end: str) -> None:
    lines = ["audio,text,note", 'a.wav,"one, two; three",', '/b.wav,"he said ""no""",x']
    lines[0] = lines[0].replace(",", delimiter)
    lines[1] = lines[1].replace('wav,"', f'wav{delimiter}"').replace('",', f'"{delimiter}')
    lines[2] = lines[2].replace('wav,"', f'wav{delimiter}"').replace('",x', f'"{delimiter}x')
    path = write(tmp_path / "rows.csv", BOM + end.join(lines) + end)
    assert kind(path) == "CSV, 2 rows"
    found = rows(path)
    assert [row.audio for row in found] == [str(tmp_path / "a.wav"), "/b.wav"]
    assert said(found) == ["one, two; three", 'he said "no"']
    assert said(found, "note") == ["", "x"]


def test_columns_that_are_named(tmp_path: Path) -> None:
    content = "id,path,file,sentence,transcript,cut\n1,a.wav,other.wav,said,raw,0.5\n"
    path = write(tmp_path / "rows.csv", content)
    (row,) = rows(path, "audio=path,text=sentence,offset=cut")
    assert (row.audio, row.id, row.offset) == (str(tmp_path / "a.wav"), "1", 0.5)
    # Others of the same meaning are not read, and can be in nobody's way.
    assert dict(row.columns) == {"text": "said"}
    with pytest.raises(ValueError, match=r"rows.csv: .* clip among them; got 'id, path, file"):
        rows(path, "audio=clip")
    lines = '{"path": "a.wav"}\n{"clip": "b.wav"}\n'
    found = rows(write(tmp_path / "rows.jsonl", lines), "audio=path")
    assert [(row.place, row.problem) for row in found][1] == ("line 2", "no column path")
    before = open_inputs([str(path)]).fingerprint
    assert open_inputs([str(path)], ColumnNames.parse("text=sentence")).fingerprint != before


@pytest.mark.parametrize("text", ["", "audio", "audio=", "=path", "audio=a,audio=b", "audio=a,"])
def test_columns_that_are_named_wrongly(text: str) -> None:
    with pytest.raises(ValueError, match="columns must be MEANING=COLUMN"):
        ColumnNames.parse(text)


def test_a_manifest_of_nemo(tmp_path: Path) -> None:
    (clip,) = clips(tmp_path / "clips", 1, seconds=0.5)
    entry = {"audio_filepath": clip, "text": "x"}
    parts = [{"offset": 0.1, "duration": 0.2}, {"offset": None, "duration": 9.0}, {"offset": 60.0}]
    lines = [json.dumps({**entry, **part}) for part in parts]
    run([str(write(tmp_path / "nemo.json", "\n".join(lines)))], tmp_path / "out")
    found = table(tmp_path / "out")
    assert [row.get("seconds") for row in found] == [0.2, 0.5, None]
    assert found[2]["error"] == "ends after 0.50 seconds; the part from 60.00 is not there"


# Tables of Arrow.


def test_what_the_datasets_library_has_saved_to_disk(tmp_path: Path) -> None:
    """The folder was written by that library, see its README."""
    assert kind(SAVED) == "datasets folder saved to disk, 2 rows"
    found = rows(SAVED)
    # Its own note says that `speech` holds recordings and what the numbers of `label` mean.
    assert [row.name for row in found] == ["a.flac", "b.flac"]
    assert said(found, "sentence") == ["is in use", None]
    assert said(found, "label") == ["woman", "man"]
    lengths = [soundfile.info(io.BytesIO(row.audio)).frames for row in found]
    assert lengths == [3000, 4000]
    assert [row.place for row in found] == ["row 1", "row 2"]


def test_splits_of_what_was_saved_to_disk(tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(SAVED, tmp_path / split)
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"has the splits train, test; name one, as in .*/train"):
        rows(tmp_path)
    assert len(rows(tmp_path / "test")) == 2
    write(tmp_path / "dataset_dict.json", '{"splits": ["train"]}')
    assert len(rows(tmp_path)) == 2


def test_damage_of_what_was_saved_to_disk(tmp_path: Path) -> None:
    shutil.copytree(SAVED, tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=f"{file} is no stream of Arrow"):
        rows(tmp_path / "saved")
    state = json.loads((SAVED / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    write(tmp_path / "saved" / "state.json", json.dumps(state))
    with pytest.raises(ValueError, match="by a file of indices; save flatten_indices"):
        rows(tmp_path / "saved")


def test_shards_of_parquet(tmp_path: Path) -> None:
    for shard in range(2):
        cells = [{"bytes": encoded("FLAC"), "path": f"{shard}{i}.flac"} for i in range(2)]
        content = pyarrow.table({"audio": cells, "text": ["a", None]})
        (tmp_path / "data").mkdir(exist_ok=True)
        name = f"train-{shard:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(content, tmp_path / "data" / name)
    for name in (tmp_path, tmp_path / "data", tmp_path / "data" / "train-*.parquet"):
        assert kind(name) == "Parquet (2 files), 4 rows"
        assert [row.name for row in rows(name)] == ["00.flac", "01.flac", "10.flac", "11.flac"]
    shards = sorted((tmp_path / "data").iterdir())
    (tmp_path / "one" / "data").mkdir(parents=True)
    shutil.copy(shards[0], tmp_path / "one" / "data")
    with pytest.raises(ValueError, match=r"has 1 of the 2 shards of train; .*/one/data/train-\*"):
        rows(tmp_path / "one")
    assert kind(tmp_path / "one" / "data" / "train-*.parquet") == "Parquet, 2 rows"
    shards[1].rename(tmp_path / "data" / "test-00000-of-00001.parquet")
    message = r"has the splits test, train; name one, as in '.*/test-\*"
    with pytest.raises(ValueError, match=message):
        rows(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        rows(tmp_path / "rows.parquet")


def test_columns_of_parquet_that_are_named(tmp_path: Path) -> None:
    content = pyarrow.table({"clip": ["a.wav", None], "said": [None, "b"], "text": ["x", "y"]})
    pyarrow.parquet.write_table(content, tmp_path / "rows.parquet")
    first, second = rows(tmp_path / "rows.parquet", "audio=clip,text=said")
    assert (first.audio, first.columns["text"]) == (str(tmp_path / "a.wav"), None)
    assert second.name == f"{tmp_path / 'rows.parquet'}, row 2"
    assert second.problem == "audio must be the name of a file, got None"


# Folders with a manifest of a known name.


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_audio_folder(tmp_path: Path, name: str) -> None:
    entries = [("sub/a.wav", "one"), ("b.wav", "two")]
    lines = [json.dumps({"file_name": n, "transcription": t}) for n, t in entries]
    if name.endswith("csv"):
        lines = ["file_name,transcription", *map(",".join, entries)]
    write(tmp_path / name, BOM + "\r\n".join(lines))
    write(tmp_path / "unnamed.wav", "")
    for path in (tmp_path, tmp_path / name):
        assert kind(path) == f"AudioFolder, {name}, 2 rows"
        found = rows(path)
        assert places(found, tmp_path) == ["sub/a.wav", "b.wav"]
        assert said(found, "transcription") == ["one", "two"]


def test_a_folder_with_other_metadata_is_one_of_recordings(tmp_path: Path) -> None:
    # As LJSpeech has it.
    write(tmp_path / "metadata.csv", "LJ001-0001|Printing|Printing\n")
    clips(tmp_path, 2)
    assert kind(tmp_path) == "folder of recordings, 2 rows"
    assert open_dataset(tmp_path) == []


def test_a_pattern_reads_a_data_set_once(tmp_path: Path) -> None:
    write(tmp_path / "in" / "metadata.csv", "file_name\n0000.wav\n")
    clips(tmp_path / "in", 2)
    clips(tmp_path / "other", 1)
    found = list(open_inputs([str(tmp_path / "**")]).rows())
    # The folder of all is one of recordings; manifests that are found in it are read as well.
    assert places(found, tmp_path)[:3] == ["in/0000.wav", "in/0001.wav", "other/0000.wav"]
    assert places(list(open_inputs([str(tmp_path / "in/**")]).rows()), tmp_path) == ["in/0000.wav"]
    found = list(open_inputs([str(tmp_path / "[io]*")]).rows())
    assert places(found, tmp_path) == ["in/0000.wav", "other/0000.wav"]


def test_common_voice(tmp_path: Path) -> None:
    head = "client_id\tpath\tsentence\tup_votes\n"
    lines = 'a\tcommon_voice_1.mp3\t"Where are you\t2\nb\tcommon_voice_2.mp3\tfine\t3\n'
    for name in ("validated.tsv", "test.tsv"):
        write(tmp_path / name, head + lines)
    # Without the folder of clips it is a table that names no recordings.
    with pytest.raises(ValueError, match="one of them audio_filepath"):
        rows(tmp_path / "test.tsv")
    (tmp_path / "clips").mkdir()
    for path, name in ((tmp_path, "validated.tsv"), (tmp_path / "test.tsv", "test.tsv")):
        assert kind(path) == f"Common Voice, {name}, 2 rows"
        found = rows(path)
        assert places(found, tmp_path) == ["clips/common_voice_1.mp3", "clips/common_voice_2.mp3"]
        assert said(found, "sentence") == ['"Where are you', "fine"]
    # Written on by a script, with names that say where they are.
    (tmp_path / "clips" / "x.mp3").touch()
    write(tmp_path / "test.tsv", head + "a\tclips/x.mp3\tfine\t1\nb\tclips/y.mp3\tfine\t1\n")
    assert places(rows(tmp_path / "test.tsv"), tmp_path) == ["clips/x.mp3", "clips/y.mp3"]
    write(tmp_path / "test.tsv", head + "a\tx.mp3\tone cell less\n")
    assert rows(tmp_path / "test.tsv")[0].problem == "3 cells in 4 columns"


# Kaldi.


def kaldi(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        write(folder / name.replace("_", "."), content)
    return folder


def test_kaldi_without_segments(tmp_path: Path) -> None:
    kaldi(
        tmp_path,
        wav_scp=f"{BOM}u1 a.wav\r\nu2\t/data/with space.wav\r\n\r\nu3 https://example.org/c.wav\r\n",
        # In another order, with an utterance that is not there, and one without words.
        text="u3 drei\nnone nobody\nu1  one  two \nu2\n",
        utt2spk="u1 ann\nu3 bob\n",
    )
    for path in (tmp_path, tmp_path / "wav.scp"):
        assert kind(path) == "Kaldi data folder, 3 rows"
        found = rows(path)
        names = [str(tmp_path / "a.wav"), "/data/with space.wav", "https://example.org/c.wav"]
        assert [row.audio for row in found] == names
        assert [row.id for row in found] == ["u1", "u2", "u3"]
        assert said(found) == ["one  two", "", "drei"]
        assert said(found, "speaker") == ["ann", None, "bob"]


def test_segments_of_kaldi(tmp_path: Path) -> None:
    (clip,) = clips(tmp_path / "clips", 1, seconds=1.0)
    segments = ["u2 r 0.25 0.75", "u1 r 0.5 -1", "u3 r 7 8", "u4 r 0.5 0.5", "u5 r 0.5"]
    segments += ["u6 other 0 1", "u2 r 0 1", "u7 r 0 x"]
    kaldi(tmp_path, wav_scp=f"r {clip}\n", segments="\n".join(segments), text="u2 zwei\n")
    run([str(tmp_path)], tmp_path / "out")
    found = table(tmp_path / "out")
    assert [row.get("seconds") for row in found[:2]] == [0.5, 0.5]
    assert (found[0]["offset"], found[0]["input_text"], found[0]["id"]) == (0.25, "zwei", "u2")
    places = [row["audio_filepath"].removeprefix(f"{tmp_path}, ") for row in found[3:]]
    assert places == [f"segments, line {n}" for n in range(4, 9)]
    assert [row["error"] for row in found[2:]] == [
        "ends after 1.00 seconds; the part from 7.00 to 8.00 is not there",
        "a segment must end behind its start, got 0.5 to 0.5 s",
        "a segment must be an id, a recording, its start and its end in seconds, "
        "got 'r 0.5' behind the id",
        "wav.scp has no recording other",
        "u2 is there twice, first in line 1",
        "a segment must be an id, a recording, its start and its end in seconds, "
        "got 'r 0 x' behind the id",
    ]


def test_a_command_of_kaldi_is_never_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    kaldi(tmp_path, wav_scp=f"u1 touch {touched} |\nu2 a.ark:17\nu3\nu4 sox b.wav -t wav - |  \n")
    run([str(tmp_path)], tmp_path / "out")
    found = [row["error"] for row in table(tmp_path / "out")]
    assert not touched.exists()
    assert found[0].startswith(f"wav.scp has a command, 'touch {touched} |'")
    assert found[0].endswith("are never run; write its output to a file and name that")
    assert "got a place in an archive, a.ark:17" in found[1]
    assert "must name a file behind the id, and there is none" in found[2]
    assert "'sox b.wav -t wav - |'" in found[3]


def test_ids_that_are_there_twice_in_kaldi(tmp_path: Path) -> None:
    kaldi(tmp_path, wav_scp="u1 a.wav\nu2 b.wav\nu1 c.wav\n", text="u2 x\nu1 y\nu2 z\nu2 z\n")
    assert [(row.place, row.problem) for row in rows(tmp_path)] == [
        ("wav.scp, line 1", None),
        ("wav.scp, line 2", "text has an utterance u2 twice, in lines 1 and 3"),
        ("wav.scp, line 3", "u1 is there twice, first in line 1"),
    ]
    kaldi(tmp_path, segments="u1 u1 0 1\n")
    (row,) = rows(tmp_path)
    assert row.problem is not None and "has a recording u1 twice, in lines 1 and 3" in row.problem


def test_relative_names_of_kaldi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder, or else, as Kaldi's tools have it, from where the command is given."""
    kaldi(tmp_path / "data" / "train", wav_scp="u1 a.wav\nu2 wavs/b.wav\nu3 c.wav\n")
    (both, there) = (tmp_path / "data/train/a.wav", tmp_path / "wavs/b.wav")
    for path in (both, there, tmp_path / "a.wav"):
        write(path, "")
    monkeypatch.chdir(tmp_path)
    assert [row.audio for row in rows("data/train")] == [
        "data/train/a.wav",
        str(there),
        "data/train/c.wav",
    ]


# Tar files.


def test_columns_of_tar_files_that_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (
            ("a.flac", encoded("FLAC")),
            ("a.norm.txt", b"said"),
            ("a.txt", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert transcript(rows(tmp_path / "0.tar")[0].columns) == "x"
    (row,) = rows(tmp_path / "0.tar", "text=norm.txt")
    assert (row.columns["text"], row.problem) == ("said", None)
    (row,) = rows(tmp_path / "0.tar", "text=other")
    assert row.problem == "no column other"
    with pytest.raises(ValueError, match="whose recordings are files and in no column"):
        rows(tmp_path / "0.tar", "audio=wav")


# All of them.


def many(folder: Path, count: int) -> dict[str, Path]:
    """A large data set of each layout."""
    words = "said " * 40
    found = {"jsonl": folder / "rows.jsonl", "csv": folder / "rows.csv"}
    found |= {"kaldi": folder / "kaldi", "parquet": folder / "rows.parquet"}
    entries = [{"audio": f"{i}.wav", "text": words} for i in range(count)]
    write(found["jsonl"], "".join(json.dumps(entry) + "\n" for entry in entries))
    write(found["csv"], "audio,text\n" + "".join(f"{i}.wav,{words}\n" for i in range(count)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), found["parquet"])
    lines = [f"u{i:06d}" for i in range(count)]
    kaldi(
        found["kaldi"],
        wav_scp="".join(f"{name} {name}.wav\n" for name in lines),
        text="".join(f"{name} {words}\n" for name in reversed(lines)),
    )
    return found


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    for layout, path in many(tmp_path, 3_000).items():
        tracemalloc.start()
        count = sum(1 for _ in open_inputs([str(path)]).rows())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 3_000
        # All rows at once would be above 2 MB.
        assert peak < 700_000, f"{layout}: {peak} bytes"
