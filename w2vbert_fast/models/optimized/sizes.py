"""Batches of few different numbers of rows, for inference on a CPU.

The utterances of a batch have a new number of tokens together nearly every time, so they are filled
up to one of few (`ops.cpu.sizes`). The further rows are nobody's: whoever sums values up with a
hook must not meet them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.layers import has_global_hooks, is_touched
from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.cpu.sizes import rounded_up
from w2vbert_fast.ops.dispatch import implementation


def in_few_sizes(
    layout: PackedBatch, like: Tensor, watched: Callable[[], bool], *, fast: bool
) -> PackedBatch:
    """A layout of the same utterances, filled up where the CPU's fast operations will run.

    Not where a gradient may be recorded, nor where PyTorch records or watches the calls.

    Args:
        layout: of the utterances alone.
        like: a tensor of the device and dtype that operations will work on.
        watched: whether somebody sees what goes into the modules that run; asked last.
        fast: whether fast operations are wanted.
    """
    if (
        not fast
        or torch.is_grad_enabled()
        or threads.are_watched()
        or implementation(like) != "cpu"
        or watched()
    ):
        return layout
    return layout.filled(rounded_up(layout.num_tokens))


def are_watched(modules: Iterable[nn.Module | None]) -> bool:
    """Whether somebody has touched one of these modules or a part of them."""
    if has_global_hooks():
        return True
    parts = [*modules]
    for part in parts:  # the list grows meanwhile; `modules()` takes three times as long
        if part is not None:
            if is_touched(part):
                return True
            parts += part._modules.values()
    return False
