"""The cost ledger of one forward pass of the encoder: ours, and transformers' eager and sdpa."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from .costs import Cost
from .hardware import GPUS, Gpu
from .trace import Operation, Trace, place, trace, without_data
from .workload import Workload, described

SCHEMA = "w2vbert-ledger/v1"

OURS = "w2vbert_fast"
EAGER = "transformers eager"
SDPA = "transformers sdpa"
PATHS = (OURS, SDPA, EAGER)

LAUNCH_TARGET = 3
"""The reference's sdpa path launches at least this many times what ours does, a layer."""
BYTES_TARGET = 5
"""And it moves at least this many times the bytes."""


def _ours(overrides: Mapping[str, Any]) -> nn.Module:
    from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertModel

    model = Wav2Vec2BertModel(Wav2Vec2BertConfig(**overrides))
    model.use_fast_kernels = True
    return model


def _pack_projections(model: nn.Module) -> None:
    """Lays the weights of query, key and value end to end, as the first inference call does.

    That call finds nothing to do on tensors without data, which have no address.
    """
    for module in model.modules():
        found = [getattr(module, f"linear_{name}", None) for name in "qkv"]
        layers = [layer for layer in found if isinstance(layer, nn.Linear)]
        if len(layers) != len(found):
            continue
        for name in ("weight", "bias"):
            given = [layer._parameters[name] for layer in layers]
            parts = [part for part in given if part is not None]
            if len(parts) == len(layers):
                buffer = torch.cat(parts)
                for layer, part in zip(layers, buffer.chunk(len(layers)), strict=True):
                    layer._parameters[name] = nn.Parameter(part, requires_grad=False)


def _reference(overrides: Mapping[str, Any], attention: str) -> nn.Module:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    config = Wav2Vec2BertConfig(**overrides)
    config._attn_implementation = attention
    model: nn.Module = Wav2Vec2BertModel(config)
    return model


def build(path: str, config: Mapping[str, Any]) -> nn.Module:
    """The bare model of one of `PATHS`, without values.

    Args:
        path: one of `PATHS`.
        config: what of its config is not the default.

    Raises:
        ValueError: an unknown path.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it must be one of {PATHS}")
    with torch.device("meta"):
        if path == OURS:
            return _ours(config)
        return _reference(config, path.removeprefix("transformers "))


def trace_encoder(path: str, workload: Workload) -> Trace:
    """One forward pass of the bare model over rows of valid frames.

    Args:
        path: one of `PATHS`.
        workload: shapes, dtype, depth.

    Raises:
        ValueError: an unknown path.
    """
    with torch.no_grad():
        model = build(path, workload.config)
    model.eval()
    # The kernels' path asks for CUDA tensors; PyTorch's own operations are the same on any device.
    device = "cuda" if path == OURS else "meta"
    with without_data(workload.sdpa):
        place(model, device, workload.torch_dtype)
        if path == OURS:
            _pack_projections(model)
        width = model.config.feature_projection_input_dim
        inputs = workload.inputs(width, device, reference=path != OURS)
        return trace(lambda: model(**inputs), workload.arch)


def _difference(longer: Trace, shorter: Trace) -> list[Operation]:
    """The operations of one layer: those that a model has more than one with a layer less.

    An operation that all layers share (a table made for each of them) has another shape in the
    longer model: what it costs more belongs to the layer, its launch does not.
    """
    extra = Counter(longer.operations) - Counter(shorter.operations)
    shared = Counter(shorter.operations) - Counter(longer.operations)
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


def _counts(operations: Sequence[Operation]) -> dict[str, Any]:
    cost = sum((operation.cost for operation in operations), Cost())
    counts = asdict(cost)
    del counts["temporary"]
    return counts | {"bytes": cost.moved, "flops": cost.flops}


def _by_kind(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, str], Cost] = {}
    for operation in operations:
        key = (operation.name, operation.shape)
        kinds[key] = kinds.get(key, Cost()) + operation.cost
    rows = [
        {
            "operation": name,
            "shape": shape,
            "launches": cost.launches,
            "bytes": cost.moved,
            "flops": cost.flops,
        }
        for (name, shape), cost in kinds.items()
    ]
    return sorted(rows, key=lambda row: -int(row["bytes"]))


def ledger(workload: Workload | None = None, paths: Sequence[str] = PATHS) -> dict[str, Any]:
    """Counts of every path, as the JSON file has them.

    Args:
        workload: what is counted; the default is `Workload()`. A layer's own counts come from
            models of 3 and 2 layers.
        paths: which of `PATHS`.

    Raises:
        ValueError: an unknown path or architecture.
    """
    workload = workload or Workload()
    counted = {}
    for path in paths:
        whole, longer, shorter = (
            trace_encoder(path, replace(workload, layers=layers))
            for layers in (workload.layers, 3, 2)
        )
        layer = _difference(longer, shorter)
        counted[path] = {
            "layer": _counts(layer),
            "layer_operations": _by_kind(layer),
            "encoder": _counts(whole.operations),
            "peak_activation_bytes": whole.peak_bytes,
            "roofline": {gpu.name: roofline(gpu, whole.operations, workload.dtype) for gpu in GPUS},
        }
    return {
        "schema": SCHEMA,
        "kind": "a model, not a measurement",
        **workload.facts(),
        "versions": _versions(paths),
        "gpus": [asdict(gpu) for gpu in GPUS],
        "paths": counted,
    }


def _versions(paths: Sequence[str]) -> dict[str, str]:
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    if any(path != OURS for path in paths):
        import transformers

        versions["transformers"] = transformers.__version__
    return versions


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """How many times our counts a layer the reference's sdpa path has."""
    ours, reference = (result["paths"][path]["layer"] for path in (OURS, SDPA))
    return {name: reference[name] / ours[name] for name in ("launches", "bytes", "flops")}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                 enumerate(zip(line, widths, strict=True))]  # fmt: skip
        return "  ".join(cells).rstrip()

    return "\n".join([text(lines[0]), "  ".join("-" * w for w in widths), *map(text, lines[1:])])


def render(result: dict[str, Any], operations: bool = False) -> str:
    """The tables that the command prints."""
    paths = result["paths"]
    parts = [
        "COST LEDGER: a model, not a measurement. Counted on tensors without data; nothing ran on "
        "a GPU.",
        described(result),
    ]
    rows = []
    for path, counts in paths.items():
        layer, whole = counts["layer"], counts["encoder"]
        rows.append(
            [
                path,
                str(layer["launches"]),
                f"{layer['bytes'] / 1e9:.2f}",
                f"{layer['flops'] / 1e12:.3f}",
                str(whole["launches"]),
                f"{whole['bytes'] / 1e9:.1f}",
                f"{whole['flops'] / 1e12:.2f}",
                f"{counts['peak_activation_bytes'] / 1e9:.2f}",
            ]
        )
    header = ["", "launches/layer", "GB/layer", "TFLOP/layer"]
    parts.append(_table([*header, "launches", "GB", "TFLOP", "peak activations GB"], rows))
    rows = [
        [
            f"{path}, {gpu}",
            f"{term['seconds'] * 1e3:.1f}",
            f"{term['share_bandwidth_bound']:.0%}",
            f"{term['largest_share']:.0%}, {term['largest_bound']}: {term['largest_term']}",
        ]
        for gpu in (gpu["name"] for gpu in result["gpus"])
        for path, counts in paths.items()
        for term in [counts["roofline"][gpu]]
    ]
    parts.append(
        "Roofline time of the encoder: every operation at the peak rate of what bounds it, no time "
        "between launches.\n" + _table(["", "ms", "bandwidth-bound", "largest term"], rows)
    )
    if OURS in paths and SDPA in paths:
        ratio = ratios(result)
        parts.append(
            f"A layer of {SDPA} against ours: {ratio['launches']:.2f}x the launches (target "
            f"{LAUNCH_TARGET}x), {ratio['bytes']:.2f}x the bytes (target {BYTES_TARGET}x), "
            f"{ratio['flops']:.2f}x the FLOPs."
        )
    if operations:
        for path, counts in paths.items():
            rows = [
                [
                    f"{row['operation']} {row['shape']}",
                    str(row["launches"]),
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['flops'] / 1e9:.1f}",
                ]
                for row in counts["layer_operations"]
            ]
            parts.append(_table([f"one layer, {path}", "launches", "MB", "GFLOP"], rows))
    return "\n\n".join(parts)
