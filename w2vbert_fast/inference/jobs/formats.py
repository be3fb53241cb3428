"""What a job writes: tables of rows as JSON lines or Parquet, and a file for each recording.

Every writer writes under a temporary name. Nothing has its final name before `commit`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.inference.rows import Embedding, Result, Transcription
from w2vbert_fast.recordings.rows import Row

if TYPE_CHECKING:
    from w2vbert_fast.inference.ctc.timestamps import Word

TABLE_FORMATS = ("jsonl", "parquet")
SUBTITLE_FORMATS = ("srt", "vtt", "txt")
TENSOR_FORMATS = ("npy", "safetensors")
TEMPORARY = ".tmp"

EXTRA = "extra"
"""Column of Parquet tables with the carried columns, as JSON, that have no column of their own."""

_OWN_COLUMNS = frozenset(
    (
        *("index", "id", "audio_filepath", "offset", "seconds", "louder_channel"),
        *("text", "words", "shape"),
        *("embedding", "label", "scores", "segments", "error_type", "error", "extra"),
        *("npy_file", "srt_file", "vtt_file", "txt_file", "safetensors_file"),
    )
)
_FOLDER_ROWS = 1000
_STEM_LENGTH = 80
_ROW_GROUP_VALUES = 1 << 24


def table_row(result: Result, files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A result as a row of a JSONL table. Carried columns named as ours get the prefix `input_`."""
    row: dict[str, Any] = {
        "index": result.index,
        "id": result.id,
        "audio_filepath": result.audio,
        "offset": result.offset,
        "seconds": None if result.seconds is None else round(result.seconds, 4),
        "louder_channel": result.louder_channel,
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
        f"input_{name}" if name in _OWN_COLUMNS else name: value for name, value in columns.items()
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


class Writer(Protocol):
    """Writes a part of the results, under temporary names."""

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        """Take results in. `files` are names, relative to the folder, that rows have to state."""
        ...

    def close(self) -> list[Path]:
        """Complete the files; the temporary ones, on the disk."""
        ...

    def discard(self) -> None:
        """Leave nothing behind."""
        ...


def temporary(final: Path) -> Path:
    """The name that a file has before it is complete."""
    return final.with_name(f".{final.name}{TEMPORARY}")


def final_name(path: Path) -> Path:
    """The name that a complete file gets."""
    return path.with_name(path.name[1 : -len(TEMPORARY)])


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonTable:
    """Rows as JSON lines."""

    def __init__(self, final: Path) -> None:
        self.path = temporary(final)
        self._file = self.path.open("w", encoding="utf-8")

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        for result, names in zip(results, files, strict=True):
            self._file.write(to_json(table_row(result, names)))

    def close(self) -> list[Path]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return [self.path]

    def discard(self) -> None:
        discard_file(self._file, self.path)


def discard_file(file: Any, path: Path) -> None:
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


class ParquetTable:
    """Rows as a Parquet file, written group by group.

    Args:
        final: name of the complete file.
        columns: the carried columns.
        task_columns: names and Arrow types of the task's own columns.

    Raises:
        ImportError: pyarrow is not installed.
    """

    def __init__(self, final: Path, columns: Columns, task_columns: Sequence[Any]) -> None:
        arrow = require("pyarrow", "offline")
        parquet = require("pyarrow.parquet", "offline")
        kinds = {
            "int": arrow.int64(),
            "float": arrow.float64(),
            "bool": arrow.bool_(),
            "string": arrow.string(),
        }
        self._arrow = arrow
        self._columns = columns
        self.schema = arrow.schema(
            [
                ("index", arrow.int64()),
                ("id", arrow.string()),
                ("audio_filepath", arrow.string()),
                ("offset", arrow.float64()),
                ("seconds", arrow.float64()),
                ("louder_channel", arrow.int64()),
                *task_columns,
                *((name, kinds[kind]) for name, kind in columns.types.items()),
                (EXTRA, arrow.string()),
            ]
        )
        self.path = temporary(final)
        self._file = self.path.open("wb")
        self._writer = parquet.ParquetWriter(self._file, self.schema, compression="zstd")

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        """Write row groups of at most some 16 million numbers."""
        group: list[tuple[Result, dict[str, str]]] = []
        values = 0
        for result, names in zip(results, files, strict=True):
            group.append((result, names))
            if isinstance(result, Embedding) and result.embedding is not None:
                values += result.embedding.numel()
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
        arrays = [
            self._embeddings([result for result, _ in group], field.type)
            if field.name == "embedding" and isinstance(group[0][0], Embedding)
            else self._arrow.array([row.get(field.name) for row in rows], type=field.type)
            for field in self.schema
        ]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self.schema))

    def _embeddings(self, results: Sequence[Result], kind: Any) -> Any:
        arrow = self._arrow
        values = [r.embedding for r in results if isinstance(r, Embedding)]
        tensors = [value.reshape(-1, value.shape[-1]) for value in values if value is not None]
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
        discard_file(self._file, self.path)


class TensorShard:
    """Embeddings in one safetensors file; a row's key is its index."""

    def __init__(self, final: Path) -> None:
        self.path = temporary(final)
        self._tensors: dict[str, Tensor] = {}

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        for result in results:
            assert isinstance(result, Embedding) and result.embedding is not None
            self._tensors[str(result.index)] = result.embedding.contiguous()

    def close(self) -> list[Path]:
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


class FilePerRecording:
    """A file for each recording: an embedding as .npy, or subtitles.

    A row that is computed again writes the same file again.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self._written: list[Path] = []

    def name(self, result: Result) -> str:
        """The file of a row, relative to the job's folder; a thousand of them share a folder."""
        stem = re.sub(r"[^\w.-]+", "_", utf8(os.path.basename(result.audio)))
        stem = os.path.splitext(stem)[0][:_STEM_LENGTH]
        group = f"{result.index // _FOLDER_ROWS:06d}"
        return f"{self.kind}/{group}/{result.index:09d}_{stem}.{self.kind}"

    def add(self, results: Sequence[Result], files: Sequence[dict[str, str]]) -> None:
        for result, names in zip(results, files, strict=True):
            final = self.folder / names[f"{self.kind}_file"]
            final.parent.mkdir(parents=True, exist_ok=True)
            path = temporary(final)
            self._written.append(path)
            if isinstance(result, Embedding):
                assert result.embedding is not None
                with path.open("wb") as file:
                    np.save(file, result.embedding.numpy())
            else:
                assert isinstance(result, Transcription)
                text = subtitles_of(result.text or "", result.words, self.kind)
                path.write_text(text, encoding="utf-8")

    def close(self) -> list[Path]:
        for path in self._written:
            to_disk(path)
        return self._written

    def discard(self) -> None:
        for path in self._written:
            path.unlink(missing_ok=True)


def subtitles_of(text: str, words: Sequence[Word] | None, kind: str) -> str:
    """The content of a file of subtitles; of a text without words, for "txt", the text."""
    from w2vbert_fast.inference.ctc import subtitles

    if words is not None:
        text = getattr(subtitles, kind)(words)
    return text if text.endswith("\n") else text + "\n"
