"""What a job reads: manifests, folders, patterns, tar files, and recordings that are broken."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from tests.helpers.offline import Stub, clips, encoded, job, run, table, write_manifest
from tests.helpers.signals import speech_like, stereo, write_container
from w2vbert_fast.inference import AudioError, Flow, load_audio
from w2vbert_fast.inference.reading import Decoder
from w2vbert_fast.inference.runner import Runner
from w2vbert_fast.inference.tasks.transcribe import Transcribe
from w2vbert_fast.recordings.datasets.tar import Tar
from w2vbert_fast.recordings.inputs import open_inputs
from w2vbert_fast.recordings.manifest import JsonLines
from w2vbert_fast.recordings.rows import Row


def rows(*names: str, wanted: Any = None) -> list[Row]:
    inputs = open_inputs(names)
    return list(inputs.rows(wanted) if wanted else inputs.rows())


ENTRIES: list[dict[str, Any]] = [
    {"audio_filepath": "a.wav", "text": "what was said"},
    {"audio_filepath": "sub/b.wav", "id": "b", "offset": 1.5, "duration": 2.0, "speaker": "x"},
    {"audio_filepath": "/c.wav", "duration": 4.0},
]


def check_entries(found: list[Row], folder: Path) -> None:
    assert [row.index for row in found] == [0, 1, 2]
    assert [row.audio for row in found] == [
        str(folder / "a.wav"),
        str(folder / "sub/b.wav"),
        "/c.wav",
    ]
    assert [row.id for row in found] == [str(folder / "a.wav"), "b", "/c.wav"]
    assert [(row.offset, row.duration) for row in found] == [(0, None), (1.5, 2.0), (0, None)]
    assert [row.problem for row in found] == [None] * 3
    assert found[0].columns["text"] == "what was said"
    assert found[1].columns["speaker"] == "x"


def test_jsonl(tmp_path: Path) -> None:
    name = write_manifest(tmp_path / "rows.jsonl", ENTRIES)
    check_entries(rows(name), tmp_path)
    assert [row.index for row in rows(name, wanted={2}.__contains__)] == [2]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_csv_and_tsv(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    names = ["audio_filepath", "id", "offset", "duration", "text", "speaker"]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="," if suffix == "csv" else "\t")
        writer.writeheader()
        writer.writerows(ENTRIES)
    found = rows(str(path))
    assert found[0].id == str(tmp_path / "a.wav")
    check_entries(found, tmp_path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ENTRIES[1:] + ENTRIES[:1]), path)
    found = rows(str(path))
    assert [row.audio for row in found] == [
        str(tmp_path / "sub/b.wav"),
        "/c.wav",
        str(tmp_path / "a.wav"),
    ]
    assert (found[0].offset, found[0].columns["speaker"]) == (1.5, "x")


def test_recordings_within_a_parquet_file(tmp_path: Path) -> None:
    content = encoded("FLAC")
    cells = [{"bytes": content, "path": "x.flac"}, {"bytes": content, "path": None}]
    table_ = pyarrow.Table.from_pylist([{"audio": cell, "id": i} for i, cell in enumerate(cells)])
    pyarrow.parquet.write_table(table_, tmp_path / "rows.parquet")
    run([str(tmp_path / "rows.parquet")], tmp_path / "out")
    found = table(tmp_path / "out")
    assert [(row["id"], row["audio_filepath"]) for row in found] == [
        ("0", "x.flac"),
        ("1", "rows.parquet:1"),
    ]
    assert [row["text"] for row in found] == ["4800", "4800"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"audio_filepath": "a.wav"', "not JSON"),
        ("[1]", "not a JSON object but a list"),
        ('{"text": "x"}', "no column audio_filepath, audio, file"),
        ('{"audio": 3}', "audio must be the name of a file, got 3"),
        ('{"audio": "a", "offset": -1}', "offset must be seconds of at least 0, got -1"),
        ('{"audio": "a", "offset": 1, "duration": "x"}', "duration must be seconds above 0"),
        ('{"audio": "a", "offset": NaN}', "offset must be seconds"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_of_a_manifest_is_one_bad_row(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"audio": "a"}\n' + line + "\n\n" + '{"audio": "b"}\n')
    found = rows(str(path))
    assert [row.index for row in found] == [0, 1, 2]
    assert found[1].problem is not None and problem in found[1].problem
    assert (found[0].problem, found[2].problem) == (None, None)


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.wav", "a.FLAC", "notes.txt", "deep/er/c.mp3"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    folder = str(tmp_path / "in")
    expected = [f"{folder}/a.FLAC", f"{folder}/b.wav", f"{folder}/deep/er/c.mp3"]
    assert [row.audio for row in rows(folder)] == expected
    assert [row.audio for row in rows(f"{folder}/**/*.mp3", f"{folder}/b.wav", folder)] == [
        expected[2],
        expected[1],
        *expected,
    ]
    assert open_inputs([folder]).total == 3
    before = open_inputs([folder]).fingerprint
    (tmp_path / "in" / "d.wav").touch()
    assert open_inputs([folder]).fingerprint != before
    (tmp_path / "in" / "[x].wav").touch()
    assert [row.audio for row in rows(f"{folder}/[x].wav")] == [f"{folder}/[x].wav"]
    with pytest.raises(ValueError, match="finds no files"):
        open_inputs([f"{folder}/*.ogg"])
    with pytest.raises(ValueError, match="the input is empty"):
        open_inputs([])


def tar_of(path: Path, members: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as shard:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return str(path)


MEMBERS = {
    "a/1.json": b'{"id": "one", "text": "x"}',
    "a/1.flac": encoded("FLAC"),
    "a/2.wav": encoded("WAV"),
    "a/2.txt": b"said",
    "readme.md": b"-",
    "a/3.ogg": encoded("OGG"),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_shards(tmp_path: Path, mode: str) -> None:
    name = tar_of(tmp_path / "s.tar", MEMBERS, mode)
    found = rows(name)
    assert [row.id for row in found] == ["one", "a/2", "a/3"]
    assert [dict(row.columns) for row in found] == [{"text": "x"}, {"txt": "said"}, {}]
    assert found[0].name == f"{name}/a/1.flac"
    assert [row.index for row in rows(name, wanted={1, 5}.__contains__)] == [1]
    run([name, *clips(tmp_path / "clips", 2)], tmp_path / "out")
    texts = [row["text"] for row in table(tmp_path / "out")]
    assert texts == ["4800", "4800", "4800", "3200", "3216"]


@pytest.mark.parametrize("where", ["header", "cut", "text"])
def test_a_damaged_tar_file_is_one_bad_row(tmp_path: Path, where: str) -> None:
    path = tmp_path / "s.tar"
    content = bytearray(Path(tar_of(path, MEMBERS)).read_bytes())
    start = content.index(b"a/3.ogg")
    if where == "header":
        content[start + 100 : start + 200] = b"\xff" * 100
    elif where == "cut":
        del content[start + 512 + 100 :]
    else:
        content = bytearray(b"This is not a tar file.\n" * 100)
    path.write_bytes(content)
    found = rows(str(path))
    assert found[-1].problem is not None and "damaged tar file" in found[-1].problem
    assert [row.problem for row in found[:-1]] == [None] * (len(found) - 1)
    for wanted in range(len(found)):
        assert [row.index for row in rows(str(path), wanted={wanted}.__contains__)] == [wanted]
    after = Tar(str(path)).rows(0, lambda index: False)
    with pytest.raises(StopIteration) as end:
        next(after)
    assert end.value.value == len(found)


def test_parts_of_recordings(tmp_path: Path) -> None:
    signal = speech_like(4, 16_000)
    for name in ("x.wav", "x.flac"):
        soundfile.write(tmp_path / name, signal, 16_000, subtype="PCM_16")
        whole = load_audio(tmp_path / name).samples
        part = load_audio(tmp_path / name, offset=1.25, duration=0.5)
        np.testing.assert_array_equal(part.samples, whole[20_000:28_000])
        assert part.seconds == 0.5
        assert load_audio(tmp_path / name, offset=3.0).samples.numel() == 16_000
        # A part that ends a little behind the end gives what there is.
        assert load_audio(tmp_path / name, offset=3.5, duration=0.9).seconds == 0.5
        for offset, duration in ((4.5, None), (3.0, 2.0)):
            with pytest.raises(AudioError, match=r"ends after 4.00 seconds; the part from"):
                load_audio(tmp_path / name, offset=offset, duration=duration)
    write_container(tmp_path / "x.m4a", "aac", 48_000, seconds=3)
    whole = load_audio(tmp_path / "x.m4a").samples
    part = load_audio(tmp_path / "x.m4a", offset=1, duration=1).samples
    inner = slice(200, -200)  # the resampler sees other samples at the ends
    np.testing.assert_allclose(part[inner], whole[16_000:32_000][inner], atol=2e-3)
    for wrong in ({"offset": -1}, {"offset": float("nan")}, {"duration": 0}, {"longest": 0}):
        with pytest.raises(ValueError, match="must be seconds"):
            load_audio(tmp_path / "x.wav", **wrong)


GOOD = {
    f"{rate} Hz, {subtype}, {channels} channels.wav": (rate, subtype, channels)
    for rate, subtype, channels in [
        (8_000, "PCM_16", 1),
        (11_025, "PCM_U8", 2),
        (22_050, "PCM_24", 3),
        (44_100, "PCM_32", 4),
        (48_000, "FLOAT", 6),
        (96_000, "DOUBLE", 8),
    ]
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Bad recordings, the type of error and a part of its message; among good ones."""
    folder = tmp_path_factory.mktemp("corpus")
    names: dict[str, tuple[str, str]] = {}

    def add(name: str, content: bytes | None, kind: str, message: str) -> None:
        path = os.path.join(folder, name)
        if content is not None:
            Path(path).write_bytes(content)
        names[path] = (kind, message)

    for name, (rate, subtype, channels) in GOOD.items():
        signal = np.repeat(speech_like(0.4, rate)[:, None], channels, axis=1)
        soundfile.write(folder / name, signal, rate, subtype=subtype)
        names[str(folder / name)] = ("", "")
    wav, flac = encoded("WAV", 1.0), encoded("FLAC", 1.0)
    add("a name with\nnewlines and spaces.wav", wav, "", "")
    add(os.fsdecode(b"caf\xe9.wav"), wav, "", "")
    add("really a flac.mp3", flac, "", "")
    add("stereo.wav", None, "", "")
    soundfile.write(folder / "stereo.wav", stereo(44_100, 0.5), 44_100)
    add("missing.wav", None, "FileNotFoundError", "No such file")
    add("empty.wav", b"", "AudioError", "the file is empty")
    add("truncated.wav", wav[:9_000], "AudioError", "truncated")
    add("truncated.flac", flac[: len(flac) // 2], "AudioError", "truncated or damaged")
    add("truncated.ogg", encoded("OGG", 6.0)[:-200], "AudioError", "truncated")
    junk = encoded("OGG", 6.0) + b"TAG" + bytes(125)
    add("tags at the end.ogg", junk, "", "")
    add("text.wav", b"This is not audio.\n" * 100, "AudioError", "cannot be read as audio")
    add("zeros.wav", bytes(5_000), "AudioError", "cannot be read as audio")
    add("header only.wav", encoded("WAV", 0.0), "AudioError", "holds no samples")
    add("short.wav", encoded("WAV", 0.02), "AudioError", "too short")
    nan = np.full(16_000, np.nan, np.float32)
    add("nan.wav", None, "AudioError", "NaN or infinite")
    soundfile.write(folder / "nan.wav", nan, 16_000, subtype="FLOAT")
    add("six hours.wav", None, "AudioError", "longer than the limit of 14400 seconds")
    size = 6 * 3600 * 16_000 * 2
    with open(folder / "six hours.wav", "wb") as file:
        # A sparse file: the header of one second with another size, and nothing behind it.
        file.write(wav[:4] + (size + 36).to_bytes(4, "little") + wav[8:40])
        file.write(size.to_bytes(4, "little"))
        file.truncate(44 + size)
    add("folder.wav", None, "IsADirectoryError", "Is a directory")
    (folder / "folder.wav").mkdir()
    add("secret.wav", wav, "PermissionError", "Permission denied")
    (folder / "secret.wav").chmod(0)
    if os.access(folder / "secret.wav", os.R_OK):  # by root, whom permissions do not stop
        del names[str(folder / "secret.wav")]
    add("null\0.wav", None, "AudioError", "null character")
    return names


class Texts(Stub, Transcribe):
    """A stub whose results are texts to tables, too."""


def test_bad_recordings_cost_one_row_each(
    corpus: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    names = corpus
    manifest = tmp_path / "rows.jsonl"
    # Escaped, a name that is not UTF-8 survives JSON.
    write_manifest(manifest, [{"audio": name} for name in names])
    # On the command line a folder is the recordings in it.
    files = [name for name in names if not os.path.isdir(name)]
    for inputs, expected in (([str(manifest)], list(names)), (files, files)):
        out = tmp_path / f"out {len(inputs)}"
        summary = run(inputs, out, flow=Flow(frame_budget=400, window_rows=5, workers=2))
        found = table(out)
        assert [row["audio_filepath"] for row in found] == expected
        for row in found:
            kind, message = names[row["audio_filepath"]]
            if kind:
                assert row["error_type"] == kind, row
                assert message in row["error"]
                assert row["seconds"] is None
            else:
                assert int(row["text"]) > 0, row
        assert sum(summary.errors.values()) == sum(bool(names[name][0]) for name in expected)
    run([str(manifest)], tmp_path / "parquet", Texts(), ["parquet"])
    for row, name in zip(table(tmp_path / "parquet"), names, strict=True):
        # Parquet holds UTF-8 alone.
        expected = name if "error" in row else name.replace("\udce9", "\\xe9")
        assert row["audio_filepath"] == expected


def test_a_limit_stops_the_decoding_of_what_states_no_length(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.mp3", np.zeros(16_000 * 60), 16_000, format="MP3")
    with pytest.raises(AudioError, match="longer than the limit of 20 seconds"):
        load_audio(tmp_path / "x.mp3", longest=20)
    loaded = Decoder(longest=20)(Row(0, str(tmp_path / "x.mp3"), "x", "x"))
    assert loaded.error_type == "AudioError"
    assert load_audio(tmp_path / "x.mp3", longest=20, duration=10).seconds == 10


def test_a_large_manifest_is_parsed_as_far_as_its_rows_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million rows start at once: all lines are counted, some are parsed."""
    parsed = 0
    entries_of = JsonLines._entries

    def counted(self: JsonLines, record: bytes) -> Any:
        nonlocal parsed
        parsed += 1
        return entries_of(self, record)

    monkeypatch.setattr(JsonLines, "_entries", counted)
    (path,) = clips(tmp_path / "clips", 1)
    line = json.dumps({"audio_filepath": path, "duration": 0.2, "text": "what was said"}) + "\n"
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(line * 100_000)
    inputs = open_inputs([str(tmp_path / "rows.jsonl")])
    first = next(Runner(Stub(), Flow(window_rows=256))(inputs.rows()))
    assert first.text == "3200"
    assert inputs.total == 100_000
    assert 256 <= parsed <= 4 * 256


def test_memory_stays_flat(tmp_path: Path) -> None:
    paths = clips(tmp_path / "clips", 10)
    manifest = write_manifest(
        tmp_path / "rows.jsonl",
        [{"audio": paths[i % 10], "text": "said " * 20} for i in range(4_000)],
    )
    process = psutil.Process()
    sizes: list[int] = []

    class Watched(Stub):
        def run(self, pieces: Any) -> list[Any]:
            sizes.append(process.memory_info().rss)
            return super().run(pieces)

    flow = Flow(frame_budget=10_000, window_rows=100, workers=2)
    work = job([manifest], tmp_path / "out", Watched(), flow=flow, shard_rows=500)
    work.run()
    assert len(sizes) == 40
    assert sizes[-1] - sizes[4] < 8 << 20
