"""Weights in files: reading and writing checkpoints.

Read: `model.safetensors`, or several files with `model.safetensors.index.json`, and the older
`pytorch_model.bin` (one file or several), the last only through `torch.load(weights_only=True)`.
Everything is checked against the files' headers before the first tensor is copied, and tensors are
copied a few megabytes at a time, so that loading needs little more memory than the weights.

Written: safetensors only. The layout of the files is that of transformers' `save_pretrained`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from w2vbert_fast.checkpoints.files import make_folder, staged_file
from w2vbert_fast.checkpoints.repository import Repository

SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

# Pages of a mapped file stay in memory as long as the mapping does. So a file is mapped anew for
# every so many bytes read from it: a share of all bytes of the checkpoint, but not too few.
_SHARE_PER_MAPPING = 0.02
_LEAST_BYTES_PER_MAPPING = 4 * 2**20

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])B")
_SEVERAL = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(ValueError):
    """A checkpoint's files are damaged, incomplete or do not fit the model."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says about one tensor.

    `dtype` is None for a type that no weights here can have, `dtype_name` the file's word for it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes, 8 an element where the type is not known."""
        return math.prod(self.shape) * (8 if self.dtype is None else self.dtype.itemsize)

    @property
    def rows(self) -> int:
        """Length of the first dimension, at least 1."""
        return max(1, self.shape[0]) if self.shape else 1


_Piece = tuple[str, int, int]
"""A tensor's name and the first and last (exclusive) of some of its rows."""

_Take = Callable[[str, int, int], Tensor]


class Checkpoint:
    """The tensors of one or more weight files, read on demand.

    Args:
        name: what error messages call the checkpoint.
        files: the weight files: safetensors, or `.bin` files of `torch.save`.
        index: of a checkpoint in several files, each tensor's file as its index says.

    Raises:
        CheckpointError: a file is damaged or truncated, or lacks a tensor that the index places
            in it.
    """

    def __init__(
        self, name: str, files: Iterable[Path], index: Mapping[str, Path] | None = None
    ) -> None:
        self.name = name
        self.tensors: dict[str, StoredTensor] = {}
        index = {} if index is None else index
        for file in files:
            for key, stored in _read_header(file).items():
                if key in self.tensors and key not in index:
                    other = self.tensors[key].file.name
                    raise CheckpointError(f"{name}: {key} is both in {other} and in {file.name}")
                if index.get(key, file) == file:
                    self.tensors[key] = stored
        absent = [f"{key} ({file.name})" for key, file in index.items() if key not in self.tensors]
        if absent:
            raise CheckpointError(
                f"{name}: the index places tensors in files that lack them: {listed(absent)}"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the first floating point tensor, or None when there is none."""
        dtypes = (stored.dtype for stored in self.tensors.values())
        return next((dtype for dtype in dtypes if dtype and dtype.is_floating_point), None)

    def read(
        self,
        names: Iterable[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name, file by file, as new tensors with memory of their own.

        Args:
            names: which tensors, each once.
            dtype: floating point tensors are converted to it; None leaves them as stored.
            device: where the tensors go.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, wanted in by_file.items():
            incomplete: dict[str, Tensor] = {}
            for pieces in self._pieces_per_mapping(wanted, _can_be_mapped(file)):
                with _opened(file) as take:
                    for name, start, stop in pieces:
                        piece = take(name, start, stop)
                        stored = self.tensors[name]
                        if name not in incomplete:
                            kept = dtype if piece.is_floating_point() and dtype else piece.dtype
                            incomplete[name] = torch.empty(stored.shape, dtype=kept, device=device)
                        whole = incomplete[name]
                        (whole[start:stop] if stored.shape else whole).copy_(piece)
                        del piece
                        if stop >= stored.rows:
                            yield name, incomplete.pop(name)

    def _pieces_per_mapping(self, names: list[str], mapped: bool) -> Iterator[list[_Piece]]:
        """Cut tensors into rows of the first dimension, and these into groups of limited size."""
        total = sum(stored.num_bytes for stored in self.tensors.values())
        limit = max(_LEAST_BYTES_PER_MAPPING, int(_SHARE_PER_MAPPING * total)) if mapped else total
        group: list[_Piece] = []
        room = limit
        for name in names:
            stored = self.tensors[name]
            bytes_per_row = max(1, stored.num_bytes // stored.rows)
            step = max(1, limit // bytes_per_row)
            for start in range(0, stored.rows, step):
                stop = min(start + step, stored.rows)
                size = (stop - start) * bytes_per_row
                if group and size > room:
                    yield group
                    group, room = [], limit
                group.append((name, start, stop))
                room -= size
        if group:
            yield group


def listed(items: Iterable[str], limit: int = 20) -> str:
    """Items separated by commas; beyond `limit`, the number of the rest."""
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def find_checkpoint(
    repository: Repository, *, variant: str | None = None, use_safetensors: bool | None = None
) -> Checkpoint:
    """Open the weights of a folder or hub repository.

    The first counts of: `model.safetensors`, several such files with their index,
    `pytorch_model.bin`, several such files.

    Args:
        repository: where the files are.
        variant: the weights of that variant, such as "fp16": `model.fp16.safetensors`.
        use_safetensors: True: safetensors or nothing. False: the `.bin` files or nothing.

    Raises:
        OSError: no such folder or repository.
        CheckpointError: it holds no such weights, or damaged ones, or an index that names files
            outside of the folder.
    """
    name = os.fspath(repository.path_or_id)
    kinds = [(SAFETENSORS_NAME, SAFETENSORS_INDEX_NAME), (TORCH_NAME, TORCH_INDEX_NAME)]
    if use_safetensors is not None:
        kinds = kinds[:1] if use_safetensors else kinds[1:]
    kinds = [(_of_variant(whole, variant), _of_variant(index, variant)) for whole, index in kinds]
    for whole, index_name in kinds:
        file = repository.find(whole)
        if file is not None:
            return Checkpoint(name, [file])
        index = repository.find(index_name)
        if index is None:
            continue
        files: dict[str, Path] = {}
        weight_map = _read_index(index)
        for filename in dict.fromkeys(weight_map.values()):
            found = repository.find(filename)
            if found is None:
                raise CheckpointError(f"{name}: {index_name} names {filename}, which is not there")
            if Path(name).is_dir():
                _check_inside(found, index)
            files[filename] = found
        places = {key: files[filename] for key, filename in weight_map.items()}
        return Checkpoint(name, files.values(), places)
    looked_for = ", ".join(filename for kind in kinds for filename in kind)
    where = "" if Path(name).is_dir() else " on the hub, or in its cache where it is out of reach"
    raise CheckpointError(f"{name} holds no weights: none of {looked_for}{where}")


def _of_variant(filename: str, variant: str | None) -> str:
    """The name of a file's variant: `model.safetensors.index.json` has its before `.json`."""
    stem, ending = filename.rsplit(".", 1)
    return filename if variant is None else f"{stem}.{variant}.{ending}"


def _read_index(index: Path) -> dict[str, str]:
    """The map from tensor to file; every file is one within the index's folder."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint: {error!r}") from error
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(filename, str) for filename in weight_map.values())
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    for filename in dict.fromkeys(weight_map.values()):
        path = PurePosixPath(filename)
        if (
            not path.parts
            or path.is_absolute()
            or ".." in path.parts
            or set(filename) & set("\\:\0")
        ):
            raise CheckpointError(f"{index} names {filename!r}, which is outside of its folder")
        if not filename.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{index} names {filename!r}, which is no file of weights")
    return weight_map


def _check_inside(file: Path, index: Path) -> None:
    """Refuse a file that is a link out of the index's folder.

    The hub's cache is the exception: its snapshots link to the `blobs` folder beside them.
    """
    folder = index.parent.resolve()
    snapshots = [parent for parent in folder.parents if parent.name == "snapshots"]
    allowed = [folder, *(parent.parent / "blobs" for parent in snapshots)]
    target = file.resolve()
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{index} names {file.name}, a link to {target}, outside of its folder"
        )


def _is_safetensors(file: Path) -> bool:
    return file.name.endswith(".safetensors")


def _can_be_mapped(file: Path) -> bool:
    """Whether tensors can be read without the whole file: not so in torch's format before 1.6."""
    if _is_safetensors(file):
        return True
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of the tensors in a file."""
    if not _is_safetensors(file):
        return {
            name: StoredTensor(file, tuple(tensor.shape), tensor.dtype, str(tensor.dtype))
            for name, tensor in _load_torch_file(file).items()
        }
    header: dict[str, StoredTensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open cannot be iterated over
                tensor = opened.get_slice(name)
                dtype = str(tensor.get_dtype())
                shape = tuple(tensor.get_shape())
                header[name] = StoredTensor(file, shape, _DTYPES.get(dtype), dtype)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from error
    return header


@contextmanager
def _opened(file: Path) -> Iterator[_Take]:
    """Give a function that returns rows of a tensor: views of the mapped file."""
    if not _is_safetensors(file):
        tensors = _load_torch_file(file)
        # What is not mapped is in memory as a whole, and leaves it tensor by tensor.
        get = tensors.__getitem__ if _can_be_mapped(file) else tensors.pop

        def take_rows(name: str, start: int, stop: int) -> Tensor:
            tensor = get(name)
            return tensor[start:stop] if tensor.dim() else tensor

        yield take_rows
        return
    try:
        with safe_open(file, framework="pt") as opened:

            def take(name: str, start: int, stop: int) -> Tensor:
                rows = opened.get_slice(name)
                piece: Tensor = rows[start:stop] if rows.get_shape() else opened.get_tensor(name)
                return piece

            yield take
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from error


def _load_torch_file(file: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, without running code that the file may hold."""
    try:
        loaded: Any = torch.load(
            file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds more than tensors, which is not loaded: {error}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        # A zip archive cut short makes torch seek to places before the file's start.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(f"{file} is damaged or truncated: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{file} is no state dict: it must map names to tensors")
    return loaded


def write_checkpoint(
    state_dict: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as several files with an index.

    Every file is written under a temporary name beside its final one and renamed when all are
    complete. The weight files of an earlier save that the new ones do not replace are removed.

    Args:
        state_dict: tensors by name, on any device; views and shared storages become tensors of
            their own.
        folder: made when it is not there.
        max_shard_size: most bytes in one file, as a number or such as `"200MB"`; a tensor that is
            larger gets a file of its own.

    Returns:
        The weight files written, without the index.

    Raises:
        TypeError: a value is no tensor.
        ValueError: `max_shard_size` is no size, or a tensor is on the meta device.
        NotADirectoryError: the folder's path is a file.
    """
    if not state_dict:
        raise ValueError("state_dict is empty: there is nothing to write")
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; state_dict must hold tensors")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values to write")
    files = _split(state_dict, max_shard_size)
    folder = make_folder(folder)
    index = folder / SAFETENSORS_INDEX_NAME
    with ExitStack() as stack:
        staged = []
        for filename, names in files.items():
            file = stack.enter_context(staged_file(folder / filename))
            save_file(_standalone(state_dict, names), file.path, metadata={"format": "pt"})
            staged.append(file)
        if len(files) > 1:
            file = stack.enter_context(staged_file(index))
            file.path.write_text(_index_text(files, state_dict), encoding="utf-8")
            staged.append(file)
            # The index of an earlier save must not meet the new files.
            index.unlink(missing_ok=True)
        for file in staged:
            file.commit()
    written = {file.final for file in staged}
    for path in folder.iterdir():
        ours = path.name in (SAFETENSORS_NAME, index.name) or _SEVERAL.fullmatch(path.name)
        if ours and path not in written:
            path.unlink()
    return [folder / filename for filename in files]


def _split(state_dict: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, list[str]]:
    """Names of the tensors of each file, in order, keyed by file name."""
    from huggingface_hub import split_state_dict_into_shards_factory

    # Sizes alone, no storages: tensors that share one storage may go to different files.
    split = split_state_dict_into_shards_factory(
        {name: tensor.numel() * tensor.element_size() for name, tensor in state_dict.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_as_bytes(max_shard_size),
    )
    return split.filename_to_tensors


def _as_bytes(size: object) -> int:
    """A number of bytes from itself or a string such as `"5GB"`, in powers of 1000."""
    number = size if isinstance(size, int) else 0
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip().upper())):
        number = int(float(match[1]) * 1000 ** ("KMGT".index(match[2]) + 1))
    if isinstance(size, bool) or number < 1:
        raise ValueError(
            f"max_shard_size is {size!r}; it must be a positive number of bytes or such as '5GB'"
        )
    return number


def _standalone(state_dict: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share a storage."""
    tensors: dict[str, Tensor] = {}
    storages = set()
    for name in names:
        tensor = state_dict[name].detach().cpu()
        shared = tensor.untyped_storage().data_ptr() in storages
        if shared or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _index_text(files: Mapping[str, list[str]], state_dict: Mapping[str, Tensor]) -> str:
    tensors = state_dict.values()
    metadata = {
        "total_parameters": sum(tensor.numel() for tensor in tensors),
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
    weight_map = {name: filename for filename, names in files.items() for name in names}
    entries = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(entries, indent=2, sort_keys=True) + "\n"
