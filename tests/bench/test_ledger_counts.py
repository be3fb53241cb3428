"""What launches move, without their arithmetic, is what the same launches move as they are executed
whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.ledger.trace import without_memory
from tests.helpers.operations import OF_WAVEFORMS, SMALL, WITH_KERNELS
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, Executor
from tools.virtual_gpu.footprint import footprint
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.record import Launch
from w2vbert_fast.ops.dispatch import force
from w2vbert_fast.ops.examples import example

UNCHECKED = Checks(races=False, written_once=False, written_whole=False, garbage=False)
# Where a frame begins comes through memory that asynchronous copies share.
NOT_SLICED = {"log_mel_filterbank"}


OF_VALUES = {"ctc_greedy"}  # whose values decide what is stored


def without_values(launch: Launch) -> Launch:
    """The launch whose floating-point tensors have no memory."""
    converted = without_memory()
    arguments = []
    for argument in launch.arguments:
        value = argument.value
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = converted(value)
        arguments.append(replace(argument, value=value))
    return replace(launch, arguments=arguments)


@pytest.mark.parametrize("name", sorted(set(WITH_KERNELS) - NOT_SLICED))
def test_counts_are_those_of_the_whole(name: str) -> None:
    dtype = torch.float32 if name in OF_WAVEFORMS else torch.bfloat16
    with torch.no_grad(), force("plain"):
        arguments = example(name, SMALL, dtype=dtype)
    launches: list[str] = []

    def compare(launch: Launch, whole: Counts) -> None:
        launches.append(launch.kernel)
        assert whole.first_loaded > 0 and whole.first_stored > 0
        found = footprint(launch if name in OF_VALUES else without_values(launch))
        found.instructions = whole.instructions
        assert found == whole, launch.kernel

    with torch.no_grad(), activated("sm_90", Executor(UNCHECKED, compare)), force("triton"):
        getattr(torch.ops.w2vbert, name)(*arguments)
    assert launches
