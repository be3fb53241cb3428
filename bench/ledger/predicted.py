"""Times of our kernels on GPUs that nobody has run them on: a prediction, with its range.

Linear layers by the model that chooses their tiles (`csrc_triton.gemm.config`), in clocks; all
others by the ledger's counts and by shares of the peak rates. Which shares is read off what others
published of kernels like these, and is an assumption here: `LIKELY`, and `BEST` and `WORST` around
it, which give the range.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.ledger.counts import seconds_on
from bench.ledger.forward import SDPA, trace_encoder
from bench.ledger.hardware import A100, H100, H200, L40S, Gpu
from bench.ledger.trace import Operation
from bench.ledger.workload import DTYPES, Workload
from bench.measure import OURS
from bench.table import Table
from csrc_triton.architectures import ARCHITECTURES
from csrc_triton.gemm.config import linear_config, predicted_clocks

PREDICTED = (A100, L40S, H100, H200)
LINEAR = ("w2vbert.linear", "w2vbert.linear_glu", "w2vbert.linear_stacked")


@dataclass(frozen=True)
class Shares:
    """Of peak rates, what kernels reach.

    Attributes:
        tiles: of the clocks that the model of tiles counts, at the clock of the peak rates: what a
            device's power allows, times how far the model is off.
        library: products of the vendor's library.
        attention: products inside attention.
        bandwidth: of device memory.
        vector: arithmetic outside of matrix units.
        between: seconds from a kernel's end to the next one's start.
    """

    tiles: float
    library: float
    attention: float
    bandwidth: float
    vector: float
    between: float


# Public measurements on an H100: Triton without descriptors 450 to 500 TFLOP/s at K = 1024, which
# is `tiles` of 0.80 to 0.89; cuBLAS 584, which is `library` of 0.59; attention with heads of 64,
# 0.25 to 0.45.
LIKELY = Shares(0.85, 0.62, 0.35, 0.82, 0.5, 1.5e-6)
BEST = Shares(0.93, 0.72, 0.45, 0.92, 0.7, 1e-6)
WORST = Shares(0.75, 0.52, 0.25, 0.70, 0.35, 3e-6)


def predicted_seconds(gpu: Gpu, operation: Operation, dtype: str, shares: Shares) -> float:
    """Of one call of an operation, with the pauses behind its kernels."""
    cost = operation.cost
    if operation.name in LINEAR:
        tokens, inner = map(int, re.findall(r"\d+", operation.shape)[:2])
        columns = cost.matrix_flops // (2 * tokens * inner)
        size = (tokens, columns, inner, DTYPES[dtype], gpu.arch, gpu.multiprocessors)
        clocks = predicted_clocks(linear_config(*size), *size)
        arithmetic = clocks / (_clock(gpu) * shares.tiles)
    else:
        share = shares.attention if "attention" in operation.name else shares.library
        arithmetic = max(
            cost.matrix_flops / (gpu.matrix[dtype] * share),
            cost.vector_flops / (gpu.vector * shares.vector),
            cost.double_flops / (gpu.double * shares.vector),
        )
    moving = cost.moved / (gpu.bandwidth * shares.bandwidth)
    return max(arithmetic, moving) + cost.launches * shares.between


def _clock(gpu: Gpu) -> float:
    """At which its matrix units have their peak rate, in hertz."""
    of_a_clock = 2 * ARCHITECTURES[gpu.arch].matrix_rate * gpu.multiprocessors
    return gpu.matrix["bf16"] / of_a_clock


def _times(gpu: Gpu, operations: Iterable[Operation], dtype: str) -> dict[str, float]:
    found = list(operations)
    times = {
        name: sum(predicted_seconds(gpu, operation, dtype, shares) for operation in found)
        for name, shares in (("likely", LIKELY), ("best", BEST), ("worst", WORST))
    }
    return times | {"bound": sum(seconds_on(gpu, o.cost, dtype) for o in found)}


def predictions(workload: Workload) -> dict[str, Any]:
    """Seconds of one forward pass of the encoder on each GPU: every kernel, all of them, the
    reference's sdpa path; and their bounds, at peak rates."""
    ours = trace_encoder(OURS, workload).operations
    theirs = trace_encoder(SDPA, workload).operations
    kinds: dict[str, list[Operation]] = {}
    for operation in ours:
        # What layers share, tables and copies, are launches and nothing else.
        is_ours = operation.name.startswith("w2vbert.") and operation.cost.launches == 1
        kind = f"{operation.name.removeprefix('w2vbert.')} {operation.shape}"
        kinds.setdefault(kind if is_ours else "others", []).append(operation)
    return {
        "kind": "a prediction, not a measurement",
        **workload.facts(),
        "kernels": {
            kind: {
                "calls": len(found),
                **{gpu.name: _times(gpu, found, workload.dtype) for gpu in PREDICTED},
            }
            for kind, found in kinds.items()
        },
        **{
            path: {gpu.name: _times(gpu, found, workload.dtype) for gpu in PREDICTED}
            for path, found in ((OURS, ours), (SDPA, theirs))
        },
    }


def _cell(times: Mapping[str, float]) -> str:
    likely, best, worst = (1e3 * times[name] for name in ("likely", "best", "worst"))
    digits = 1 if likely >= 1 else 2
    return f"{likely:.{digits}f} ({best:.{digits}f} to {worst:.{digits}f})"


def predictions_table(found: Mapping[str, Any]) -> Table:
    """Milliseconds; the longest kernel of the first GPU first."""
    names = [gpu.name for gpu in PREDICTED]
    kernels = sorted(
        found["kernels"].items(), key=lambda item: item[1][names[0]]["likely"], reverse=True
    )
    rows = [
        [kind, str(times["calls"]), *(_cell(times[name]) for name in names)]
        for kind, times in kernels
    ]
    for path in (OURS, SDPA):
        rows.append([f"all of {path}", "", *(_cell(found[path][name]) for name in names)])
    bounds = [f"{1e3 * found[OURS][name]['bound']:.1f}" for name in names]
    rows.append([f"bound of {OURS}, at peak rates", "", *bounds])
    return Table(["predicted, ms", "calls", *names], rows)


def render_predictions(found: Mapping[str, Any], operations: bool = False) -> str:
    """What the command prints; `operations` changes nothing, every kernel is listed anyway."""
    return (
        f"PREDICTED, not measured: {found['batch']} utterances x {found['frames']} frames, "
        f"{found['dtype']}, {found['layers']} layers. In brackets the range that the assumptions "
        "give; the host's own time is not in it.\n\n"
        f"{predictions_table(found)}"
    )
