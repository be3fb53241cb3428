"""The reader of manifests: no row is left out or read into another, and bad ones say where."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from w2vbert_fast.recordings.datasets.formats import open_dataset
from w2vbert_fast.recordings.manifest import transcript
from w2vbert_fast.recordings.rows import Row, everything
from w2vbert_fast.recordings.which_files import MANIFEST, why_not_by_name


def read(path: Path, content: str | bytes) -> list[Row]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (reader,) = open_dataset(path)
    rows = list(reader.rows(0, everything))
    assert reader.survey()[0] == len(rows)
    assert [row.index for row in rows] == list(range(len(rows)))
    assert [row.name for row in reader.rows(5, {6}.__contains__)] == [r.name for r in rows[1:2]]
    return rows


def problem_of(row: Row) -> str | None:
    """What is wrong with a row, behind its place, which its name has and its problem has not."""
    if row.problem is None:
        return None
    assert row.name.endswith(f", {row.place}") and row.place not in row.problem
    return f"{row.place}: {row.problem}"


def names(rows: list[Row]) -> list[str | None]:
    return [None if row.audio is None else Path(row.audio).name for row in rows]


def texts(rows: list[Row]) -> list[Any]:
    return [row.columns.get("text") for row in rows]


# Quotation marks and fields.


def test_quotation_marks_are_text_in_tsv(tmp_path: Path) -> None:
    # Sentences as Common Voice has them: marks that open alone, close alone, and inner ones.
    said = ['"Where are you going', "fine", 'She said so"', '"では、危険だ"と彼は言った', '""', '"']
    lines = "".join(f"{i}.wav\t{text}\n" for i, text in enumerate(said))
    rows = read(tmp_path / "rows.tsv", f"audio\ttext\n{lines}")
    assert texts(rows) == said
    assert names(rows) == [f"{i}.wav" for i in range(len(said))]


def test_a_quotation_mark_that_nobody_closes_swallows_no_row_of_a_csv(tmp_path: Path) -> None:
    lines = ["file,text", 'a.wav,"Where are you', "b.wav,fine", 'c.wav,said so"', 'd.wav,"end']
    rows = read(tmp_path / "rows.csv", "\n".join(lines))
    assert [problem_of(row) for row in rows] == [
        "line 2: a quotation mark is not closed before line 3, which could be a row",
        None,
        None,
        "line 5: a quotation mark is not closed",
    ]
    assert texts(rows[1:3]) == ["fine", 'said so"']
    assert [row.place for row in rows] == [f"line {n}" for n in range(2, 6)]


def test_a_cell_over_two_lines_that_makes_no_row_is_two_bad_rows(tmp_path: Path) -> None:
    lines = ["file,text,speaker", 'a.wav,"two', 'lines",x', 'b.wav,"two', 'lines"', "c.wav,y,z"]
    rows = read(tmp_path / "rows.csv", "\n".join(lines))
    assert [problem_of(row) for row in rows] == [
        None,
        "line 4: 2 cells in 3 columns",
        "line 5: 1 cells in 3 columns",
        None,
    ]
    assert texts(rows[:1]) == ["two\nlines"]


def test_every_line_that_could_be_a_row_is_one_wherever_marks_stand(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(200):
        columns = rng.randint(2, 3)
        count = rng.randint(1, 6)
        lines = [
            ",".join("".join(rng.choices('ab" ', k=rng.randint(0, 4))) for _ in range(columns))
            for _ in range(count)
        ]
        header = ",".join(("audio", "text", "more")[:columns])
        rows = read(tmp_path / "rows.csv", "\n".join((header, *lines)) + "\n")
        assert [row.place for row in rows] == [f"line {n}" for n in range(2, count + 2)], lines


@pytest.mark.parametrize("columns", [("audio", "text"), ("text", "audio"), ("audio", "text", "x")])
def test_no_quotation_mark_swallows_a_row_that_names_a_file(
    tmp_path: Path, columns: tuple[str, ...]
) -> None:
    rng = random.Random(0)
    for _ in range(200):
        lines = [
            ",".join(
                f"{i}.wav" if name == "audio" else "".join(rng.choices('ab" ', k=rng.randint(0, 4)))
                for name in columns
            )
            for i in range(rng.randint(1, 6))
        ]
        rows = read(tmp_path / "rows.csv", "\n".join((",".join(columns), *lines)) + "\n")
        assert [row.place for row in rows] == [f"line {n + 2}" for n in range(len(lines))], lines


@pytest.mark.parametrize("columns", [("audio", "text"), ("text", "audio")])
def test_cells_of_lines_that_have_as_many_delimiters_as_a_row(
    tmp_path: Path, columns: tuple[str, ...]
) -> None:
    said = ["first, second\nthird, fourth\nfifth", 'one\n"two", three', "one\n\ntwo,", "x"]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows({"audio": f"{i}.wav", "text": text} for i, text in enumerate(said))
    rows = read(tmp_path / "rows.csv", file.getvalue())
    assert [row.problem for row in rows] == [None] * len(said)
    assert (texts(rows), names(rows)) == (said, [f"{i}.wav" for i in range(len(said))])


def test_what_the_csv_module_writes_comes_back(tmp_path: Path) -> None:
    rng = random.Random(1)
    said = [
        'say "hi", please',
        "two\nlines",
        "three\r\nshort\n\nlines",
        '"',
        "",
        "a,b",
        'ends "so"',
    ]
    said += ["".join(rng.choices('xyz,"', k=8)) for _ in range(50)]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("audio", "text", "speaker", "a"))
    writer.writerows((f"{i}.wav", text, "s", 1) for i, text in enumerate(said))
    rows = read(tmp_path / "rows.csv", file.getvalue())
    assert [row.problem for row in rows] == [None] * len(said)
    assert texts(rows) == [text.replace("\r\n", "\n") for text in said]
    assert names(rows) == [f"{i}.wav" for i in range(len(said))]


@pytest.mark.parametrize(
    ("suffix", "line", "problem"),
    [
        ("csv", "b.wav", "line 3: 1 cells in 2 columns"),
        ("csv", "b.wav,x,y", "line 3: 3 cells in 2 columns"),
        ("csv", 'b.wav,"x",y', "line 3: 3 cells in 2 columns"),
        ("csv", 'b.wav,"x" y', "line 3: not CSV: "),
        ("csv", "b.wav,x\0y", "line 3: holds a null character"),
        ("csv", ",x", "line 3: audio must be the name of a file, got ''"),
        ("tsv", "b.wav\tx\ty", "line 3: 3 cells in 2 columns"),
        ("tsv", "\t", "line 3: audio must be the name of a file, got ''"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path: Path, suffix: str, line: str, problem: str) -> None:
    comma = "," if suffix == "csv" else "\t"
    lines = [f"audio{comma}text", f"a.wav{comma}x", line, "", f"c.wav{comma}z"]
    rows = read(tmp_path / f"rows.{suffix}", "\n".join(lines))
    assert [row.problem is None for row in rows] == [True, False, True]
    assert (problem_of(rows[1]) or "").startswith(problem)
    assert names(rows) == ["a.wav", None, "c.wav"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_marks_and_line_ends_of_other_systems(tmp_path: Path, suffix: str) -> None:
    said = ["eins", "zwei ", "dr\u00e4i\u2028\x85"]
    if suffix == "jsonl":
        lines = [json.dumps({"audio": "a", "text": t}, ensure_ascii=False) for t in said]
    else:
        comma = "," if suffix == "csv" else "\t"
        lines = [f" audio{comma}text ", *(f"a{comma}{text}" for text in said)]
    lines.insert(2, "")
    content = "\r\n".join(lines)
    assert texts(read(tmp_path / f"rows.{suffix}", f"\ufeff{content}\r\n")) == said
    assert texts(read(tmp_path / f"rows.{suffix}", content.encode() + b"\r\n  \r\n")) == said
    with pytest.raises(ValueError, match="is UTF-16; a manifest must be UTF-8"):
        read(tmp_path / f"rows.{suffix}", content.encode("utf-16"))


def zstandard(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("XZ", lzma.compress), ("zst", zstandard)],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_compressed_manifests(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], suffix: str
) -> None:
    lines = {
        "jsonl": ['{"audio": "a.wav", "text": "x"}', '{"audio": "b.wav", "text": "y"}'],
        "csv": ["audio;text", "a.wav;x", "b.wav;y"],
    }[suffix]
    content = "\n".join(lines).encode()
    path = tmp_path / f"rows.{suffix}.{ending}"
    # Joined of two streams, as `cat` does it.
    first, second = compress(content[:20]), compress(content[20:])
    rows = read(path, first + second)
    assert (names(rows), texts(rows)) == (["a.wav", "b.wav"], ["x", "y"])
    assert why_not_by_name(str(path)) == MANIFEST
    (tmp_path / f"rows.{suffix}").write_bytes(content)
    (plain,) = open_dataset(tmp_path / f"rows.{suffix}")
    (reader,) = open_dataset(path)
    assert reader.survey()[1]["sha256"] == plain.survey()[1]["sha256"]
    cut, end = (first + second)[:-8], len(first) - 6
    overwritten = first[:end] + b"\0" * 12 + second[6:]
    # Where a later stream does not begin as one, it is no end either.
    for damaged in (cut, overwritten, first + b"\1" + second[1:], first + second[:1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged: "):
            reader.survey()


def test_names_that_are_not_utf8_are_bytes_of_the_file_system(tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.csv", b"audio,text\ncaf\xe9.wav,x\n")
    assert rows[0].audio == str(tmp_path / "caf\udce9.wav")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "", "holds no rows"),
        ("rows.csv", "\n \n", "holds no rows"),
        ("rows.tsv", "audio\ttext\n\n", "holds no rows"),
        ("rows.jsonl", "\n", "holds no rows"),
        ("rows.csv", "a.wav,x\nb.wav,y\n", "first line must name the columns, one of them audio_f"),
        ("rows.csv", "audio|text\na|b\n", r"got 'audio\|text'"),
        ("rows.csv", "path,text\na,b\n", "file .--columns audio=NAME: another.; got 'path, text'"),
        ("rows.json", '\n[{"audio": "a.wav"},\n{"audio": "b.wav"}]\n', "a JSON array; needed is"),
        ("rows.tsv", '"audio"\t"text"\na\tb\n', "first line must name the columns"),
        ("rows.csv", "audio,text,text\na,b,c\n", "the column 'text' is there twice"),
        (
            "rows.csv",
            'audio,"text\na,b\n',
            "the first line must name the columns: a quotation mark",
        ),
        ("rows.csv", "audio,text\ra,b\rc,d\r", "they end with a carriage return alone"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    (reader,) = open_dataset(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        reader.survey()
    assert str(caught.value).startswith(str(tmp_path / name))


def test_columns_without_a_name(tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.csv", ",audio,text,,\n7,a.wav,x,,\n8,b.wav,y,,z\n")
    assert [dict(row.columns) for row in rows[:1]] == [{"": "7", "text": "x"}]
    assert problem_of(rows[1]) == "line 3: 'z' and another cell have no column name"


# Columns.

DIFFERENT = [
    ({"audio": "a.wav", "file": "b.wav"}, "audio and file are two recordings"),
    ({"file": "b.wav", "audio_filepath": "a.wav"}, "audio_filepath and file are two recordings"),
    ({"audio": 3, "file": "b.wav"}, "audio and file are two recordings"),
]


@pytest.mark.parametrize(("entries", "problem"), DIFFERENT)
def test_two_recordings_in_a_row_are_an_error(
    tmp_path: Path, entries: dict[str, Any], problem: str
) -> None:
    (row,) = read(tmp_path / "rows.jsonl", json.dumps(entries))
    assert (problem_of(row) or "").startswith(f"line 1: {problem}")
    if all(isinstance(value, str) for value in entries.values()):
        comma = "\t"
        content = comma.join(entries) + "\n" + comma.join(entries.values())
        (row,) = read(tmp_path / "rows.tsv", content)
        assert (problem_of(row) or "").startswith(f"line 2: {problem}")


def test_a_recording_that_is_named_twice_or_in_another_column_is_one(tmp_path: Path) -> None:
    entries = [
        {"audio": "a.wav", "file": "a.wav"},
        {"audio": None, "file": "a.wav"},
        {"audio_filepath": "", "file": "a.wav", "audio": "a.wav"},
    ]
    rows = read(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, entries)))
    assert names(rows) == ["a.wav"] * 3
    # As the datasets library stores LibriSpeech: the recording, and where it lay.
    content = {"bytes": b"fLaC", "path": "a.flac"}
    for file, good in (("/data/train/a.flac", True), ("/data/train/b.flac", False)):
        table = pyarrow.Table.from_pylist([{"file": file, "audio": content}])
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        (reader,) = open_dataset(tmp_path / "rows.parquet")
        (row,) = reader.rows(0, everything)
        assert row.audio == (b"fLaC" if good else None)
        assert (row.problem is None) == good and row.place == "row 1"
    # And the content alone.
    pyarrow.parquet.write_table(
        pyarrow.table({"audio": [b"fLaC", b"RIFF"]}), tmp_path / "rows.parquet"
    )
    (reader,) = open_dataset(tmp_path / "rows.parquet")
    assert [(row.audio, row.name) for row in reader.rows(5, everything)] == [
        (b"fLaC", "rows.parquet:5"),
        (b"RIFF", "rows.parquet:6"),
    ]


def test_transcripts() -> None:
    assert transcript({"sentence": "a", "audio": "b"}) == "a"
    assert transcript({"text": "", "sentence": "a", "transcript": None}) == "a"
    assert transcript({"text": "a", "transcription": "a"}) == "a"
    assert transcript({"text": "a b", "txt": "a  b\n"}) == "a b"  # a file ends with a line feed
    assert transcript({"text": ""}) == ""
    for columns, message in (
        (
            {"text": "a", "txt": "b"},
            "text and txt are two transcripts that differ; keep one, or .* --columns text=txt",
        ),
        ({"sentence": 5}, "sentence must be a text, got 5"),
        ({"txt": "caf\udce9"}, r"the transcript is not UTF-8: 'caf\\udce9'"),
        ({"text": None}, "no column text, sentence, transcription, transcript, txt .--columns te"),
    ):
        with pytest.raises(ValueError, match=message):
            transcript(columns)


def test_offsets_and_durations(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [
        {"offset": "1.5", "duration": " 2 "},
        {"offset": 0, "duration": 2},
        {"offset": None, "duration": 2},
        {"offset": "", "duration": ""},
        {"offset": 1},
    ]
    lines = [json.dumps({"audio": "a", **entry}) for entry in entries]
    rows = read(tmp_path / "rows.jsonl", "\n".join(lines))
    assert [(row.offset, row.duration) for row in rows] == [
        (1.5, 2.0),
        (0.0, 2.0),
        (0.0, None),
        (0.0, None),
        (1.0, None),
    ]
    assert dict(rows[2].columns) == {"duration": 2} and dict(rows[3].columns) == {}


@pytest.mark.parametrize("value", ["-1", "nan", "inf", '"1,5"', "true", "[]", '"NaN"', "1e999"])
@pytest.mark.parametrize("name", ["offset", "duration"])
def test_seconds_that_are_none(tmp_path: Path, name: str, value: str) -> None:
    value = {"nan": "NaN", "inf": "Infinity"}.get(value, value)
    (row,) = read(tmp_path / "rows.jsonl", f'{{"audio": "a", "{name}": {value}}}')
    assert (problem_of(row) or "").startswith(f"line 1: {name} must be seconds")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"audio": "a", "audio": "b"}', "line 2: not JSON: 'audio' is there twice"),
        ("{\udce9}", "line 2: not UTF-8: "),
        ('"a.wav"', "line 2: not a JSON object but a str"),
        ("null", "line 2: not a JSON object but a NoneType"),
        ('{"audio": "a"} {"audio": "b"}', "line 2: not JSON: Extra data at character 16"),
        ('{"audio": "a\0"}', "line 2: not JSON: "),
    ],
)
def test_a_line_of_json_that_is_no_row(tmp_path: Path, line: str, problem: str) -> None:
    lines = ['{"audio": "a"}', line, '{"audio": "c"}']
    content = "\n".join(lines).encode("utf-8", "surrogateescape")
    rows = read(tmp_path / "rows.jsonl", content)
    assert [row.problem is None for row in rows] == [True, False, True]
    assert (problem_of(rows[1]) or "").startswith(problem)
