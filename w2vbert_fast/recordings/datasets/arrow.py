"""Tables of Arrow: Parquet, and what `save_to_disk` of the datasets library writes.

Rows name recordings, or hold them: as bytes, or as `{bytes, path}`, as that library has them. Its
note of the columns' types, where there is one, says which column holds recordings, and what the
numbers of classes mean.
"""

from __future__ import annotations

import abc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.recordings.manifest import (
    USUAL,
    ColumnNames,
    check_columns,
    description,
    manifest_row,
)
from w2vbert_fast.recordings.rows import Part, Rows, Wanted

_BLOCK = 1 << 16
_STATE = "state.json"
_ROWS = 512
_ROWS_WITH_RECORDINGS = 16
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")


class _Table(abc.ABC):
    """Rows of batches of Arrow.

    Args:
        path: the file or folder.
        names: what its columns mean.

    Raises:
        ImportError: pyarrow is not installed.
    """

    kind: str

    def __init__(self, path: str, names: ColumnNames = USUAL) -> None:
        self.path = path
        self.arrow = require("pyarrow", "offline")
        self.names = names
        self.sealed = False  # until it was surveyed

    def rows(self, start: int, wanted: Wanted) -> Rows:
        index = start
        for batch, names, classes in self._batches():
            for i in range(batch.num_rows):
                if not wanted(index + i):
                    continue
                (entries,) = batch.slice(i, 1).to_pylist()
                for name, labels in classes.items():
                    if entries[name] is not None and 0 <= entries[name] < len(labels):
                        entries[name] = labels[entries[name]]
                # What is not there is no entry; a column that was asked for stays one.
                asked = names.by_meaning.values()
                found = {k: v for k, v in entries.items() if v is not None or k in asked}
                place = f"row {index + i - start + 1}"
                folder = self._folder()
                yield manifest_row(index + i, found, folder, self.path, place, names)
            index += batch.num_rows
        return index

    def _folder(self) -> Path:
        """Where relative names of recordings start."""
        return Path(self.path).parent

    @abc.abstractmethod
    def _batches(self) -> Iterator[tuple[Any, ColumnNames, dict[str, list[str]]]]:
        """Batches, what their columns mean, and the names of classes by column."""

    def _meaning(self, schema: Any) -> tuple[ColumnNames, dict[str, list[str]]]:
        """What columns mean, and the names of classes, by the datasets library's note."""
        features = _features(schema)
        audio = [name for name, kind in features.items() if kind.get("_type") == "Audio"]
        named = self.names.has_audio(schema.names) or len(audio) != 1
        names = self.names if named else self.names.of_audio(audio[0])
        check_columns(self.path, schema.names, "it must have columns", names)
        self.sealed = _holds_recordings(self.arrow, schema)
        classes = {n: kind["names"] for n, kind in features.items() if "names" in kind}
        return names, classes


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Types of columns as the datasets library notes them in a schema; none where it does not."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        features = note["info"]["features"]
        return {n: features[n] for n in schema.names if isinstance(features.get(n), dict)}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


class Parquet(_Table):
    """A Parquet file."""

    kind = "Parquet"

    @classmethod
    def open(cls, path: str, names: ColumnNames) -> list[Part]:
        """A file, or a folder of shards as the hub has them, `data/train-00000-of-00002.parquet`.

        Raises:
            ValueError: the folder has several splits, or not all shards of one.
        """
        if not os.path.isdir(path):
            return [cls(path, names)] if path.lower().endswith(".parquet") else []
        found: dict[str, list[str]] = {}
        for folder in (path, os.path.join(path, "data")):
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
                if match := _SHARD.fullmatch(name):
                    found.setdefault(match["split"], []).append(os.path.join(folder, name))
                    count = int(match["count"])
            if found:
                break
        if len(found) > 1:
            raise ValueError(
                f"{path} has the splits {', '.join(found)}; name one, as in "
                f"'{os.path.join(folder, next(iter(found)))}-*.parquet'"
            )
        for split, shards in found.items():
            if len(shards) < count:
                raise ValueError(
                    f"{path} has {len(shards)} of the {count} shards of {split}; to read these, "
                    f"name them: '{os.path.join(folder, split)}-*.parquet'"
                )
        return [cls(shard, names) for shards in found.values() for shard in shards]

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        digest = hashlib.sha256()
        with open(self.path, "rb") as content:
            for block in iter(lambda: content.read(_BLOCK), b""):
                digest.update(block)
        with self._open() as file:
            self._meaning(file.schema_arrow)
            count = file.metadata.num_rows
        return description(self.path, digest, count)

    def _batches(self) -> Iterator[tuple[Any, ColumnNames, dict[str, list[str]]]]:
        with self._open() as file:
            schema = file.schema_arrow
            names, classes = self._meaning(schema)
            # A batch is in memory as a whole.
            size = _ROWS_WITH_RECORDINGS if _holds_recordings(self.arrow, schema) else _ROWS
            for batch in file.iter_batches(batch_size=size):
                yield batch, names, classes

    def _open(self) -> Any:
        parquet = require("pyarrow.parquet", "offline")
        try:
            return parquet.ParquetFile(self.path)
        except self.arrow.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a Parquet file: {error}") from error


def _holds_recordings(arrow: Any, schema: Any) -> bool:
    """Whether rows hold recordings, and not their names alone."""
    kinds = [field.type for field in schema]
    kinds += [kind.field("bytes").type for kind in kinds if _has_bytes(arrow, kind)]
    return any(arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind) for kind in kinds)


def _has_bytes(arrow: Any, kind: Any) -> bool:
    return bool(arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


class SavedToDisk(_Table):
    """A folder that `Dataset.save_to_disk` has written: files of Arrow, and `state.json`."""

    kind = "datasets folder saved to disk"

    @classmethod
    def open(cls, path: str, names: ColumnNames) -> list[Part]:
        """Such a folder, or that of a `DatasetDict` with one split.

        Raises:
            ValueError: it has several.
        """
        splits = _json(os.path.join(path, "dataset_dict.json")).get("splits")
        if isinstance(splits, list) and splits:
            if len(splits) > 1:
                raise ValueError(
                    f"{path} has the splits {', '.join(splits)}; name one, as in "
                    f"{os.path.join(path, splits[0])}"
                )
            path = os.path.join(path, splits[0])
        state = _json(os.path.join(path, _STATE))
        return [cls(path, names)] if isinstance(state.get("_data_files"), list) else []

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        state = _json(os.path.join(self.path, _STATE))
        count = 0
        for file in self._files():
            # The memory is that of the file: what lies between the counts is not read.
            with self.arrow.memory_map(file) as content, self._stream(content, file) as batches:
                self._meaning(batches.schema)
                count += sum(batch.num_rows for batch in batches)
        if count == 0:
            raise ValueError(f"{self.path} holds no rows")
        return count, {
            "dataset": os.path.abspath(self.path),
            "fingerprint": state.get("_fingerprint"),
            "bytes": [os.stat(file).st_size for file in self._files()],
            "rows": count,
        }

    def _batches(self) -> Iterator[tuple[Any, ColumnNames, dict[str, list[str]]]]:
        for file in self._files():
            with self.arrow.OSFile(file) as content, self._stream(content, file) as batches:
                names, classes = self._meaning(batches.schema)
                for batch in batches:
                    yield batch, names, classes

    def _folder(self) -> Path:
        return Path(self.path)

    def _files(self) -> list[str]:
        """Its files of Arrow, in order.

        Raises:
            ValueError: rows are chosen by a file of indices, as old versions left them.
        """
        state = _json(os.path.join(self.path, _STATE))
        if state.get("_indices_data_files"):
            raise ValueError(
                f"{self.path} chooses its rows by a file of indices; save flatten_indices() of it"
            )
        names: Iterable[Any] = state["_data_files"]
        return [os.path.join(self.path, entry["filename"]) for entry in names]

    def _stream(self, content: Any, path: str) -> Any:
        try:
            return self.arrow.ipc.open_stream(content)
        except self.arrow.ArrowInvalid as error:
            raise ValueError(f"{path} is no stream of Arrow: {error}") from error


def _json(path: str) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
