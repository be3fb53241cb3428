"""Batches of few different numbers of rows, for inference on a CPU.

The utterances of a batch have a new number of tokens together nearly every time, so they are filled
up to one of few (`ops.cpu.sizes`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.cpu.sizes import rounded_up
from w2vbert_fast.ops.dispatch import implementation


def in_few_sizes(layout: PackedBatch, like: Tensor, *, fast: bool) -> PackedBatch:
    """A layout of the same utterances, filled up where the CPU's fast operations will run.

    Not where a gradient may be recorded, nor where PyTorch records or watches the calls.

    Args:
        layout: of the utterances alone.
        like: a tensor of the device and dtype that operations will work on.
        fast: whether fast operations are wanted.
    """
    if (
        not fast
        or torch.is_grad_enabled()
        or threads.are_watched()
        or implementation(like) != "cpu"
    ):
        return layout
    return layout.filled(rounded_up(layout.num_tokens))
