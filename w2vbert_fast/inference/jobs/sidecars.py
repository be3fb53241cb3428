"""Transcripts as files beside their recordings: `talk.mp4` to `talk.srt`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from w2vbert_fast.checkpoints.files import write_text
from w2vbert_fast.inference.ctc.subtitles import Layout
from w2vbert_fast.inference.jobs.formats import BESIDE, beside_format
from w2vbert_fast.inference.transcripts import Transcript
from w2vbert_fast.recordings.inputs import Files, Folder, Inputs, Transcribed
from w2vbert_fast.recordings.remote import is_elsewhere


def plan(
    inputs: Inputs,
    formats: Sequence[str],
    out: str | None = None,
    *,
    beside: bool = False,
    overwrite: bool = False,
) -> dict[str, list[Path]]:
    """The files that each recording gets, before anything is computed.

    Args:
        inputs: files and folders.
        formats: names of `formats.BESIDE`.
        out: the file of the only recording; None: beside it, with the format as its ending.
        beside: the same for each of several.
        overwrite: replace files that are there.

    Returns:
        Paths by the name of the recording, a path a format.

    Raises:
        ValueError: the input is something else than files; several recordings would share a file;
            a file is one of the recordings or transcripts; or there are several recordings for
            `out`, or for none without `beside`.
        FileExistsError: a file is there and must not be replaced.
        OSError: the folder of `out` is not there.
    """
    check_beside(inputs, out is not None)
    names = [row.name for row in inputs.rows()]
    if out is None and len(names) > 1 and not beside:
        raise ValueError(
            f"{len(names)} recordings need --out DIR, for files in folders as the input has them, "
            "or --beside, for files beside the recordings"
        )
    if out is not None:
        if len(names) != 1:
            raise ValueError(f"{out} would be one file for {len(names)} recordings; name a folder")
        if not Path(out).parent.is_dir():
            raise FileNotFoundError(f"the folder of {out} is not there")
    found: dict[str, list[Path]] = {}
    owners: dict[Path, str] = {}
    sources = {Path(name) for name in names}
    sources |= {Path(part.transcript) for part in inputs.parts if isinstance(part, Transcribed)}
    for name in dict.fromkeys(names):
        stem = os.path.splitext(name)[0]
        found[name] = [Path(f"{stem}.{kind}" if out is None else out) for kind in formats]
        for path in found[name]:
            other = owners.setdefault(path, name)
            if other != name:
                raise ValueError(f"{other} and {name} would both be written to {path}")
            _check(path, sources, overwrite)
    return found


def check_beside(inputs: Inputs, elsewhere: bool = False) -> None:
    """Refuse recordings beside which nothing can be written, or whose names somebody else chose.

    Args:
        inputs: the recordings.
        elsewhere: URLs and standard input are files, too.

    Raises:
        ValueError: the input is something else than files and folders.
    """
    for part in inputs.parts:
        named = isinstance(part, Files | Folder)
        if isinstance(part, Files) and not elsewhere:
            named = not any(map(is_elsewhere, part.paths))
        if not named:
            raise ValueError(
                "files beside the recordings can be written for files and folders only; for tar "
                "files, manifests, URLs and standard input name a folder for results"
            )


def _check(path: Path, sources: set[Path], overwrite: bool) -> None:
    if path in sources or any(_same(path, source) for source in sources):
        raise ValueError(f"{path} is read itself and must not be overwritten")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")


def _same(path: Path, source: Path) -> bool:
    # Other spellings of a name are compared only where there is a file: most have none.
    return path.exists() and source.exists() and path.samefile(source)


def write(
    row: Transcript,
    paths: Sequence[Path],
    *,
    characters: bool = False,
    layout: Layout | None = None,
) -> None:
    """Write the files of a recording that went well, each under a temporary name first.

    Args:
        row: the transcript.
        paths: from `plan`; their endings say in which format.
        characters: whether JSON has the times of characters too.
        layout: of subtitles; None: the usual one.

    Raises:
        OSError: a file cannot be written.
    """
    assert row.text is not None
    for path in paths:
        kind = BESIDE[beside_format(path) or ""]
        write_text(path, kind.content(row, characters, layout))
