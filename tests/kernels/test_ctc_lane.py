"""Greedy CTC decoding on the device against its plain twin: ids, so exactly equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.ctc import ctc_greedy
from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, DTYPES, LENGTHS, LONG, choose, packed, random, strided
from w2vbert_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


def check(judge: Judge, logits: Tensor, lengths: list[int], blank: int) -> None:
    token_ids, counts = ctc_greedy(logits, packed(lengths), blank)
    assert token_ids.dtype == counts.dtype == torch.int32
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length, count in zip(starts, lengths, counts.tolist(), strict=True):
        frames = logits[start : start + length]
        if length > 0:
            (expected,) = ops.greedy_decode(frames[None], torch.tensor([length]), blank=blank)
        else:
            expected = []
        got = token_ids[start : start + length].tolist()
        assert got == expected + [-1] * (length - len(expected))
        assert count == len(expected)
    judge.counted("ctc_greedy", logits.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", choose([1, 3, 32, 33, 1025, 32_000], [1, 33, 1025]))
def test_ragged_batch(vocabulary: int, dtype: torch.dtype, judge: Judge) -> None:
    for lengths in (LENGTHS, [LONG]):
        # Whole numbers: many equals within a frame, many repeats between frames.
        logits = strided(random(sum(lengths), vocabulary, dtype=dtype).round())
        check(judge, logits, lengths, 0)
        check(judge, logits, lengths, vocabulary // 2)


def test_repeats_across_blocks(judge: Judge) -> None:
    for length in choose([1, 1023, 1024, 1025, 5000], [1, 63, 64, 65, 200]):
        for period in (1, 2, 3, choose(1024, 64), 100_000):
            best = torch.arange(length, device=DEVICE) // period % 2
            check(judge, torch.nn.functional.one_hot(best, 3).float(), [length], 2)


def test_special_values(judge: Judge) -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [
            [-inf, -inf, -inf],
            [-inf, -1.0, -inf],
            [-0.0, 0.0, -0.0],
            [inf, 3.0, inf],
            [0.0, nan, inf],
            [nan, nan, 1.0],
            [-1e-45, -2e-45, -1.0],
        ],
        device=DEVICE,
    )
    rows[4, 1] = -rows[4, 1]  # NaN with its sign bit set
    for row in rows:
        check(judge, row[None], [1], 7)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_frames(lengths: list[int]) -> None:
    token_ids, counts = ctc_greedy(torch.empty(0, 8, device=DEVICE), packed(lengths), 0)
    assert token_ids.shape == (0,)
    assert counts.tolist() == [0] * len(lengths)
