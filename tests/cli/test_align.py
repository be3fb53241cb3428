"""`w2vbert-fast align`: a recording and a text file, or data sets with transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from typer.testing import CliRunner, Result

import w2vbert_fast
from tests.helpers.offline import table, write_manifest
from w2vbert_fast.cli import app as cli
from w2vbert_fast.inference import align

DEMO = Path(w2vbert_fast.__file__).parent / "demo"
SAID = "press three to rerecord your message"
WRITTEN = "Press 3 to re-record\nyour message!"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.build_app(), [str(a) for a in arguments])


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.flac"
    path.write_bytes((DEMO / "samples" / "vm-torerecord.flac").read_bytes())
    return path


def test_a_recording_and_its_transcript(talk: Path) -> None:
    text = talk.with_suffix(".txt")
    text.write_text(f"\ufeff{WRITTEN}\n", encoding="utf-8")
    result = invoke("align", talk, text)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["text"] == WRITTEN
    assert (found["unwritten"], found["unsaid"]) == ([], [])
    words = [word["word"] for word in found["words"]]
    assert words == ["Press", "3", "to", "re-record", "your", "message!"]
    # The digit where the word is.
    plain = {word.text: word for word in align(talk, SAID).words or ()}
    three = found["words"][1]
    assert three["start"] == pytest.approx(plain["three"].start, abs=0.06)
    assert three["end"] == pytest.approx(plain["three"].end, abs=0.06)


def test_what_differs_is_said(talk: Path, tmp_path: Path) -> None:
    text = tmp_path / "wrong.txt"
    text.write_text("to rerecord your quickly message")
    result = invoke("align", talk, text, "--out", tmp_path / "talk.ctm")
    assert result.exit_code == 0, result.stderr
    assert "talk.flac: not in the transcript: " in result.stderr
    assert "probably not said: word 3 'quickly'" in result.stderr
    row = align(talk, text.read_text())
    assert row.unsaid == (3,)
    (stretch,) = row.unwritten or ()
    first = (row.words or ())[0]
    assert stretch.end <= first.start + 0.3 and "press" in stretch.text
    lines = (tmp_path / "talk.ctm").read_text().splitlines()
    assert [line.split()[4] for line in lines] == text.read_text().split()
    assert lines[0].startswith(f"talk 1 {first.start:.3f} ")


def test_files_beside_it(talk: Path) -> None:
    text = talk.with_suffix(".txt")
    text.write_text(WRITTEN)
    formats = ["json", "srt", "vtt", "TextGrid", "ctm"]
    options = [part for name in formats for part in ("--format", name)]
    result = invoke("align", talk, text, *options, "--highlight-words")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(talk.with_suffix(f".{name}")) for name in formats]
    assert json.loads(talk.with_suffix(".json").read_text())["unsaid"] == []
    assert "Press 3 to re-record" in talk.with_suffix(".srt").read_text()
    assert "<u>3</u>" in talk.with_suffix(".vtt").read_text()
    assert 'text = "3"' in talk.with_suffix(".TextGrid").read_text()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_job(talk: Path, tmp_path: Path, kind: str) -> None:
    soundfile.write(tmp_path / "short.wav", [0.1, -0.1] * 500, 16_000)
    rows = [
        {"audio": "talk.flac", "text": WRITTEN, "speaker": "a"},
        {"audio": "talk.flac", "speaker": "b"},
        {"audio": "talk.flac", "text": "...", "speaker": "c"},
        {"audio": "short.wav", "text": WRITTEN, "speaker": "d"},
        {"audio": "talk.flac", "text": "rerecord your message", "speaker": "e"},
    ]
    manifest, out = write_manifest(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    result = invoke("align", manifest, "--out", out, "--format", kind, "--format", "TextGrid")
    assert result.exit_code == 1, result.stderr
    good, *bad, part = table(out)
    assert [word["word"] for word in good["words"]] == WRITTEN.split()
    assert (good["unsaid"], good["unwritten"], good["speaker"]) == ([], [], "a")
    assert part["unwritten"][0]["text"].startswith("press")
    assert [row["error"] for row in bad] == [
        "no column text, sentence, transcription, transcript, txt (--columns text=NAME: another)",
        "text has nothing that can be said: '...'",
        "text needs at least 34 frames, log_probs has 2",
    ]
    assert 'text = "re-record"' in (out / good["TextGrid_file"]).read_text()
    # Another format is written from the table, which keeps what it knows.
    formats = ("--format", kind, "--format", "TextGrid", "--format", "ctm")
    assert invoke("align", manifest, "--out", out, *formats).exit_code == 1
    more, *_, last = table(out)
    lines = (out / more.pop("ctm_file")).read_text().splitlines()
    assert [line.split()[4] for line in lines] == WRITTEN.split()
    assert more == good and last["unwritten"] == part["unwritten"]


def test_a_transcript_that_was_corrected_is_aligned_again(talk: Path, tmp_path: Path) -> None:
    manifest, out = tmp_path / "rows.jsonl", tmp_path / "out"

    def aligned(*texts: str) -> tuple[str, list[tuple[int, str | None]]]:
        write_manifest(manifest, [{"audio": "talk.flac", "text": text} for text in texts])
        result = invoke("align", manifest, "--out", out)
        return result.stderr, [(row["index"], row.get("text")) for row in table(out)]

    aligned("press three", SAID, "")
    # The index stays; what came of a row without a text is replaced, too.
    said, rows = aligned("press three to", SAID, WRITTEN)
    assert rows == [(0, "press three to"), (1, SAID), (2, WRITTEN)]
    assert "2 rows changed and done again" in said
    assert "done again" not in aligned("press three to", SAID, WRITTEN)[0]
    # A recording that is away for once takes no row with it.
    talk.rename(tmp_path / "away")
    said, found = aligned("press three to", SAID, WRITTEN)
    assert (found, "3 rows no longer there" in said) == (rows, True)


def test_bad_usage(talk: Path, tmp_path: Path) -> None:
    text = tmp_path / "talk.txt"
    text.write_bytes(b"\xff\xfe")
    for arguments, message in (
        ((talk, text), "talk.txt is not UTF-8"),
        ((talk, tmp_path / "missing.txt"), "missing.txt"),
        ((talk, talk, text), "a transcript goes with one recording"),
        ((talk, text, "--timestamps", "none"), "timestamps must be word or character"),
        ((talk, text, "--channels", "split"), "channels 'split' is not for align"),
        ((talk,), "there is no transcript: align AUDIO TRANSCRIPT"),
    ):
        result = invoke("align", *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.stderr
    # What it reads it never writes to, whatever is asked for.
    text = talk.with_suffix(".txt")
    text.write_text(WRITTEN)
    result = invoke("align", talk, text, "--format", "txt", "--overwrite")
    assert result.exit_code == 2 and "talk.txt is read itself" in result.stderr
    assert text.read_text() == WRITTEN
