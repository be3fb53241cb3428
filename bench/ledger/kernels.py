"""The bytes that our launches move, counted and kept.

A launch is what its launcher asks of Triton, and its bytes are those of the 32-byte sectors that it
loads and stores as compiled, found for all of its blocks (`tools.virtual_gpu.footprint`). That
takes minutes, so counts are kept in `FILE`, which `python -m bench.ledger --count` writes. A row is
of one launch, whose kernel must be what it was.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.ledger.cost import Cost
from csrc_triton.attention import build_tile_map, tile_bound
from tools.virtual_gpu.footprint import footprint
from tools.virtual_gpu.global_memory import SECTOR
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.requests import Uncompiled

FILE = Path(__file__).resolve().parents[1] / "results" / "ledger_kernels.json"

Row = dict[str, Any]


@functools.cache
def source_of(kernel: str) -> str:
    """A digest of what a kernel such as `csrc_triton.ctc:_ctc_argmax_kernel` is compiled from: its
    code and that of the functions that it calls, without comments, and Triton's version."""
    module, _, name = kernel.partition(":")
    todo = [getattr(importlib.import_module(module), name)]
    digest = hashlib.sha256(triton.__version__.encode())
    seen = set()
    for function in todo:
        if function in seen:
            continue
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
        digest.update(ast.dump(tree).encode())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        called = (function.fn.__globals__.get(name) for name in sorted(names))
        todo += [value for value in called if isinstance(value, triton.JITFunction)]
    return digest.hexdigest()[:16]


def _shapes(request: Uncompiled) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in request.tensors.items()}


def _name(request: Uncompiled) -> str:
    """Equal for launches that move the same: where a storage begins and ends is left out, and where
    in it the first tensor begins, but for the place in a sector."""
    places: dict[int, tuple[int, int]] = {}
    arguments = request.described()["arguments"]
    for name, tensor in request.tensors.items():
        start = int(tensor.storage_offset()) * tensor.element_size()
        storage = tensor.untyped_storage()._cdata
        number, first = places.setdefault(storage, (len(places), start // SECTOR * SECTOR))
        del arguments[name]["storage_bytes"], arguments[name]["storage_offset"]
        arguments[name]["place"] = [number, start - first]
    facts = {**request.described(), "arguments": arguments}
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row(request: Uncompiled, launch: str, lengths: Sequence[int]) -> Row:
    started = time.monotonic()
    counts = footprint(_with_offsets(request, lengths))
    first = {"read": counts.first_loaded, "written": counts.first_stored}
    asked = {"read": counts.loaded_sectors, "written": counts.stored_sectors}
    dtype = next(a.type for a in request.arguments if a.type.startswith("*")).removeprefix("*")
    print(f"{request.kernel} {request.grid}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return {
        "kernel": request.kernel,
        "target": request.target,
        "dtype": dtype,
        "grid": list(request.grid),
        "constants": {
            name: value for name, value in request.constants.items() if value is not None
        },
        "tensors": _shapes(request),
        "launch": launch,
        "source": source_of(request.kernel),
        **{name: SECTOR * sectors for name, sectors in first.items()},
        **{f"{name}_again": SECTOR * (asked[name] - first[name]) for name in first},
    }


def _with_offsets(request: Uncompiled, lengths: Sequence[int]) -> Launch:
    """A launch whose offsets and tiles are those of utterances of these lengths: they say where its
    blocks go. All else stays without memory."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    contents = {"cu_seqlens_ptr": offsets}
    if (tiles := request.tensors.get("tile_map_ptr")) is not None:
        size = (len(lengths), sum(lengths), max(lengths))
        blocks = (request.constants["BLOCK_M"], request.constants.get("BLOCK_N", 0))
        block = next((b for b in blocks if tile_bound(*size, b) == len(tiles)), blocks[0])
        contents["tile_map_ptr"] = build_tile_map(
            offsets, block, num_tokens=size[1], max_seqlen=size[2]
        )
    launch = request.launch()
    arguments = []
    for argument in launch.arguments:
        value = contents.get(argument.name, argument.value)
        if isinstance(value, Tensor) and value.shape != argument.value.shape:
            raise ValueError(
                f"{request.kernel}: {argument.name} is {list(argument.value.shape)}; of utterances "
                f"of {list(lengths)} it would be {list(value.shape)}"
            )
        arguments.append(replace(argument, value=value))
    return replace(launch, arguments=arguments)


class Kernels:
    """Rows of counts.

    Args:
        path: their file.
        lengths: tokens of each utterance, of which launches without a row are counted; None: such a
            launch is an error.
    """

    def __init__(self, path: Path, lengths: Sequence[int] | None = None) -> None:
        self.path, self.lengths = path, lengths
        found = json.loads(path.read_text()) if path.exists() else []
        self.rows: dict[str, Row] = {row["launch"]: row for row in found}
        self.costs: dict[Any, Cost] = {}
        """Of operations, which many layers call with the like of the same arguments."""

    def cost(self, request: Uncompiled) -> Cost:
        """Of one launch.

        Raises:
            ValueError: it has no row, or its kernel is another by now.
        """
        launch = _name(request)
        row = self.rows.get(launch)
        if row is None or row["source"] != source_of(request.kernel):
            if self.lengths is None:
                why = "nobody has counted" if row is None else "is another since somebody counted"
                raise ValueError(
                    f"{request.kernel} for {request.target}: {why} what it moves of "
                    f"{_shapes(request)}; python -m bench.ledger --count, with the same arguments "
                    "besides, counts it"
                )
            row = self.rows[launch] = _row(request, launch, self.lengths)
            self._write()
        return Cost(
            launches=1,
            read=row["read"],
            written=row["written"],
            again=row["read_again"] + row["written_again"],
        )

    def _write(self) -> None:
        """What is of today's kernels, a line each."""
        current = [row for row in self.rows.values() if row["source"] == source_of(row["kernel"])]
        current.sort(key=lambda row: (row["kernel"], row["target"], row["grid"], row["launch"]))
        lines = ",\n".join(json.dumps(row) for row in current)
        self.path.write_text(f"[\n{lines}\n]\n")


_open: list[Kernels] = []


def kernels() -> Kernels:
    """The rows that count."""
    if not _open:
        _open.append(Kernels(FILE))
    return _open[-1]


@contextmanager
def counting(lengths: Sequence[int], path: Path | None = None) -> Iterator[None]:
    """Launches that have no row inside are counted, of utterances of these lengths, and written.

    Args:
        lengths: tokens of each utterance.
        path: where; None: `FILE`.
    """
    _open.append(Kernels(FILE if path is None else path, lengths))
    try:
        yield
    finally:
        _open.clear()
