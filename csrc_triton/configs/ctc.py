"""Blocks of the greedy CTC kernels: the vocabulary decides, the number of frames does not."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class CtcConfig:
    """Launch configuration of greedy CTC decoding.

    Attributes:
        block_frames: frames that a program of the argmax owns.
        block_vocabulary: logits of each frame that it compares in a step.
        block_collapse: frames that a program of the collapse takes in a step.
        num_warps: warps in a block, of both.
    """

    block_frames: int
    block_vocabulary: int
    block_collapse: int
    num_warps: int


def ctc_config(vocabulary: int, arch: str) -> CtcConfig:
    """16 logits a thread in flight, of as many frames as that takes.

    Args:
        vocabulary: logits of a frame, at least 1.
        arch: such as `"sm_90"`, `"gfx942"` or `"interpreter"`.
    """
    block_vocabulary = min(triton.next_power_of_2(vocabulary), 1024)
    if arch == "interpreter":
        return CtcConfig(32, block_vocabulary, 64, 1)
    return CtcConfig(max(1, 2048 // block_vocabulary), block_vocabulary, 1024, 4)
