"""WebDataset shards: tar files in which the files of one sample follow each other.

`speech/0001.flac`, `speech/0001.json` are one sample with the key `speech/0001`. Members are
read once, in the order in which they lie, and are never unpacked to the disk.
"""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w2vbert_fast.recordings.rows import Row, Rows, Wanted

AUDIO_SUFFIXES = frozenset(
    (
        *("aac", "aif", "aifc", "aiff", "amr", "au", "caf", "flac", "m4a", "m4b", "mka", "mkv"),
        *("mov", "mp2", "mp3", "mp4", "mpeg", "mpga", "oga", "ogg", "opus", "snd", "ts", "w64"),
        *("wav", "weba", "webm", "wma"),
    )
)
"""Endings of names, in small letters, that are taken for recordings in folders and tar files."""

_COLUMN_SUFFIXES = ("json", "txt", "text", "cls")


class TarShard:
    """A tar file, compressed or not."""

    def __init__(self, path: str) -> None:
        self.path = path

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        size = os.stat(self.path).st_size
        with open(self.path, "rb"):
            pass
        return None, {"tar": os.path.abspath(self.path), "bytes": size}

    def rows(self, start: int, wanted: Wanted) -> Rows:
        """The samples with a recording. Where the tar file is damaged, a row says so in place of
        the sample there, and the rest of the file is lost."""
        index = start
        sample = _Sample("")
        try:
            # As a stream: a member that nobody reads takes no memory.
            with tarfile.open(self.path, "r|*", tarinfo=_StrictHeader) as shard:
                for member in shard:
                    # Kept for random access, which nobody needs; a shard may have millions.
                    shard.members = []  # type: ignore[attr-defined]
                    if not member.isfile():
                        continue
                    key, suffix = _split(member.name)
                    if key != sample.key:
                        if sample.has_audio:
                            if wanted(index):
                                yield self._row(index, sample)
                            index += 1
                        sample = _Sample(key)
                    first = suffix in AUDIO_SUFFIXES and not sample.has_audio
                    sample.has_audio = sample.has_audio or first
                    file = shard.extractfile(member) if wanted(index) else None
                    if file is not None and first:
                        sample.audio = (member.name, file.read())
                    elif file is not None and suffix in _COLUMN_SUFFIXES:
                        sample.columns.update(_columns(suffix, file.read()))
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if wanted(index):
                name = os.path.join(self.path, sample.key)
                yield Row(index, None, name, name, problem=f"damaged tar file: {error}")
            return index + 1
        if sample.has_audio:
            if wanted(index):
                yield self._row(index, sample)
            index += 1
        return index

    def _row(self, index: int, sample: _Sample) -> Row:
        assert sample.audio is not None
        member, content = sample.audio
        identity = sample.columns.pop("id", None)
        name = os.path.join(self.path, member)
        given = sample.key if identity is None else str(identity)
        return Row(index, content, name, given, columns=sample.columns)


@dataclass
class _Sample:
    key: str
    has_audio: bool = False
    audio: tuple[str, bytes] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


class _StrictHeader(tarfile.TarInfo):
    """A damaged header is an error; tarfile would take it for the end."""

    @classmethod
    def fromtarfile(cls, shard: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(shard)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("EmptyHeaderError", "EOFHeaderError"):
                raise
            raise tarfile.ReadError(str(error)) from error


def _split(name: str) -> tuple[str, str]:
    """The key, up to the first full stop of the last component, and the ending without its stop."""
    folder, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return (f"{folder}/{stem}" if folder else stem), Path(base).suffix[1:].lower()


def _columns(suffix: str, content: bytes) -> dict[str, Any]:
    """Columns of a sample's other file: the entries of a JSON object, or text by its ending."""
    text = content.decode("utf-8", "replace")
    if suffix == "json":
        try:
            entries = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            entries = None
        if isinstance(entries, dict):
            return entries
    return {suffix: text}
