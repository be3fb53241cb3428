"""What traces add up to: counts by operation, those of one layer, and roofline times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.ledger.cost import Cost
from bench.ledger.hardware import GPUS, Gpu
from bench.ledger.trace import Operation
from bench.ledger.workload import FRAME_SECONDS, Workload
from bench.table import Table


def layer_of(longer: Sequence[Operation], shorter: Sequence[Operation]) -> list[Operation]:
    """The operations of one layer: those that a model has more than one with a layer less.

    An operation that all layers share (a table made for each of them) has another shape in the
    longer model: what it costs more belongs to the layer, its launch does not.
    """
    extra = Counter(longer) - Counter(shorter)
    shared = Counter(shorter) - Counter(longer)
    layer: list[Operation] = []
    for operation in extra.elements():
        twin = next((other for other in shared if other.name == operation.name), None)
        if twin is None:
            layer.append(operation)
        else:
            shared -= Counter([twin])
            layer.append(replace(operation, cost=operation.cost - twin.cost))
    if shared:
        raise RuntimeError(f"a model of fewer layers has operations of its own: {list(shared)}")
    return layer


def seconds_on(gpu: Gpu, cost: Cost, dtype: str) -> float:
    """Roofline time of one operation: that of its bytes or of its FLOPs, whichever is longer."""
    return max(
        cost.moved / gpu.bandwidth,
        cost.matrix_flops / gpu.matrix[dtype],
        cost.vector_flops / gpu.vector,
        cost.double_flops / gpu.double,
    )


def roofline(gpu: Gpu, operations: Sequence[Operation], dtype: str) -> dict[str, Any]:
    """Sum of the operations' roofline times, and the kind of operation that takes most of it."""
    by_kind: dict[str, float] = {}
    bound: dict[str, str] = {}
    memory = 0.0
    for operation in operations:
        seconds = seconds_on(gpu, operation.cost, dtype)
        kind = f"{operation.name} {operation.shape}".strip()
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds
        moved = operation.cost.moved / gpu.bandwidth
        bound[kind] = "bandwidth" if moved >= seconds else "arithmetic"
        memory += seconds if moved >= seconds else 0.0
    total = sum(by_kind.values())
    largest = max(by_kind, key=lambda kind: by_kind[kind])
    return {
        "seconds": total,
        "share_bandwidth_bound": memory / total,
        "largest_term": largest,
        "largest_share": by_kind[largest] / total,
        "largest_bound": bound[largest],
    }


def rooflines(operations: Sequence[Operation], dtype: str) -> dict[str, Any]:
    """`roofline` on every GPU, by its name."""
    return {gpu.name: roofline(gpu, operations, dtype) for gpu in GPUS}


def counts(operations: Iterable[Operation]) -> dict[str, Any]:
    cost = sum((operation.cost for operation in operations), Cost())
    found = asdict(cost)
    del found["temporary"]
    return found | {"bytes": cost.moved, "flops": cost.flops}


def by_kind(operations: Iterable[Operation]) -> list[dict[str, Any]]:
    """Launches, bytes, those that a launch touches again, and FLOPs by operation and shape, those
    that move most first."""
    kinds: dict[tuple[str, str], Cost] = {}
    for operation in operations:
        key = (operation.name, operation.shape)
        kinds[key] = kinds.get(key, Cost()) + operation.cost
    rows = [
        {"operation": name, "shape": shape}
        | {"launches": cost.launches, "bytes": cost.moved, "again": cost.again}
        | {"flops": cost.flops}
        for (name, shape), cost in kinds.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])  # type: ignore[operator]


def kinds_table(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """Of what `by_kind` gives."""
    cells = [
        [
            f"{row['operation']} {row['shape']}",
            str(row["launches"]),
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['again'] / 1e6:.1f}" if row["again"] else "",
            f"{row['flops'] / 1e9:.1f}",
        ]
        for row in rows
    ]
    return Table(["", "launches", "MB", "MB again", "GFLOP"], cells, title=title)


def facts(schema: str, workload: Workload, *, reference: bool) -> dict[str, Any]:
    """What every ledger begins with: what was counted, by which versions, for which GPUs."""
    versions = {"torch": str(torch.__version__)}
    if reference:
        import transformers

        versions["transformers"] = transformers.__version__
    return {
        "schema": schema,
        "kind": "a model, not a measurement",
        **workload.facts(),
        "versions": versions,
        "gpus": [asdict(gpu) for gpu in GPUS],
    }


def described(ledger: Mapping[str, Any]) -> str:
    """What was counted, as a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in ledger["versions"].items())
    return (
        f"{ledger['batch']} utterances x {ledger['frames']} frames "
        f"({ledger['frames'] * FRAME_SECONDS:g} s each), {ledger['dtype']}, {ledger['layers']} "
        f"layers; our launch configurations for {ledger['arch']}; sdpa takes the "
        f"{ledger['sdpa']} kernel; the reference with{'' if ledger['mask'] else 'out'} attention "
        f"mask; {versions}"
    )
