"""The cost ledger of one training step: forward pass, loss and backward pass, and AdamW by itself.

    python -m bench.ledger --training

As `ledger`, on tensors without data; what is counted, and how: docs/inside/ledger.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csrc_triton import architectures
from w2vbert_fast.models.recompute import Checkpointing
from w2vbert_fast.ops import dispatch

from .costs import Cost
from .forward import (
    EAGER,
    OURS,
    SDPA,
    _by_kind,
    _counts,
    _difference,
    _table,
    _versions,
    build,
    roofline,
)
from .hardware import GPUS
from .trace import (
    Operation,
    StepTrace,
    Trace,
    WithoutDevice,
    place,
    trace_step,
    without_data,
)
from .workload import DTYPES, Workload, described

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
    # A backward pass runs outside of `WithoutDevice`; what is computed again must be inside.
    again = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), WithoutDevice(workload.sdpa)),
    )
    if path == OURS:
        model.gradient_checkpointing_enable(policy=policy)  # type: ignore[operator]
    elif policy == "layer":
        model._set_gradient_checkpointing(True, again)  # type: ignore[operator]
    elif policy != "none":
        raise ValueError(f"policy is {policy!r}; {path} has 'none' and 'layer'")
    with ExitStack() as stack:
        stack.enter_context(without_data(workload.sdpa, training=True))
        # PyTorch built without CUDA has no autograd for tensors that claim to be there.
        stack.enter_context(patch.object(dispatch, "_forced", "triton"))
        stack.enter_context(
            patch.object(architectures, "architecture", lambda device: workload.arch)
        )
        stack.enter_context(patch.object(Checkpointing, "run", staticmethod(again)))
        place(model, "meta", workload.torch_dtype, training=True)
        width = model.config.feature_projection_input_dim
        inputs = workload.inputs(width, "meta", reference=path != OURS)

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
        forward = _difference(longer.forward, shorter.forward)
        backward = _difference(longer.backward, shorter.backward)
        operations = [*whole.forward.operations, *whole.backward.operations]
        counted.append(
            {
                "path": path,
                "policy": policy,
                "layer": {
                    "forward": _counts(forward),
                    "backward": _counts(backward),
                    "kept_bytes": longer.kept_bytes - shorter.kept_bytes,
                },
                "layer_operations": {
                    "forward": _by_kind(forward),
                    "backward": _by_kind(backward),
                },
                "step": _counts(operations),
                "kept_bytes": whole.kept_bytes,
                "peak_bytes": whole.peak_bytes,
                "roofline": {gpu.name: roofline(gpu, operations, workload.dtype) for gpu in GPUS},
            }
        )
    model = build(OURS, {**_STILL, **workload.config})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "schema": SCHEMA,
        "kind": "a model, not a measurement",
        **workload.facts(),
        "versions": _versions([path for path, _ in runs]),
        "gpus": [asdict(gpu) for gpu in GPUS],
        "runs": counted,
        "adamw": {
            "parameters": parameters,
            **_counts(_adamw_trace(parameters, workload.dtype).operations),
        },
    }


def _adamw_trace(parameters: int, dtype: str) -> Trace:
    cost = adamw(parameters, DTYPES[dtype].itemsize)
    return Trace([Operation("adamw", str(parameters), cost)])


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
    """The tables that the command prints."""
    parts = [
        "COST LEDGER OF A TRAINING STEP: a model, not a measurement. Counted on tensors without "
        "data; nothing ran on a GPU.",
        described(result),
    ]
    rows = [
        [
            f"{run['path']}, recomputing {run['policy']}",
            f"{run['layer']['forward']['launches']} + {run['layer']['backward']['launches']}",
            f"{run['layer']['forward']['bytes'] / 1e9:.2f} + "
            f"{run['layer']['backward']['bytes'] / 1e9:.2f}",
            f"{run['layer']['kept_bytes'] / 1e9:.3f}",
            f"{run['step']['bytes'] / 1e9:.0f}",
            f"{run['step']['flops'] / 1e12:.1f}",
            f"{run['kept_bytes'] / 1e9:.2f}",
            f"{run['peak_bytes'] / 1e9:.2f}",
        ]
        for run in result["runs"]
    ]
    header = ["", "launches/layer", "GB/layer", "kept GB/layer", "GB", "TFLOP", "kept GB"]
    parts.append(_table([*header, "peak GB"], rows))
    optimizer = result["adamw"]
    parts.append(
        f"AdamW, fused, moments in {result['dtype']}, the same for all: "
        f"{optimizer['parameters'] / 1e6:.0f} M parameters, {optimizer['bytes'] / 1e9:.2f} GB a "
        "step, not in the table. Kept: activations between forward and backward pass. Peak: with "
        "the parameters' gradients, without parameters and moments."
    )
    rows = [
        [
            f"{run['path']}, recomputing {run['policy']}",
            *(f"{run['roofline'][gpu['name']]['seconds'] * 1e3:.0f}" for gpu in result["gpus"]),
        ]
        for run in result["runs"]
    ]
    names = [gpu["name"] for gpu in result["gpus"]]
    parts.append("Roofline time of a step, ms, without AdamW.\n" + _table(["", *names], rows))
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
            for direction, found in run["layer_operations"].items():
                rows = [
                    [
                        f"{row['operation']} {row['shape']}",
                        str(row["launches"]),
                        f"{row['bytes'] / 1e6:.1f}",
                        f"{row['flops'] / 1e9:.1f}",
                    ]
                    for row in found
                ]
                title = f"one layer {direction}, {run['path']}, recomputing {run['policy']}"
                parts.append(_table([title, "launches", "MB", "GFLOP"], rows))
    return "\n\n".join(parts)
