"""The cost ledger of one training step: forward pass, loss and backward pass; and AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.ledger.cost import Cost
from bench.ledger.counts import by_kind, counts, described, facts, kinds_table, layer_of, rooflines
from bench.ledger.forward import EAGER, OURS, SDPA, build
from bench.ledger.trace import AsOnAGpu, Operation, StepTrace, place, trace_step, without_data
from bench.ledger.workload import Workload
from bench.table import Table
from w2vbert_fast.models.recompute import Recompute

SCHEMA = "w2vbert-ledger-training/v1"
RUNS: tuple[tuple[str, str], ...] = (
    (OURS, "none"),
    (OURS, "attention"),
    (OURS, "layer"),
    (SDPA, "none"),
    (SDPA, "layer"),
    (EAGER, "none"),
    (EAGER, "layer"),
)
"""Paths, and what is computed again in the backward pass."""
KEPT_TARGET = 4
"""The reference's sdpa path keeps at least this many times the activation bytes that ours does."""
MOVED_TARGET = 3
"""And it moves at least this many times the bytes in a step."""

_STILL = {"layerdrop": 0.0, "apply_spec_augment": False}
_ADAMW_FLOPS = 14  # an element: two moments, their bias corrections, a root, a quotient, decay


def trace_training(path: str, policy: str, workload: Workload) -> StepTrace:
    """Forward pass of the bare model, mean square of its output as the loss, and backward pass.

    Args:
        path: one of `ledger.PATHS`.
        policy: "none", "layer" or, on our path, "attention".
        workload: shapes, dtype, depth. LayerDrop and SpecAugment, which depend on chance, are off
            unless its overrides say otherwise; the dropout of the convolution module, 0.1, is on.

    Raises:
        ValueError: an unknown path or policy.
    """
    model = build(path, {**_STILL, **workload.config})
    model.train()
    # A backward pass runs outside of `AsOnAGpu`; what is computed again must be inside.
    again = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), AsOnAGpu(workload.sdpa)),
    )
    if path == OURS:
        model.gradient_checkpointing_enable(policy=policy)  # type: ignore[operator]
    elif policy == "layer":
        model._set_gradient_checkpointing(True, again)  # type: ignore[operator]
    elif policy != "none":
        raise ValueError(f"policy is {policy!r}; {path} has 'none' and 'layer'")
    with (
        without_data(workload.arch, workload.sdpa, training=True),
        patch.object(Recompute, "run", staticmethod(again)),
    ):
        place(model, workload.torch_dtype, training=True)
        width = model.config.feature_projection_input_dim
        inputs = workload.inputs(width, reference=path != OURS)

        def loss() -> Tensor:
            output: Tensor = model(**inputs).last_hidden_state
            return output.float().square().mean()

        return trace_step(loss, workload.arch)


def adamw(parameters: int, itemsize: int) -> Cost:
    """Of a fused AdamW step: parameter, gradient and two moments read, all but the gradient
    written, each of one dtype; its few launches are not counted."""
    size = parameters * itemsize
    return Cost(0, 4 * size, 3 * size, vector_flops=_ADAMW_FLOPS * parameters)


def training_ledger(
    workload: Workload | None = None, runs: Sequence[tuple[str, str]] = RUNS
) -> dict[str, Any]:
    """Counts of a training step for every path and policy.

    Args:
        workload: what is counted; the default is `Workload()`.
        runs: pairs of path and policy.

    Raises:
        ValueError: an unknown path, policy or architecture.
    """
    workload = workload or Workload()

    @cache
    def run(path: str, policy: str, num_layers: int) -> StepTrace:
        return trace_training(path, policy, replace(workload, layers=num_layers))

    counted = []
    for path, policy in runs:
        whole, longer, shorter = (run(path, policy, count) for count in (workload.layers, 3, 2))
        layer = {
            "forward": layer_of(longer.forward.operations, shorter.forward.operations),
            "backward": layer_of(longer.backward.operations, shorter.backward.operations),
        }
        operations = [*whole.forward.operations, *whole.backward.operations]
        kept = longer.kept_bytes - shorter.kept_bytes
        counted.append(
            {
                "path": path,
                "policy": policy,
                "layer": {way: counts(found) for way, found in layer.items()}
                | {"kept_bytes": kept},
                "layer_operations": {way: by_kind(found) for way, found in layer.items()},
                "step": counts(operations),
                "kept_bytes": whole.kept_bytes,
                "peak_bytes": whole.peak_bytes,
                "roofline": rooflines(operations, workload.dtype),
            }
        )
    model = build(OURS, {**_STILL, **workload.config})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = Operation("adamw", "", adamw(parameters, workload.torch_dtype.itemsize))
    reference = any(path != OURS for path, _ in runs)
    return {
        **facts(SCHEMA, workload, reference=reference),
        "runs": counted,
        "adamw": {"parameters": parameters, **counts([optimizer])},
    }


def training_ratios(result: dict[str, Any], reference: str = SDPA) -> dict[str, float]:
    """How many times what our step keeps and moves the reference's does; nothing is recomputed."""
    by_run = {(run["path"], run["policy"]): run for run in result["runs"]}
    ours, theirs = by_run[OURS, "none"], by_run[reference, "none"]
    return {
        "kept_bytes": theirs["kept_bytes"] / ours["kept_bytes"],
        "bytes": theirs["step"]["bytes"] / ours["step"]["bytes"],
        "kept_bytes_layer": theirs["layer"]["kept_bytes"] / ours["layer"]["kept_bytes"],
    }


def render_training(result: dict[str, Any], operations: bool = False) -> str:
    """What the command prints."""
    rows = [
        [
            f"{run['path']}, recomputing {run['policy']}",
            f"{forward['launches']} + {backward['launches']}",
            f"{forward['bytes'] / 1e9:.2f} + {backward['bytes'] / 1e9:.2f}",
            f"{run['layer']['kept_bytes'] / 1e9:.3f}",
            f"{run['step']['bytes'] / 1e9:.0f}",
            f"{run['step']['flops'] / 1e12:.1f}",
            f"{run['kept_bytes'] / 1e9:.2f}",
            f"{run['peak_bytes'] / 1e9:.2f}",
        ]
        for run in result["runs"]
        for forward, backward in [(run["layer"]["forward"], run["layer"]["backward"])]
    ]
    header = ["", "launches/layer", "GB/layer", "kept GB/layer", "GB", "TFLOP", "kept GB"]
    gpus = [gpu["name"] for gpu in result["gpus"]]
    times = [
        [
            f"{run['path']}, recomputing {run['policy']}",
            *(f"{run['roofline'][gpu]['seconds'] * 1e3:.0f}" for gpu in gpus),
        ]
        for run in result["runs"]
    ]
    optimizer = result["adamw"]
    parts = [
        "COST LEDGER OF A TRAINING STEP: a model, not a measurement. Counted on tensors without "
        "data; nothing ran on a GPU.",
        described(result),
        Table([*header, "peak GB"], rows),
        f"AdamW, fused, moments in {result['dtype']}, the same for all: "
        f"{optimizer['parameters'] / 1e6:.0f} M parameters, {optimizer['bytes'] / 1e9:.2f} GB a "
        "step, not in the table. Kept: activations between forward and backward pass. Peak: with "
        "the parameters' gradients, without parameters and moments.",
        f"Roofline time of a step, ms, without AdamW.\n{Table(['', *gpus], times)}",
    ]
    present = {(run["path"], run["policy"]) for run in result["runs"]}
    for reference in (SDPA, EAGER):
        if {(OURS, "none"), (reference, "none")} <= present:
            ratio = training_ratios(result, reference)
            parts.append(
                f"{reference} against ours, nothing recomputed: {ratio['kept_bytes']:.2f}x the "
                f"activation bytes kept (target {KEPT_TARGET}x), {ratio['bytes']:.2f}x the bytes "
                f"moved (target {MOVED_TARGET}x)."
            )
    if operations:
        for run in result["runs"]:
            for way, found in run["layer_operations"].items():
                title = f"one layer {way}, {run['path']}, recomputing {run['policy']}"
                parts.append(kinds_table(title, found))
    return "\n\n".join(map(str, parts))
