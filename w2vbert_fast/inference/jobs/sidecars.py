"""Transcripts as files beside their recordings: `talk.mp4` to `talk.srt`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import write_text
from w2vbert_fast.inference.jobs.folders import Folder
from w2vbert_fast.inference.jobs.formats import subtitles_of
from w2vbert_fast.inference.jobs.inputs import Files, Inputs
from w2vbert_fast.inference.rows import word_fields
from w2vbert_fast.inference.transcripts import Transcript


def plan(
    inputs: Inputs, formats: Sequence[str], out: str | None = None, *, overwrite: bool = False
) -> dict[str, list[Path]]:
    """The files that each recording gets, before anything is computed.

    Args:
        inputs: files and folders.
        formats: "srt", "vtt", "txt", "json".
        out: the file of the only recording; None: beside each, with the format as its ending.
        overwrite: replace files that are there.

    Returns:
        Paths by the name of the recording, a path a format.

    Raises:
        ValueError: the input is something else than files; several recordings would share a file;
            a file is one of the recordings; or there are several recordings for `out`.
        FileExistsError: a file is there and must not be replaced.
        OSError: the folder of `out` is not there.
    """
    if not all(isinstance(part, Files | Folder) for part in inputs.parts):
        raise ValueError(
            "files beside the recordings can be written for files and folders only; for tar files "
            "and manifests name a folder for results"
        )
    names = [row.name for row in inputs.rows()]
    if out is not None:
        if len(names) != 1:
            raise ValueError(f"{out} would be one file for {len(names)} recordings; name a folder")
        if not Path(out).parent.is_dir():
            raise FileNotFoundError(f"the folder of {out} is not there")
    found: dict[str, list[Path]] = {}
    owners: dict[Path, str] = {}
    recordings = {Path(name) for name in names}
    for name in dict.fromkeys(names):
        stem = os.path.splitext(name)[0]
        found[name] = [Path(f"{stem}.{kind}" if out is None else out) for kind in formats]
        for path in found[name]:
            other = owners.setdefault(path, name)
            if other != name:
                raise ValueError(f"{other} and {name} would both be written to {path}")
            _check(path, recordings, overwrite)
    return found


def _check(path: Path, recordings: set[Path], overwrite: bool) -> None:
    if path in recordings or any(_same(path, recording) for recording in recordings):
        raise ValueError(f"{path} is a recording itself and must not be overwritten")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")


def _same(path: Path, recording: Path) -> bool:
    # Other spellings of a name are compared only where there is a file: most have none.
    return path.exists() and recording.exists() and path.samefile(recording)


def write(row: Transcript, paths: Sequence[Path], *, characters: bool = False) -> None:
    """Write the files of a recording that went well, each under a temporary name first.

    Args:
        row: the transcript.
        paths: from `plan`; their endings say in which format.
        characters: whether JSON has the times of characters too.

    Raises:
        OSError: a file cannot be written.
    """
    assert row.text is not None
    for path in paths:
        kind = path.suffix[1:].lower()
        if kind == "json":
            text = to_json(row, characters, indent=2) + "\n"
        else:
            text = subtitles_of(row.text, row.words, kind)
        write_text(path, text)


def fields(row: Transcript, characters: bool = False) -> dict[str, Any]:
    """A transcript as JSON has it."""
    if row.error is not None:
        return {"file": row.file, "error": row.error}
    assert row.audio_seconds is not None and row.real_time_factor is not None
    content: dict[str, Any] = {
        "file": row.file,
        "text": row.text,
        "seconds": round(row.audio_seconds, 4),
        "real_time_factor": round(row.real_time_factor, 5),
    }
    if row.louder_channel is not None:
        content["louder_channel"] = row.louder_channel
    if row.words is not None:
        content["words"] = [word_fields(word, characters) for word in row.words]
    return content


def to_json(row: Transcript, characters: bool = False, *, indent: int | None = None) -> str:
    """A transcript as JSON that any UTF-8 file can hold; in one line without `indent`."""
    content = fields(row, characters)
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        # A file name that is not UTF-8: escaped, Python and others read the same bytes back.
        text = json.dumps(content, indent=indent)
    return text
