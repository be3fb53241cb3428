"""Every operation's kernels as they ship, compiled for a GPU and executed without one.

Forward and backward in bfloat16 with all checks of `tools.virtual_gpu`, at most 1.1 times as far
from float64 as plain PyTorch in bfloat16. The same for all sizes and dtypes:
`W2VBERT_GPU_TESTS=sm_90 pytest tests/gpu`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.launch import interpreting
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, Executor
from tools.virtual_gpu.record import Launch
from w2vbert_fast.ops.dispatch import force
from w2vbert_fast.ops.examples import Sizes, example
from w2vbert_fast.ops.operation import OPERATIONS

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing")

SIZES = Sizes(
    lengths=(5, 0, 19),
    width=48,
    inner=80,
    heads=2,
    head_size=16,
    left=64,
    right=8,
    taps=31,
    vocabulary=32,
)
OF_WAVEFORMS = {"log_mel_filterbank": 2e-3, "normalize_and_stack": 1e-5}
"""In float32 alone, and by how much they may be off."""
_ENOUGH_FOR_A_LARGEST = 256
"""Elements of a result. The largest error of fewer is a matter of luck; the mean one is not."""
# A work list, which depends on the target's tiles; attention makes its own.
NAMES = sorted(OPERATIONS.keys() - {"attention_tile_map"})


def leaves(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def in_float64(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_as_compiled(name: str, target: str) -> None:
    limit = OF_WAVEFORMS.get(name)
    dtype = torch.bfloat16 if limit is None else torch.float32
    with torch.no_grad(), force("plain"):
        arguments = example(name, SIZES, dtype=dtype)
        if name == "ctc_greedy":  # the first of equal logits counts
            arguments = (arguments[0].round(), *arguments[1:])
        operation = getattr(torch.ops.w2vbert, name)
        plain = leaves(operation(*arguments))
        exact = plain if limit is not None else leaves(operation(*in_float64(arguments)))
    launches: list[Launch] = []

    def counted(launch: Launch, counts: Counts) -> None:
        launches.append(launch)

    with torch.no_grad(), activated(target, Executor(counted=counted)), force("triton"):
        ours = leaves(operation(*arguments))
    assert launches and all(launch.target == target for launch in launches)
    assert len(ours) == len(exact) > 0
    for one, theirs, right in zip(ours, plain, exact, strict=True):
        assert one.shape == right.shape
        if not one.is_floating_point():
            assert torch.equal(one, right)
            continue
        error, allowed = ((x.double() - right).abs() for x in (one, theirs))
        if limit is not None:  # `exact` is plain PyTorch in float32
            assert error.max() <= limit
            continue
        # float32 results (statistics, gradients of weights) may be exact to their own rounding.
        rounding = torch.finfo(one.dtype).eps * right.abs()
        assert error.square().mean().sqrt() <= (
            1.1 * allowed.square().mean().sqrt() + rounding.square().mean().sqrt()
        )
        if one.numel() >= _ENOUGH_FOR_A_LARGEST:
            assert error.max() <= 1.1 * allowed.max() + rounding.max()
