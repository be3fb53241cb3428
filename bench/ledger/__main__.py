"""Cost ledger: launches, bytes, FLOPs and activation memory of the encoder on a GPU, counted.

    python -m bench.ledger --batch 16 --frames 1500 --dtype bf16 --layers 24

counts the kernels' path of this library and transformers' eager and sdpa attention under the same
shapes, and sets the counts against the peak rates of three GPUs; `--training` does so for a
training step, and `--predicted` predicts the kernels' times on four. `--count` counts what our
launches move where nobody has, which takes minutes; `--count-all` counts what the committed file
has, of kernels that are others by now. It is a model and not a measurement, and needs no GPU. What
is counted, and how: docs/inside/ledger.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.ledger.forward import OURS, ledger, render, trace_encoder
from bench.ledger.kernels import counting
from bench.ledger.predicted import predictions, render_predictions
from bench.ledger.training import RUNS, render_training, trace_training, training_ledger
from bench.ledger.workload import DTYPES, Workload

COUNTED = ((Workload(), True), (Workload(4), False), (Workload(2, 80), True))
"""What the committed file has rows of: the tables' workload, and those of the tests; and whether of
a training step too."""


def count_launches(workload: Workload, training: bool) -> None:
    """Counts what our launches of a forward pass, and of a training step, move where no row says.

    Args:
        workload: what is computed.
        training: whether a training step is, besides a forward pass.
    """
    # Layers are alike, but for the first and the last.
    workload = replace(workload, layers=min(workload.layers, 2))
    with counting((workload.frames,) * workload.batch):
        trace_encoder(OURS, workload)
        for path, policy in RUNS:
            if training and path == OURS:
                trace_training(path, policy, workload)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ledger",
        description="Count launches, bytes, FLOPs and activation memory (a model, no measurement).",
    )
    parser.add_argument("--batch", type=int, default=16, help="utterances (16)")
    parser.add_argument("--frames", type=int, default=1500, help="frames of each, 20 ms (1500)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--arch", default="sm_90", help="for our launch configurations (sm_90)")
    parser.add_argument(
        "--sdpa",
        choices=("efficient", "math"),
        default="efficient",
        help="the kernel behind the reference's sdpa (efficient)",
    )
    parser.add_argument(
        "--no-mask",
        action="store_true",
        help="give the reference no attention mask, as if no utterance were shorter",
    )
    parser.add_argument(
        "--training", action="store_true", help="of a training step instead of a forward pass"
    )
    parser.add_argument(
        "--predicted", action="store_true", help="times of the kernels, predicted, with a range"
    )
    parser.add_argument("--operations", action="store_true", help="list a layer's operations")
    parser.add_argument(
        "--count", action="store_true", help="count what launches move that nobody has counted"
    )
    parser.add_argument(
        "--count-all", action="store_true", help="count so what the committed file has, and end"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    options = parser.parse_args(argv)
    if options.predicted and options.training:
        parser.error("--predicted is of a forward pass; leave --training out")
    count: Callable[..., dict[str, Any]] = ledger
    show: Callable[..., str] = render
    if options.training:
        count, show = training_ledger, render_training
    if options.predicted:
        count, show = predictions, render_predictions
    try:
        workload = Workload(
            options.batch,
            options.frames,
            options.dtype,
            options.layers,
            arch=options.arch,
            sdpa=options.sdpa,
            mask=not options.no_mask,
        )
        if options.count_all:
            for counted, training in COUNTED:
                count_launches(counted, training)
            return 0
        if options.count:
            count_launches(workload, options.training)
        result = count(workload)
    except ValueError as error:
        parser.error(str(error))
    print(show(result, options.operations))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
