"""Formats of results, the one list of them: options, help, tables and clean-up derive from it.

A format is a class here and an entry of `FORMATS`. An object of it writes a shard's results, under
temporary names: nothing has its final name before the shard is committed. PyTorch, NumPy and
pyarrow are imported where they are needed, so that the command line can name the formats at once.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from w2vbert_fast._extras import require
from w2vbert_fast.checkpoints.files import to_disk
from w2vbert_fast.inference.jobs.naming import candidates, in_tree, may_lie_there

if TYPE_CHECKING:
    from torch import Tensor

    from w2vbert_fast.inference.ctc.subtitles import Layout
    from w2vbert_fast.inference.rows import Result
    from w2vbert_fast.inference.tasks.base import Task
    from w2vbert_fast.inference.tasks.transcribe import Transcription
    from w2vbert_fast.inference.transcripts import Transcript
    from w2vbert_fast.recordings.rows import Row

TEMPORARY = ".tmp"
PARTS, ERRORS, KNOWN = "part-", "errors-", "known-"
"""What the names of tables begin with: of rows that went well, of those that did not, and of what
all of them were made of."""

EXTRA = "extra"
"""Column of Parquet tables with the carried columns, as JSON, that have no column of their own."""

_ROW_GROUP_VALUES = 1 << 24


class Format(abc.ABC):
    """A format; an object of it writes the results of one shard.

    Args:
        folder: the job's.
        stem: name of the shard's files, without an ending.
        columns: types of the carried columns, for tables with types.
        own: names and Arrow types of the task's columns, for tables with types.
        how: how files of single recordings are named and laid out.

    Attributes:
        name: what `--format` calls it, the ending of its files, and the name of their folder.
        of: what it holds, where that is not any result: "transcripts" or "embeddings".
        is_table: it holds rows. A job has one table; what others hold is named in its rows.
        is_typed: the columns of the table have types.
        per_recording: a file for each recording, in a folder of the format's name.
        in_jobs: jobs write it.
        beside: it can be written beside the recordings.
        has_times: it shows when words were said.
        has_cues: it shows words in cues, whose layout can be chosen.
    """

    name: ClassVar[str]
    of: ClassVar[str] = ""
    is_table: ClassVar[bool] = False
    is_typed: ClassVar[bool] = False
    per_recording: ClassVar[bool] = False
    in_jobs: ClassVar[bool] = True
    beside: ClassVar[bool] = False
    has_times: ClassVar[bool] = False
    has_cues: ClassVar[bool] = False

    def __init__(
        self,
        folder: Path,
        stem: str,
        columns: Columns | None = None,
        own: Sequence[tuple[str, Any]] = (),
        how: PerRecording | None = None,
    ) -> None:
        self.folder = folder
        self.path = temporary(folder / f"{stem}.{self.name}")

    @classmethod
    def goes_with(cls, task: Task) -> bool:
        """Whether results of a task can be asked for in this format."""
        return cls.in_jobs

    def stated(self, result: Result) -> dict[str, str]:
        """Columns of a row that name the files which hold more of it, relative to the folder if
        they are in it."""
        return {}

    @abc.abstractmethod
    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        """Take results in; `files` is what all formats have `stated` of each."""

    @abc.abstractmethod
    def close(self) -> list[Path]:
        """Complete the files; the temporary ones, on the disk."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Leave nothing behind."""


def temporary(final: Path) -> Path:
    """The name that a file has before it is complete."""
    return final.with_name(f".{final.name}{TEMPORARY}")


def final_name(path: Path) -> Path:
    """The name that a complete file gets."""
    return path.with_name(path.name[1 : -len(TEMPORARY)])


class JsonTable(Format):
    """Rows as JSON lines. Beside tensors it is the table without being named."""

    name = "jsonl"
    is_table = True

    def __init__(self, folder: Path, stem: str, *types: Any, **named: Any) -> None:
        super().__init__(folder, stem)
        self._file = self.path.open("w", encoding="utf-8")

    @classmethod
    def goes_with(cls, task: Task) -> bool:
        return not task.has_tensors

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        for result, names in zip(results, files, strict=True):
            self._file.write(to_json(table_row(result, names)))

    def close(self) -> list[Path]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return [self.path]

    def discard(self) -> None:
        _discard_file(self._file, self.path)


class ParquetTable(Format):
    """Rows as a Parquet file, written group by group.

    Raises:
        ImportError: pyarrow is not installed.
    """

    name = "parquet"
    is_table = True
    is_typed = True

    def __init__(
        self,
        folder: Path,
        stem: str,
        columns: Columns | None = None,
        own: Sequence[tuple[str, Any]] = (),
        how: PerRecording | None = None,
    ) -> None:
        super().__init__(folder, stem)
        arrow = require("pyarrow", "offline")
        parquet = require("pyarrow.parquet", "offline")
        kinds = {
            "int": arrow.int64(),
            "float": arrow.float64(),
            "bool": arrow.bool_(),
            "string": arrow.string(),
        }
        self._arrow = arrow
        self._columns = columns or Columns({})
        self.schema = arrow.schema(
            [
                ("index", arrow.int64()),
                ("id", arrow.string()),
                ("audio_filepath", arrow.string()),
                ("offset", arrow.float64()),
                ("seconds", arrow.float64()),
                ("louder_channel", arrow.int64()),
                *own,
                *((name, kinds[kind]) for name, kind in self._columns.types.items()),
                (EXTRA, arrow.string()),
            ]
        )
        self._file = self.path.open("wb")
        self._writer = parquet.ParquetWriter(self._file, self.schema, compression="zstd")

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        """Write row groups of at most some 16 million numbers."""
        group: list[tuple[Result, dict[str, str]]] = []
        values = 0
        for result, names in zip(results, files, strict=True):
            group.append((result, names))
            values += 0 if result.tensor is None else result.tensor.numel()
            if values >= _ROW_GROUP_VALUES:
                self._write(group)
                group, values = [], 0
        if group:
            self._write(group)

    def _write(self, group: Sequence[tuple[Result, dict[str, str]]]) -> None:
        rows = []
        for result, names in group:
            typed, extra = self._columns.split(result.columns)
            row = table_row(result, names)
            row.update(typed)
            row.update({EXTRA: extra, "id": utf8(result.id), "audio_filepath": utf8(result.audio)})
            rows.append(row)
        tensors = [result.tensor for result, _ in group if result.tensor is not None]
        arrays = [
            self._embeddings(tensors, field.type)
            if field.name == "embedding" and tensors
            else self._arrow.array([row.get(field.name) for row in rows], type=field.type)
            for field in self.schema
        ]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self.schema))

    def _embeddings(self, tensors: Sequence[Tensor], kind: Any) -> Any:
        import numpy as np

        arrow = self._arrow
        tensors = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        flat = np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors])
        width = tensors[0].shape[1]
        vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(flat), width)
        if arrow.types.is_fixed_size_list(kind):
            return vectors
        offsets = np.cumsum([0, *(len(tensor) for tensor in tensors)], dtype=np.int32)
        return arrow.ListArray.from_arrays(arrow.array(offsets), vectors)

    def close(self) -> list[Path]:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return [self.path]

    def discard(self) -> None:
        with contextlib.suppress(OSError, ValueError, self._arrow.ArrowException):
            self._writer.close()
        _discard_file(self._file, self.path)


@dataclass(frozen=True)
class PerRecording:
    """How files of single recordings are named and laid out.

    Attributes:
        layout: of subtitles; None: the usual one.
        roots: folders of the input, whose trees are kept.
        beside: each file lies beside its recording, and not in the job's folder.
    """

    layout: Layout | None = None
    roots: tuple[str, ...] = ()
    beside: bool = False

    def places(self, root: Path, result: Result) -> Iterator[Path]:
        """Paths for a file of a recording, without its ending; the best one first."""
        path = Path(result.audio) if self.beside else root / in_tree(result.audio, self.roots)
        return candidates(path, result.index, result.offset > 0)


class FilePerRecording(Format):
    """A file for each recording. A row that is computed again writes the same file again."""

    per_recording = True

    def __init__(
        self,
        folder: Path,
        stem: str,
        columns: Columns | None = None,
        own: Sequence[tuple[str, Any]] = (),
        how: PerRecording | None = None,
    ) -> None:
        super().__init__(folder, stem)
        self._how = how or PerRecording()
        self._written: list[Path] = []
        self._claimed: set[Path] = set()

    @classmethod
    def goes_with(cls, task: Task) -> bool:
        return cls.in_jobs and task.name in ("transcribe", "align")

    @classmethod
    def content(cls, result: Any, characters: bool = False, layout: Layout | None = None) -> str:
        """What the file holds.

        Args:
            result: of a recording that went well.
            characters: whether characters have times too.
            layout: of subtitles; None: the usual one.
        """
        raise NotImplementedError

    def stated(self, result: Result) -> dict[str, str]:
        """The file is named as the recording is, or nearly so where that name is taken."""
        root = self.folder / self.name
        for path in self._how.places(root, result):
            final = path.with_name(f"{path.name}.{self.name}")
            limit = None if self._how.beside else root
            if final not in self._claimed and may_lie_there(final, limit):
                break
        else:
            final = root / f"{result.index:09d}.{self.name}"
            root.mkdir(exist_ok=True)
        self._claimed.add(final)
        if final.is_relative_to(self.folder):
            name = final.relative_to(self.folder).as_posix()
        else:
            name = os.path.abspath(final)
        return {f"{self.name}_file": name}

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        for result, names in zip(results, files, strict=True):
            path = temporary(self.folder / names[f"{self.name}_file"])
            # What a run that was killed has left, or a link that leads elsewhere.
            path.unlink(missing_ok=True)
            self._written.append(path)
            self.write(path, result)

    def write(self, path: Path, result: Any) -> None:
        """Write the file of a result."""
        path.write_text(self.content(result, layout=self._how.layout), encoding="utf-8")

    def close(self) -> list[Path]:
        for path in self._written:
            to_disk(path)
        return self._written

    def discard(self) -> None:
        for path in self._written:
            path.unlink(missing_ok=True)


class Text(FilePerRecording):
    """What was said, as plain text: a line a cue where words have times, else one line."""

    name = "txt"
    of = "transcripts"
    beside = True

    @classmethod
    def content(
        cls,
        result: Transcription | Transcript,
        characters: bool = False,
        layout: Layout | None = None,
    ) -> str:
        from w2vbert_fast.inference.ctc import subtitles

        text = result.text or ""
        if result.words is not None:
            layout = layout or subtitles.DEFAULT_LAYOUT
            text = getattr(subtitles, cls.name)(result.words, layout)
        return text if text.endswith("\n") else text + "\n"


class SubRip(Text):
    """Subtitles as SubRip."""

    name = "srt"
    has_times = True
    has_cues = True


class WebVtt(Text):
    """Subtitles as WebVTT."""

    name = "vtt"
    has_times = True
    has_cues = True


class TextGrid(FilePerRecording):
    """Words on the time line of Praat, a tier a channel."""

    name = "TextGrid"
    of = "transcripts"
    beside = True
    has_times = True

    @classmethod
    def content(
        cls,
        result: Transcription | Transcript,
        characters: bool = False,
        layout: Layout | None = None,
    ) -> str:
        from w2vbert_fast.inference.ctc.annotations import textgrid

        return textgrid(result.words or (), result.seconds or 0.0, characters)


class Ctm(FilePerRecording):
    """Words as NIST's scoring programs read them."""

    name = "ctm"
    of = "transcripts"
    beside = True
    has_times = True

    @classmethod
    def content(
        cls,
        result: Transcription | Transcript,
        characters: bool = False,
        layout: Layout | None = None,
    ) -> str:
        from w2vbert_fast.inference.ctc.annotations import ctm

        name = os.path.splitext(os.path.basename(result.audio))[0]
        return ctm(result.words or (), utf8(name))


class JsonFile(FilePerRecording):
    """A transcript as JSON, beside its recording: a job's table has it."""

    name = "json"
    of = "transcripts"
    in_jobs = False
    beside = True
    has_times = True

    @classmethod
    def content(
        cls, result: Transcript, characters: bool = False, layout: Layout | None = None
    ) -> str:
        return result.to_json(characters, indent=2) + "\n"


class Npy(FilePerRecording):
    """An embedding as a file of NumPy."""

    name = "npy"
    of = "embeddings"

    @classmethod
    def goes_with(cls, task: Task) -> bool:
        return task.has_tensors

    def write(self, path: Path, result: Result) -> None:
        import numpy as np

        assert result.tensor is not None
        with path.open("wb") as file:
            np.save(file, result.tensor.numpy())


class Safetensors(Format):
    """The embeddings of a shard in one file; a row's key is its index."""

    name = "safetensors"
    of = "embeddings"

    def __init__(self, folder: Path, stem: str, *types: Any, **named: Any) -> None:
        super().__init__(folder, stem)
        self._tensors: dict[str, Tensor] = {}

    @classmethod
    def goes_with(cls, task: Task) -> bool:
        return task.has_tensors

    def stated(self, result: Result) -> dict[str, str]:
        return {f"{self.name}_file": final_name(self.path).name}

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        for result in results:
            assert result.tensor is not None
            self._tensors[str(result.index)] = result.tensor.contiguous()

    def close(self) -> list[Path]:
        import safetensors.torch

        try:
            safetensors.torch.save_file(self._tensors, self.path)
        except safetensors.SafetensorError as error:
            raise OSError(f"{self.path}: {error}") from error  # a full disk, for instance
        self._tensors = {}
        to_disk(self.path)
        return [self.path]

    def discard(self) -> None:
        self._tensors = {}
        self.path.unlink(missing_ok=True)


FORMATS: dict[str, type[Format]] = {
    kind.name: kind
    for kind in (
        JsonTable,
        ParquetTable,
        SubRip,
        WebVtt,
        Text,
        TextGrid,
        Ctm,
        JsonFile,
        Npy,
        Safetensors,
    )
}
"""All formats by name, tables first."""

BESIDE: dict[str, type[FilePerRecording]] = {
    name: kind
    for name, kind in FORMATS.items()
    if kind.beside and issubclass(kind, FilePerRecording)
}
"""Those that can be written beside the recordings."""


def beside_format(path: str | os.PathLike[str]) -> str | None:
    """Which of `BESIDE` a file's ending names, in capitals or not; None: none of them."""
    ending = os.path.splitext(path)[1][1:].lower()
    return next((name for name in BESIDE if name.lower() == ending), None)


def help_text() -> str:
    """What the option `--format` says of the formats."""

    def names(of: str, in_jobs: bool = True) -> list[str]:
        return [n for n, kind in FORMATS.items() if kind.of == of and kind.in_jobs == in_jobs]

    return (
        f"{listed(names(''), 'or')}; {listed(names('transcripts'), 'and')} of transcripts "
        f"({listed(names('transcripts', False), 'and')} too, beside the recordings); "
        f"{listed(names('embeddings'), 'or')} of embeddings. Can be repeated."
    )


def listed(names: Sequence[str], last: str) -> str:
    """Names in a sentence: "a, b and c"."""
    return f" {last} ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def usual_timestamps(names: Sequence[str]) -> str:
    """The timestamps that formats are usually wanted with: "word" or "none"."""
    return "word" if any(FORMATS[n].has_times for n in names if n in FORMATS) else "none"


@dataclass(frozen=True)
class Formats:
    """In which formats a job writes.

    Attributes:
        names: a table's, "jsonl" or "parquet", and others that the task has.
        how: how files of single recordings are named and laid out.

    Raises:
        ValueError: a format is unknown, or does not go with the task or with another format.
    """

    names: tuple[str, ...]
    how: PerRecording = PerRecording()

    @classmethod
    def of_task(cls, task: Task, names: Sequence[str], how: PerRecording | None = None) -> Formats:
        """Formats of a task; without names, its usual one."""
        known = {name: kind for name, kind in FORMATS.items() if kind.goes_with(task)}
        for name in names:
            if name not in known:
                raise ValueError(f"format {name!r} is not one of {task.name}'s: {', '.join(known)}")
        tables = [name for name, kind in known.items() if kind.is_table]
        chosen = list(dict.fromkeys(names)) or tables[:1]
        if task.has_tensors and len(chosen) > 1:
            raise ValueError(f"embeddings have one format, got {', '.join(chosen)}")
        if not any(FORMATS[name].is_table for name in chosen):
            chosen.insert(0, JsonTable.name)
        if sum(FORMATS[name].is_table for name in chosen) > 1:
            raise ValueError(f"the table is either {listed(tables, 'or')}, got both")
        timed = [name for name in chosen if FORMATS[name].has_times]
        if timed and getattr(task, "timestamps", None) == "none":
            raise ValueError(f"format {timed[0]!r} needs timestamps 'word' or 'character'")
        return cls(tuple(chosen), how or PerRecording())

    @property
    def table(self) -> type[Format]:
        """The format of the table."""
        return next(FORMATS[name] for name in self.names if FORMATS[name].is_table)

    def writers(self, folder: Path, number: int, task: Task, columns: Columns) -> list[Format]:
        """What writes a shard.

        Args:
            folder: the job's.
            number: the shard's.
            task: the task, loaded.
            columns: types of the carried columns.
        """
        own: list[tuple[str, Any]] = []
        if self.table.is_typed:
            string = require("pyarrow", "offline").string()
            others = [name for name in self.names if not FORMATS[name].is_table]
            own = [*task.typed_columns(), *((f"{name}_file", string) for name in others)]
        stem = f"{PARTS}{number:06d}"
        return [FORMATS[name](folder, stem, columns, own, self.how) for name in self.names]


def files_of_tables(folder: Path) -> list[str]:
    """The files of single recordings that a folder's tables name, as far as they can be read."""
    columns = [f"{name}_file" for name, kind in FORMATS.items() if kind.per_recording]
    found: list[str] = []
    for path in sorted(folder.glob(f"{PARTS}*")):
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(ValueError, OSError):
            if path.suffix == ".parquet":
                parquet = require("pyarrow.parquet", "offline")
                named = [name for name in columns if name in parquet.read_schema(path).names]
                rows = parquet.read_table(path, columns=named).to_pylist() if named else []
            elif path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as file:
                    rows = [json.loads(line) for line in file if '_file": ' in line]
        found += [row[name] for row in rows for name in columns if row.get(name)]
    return found


def remove_tables(folder: Path) -> None:
    """Remove the tables that a job's shards have written into a folder."""
    for prefix in (PARTS, ERRORS, KNOWN):
        for pattern in (f"{prefix}*", f".{prefix}*{TEMPORARY}"):
            for path in folder.glob(pattern):
                path.unlink()


@functools.cache
def own_columns() -> frozenset[str]:
    """Names of columns that a table may have by itself, whatever the task and the formats."""
    from w2vbert_fast.inference.tasks import TASKS

    return frozenset(
        (
            *("index", "id", "audio_filepath", "offset", "seconds", "louder_channel"),
            *("error_type", "error", EXTRA, "salvaged", "expected_seconds"),
            *(name for task in TASKS.values() for name in task.column_names),
            *(
                f"{name}_file"
                for name, kind in FORMATS.items()
                if kind.in_jobs and not kind.is_table
            ),
        )
    )


def table_row(result: Result, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A result as a row of a JSONL table. Carried columns named as ours get the prefix `input_`."""
    row: dict[str, Any] = {
        "index": result.index,
        "id": result.id,
        "audio_filepath": result.audio,
        "offset": result.offset,
        "seconds": None if result.seconds is None else round(result.seconds, 4),
        "louder_channel": result.louder_channel,
        **result.salvage_fields(),
    }
    if result.error is None:
        row.update(result.fields())
    else:
        row.update(error_type=result.error_type, error=result.error)
    row.update(files or {})
    row.update(carried(result.columns))
    return row


def carried(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Carried columns under the names that they have in tables."""
    return {
        f"input_{name}" if name in own_columns() else name: value for name, value in columns.items()
    }


def to_json(row: Mapping[str, Any]) -> str:
    """A row as one line of strict JSON that any UTF-8 file can hold."""
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        line = json.dumps(_plain(row), ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        # A name that is not UTF-8: escaped, Python and others read the same bytes back.
        line = json.dumps(_plain(row))
    return line + "\n"


def _plain(value: Any) -> Any:
    """What JSON can hold: no NaN; bytes as base64; dates, decimals and the like as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def _discard_file(file: Any, path: Path) -> None:
    """Close and remove a file; what it still held may not fit on the disk any more."""
    with contextlib.suppress(OSError, ValueError):
        file.close()
    path.unlink(missing_ok=True)


class Columns:
    """Types of the carried columns of Parquet tables.

    Args:
        types: "int", "float", "bool" or "string" by name.
    """

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = dict(types)

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> Columns:
        """Columns whose values have one type in all of the rows that have them."""
        found: dict[str, set[str]] = {}
        for row in rows:
            for name, value in carried(row.columns).items():
                if value is not None:
                    found.setdefault(name, set()).add(_kind(value))
        types = {}
        for name, kinds in found.items():
            if kinds == {"int", "float"}:
                kinds = {"float"}
            if len(kinds) == 1 and "other" not in kinds:
                (types[name],) = kinds
        return cls(types)

    def split(self, columns: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Values of the typed columns, and the rest as JSON."""
        typed: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in carried(columns).items():
            kind = self.types.get(name)
            if kind is not None and (value is None or _kind(value) == kind):
                typed[name] = utf8(value) if isinstance(value, str) else value
            elif kind == "float" and _kind(value) == "int":
                typed[name] = float(value)
            else:
                rest[name] = value
        return typed, to_json(rest).rstrip("\n") if rest else None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(1 << 63) <= value < 1 << 63 else "other"
    if isinstance(value, float):
        return "float"
    return "string" if isinstance(value, str) else "other"


def utf8(text: str) -> str:
    """Text that Parquet can hold: bytes of a name that are not UTF-8 become escapes, as \\xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
