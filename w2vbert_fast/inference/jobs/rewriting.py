"""Transcripts read back from the tables of a job, for files that it is to have besides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from w2vbert_fast.inference.ctc.known_text import Stretch
from w2vbert_fast.inference.ctc.timestamps import Character, Word
from w2vbert_fast.inference.jobs.formats import EXTRA, PARTS, own_columns
from w2vbert_fast.inference.jobs.journal import Entry, Ranges
from w2vbert_fast.inference.jobs.results import table_rows
from w2vbert_fast.inference.tasks.transcribe import ChannelText, Transcription
from w2vbert_fast.recordings.audio import Salvaged


def read_shard(folder: Path, entry: Entry, later: Iterable[Entry]) -> Iterator[Transcription]:
    """The transcripts of a shard that count, as they were before they were written.

    Args:
        folder: the job's.
        entry: the shard's.
        later: the entries behind it.
    """
    again = Ranges(some for one in later for some in one.replaces)
    for name in entry.files:
        if name.startswith(PARTS):
            for row in table_rows(folder / name, tensors=False):
                if row["index"] not in again:
                    yield _transcription(row, has_extra=name.endswith(".parquet"))


def _transcription(row: Mapping[str, Any], has_extra: bool) -> Transcription:
    columns = {name: value for name, value in row.items() if name not in own_columns()}
    if has_extra and row[EXTRA]:
        columns.update(json.loads(row[EXTRA]))
    words, channels, damage = row.get("words"), row.get("channels"), row.get("salvaged")
    unwritten, unsaid = row.get("unwritten"), row.get("unsaid")
    return Transcription(
        index=row["index"],
        id=row["id"],
        audio=row["audio_filepath"],
        offset=row["offset"],
        columns=columns,
        seconds=row["seconds"],
        louder_channel=row["louder_channel"],
        salvaged=None if damage is None else Salvaged(damage, row["expected_seconds"]),
        text=row["text"],
        words=None if words is None else tuple(map(_word, words)),
        channels=None if channels is None else tuple(ChannelText(**each) for each in channels),
        unwritten=None if unwritten is None else tuple(Stretch(**each) for each in unwritten),
        unsaid=None if unsaid is None else tuple(unsaid),
    )


def _word(entry: Mapping[str, Any]) -> Word:
    characters = [
        Character(each["character"], each["start"], each["end"], each["confidence"])
        for each in entry.get("characters") or ()
    ]
    times = entry["start"], entry["end"], entry["confidence"]
    return Word(entry["word"], *times, characters, entry.get("channel"))
