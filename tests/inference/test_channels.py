"""Calls: each channel transcribed by itself, and all merged by time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from w2vbert_fast.cli import app
from w2vbert_fast.inference import Transcriber, load_audio, transcribe
from w2vbert_fast.inference.ctc.subtitles import Layout, cues, srt, txt, vtt
from w2vbert_fast.inference.ctc.timestamps import Word
from w2vbert_fast.inference.ctc.turns import in_turns
from w2vbert_fast.inference.jobs.results import read_results
from w2vbert_fast.inference.tasks.embed import Embed

SAMPLES = Path(__file__).parents[2] / "w2vbert_fast" / "demo" / "samples"
RATE = 16_000


def one(path: Path, **options: Any) -> Any:
    (row,) = transcribe(path, **options)
    assert row.error is None, row.error
    return row


def run(*arguments: str | Path) -> str:
    """A command's standard output; it must end well."""
    result = CliRunner().invoke(app.build_app(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def spoken() -> dict[str, str]:
    """What the demo makes of two samples."""
    return {name: one(SAMPLES / f"{name}.flac").text for name in ("vm-starmain", "vm-torerecord")}


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A call of two who speak at once: on the left "vm-starmain", on the right "vm-torerecord"."""
    left = load_audio(SAMPLES / "vm-starmain.flac").samples.numpy()
    right = load_audio(SAMPLES / "vm-torerecord.flac").samples.numpy()
    left = np.pad(left, (0, len(right) - len(left)))
    path = tmp_path_factory.mktemp("calls") / "call.wav"
    soundfile.write(path, np.stack([left, right], 1), RATE, subtype="FLOAT")
    return path


def test_both_channels_are_transcribed_word_for_word(call: Path, spoken: dict[str, str]) -> None:
    row = one(call, channels="split", speakers=["agent", "customer"], timestamps="word")
    left, right = spoken["vm-starmain"], spoken["vm-torerecord"]
    assert [tuple(channel) for channel in row.channels] == [
        ("agent", left),
        ("customer", right),
    ]
    assert row.text == f"agent: {left}\ncustomer: {right}"
    by_channel: dict[Any, list[str]] = {}
    for word in row.words:
        by_channel.setdefault(word.channel, []).append(word.text)
    assert by_channel == {"agent": left.split(), "customer": right.split()}
    starts = [word.start for word in row.words]
    assert starts == sorted(starts)


def test_channels_have_numbers_where_nobody_names_them(call: Path, spoken: dict[str, str]) -> None:
    row = one(call, channels="split")
    assert [channel.channel for channel in row.channels] == [0, 1]
    assert row.words is None
    assert row.text.splitlines() == [
        f"channel 0: {spoken['vm-starmain']}",
        f"channel 1: {spoken['vm-torerecord']}",
    ]


def test_a_channel_alone(call: Path, spoken: dict[str, str]) -> None:
    row = one(call, channels=1, timestamps="word")
    assert row.text == spoken["vm-torerecord"]
    assert [tuple(channel) for channel in row.channels] == [(1, row.text)]
    assert {word.channel for word in row.words} == {1}


def test_a_long_call_is_cut_channel_by_channel(call: Path) -> None:
    whole = one(call, channels="split")
    cut = one(call, channels="split", max_seconds=3)
    assert [c.channel for c in cut.channels] == [0, 1]
    for ours, theirs in zip(cut.channels, whole.channels, strict=True):
        same = set(ours.text.split()) & set(theirs.text.split())
        assert len(same) >= 0.6 * len(set(theirs.text.split()))


def test_what_does_not_fit_is_an_error_of_the_row(call: Path, tmp_path: Path) -> None:
    mono = tmp_path / "mono.wav"
    soundfile.write(mono, load_audio(SAMPLES / "vm-starmain.flac").samples.numpy(), RATE)
    rows = list(transcribe([mono, call], channels="split", speakers=["agent", "customer"]))
    assert rows[0].error == "it has 1 channel, and speakers names 2: agent, customer"
    assert rows[1].error is None
    (row,) = transcribe(mono, channels=1)
    assert row.error is not None and row.error.startswith("has no channel 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speakers": ["a", "b"]}, "speakers are names of channels; set channels to 'split'"),
        ({"channels": "split", "speakers": ["a", "a"]}, "speakers must be different names"),
        ({"channels": "left"}, "channels must be mix or split, or a number from 0, got 'left'"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transcriber("demo", **options)


def test_only_transcribing_takes_each_channel_by_itself() -> None:
    with pytest.raises(ValueError, match="channels 'split' is not for embed; name one by its"):
        Embed("demo", channels="split")
    assert Embed("demo", channels=1).options()["channels"] == 1
    assert "channels" not in Embed("demo").options()


def test_a_job(call: Path, spoken: dict[str, str], tmp_path: Path) -> None:
    options = ["--channels", "split", "--speakers", "agent,customer"]
    left, right = spoken["vm-starmain"], spoken["vm-torerecord"]
    tables = []
    for kind in ("jsonl", "parquet"):
        out = tmp_path / kind
        more = ["--format", kind, "--format", "srt", "--format", "vtt", "--format", "txt"]
        run("transcribe", call, "--out", out, *options, *more)
        (row,) = read_results(out)
        tables.append(row)
        assert [c["text"] for c in row["channels"]] == [left, right]
        assert {word["channel"] for word in row["words"]} == {"agent", "customer"}
        text = (out / row["txt_file"]).read_text()
        assert text.startswith("agent: ") and "\ncustomer: " in text
        assert "agent: " in (out / row["srt_file"]).read_text()
        assert "\n<v customer>" in (out / row["vtt_file"]).read_text()
    assert tables[0]["text"] == tables[1]["text"]


def test_what_is_printed(call: Path) -> None:
    row = json.loads(run("transcribe", call, "--channels", "split", "--json"))
    assert [channel["channel"] for channel in row["channels"]] == [0, 1]


# --- merging --------------------------------------------------------------------------------------


def word(text: str, start: float, end: float) -> Word:
    return Word(text, start, end, 1.0, [])


def test_turns_begin_where_somebody_else_does_after_a_pause() -> None:
    words, text = in_turns(
        {
            "a": [word("how", 0, 0.4), word("are", 0.5, 0.9), word("fine", 5, 5.4)],
            # In the middle of what the other says: no pause, so that it comes behind it.
            "b": [word("mhm", 0.45, 0.6), word("good", 2, 2.5)],
        }
    )
    assert text == "a: how are\nb: mhm good\na: fine"
    assert [w.text for w in words] == ["how", "mhm", "are", "good", "fine"]
    assert [w.channel for w in words] == ["a", "b", "a", "b", "a"]


def test_cues_of_channels_overlap_and_say_who_speaks() -> None:
    words, _ = in_turns({0: [word("hello", 0, 2)], 1: [word("a<b", 1, 3)]})
    found = cues(words)
    assert [(cue.start, cue.end, cue.channel) for cue in found] == [(0, 2, 0), (1, 3, 1)]
    assert [cue.lines for cue in found] == [["channel 0: hello"], ["channel 1: a<b"]]
    assert "00:00:00,000 --> 00:00:02,000\nchannel 0: hello" in srt(words)
    assert "00:00:01.000 --> 00:00:03.000\n<v channel 1>a&lt;b" in vtt(words)
    assert txt(words) == "channel 0: hello\nchannel 1: a<b\n"
    narrow = cues(words, Layout(line_length=12, max_lines=1))
    assert all(len(line) <= 12 for cue in narrow for line in cue.lines)
