"""Damaged files in jobs: an error row, or a row that says what was taken of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.offline import encoded, run, table
from tests.recordings.test_audio_files import Texts
from w2vbert_fast.inference import load_audio


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_row_says_what_was_taken(tmp_path: Path, kind: str) -> None:
    whole = encoded("FLAC", 3.0)
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.flac").write_bytes(whole)
    (tmp_path / "none.flac").write_bytes(whole[:60])
    names = [str(tmp_path / name) for name in ("cut.flac", "none.flac", "whole.flac")]

    run(names, tmp_path / "strict", Texts(), [kind])
    cut, none, good = table(tmp_path / "strict")
    assert cut["error"] and "truncated" in cut["error"] and "salvaged" not in cut
    run(names, tmp_path / "salvaged", Texts(salvage=True), [kind])
    cut, none, good = table(tmp_path / "salvaged")
    assert "truncated" in cut["salvaged"] and cut["expected_seconds"] == 3.0
    assert 0.5 < cut["seconds"] < 2.5 and cut["text"]
    assert none["error"] and none.get("salvaged") is None
    assert good.get("salvaged") is None and good["seconds"] == 3.0


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_how_much_there_should_be_is_told_by_headers(tmp_path: Path, kind: str) -> None:
    whole = encoded(kind, 3.0)
    path = tmp_path / "cut"
    path.write_bytes(whole[: len(whole) // 2])
    cut = load_audio(path, salvage=True)
    assert cut.salvaged is not None and 1.4 < cut.seconds < 1.6
    assert cut.salvaged.expected_seconds == 3.0
    part = load_audio(path, offset=1.0, salvage=True)
    assert part.salvaged is not None and part.salvaged.fields()["expected_seconds"] == 2.0
