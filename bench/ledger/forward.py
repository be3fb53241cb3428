"""The cost ledger of one forward pass of the encoder: ours, and transformers' eager and sdpa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench.ledger.counts import by_kind, counts, described, facts, kinds_table, layer_of, rooflines
from bench.ledger.trace import Trace, place, trace, without_data
from bench.ledger.workload import Workload
from bench.measure import OURS
from bench.table import Table

SCHEMA = "w2vbert-ledger/v1"

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
        model = build(path, workload.config).eval()
    with without_data(workload.arch, workload.sdpa):
        place(model, workload.torch_dtype)
        if path == OURS:
            _pack_projections(model)
        width = model.config.feature_projection_input_dim
        inputs = workload.inputs(width, reference=path != OURS)
        return trace(lambda: model(**inputs), workload.arch)


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
        layer = layer_of(longer.operations, shorter.operations)
        counted[path] = {
            "layer": counts(layer),
            "layer_operations": by_kind(layer),
            "encoder": counts(whole.operations),
            "peak_activation_bytes": whole.peak_bytes,
            "roofline": rooflines(whole.operations, workload.dtype),
        }
    reference = any(path != OURS for path in paths)
    return {**facts(SCHEMA, workload, reference=reference), "paths": counted}


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """How many times our counts a layer the reference's sdpa path has."""
    ours, reference = (result["paths"][path]["layer"] for path in (OURS, SDPA))
    return {name: reference[name] / ours[name] for name in ("launches", "bytes", "flops")}


def counts_table(result: dict[str, Any]) -> Table:
    """A layer, the encoder and its activations, of each path."""
    rows = []
    for path, found in result["paths"].items():
        layer, whole = found["layer"], found["encoder"]
        rows.append(
            [
                path,
                str(layer["launches"]),
                f"{layer['bytes'] / 1e9:.2f}",
                f"{layer['flops'] / 1e12:.3f}",
                str(whole["launches"]),
                f"{whole['bytes'] / 1e9:.1f}",
                f"{whole['flops'] / 1e12:.2f}",
                f"{found['peak_activation_bytes'] / 1e9:.2f}",
            ]
        )
    header = ["", "launches/layer", "GB/layer", "TFLOP/layer", "launches", "GB", "TFLOP"]
    return Table([*header, "peak activations GB"], rows)


def roofline_table(result: dict[str, Any], gpus: Sequence[str]) -> Table:
    """Roofline times of the encoder of each path on some of the GPUs."""
    rows = [
        [
            f"{path}, {gpu}",
            f"{term['seconds'] * 1e3:.1f}",
            f"{term['share_bandwidth_bound']:.0%}",
            f"{term['largest_share']:.0%}, {term['largest_bound']}: {term['largest_term']}",
        ]
        for gpu in gpus
        for path, found in result["paths"].items()
        for term in [found["roofline"][gpu]]
    ]
    return Table(["", "ms", "bandwidth-bound", "largest term"], rows, text=(3,))


def render(result: dict[str, Any], operations: bool = False) -> str:
    """What the command prints."""
    parts = [
        "COST LEDGER: a model, not a measurement. Counted on tensors without data; nothing ran on "
        "a GPU.",
        described(result),
        counts_table(result),
        "Roofline time of the encoder: every operation at the peak rate of what bounds it, no time "
        f"between launches.\n{roofline_table(result, [gpu['name'] for gpu in result['gpus']])}",
    ]
    if OURS in result["paths"] and SDPA in result["paths"]:
        ratio = ratios(result)
        parts.append(
            f"A layer of {SDPA} against ours: {ratio['launches']:.2f}x the launches (target "
            f"{LAUNCH_TARGET}x), {ratio['bytes']:.2f}x the bytes (target {BYTES_TARGET}x), "
            f"{ratio['flops']:.2f}x the FLOPs."
        )
    if operations:
        for path, found in result["paths"].items():
            parts.append(kinds_table(f"one layer, {path}", found["layer_operations"]))
    return "\n\n".join(map(str, parts))
