"""Batches of few different numbers of rows, for inference on a CPU.

oneDNN prepares a product for its number of rows, which takes longer than a small product itself,
and keeps what it has prepared: about half a megabyte. The utterances of a batch have a new number
of tokens together nearly every time, so those are filled up to one of few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.dispatch import implementation

_SIZES_AN_OCTAVE = 16
"""Numbers of rows between a power of two and the next."""


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


def rounded_up(num_rows: int) -> int:
    """The next of the few numbers: at most a sixteenth more, the same number below 32."""
    step = 1 << max(0, num_rows.bit_length() - _SIZES_AN_OCTAVE.bit_length())
    return -(-num_rows // step) * step
