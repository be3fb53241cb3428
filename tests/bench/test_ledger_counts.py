"""The ledger's bytes against those that the kernels move as they are executed.

Every operation runs on the virtual GPU, compiled for sm_80, and the 32-byte sectors that a launch
loads and stores are counted, each once: repeats are what caches are for. What launchers leave to
PyTorch is left out on both sides.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.ledger.cost import Call, Cost
from bench.ledger.ours import COSTS
from tests.helpers.operations import OF_WAVEFORMS, SMALL, WITH_KERNELS
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, Executor
from tools.virtual_gpu.global_memory import SECTOR, Checks
from tools.virtual_gpu.record import Launch
from w2vbert_fast.ops.dispatch import force
from w2vbert_fast.ops.examples import example

SIZES = replace(
    SMALL, lengths=(125, 125), width=64, inner=128, heads=1, head_size=64, vocabulary=64
)
NEAR = 0.05


def counted(name: str) -> tuple[list[Counts], Cost]:
    """What the launches of an operation do, and what the ledger says of them."""
    dtype = torch.float32 if name in OF_WAVEFORMS else torch.bfloat16
    changes = {}
    # Near an utterance's ends some distances have no keys, and its last tile is not full: of both a
    # ledger knows nothing, and in 30 s they are little.
    sizes = replace(SIZES, lengths=(384,)) if name.startswith("shaw_attention") else SIZES
    if name.startswith("conv_norm_act"):  # laid out as a model has it, so that no launch copies it
        weight = torch.randn(SIZES.taps, SIZES.width).to(dtype)
        changes = {"conv_weight": weight.t()}
    if name == "log_mel_filterbank":
        changes = {"waveforms": torch.randn(16000), "cu_seqlens": torch.tensor([0, 9000, 16000])}
        changes["cu_seqlens"] = changes["cu_seqlens"].int()
    counts: list[Counts] = []

    def note(launch: Launch, of_launch: Counts) -> None:
        counts.append(of_launch)

    operation = getattr(torch.ops.w2vbert, name)
    with torch.no_grad(), force("plain"):
        arguments = example(name, sizes, dtype=dtype, changes=changes)
    executor = Executor(Checks(garbage=False), note)
    with torch.no_grad(), activated("sm_80", executor), force("triton"):
        results = operation(*arguments)
    results = [results] if isinstance(results, Tensor) else list(results)
    schema = operation.default._schema.arguments
    values = {argument.name: argument.default_value for argument in schema}
    values |= dict(zip(values, arguments, strict=False))
    return counts, COSTS[name](Call(values, results, "sm_80", lambda function: Cost()))


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_bytes_are_those_that_are_moved(name: str) -> None:
    counts, cost = counted(name)
    read = SECTOR * sum(of_launch.first_loaded for of_launch in counts)
    written = SECTOR * sum(of_launch.first_stored for of_launch in counts)
    assert read > 0 and written > 0
    assert cost.read == pytest.approx(read, rel=NEAR)
    assert cost.written == pytest.approx(written, rel=NEAR)
