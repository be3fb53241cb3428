"""Tar files as WebDataset has them: the files of one sample follow each other.

As in WebDataset, a sample is what has one name up to the first full stop: `speech/0001.flac` and
`speech/0001.json`. Every recording in it is a row: of `spk1.take1.flac` and `spk1.take2.flac`, and
of names with dates, each. What is written beside the only one belongs to it; beside several, to
those whose names go on from its own, or the other way round: `spk1.take1.txt` to that take,
`spk1.json` to both. Members are read once, in the order in which they lie, and are never unpacked
to the disk.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from w2vbert_fast.recordings.compressed import is_damage, open_uncompressed
from w2vbert_fast.recordings.manifest import USUAL, ColumnNames
from w2vbert_fast.recordings.rows import Part, Row, Rows, Wanted
from w2vbert_fast.recordings.which_files import (
    NO_AUDIO,
    NO_FILE,
    TAR_SUFFIXES,
    PassedOver,
    ending,
    is_hidden,
    why_not,
    why_not_by_name,
)

_COLUMN_SUFFIXES = ("json", "txt", "text", "cls")
_UNPAIRED = "belong to no recording"
# A sample of more is handed out in parts: names with dates may all begin alike.
_LARGEST_SAMPLE = 256 << 20


class Tar:
    """A tar file, compressed or not.

    Args:
        path: the file.
        names: what the columns mean that lie beside recordings.

    Attributes:
        passed_over: what of it is in no row, once it was read to its end.

    Raises:
        ValueError: a column is named as that of the recordings.
    """

    kind = "tar file of samples (WebDataset)"
    sealed = True

    def __init__(self, path: str, names: ColumnNames = USUAL) -> None:
        if "audio" in names.by_meaning:
            raise ValueError(f"{path} is a tar file, whose recordings are files and in no column")
        self.path = path
        self.names = names
        self.passed_over = PassedOver()

    @classmethod
    def open(cls, path: str, names: ColumnNames) -> list[Part]:
        is_tar = path.lower().endswith(TAR_SUFFIXES) and not os.path.isdir(path)
        return [cls(path, names)] if is_tar else []

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        size = os.stat(self.path).st_size
        rows = self.rows(0, lambda index: index == 0)
        try:
            empty = next(rows, None) is None
        finally:
            rows.close()
        return 0 if empty else None, {"tar": os.path.abspath(self.path), "bytes": size}

    def rows(self, start: int, wanted: Wanted) -> Rows:
        """The recordings. Where the tar file is damaged, a row says so in place of the one there,
        and the rest of the file is lost."""
        index = start
        passed_over = PassedOver()
        sample = _Sample("")
        damage: Exception | None = None
        members = self._members(passed_over, lambda: wanted(index + len(sample.recordings)))
        while True:
            try:
                member = next(members, None)
            except Exception as error:
                if not (isinstance(error, tarfile.TarError) or is_damage(error)):
                    raise
                member, damage = None, error
            if member is None or not sample.takes(member):
                for row in self._finish(sample, index, passed_over):
                    if wanted(row.index):
                        yield row
                index += len(sample.recordings)
                sample = sample.following(member)
            if member is None:
                break
            sample.add(member)
        if damage is not None:
            if wanted(index):
                name = os.path.join(self.path, sample.key)
                yield Row(index, None, name, name, problem=f"damaged tar file: {damage}")
            index += 1
        self.passed_over = passed_over
        return index

    def _members(self, passed_over: PassedOver, wanted: Callable[[], bool]) -> Iterator[_Member]:
        """Recordings, whose content is read if they are wanted, and what is written beside them.

        Each is handed out when the next one was found, or the end: before that nobody knows whether
        it is there as a whole.
        """
        before: _Member | None = None
        # As a stream: a member that nobody reads takes no memory. Past the mark of the end, since
        # tar files may have been joined.
        with (
            open_uncompressed(self.path) as content,
            # Block by block, since a compressed stream that was cut off hands out nothing of the
            # read that meets its end.
            tarfile.open(
                fileobj=content,
                mode="r|",
                bufsize=tarfile.BLOCKSIZE,
                tarinfo=_StrictHeader,
                ignore_zeros=True,
            ) as tar,
        ):
            try:
                for info in tar:
                    # Kept for random access, which nobody needs; a file may have millions.
                    tar.members = []  # type: ignore[attr-defined]
                    if before is not None:
                        yield before
                        before = None
                    if info.isdir() or any(map(is_hidden, info.name.split("/"))):
                        continue
                    if not info.isfile():
                        passed_over.add(NO_FILE, info.name)
                        continue
                    before = self._member(tar, info, passed_over, wanted)
            except _DamagedHeader:
                if before is not None:
                    yield before  # which is whole
                raise
        if before is not None:
            yield before

    def _member(
        self,
        tar: tarfile.TarFile,
        info: tarfile.TarInfo,
        passed_over: PassedOver,
        wanted: Callable[[], bool],
    ) -> _Member | None:
        suffix = ending(info.name)
        if suffix in _COLUMN_SUFFIXES:
            return _Member(info.name, info.size, _read(tar, info), is_audio=False)
        reason = why_not_by_name(info.name)
        content = None
        if reason is None:
            content = _read(tar, info)
            reason = why_not(content)
        elif reason == "" and wanted():
            content = _read(tar, info)
        if reason:
            passed_over.add(NO_AUDIO, os.path.join(self.path, info.name))
            return None
        return _Member(info.name, info.size, content, is_audio=True)

    def _finish(self, sample: _Sample, start: int, passed_over: PassedOver) -> Iterator[Row]:
        """The rows of a sample."""
        columns, unpaired = sample.columns()
        for name in unpaired:
            passed_over.add(_UNPAIRED, os.path.join(self.path, name))
        stems = [recording.stem for recording in sample.recordings]
        for place, recording in enumerate(sample.recordings):
            found, problem = columns[place], None
            try:
                found = self.names.apply(found)
            except ValueError as error:
                problem = str(error)
            # Of `a.wav` and `a.mp3`, the stem would name both.
            key = recording.stem if stems.count(recording.stem) == 1 else recording.name
            identity = found.pop("id", None)
            yield Row(
                start + place,
                recording.content,
                os.path.join(self.path, recording.name),
                key if identity is None else str(identity),
                columns=found,
                problem=problem,
            )


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


@dataclass(frozen=True)
class _Member:
    """A recording, whose content is None if nobody wants it, or what is written beside one."""

    name: str
    size: int
    content: bytes | None
    is_audio: bool

    @property
    def key(self) -> str:
        """The name up to the first full stop of its last component."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def stem(self) -> str:
        """The name up to the last full stop."""
        return os.path.splitext(self.name)[0]


@dataclass
class _Sample:
    """Members that follow each other and have one key."""

    key: str
    recordings: list[_Member] = field(default_factory=list)
    written: list[_Member] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    size: int = 0

    def takes(self, member: _Member) -> bool:
        """Whether a member is of this sample, as it is handed out. Where a name is there once more,
        another sample begins, which a file joined from others may have."""
        if member.key != self.key or member.name in self.names:
            return False
        return not (member.is_audio and self.size > _LARGEST_SAMPLE)

    def add(self, member: _Member) -> None:
        """Take a member in."""
        (self.recordings if member.is_audio else self.written).append(member)
        self.names.add(member.name)
        self.size += member.size

    def following(self, member: _Member | None) -> _Sample:
        """The sample of the member that was not taken: perhaps the next part of this one."""
        if member is None or member.key != self.key or member.name in self.names:
            return _Sample("" if member is None else member.key)
        return _Sample(self.key, written=[one for one in self.written if one.stem == self.key])

    def columns(self) -> tuple[list[dict[str, Any]], list[str]]:
        """What is written beside each recording, and names of what is written beside none."""
        # What all share first, what is one's own last.
        found: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in self.recordings]
        unpaired = []
        for one in self.written:
            owners, rest = self._owners(one.stem)
            if not owners:
                unpaired.append(one.name)
            for place in owners:
                alone = len(self.recordings) == 1 and one.stem == self.key
                own = alone or self.recordings[place].stem == one.stem
                name = f"{rest}.{ending(one.name)}" if rest else ending(one.name)
                entries = _columns(name, one.content or b"")
                if not own:
                    entries.pop("id", None)
                found[place].append((2 if own else 1 if rest else 0, entries))
        columns: list[dict[str, Any]] = []
        for entries_of_one in found:
            columns.append({})
            for _, entries in sorted(entries_of_one, key=lambda pair: pair[0]):
                columns[-1].update(entries)
        return columns, unpaired

    def _owners(self, stem: str) -> tuple[list[int], str]:
        """Places of the recordings that a file belongs to, and by what its name is longer."""
        stems = [recording.stem for recording in self.recordings]
        longer = [s for s in stems if stem == s or stem.startswith(s + ".")]
        if longer:
            name = max(longer, key=len)
            return [i for i, s in enumerate(stems) if s == name], stem[len(name) + 1 :]
        if len(stems) == 1 and not stems[0].startswith(stem + "."):
            # `0001.audio.flac` and `0001.transcript.txt`
            return [0], stem[len(self.key) + 1 :]
        return [i for i, s in enumerate(stems) if s.startswith(stem + ".")], ""


class _DamagedHeader(tarfile.ReadError):
    """A header that is none, behind a member that is whole."""


class _StrictHeader(tarfile.TarInfo):
    """A damaged header is an error; tarfile would take it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("EmptyHeaderError", "EOFHeaderError"):
                raise
            raise _DamagedHeader(str(error)) from error


def _columns(name: str, content: bytes) -> dict[str, Any]:
    """Columns of a sample's other file: the entries of a JSON object, or text by its ending."""
    text = content.decode("utf-8-sig", "surrogateescape")
    if name.endswith("json"):
        try:
            entries = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            entries = None
        if isinstance(entries, dict):
            return entries
    return {name: text}
