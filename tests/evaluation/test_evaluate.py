"""Error rates of results against transcripts: counted by hand, their intervals, and comparisons."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.report.test_page import rows_of, scripts
from w2vbert_fast import cli
from w2vbert_fast.evaluation import Evaluation, evaluate, write_report
from w2vbert_fast.evaluation.bootstrap import interval, resampled_rates
from w2vbert_fast.evaluation.normalisation import Normalisation, chosen
from w2vbert_fast.inference.jobs.journal import Entry

SAID = {
    "a": ("the cat sat", "x", 1.0),
    "b": ("a dog", "y", 3.0),
    "c": ("", "x", 3.0),
    "d": ("the cat ran away", "y", 50.0),
}


def write_data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    rows = [
        {"audio": f"{name}.wav", "text": text, "speaker": speaker}
        for name, (text, speaker, _) in SAID.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_results(folder: Path, heard: dict[str, str | None], **more: Any) -> Path:
    """A job's folder, whose rows come in the order of `heard`; None is an error."""
    folder.mkdir()
    lines = []
    for index, (name, text) in enumerate(heard.items()):
        audio = str(folder.parent / f"{name}.wav")
        row = {"index": index, "id": audio, "audio_filepath": audio, "offset": 0.0}
        row |= {"seconds": SAID[name][2]}
        row |= {"text": text} if text is not None else {"error": "damaged"}
        lines.append(json.dumps({**row, **more}) + "\n")
    (folder / "part-000000.jsonl").write_text("".join(lines))
    journal = Entry(0, {"part-000000.jsonl": 1}, [(0, len(lines))], len(lines), {}, 1.0)
    (folder / "journal.jsonl").write_text(json.dumps(asdict(journal)) + "\n")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def test_the_page_has_every_row_with_its_errors(data: Path) -> None:
    first = write_results(
        data.parent / "one", {"a": "the cot sat", "b": None, "c": "oh", "d": SAID["d"][0]}
    )
    words = [{"word": "the", "start": 0.5, "end": 0.75, "confidence": 0.25}]
    second = write_results(
        data.parent / "two", {name: text for name, (text, _, _) in SAID.items()}, words=words
    )
    (data.parent / "a.wav").touch()
    path = write_report(evaluate(data, first, second, by="speaker"), data.parent / "out")
    (page,) = scripts(path, "page")
    titles = [column["title"] for column in page["columns"]]
    assert titles[2:7] == [
        "Errors",
        f"WER of {first}",
        f"WER of {second}",
        "Said",
        f"Heard of {first}",
    ]
    assert (titles[page["sort"]], page["descending"]) == ("Errors", True)
    rows = {Path(row[0][0]).stem: row for row in rows_of(path)}
    assert [rows[name][0][2:5] for name in "acd"] == [[1, 1 / 3, 0.0], [1, 1.0, 0.0], [0, 0.0, 0.0]]
    assert rows["a"][0][8] == f"{first}: “cat” is heard as “cot”"
    assert rows["a"][2] == "../a.wav" and rows["c"][2] is None
    assert rows["b"][1] == 1 and rows["b"][0][-1] == "damaged"
    assert all(len(row[0]) == len(titles) for row in rows.values())
    assert page["findings"][2]["entries"][0] == ["“cat” is heard as “cot”", 1, ""]
    # Two errors in seven words; and the words light up whose times are known.
    facts = {fact["name"]: fact["value"] for fact in page["facts"]}
    assert facts["Difference in WER, 95 % interval"].startswith("-28.57 (")
    assert scripts(path, "words") == [[["the", 500, 250, 25]] * 3 + [[]]]


def test_errors_are_those_counted_by_hand(data: Path) -> None:
    results = write_results(
        data.parent / "job",
        {"d": "the cat ran", "a": "the cot sat", "c": "oh", "b": "a dog"},
    )
    summary = evaluate(data, results, by="speaker").summary()
    (system,) = summary["systems"]
    # One substitution, one insertion where nothing was said, one deletion; of nine words.
    assert (summary["words"], summary["metric"]) == (9, "wer")
    assert system["wer"] == pytest.approx(3 / 9)
    assert [system[kind] for kind in ("substitutions", "deletions", "insertions")] == [1, 1, 1]
    # "a" to "o", "oh", " away"; of 11 + 5 + 16 characters.
    assert system["cer"] == pytest.approx(8 / 32)
    assert 0 <= system["wer_interval"][0] <= system["wer"] <= system["wer_interval"][1]
    assert summary["edits"][0] == [
        {"said": "cat", "heard": "cot", "count": 1},
        {"said": "", "heard": "oh", "count": 1},
        {"said": "away", "heard": "", "count": 1},
    ]
    speakers = {g["value"]: (g["rows"], g["words"], g["wer"]) for g in summary["groups"]["speaker"]}
    assert speakers == {"x": (2, 3, [2 / 3]), "y": (2, 6, [1 / 6])}
    durations = {g["value"]: g["rows"] for g in summary["groups"]["duration"]}
    assert durations == {"0 to 2 s": 1, "2 to 5 s": 2, "from 40 s": 1}
    assert len(summary["worst"]) == 3 and summary["left_out"] == []


def test_two_are_compared_on_the_rows_that_both_have(data: Path) -> None:
    first = write_results(
        data.parent / "first", {"a": "the cot sat", "b": "a dog", "c": "", "d": "the cat ran"}
    )
    second = write_results(
        data.parent / "second", {"a": "the cat sat", "b": "dog", "c": None, "d": "the cat ran"}
    )
    evaluation = evaluate(data, first, second)
    summary = evaluation.summary()
    assert [reason["reason"] for reason in summary["left_out"]] == ["damaged"]
    assert summary["rows"] == 3 and summary["comparison"]["rows"] == {
        "better": 1,
        "worse": 1,
        "equal": 1,
    }
    assert [system["wer"] for system in summary["systems"]] == pytest.approx([2 / 9, 2 / 9])
    text = str(evaluation)
    assert "3 of 4 rows" in text and "better in 1 row, worse in 1, equal in 1" in text
    assert "\n    said  the cat sat\n    heard the cot sat\n    heard the cat sat\n" in text
    assert "damaged" in text and "'cat' is heard as 'cot'" in text and "'a' is lost" in text
    # Against itself nothing differs, in any draw.
    same = evaluate(data, first, first).summary()["comparison"]["wer"]
    assert same == {"difference": 0.0, "interval": (0.0, 0.0), "better": 0.5}
    # Of rows of which one is worse in each, it is worse in every draw, and in no draw the reverse.
    right = write_results(data.parent / "right", {"a": "the cat sat", "b": "a dog"})
    wrong = write_results(data.parent / "wrong", {"a": "the cat", "b": "dog"})
    for pair, better in (((right, wrong), 0.0), ((wrong, right), 1.0)):
        assert evaluate(data, *pair).summary()["comparison"]["wer"]["better"] == better


def test_where_nothing_separates_words_characters_are_counted(tmp_path: Path) -> None:
    row = {"audio": "a.wav", "text": "\u4f60\u597d"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    results = write_results(tmp_path / "job", {"a": "\u4f60\u662f"})
    summary = evaluate(tmp_path / "data.jsonl", results).summary()
    assert summary["metric"] == "cer" and summary["groups"]["duration"][0]["cer"] == [0.5]
    assert summary["edits"] == [[{"said": "\u597d", "heard": "\u662f", "count": 1}]]


def test_intervals_are_those_of_the_binomial_distribution() -> None:
    """Of utterances of one word each, half of them wrong: a deviation of sqrt(0.25 / n)."""
    count = 400
    wrong = np.arange(count) % 2
    rates = resampled_rates([wrong, wrong], np.ones(count, int), 2000)
    assert np.array_equal(rates[0], rates[1])
    assert rates[0].mean() == pytest.approx(0.5, abs=0.005)
    low, high = interval(rates[0])
    half = 1.96 * (0.25 / count) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.008)
    # Draws are of utterances, which bring all of their words.
    lengths = np.where(wrong, 1, 99)
    assert resampled_rates([wrong], lengths, 500).mean() == pytest.approx(0.01, abs=0.001)
    assert interval(resampled_rates([[0, 0]], [0, 0], 5)[0]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("choice", "text", "wanted"),
    [
        ("none", "  Don\u2019t \u00e9  Stop! ", "Don\u2019t \u00e9 Stop!"),
        ("case", "Don't STOP!", "don't stop!"),
        ("punctuation", "\u201cDon\u2019t stop,\u201d e\u0301 'n' 5 %", "Don't stop \u00e9 n 5"),
        ("case,punctuation", "Rock-n-Roll\u3002", "rock n roll"),
        # Vowel signs are letters' parts.
        ("punctuation", "\u0915\u093e\u0964", "\u0915\u093e"),
    ],
)
def test_normalisation(choice: str, text: str, wanted: str) -> None:
    assert chosen(choice, ())(text) == wanted


def test_what_one_side_never_writes_does_not_count() -> None:
    cased = ["It is, isn't it?"]
    assert chosen("auto", [cased, ["it is isn't it"]]) == Normalisation(True, True)
    assert chosen("auto", [cased, ["It is isn't it"]]) == Normalisation(False, True)
    assert chosen("auto", [cased, ["IT IS, ISN'T IT?"]]) == Normalisation(True, False)
    assert chosen("auto", [cased, cased]) == Normalisation()
    # A system that recognises nothing says nothing about what it could write.
    assert chosen("auto", [cased, cased, [""]]) == Normalisation()
    assert str(Normalisation(True)) == "NFC, single spaces, lower case"


def test_what_cannot_be_scored_is_named(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_results(data.parent / "good", {"a": "x"})
    with pytest.raises(ValueError, match=r"no row .* has a column 'room', but text, speaker"):
        evaluate(data, good, by="room")
    with pytest.raises(ValueError, match=r"normalise must be auto, none, .* got 'upper'"):
        evaluate(data, good, normalise="upper")
    with pytest.raises(ValueError, match="beam: no effect on results"):
        evaluate(data, good, beam=10)
    with pytest.raises(ValueError, match="holds no texts"):
        evaluate(data, write_results(data.parent / "bad", {"a": None}))
    elsewhere = data.parent / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(ValueError, match="holds none of the rows"):
        evaluate(data, write_results(elsewhere / "job", {"a": "x"}))
    (data.parent / "bare.jsonl").write_text('{"audio": "a.wav"}\n')
    with pytest.raises(ValueError, match=r"has a transcript: .*a\.wav: line 1: no column"):
        evaluate(data.parent / "bare.jsonl", good)
    # A folder of recordings, and what has their transcripts, which nobody has named.
    (data.parent / "a.wav").touch()
    with caplog.at_level("WARNING"), pytest.raises(ValueError, match="no row of the data"):
        evaluate(data.parent, good)
    assert "are manifests, which are read when they are named (bare.jsonl" in caplog.text


@pytest.mark.parametrize(
    "row", [{"audio": "moved/a.wav", "id": "7"}, {"audio": "a.wav"}, {"audio": "a.wav", "id": "8"}]
)
def test_rows_are_known_by_their_recordings_or_else_by_their_ids(
    row: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({**row, "text": "x y"}) + "\n")
    results = write_results(tmp_path / "job", {"a": "x z"}, id="7")
    assert evaluate(tmp_path / "data.jsonl", results).summary()["systems"][0]["wer"] == 0.5


def test_a_recording_that_results_have_twice_is_none_of_them(data: Path) -> None:
    results = write_results(data.parent / "job", {"a": "the cat sat", "b": "a dog"})
    part = results / "part-000000.jsonl"
    part.write_text(part.read_text() + part.read_text().splitlines()[0] + "\n")
    left_out = evaluate(data, results).summary()["left_out"]
    assert [Path(row["row"]).stem for row in left_out] == ["a", "c", "d"]
    assert "has no row of it, or several" in left_out[0]["reason"]


def test_the_command_prints_saves_and_tells_by_its_status(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    results = write_results(data.parent / "job", {"a": "the cot sat", "b": "a dog", "d": None})
    out = data.parent / "out"
    line = ["w2vbert-fast", "evaluate", str(data), "--model", str(results), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed, told = capfd.readouterr()
    summary = json.loads(printed)
    assert summary["systems"][0]["wer"] == 0.2
    assert "2 rows left out" in told
    assert json.loads((out / "evaluation.json").read_text()) == summary
    rows = [json.loads(line) for line in (out / "utterances.jsonl").read_text().splitlines()]
    assert [row["wer_errors"] for row in rows] == [[1], [0]]
    assert isinstance(evaluate(data, results), Evaluation)
