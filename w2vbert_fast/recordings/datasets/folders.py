"""Folders in which a manifest of a known name lies beside recordings: AudioFolder, Common Voice."""

from __future__ import annotations

import os
from pathlib import Path

from w2vbert_fast.recordings.manifest import ColumnNames, Csv, JsonLines, Tsv
from w2vbert_fast.recordings.rows import Part

_METADATA = {"metadata.csv": Csv, "metadata.jsonl": JsonLines}


class AudioFolder:
    """The datasets library's: recordings, and `metadata.csv` or `metadata.jsonl` with a column
    `file_name`. What the manifest names is read, and nothing else of the folder."""

    @staticmethod
    def open(path: str, names: ColumnNames) -> list[Part]:
        """Such a folder, or the file in it."""
        is_folder = os.path.isdir(path)
        files = [os.path.join(path, name) for name in _METADATA] if is_folder else [path]
        names = names.of_audio("file_name")
        for file in files:
            kind = _METADATA.get(os.path.basename(file))
            if kind is not None and os.path.isfile(file):
                part = kind(file, names, kind=f"AudioFolder, {os.path.basename(file)}")
                if names.has_audio(part.columns()):
                    return [part]
        return []


class CommonVoice:
    """A language of Common Voice: tables such as `validated.tsv` and `test.tsv`, whose column
    `path` names files in `clips/`; or beside the table, where the first is there."""

    @staticmethod
    def open(path: str, names: ColumnNames) -> list[Part]:
        """One of the tables; of the folder `validated.tsv`."""
        file = os.path.join(path, "validated.tsv") if os.path.isdir(path) else path
        clips = os.path.join(os.path.dirname(file), "clips")
        if not (file.endswith(Tsv.endings) and os.path.isfile(file) and os.path.isdir(clips)):
            return []
        names = names.of_audio("path")
        part = Tsv(file, names, clips, f"Common Voice, {os.path.basename(file)}")
        if not names.has_audio(part.columns()):
            return []
        first = next(Tsv(file, names).rows(0, lambda index: index == 0), None)
        if first is not None and isinstance(first.audio, str) and os.path.isfile(first.audio):
            part.folder = Path(file).parent  # `clips/` is a part of the names
        return [part]
