"""Greedy CTC decoding against its plain twin: ids, so exactly equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.ctc import CtcConfig, ctc_greedy
from tests.kernels.judge import Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    LENGTHS,
    LONG,
    choose,
    in_memory_of_its_own,
    packed,
    random,
    strided,
)
from w2vbert_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

RAGGED = choose(LENGTHS, [0, 1, 2, 31, 63, 64, 65, 217, 0])
# The argmax multiplies nothing, so the interpreter has bf16 here as well.
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16) if INTERPRETED else DTYPES


def check(
    judge: Judge, logits: Tensor, lengths: list[int], blank: int, config: CtcConfig | None = None
) -> None:
    token_ids, counts = ctc_greedy(logits, packed(lengths), blank, config=config)
    assert token_ids.shape == (len(logits),) and counts.shape == (len(lengths),)
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


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "vocabulary", choose([1, 3, 32, 33, 1025, 32_000], [1, 2, 3, 32, 33, 1025])
)
def test_ragged_batch(vocabulary: int, dtype: torch.dtype, judge: Judge) -> None:
    for lengths in (RAGGED, [LONG]):
        # Whole numbers: many equals within a frame, many repeats between frames.
        logits = strided(random(sum(lengths), vocabulary, dtype=dtype).round())
        for blank in sorted({0, vocabulary // 2, vocabulary - 1}):
            check(judge, logits, lengths, blank)


def test_repeats_across_blocks(judge: Judge) -> None:
    for length in choose([1, 1023, 1024, 1025, 5000], [1, 2, 63, 64, 65, 200]):
        for period in (1, 2, 3, choose(1024, 64), 100_000):
            best = torch.arange(length, device=DEVICE) // period % 2
            check(judge, torch.nn.functional.one_hot(best, 3).float(), [length], 2)


def test_utterances_do_not_run_into_each_other() -> None:
    best = torch.tensor([1, 1, 1, 1, 2, 2], device=DEVICE)
    logits = torch.nn.functional.one_hot(best, 3).float()
    token_ids, counts = ctc_greedy(logits, packed([2, 1, 3]), 0)
    assert counts.tolist() == [1, 1, 2]
    assert token_ids.tolist() == [1, -1, 1, 1, 2, -1]


@pytest.mark.parametrize("vocabulary", [1023, 1025, 2500])
def test_large_vocabulary(vocabulary: int, judge: Judge) -> None:
    lengths = [3, 20, 0, 17]
    logits = random(sum(lengths), vocabulary, dtype=torch.float32)
    # The largest logit twice, in the same and in another block of columns: the lower id wins.
    logits[2, [700, 701]] = 9.0
    logits[3, [5, 1022]] = 9.0
    logits[4, vocabulary - 1] = 9.0
    logits[5, [0, vocabulary - 1]] = 9.0
    check(judge, logits, lengths, 0)
    check(judge, logits, lengths, 5, CtcConfig(4, 256, 16, 1))


def test_special_values(judge: Judge) -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor(
        [
            [-inf, -inf, -inf],
            [-inf, -1.0, -inf],
            [-0.0, 0.0, -0.0],
            [0.0, -0.0, -1.0],
            [inf, 3.0, inf],
            [0.0, nan, inf],
            [nan, nan, 1.0],
            [1.0, 2.0, nan],
            [-1e-45, -2e-45, -1.0],
            [-3e38, -inf, -3.1e38],
        ],
        device=DEVICE,
    )
    logits[5, 1] = -logits[5, 1]  # NaN with its sign bit set
    logits[7, 2] = -logits[7, 2]
    check(judge, logits.repeat_interleave(2, 0), [20], 2)
    for row in logits:
        check(judge, row[None], [1], 7)


def test_touches_nothing_past_an_end(guarded: Callable[[Tensor], Tensor], judge: Judge) -> None:
    logits = guarded(random(65, 30, dtype=torch.float32)[:, :23])
    token_ids, counts = ctc_greedy(logits, guarded(packed([64, 1])), 3)
    expected = ops.greedy_decode(logits[None, :64], torch.tensor([64]), blank=3)
    assert token_ids[: counts[0]].tolist() == expected[0]
    judge.counted("ctc_greedy/guarded", torch.float32)


def test_writes_only_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each buffer that the launcher allocates lies in a larger one.
    owners = []

    def embedded(size: int, **options: Any) -> Tensor:
        owners.append(torch.full((size + 128,), -55, **options))
        return owners[-1][64 : size + 64]

    logits, cu_seqlens = random(99, 5, dtype=torch.float32), packed([0, 66, 33, 0])
    monkeypatch.setattr(torch, "empty", embedded)
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda like: embedded(len(like), dtype=like.dtype, device=like.device),
    )
    token_ids, counts = ctc_greedy(logits, cu_seqlens, 4)
    monkeypatch.undo()
    assert (token_ids >= -1).all() and (counts >= 0).all()
    assert len(owners) == 3
    for owner in owners:
        assert (owner[:64] == -55).all() and (owner[-64:] == -55).all()


@in_memory_of_its_own
def test_rows_beyond_32_bit_offsets(tmp_path: Path) -> None:
    stride = 2**30 + 8
    # A sparse file: only the pages that are touched exist.
    size = 2 * stride + 32
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    logits = file.as_strided((3, 32), (stride, 1))
    logits.copy_(torch.randn(3, 32))
    token_ids, counts = ctc_greedy(logits, packed([3]), 40)
    expected = ops.greedy_decode(logits.clone()[None], torch.tensor([3]), blank=40)
    assert token_ids[: counts[0]].tolist() == expected[0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_frames(lengths: list[int]) -> None:
    token_ids, counts = ctc_greedy(torch.empty(0, 8, device=DEVICE), packed(lengths), 0)
    assert token_ids.shape == (0,)
    assert counts.tolist() == [0] * len(lengths)


def test_errors_name_the_argument() -> None:
    logits, cu_seqlens = torch.zeros(4, 8, device=DEVICE), packed([4])
    with pytest.raises(ValueError, match=r"logits has shape \(8,\)"):
        ctc_greedy(logits[0], cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"logits is torch.int64"):
        ctc_greedy(logits.long(), cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"logits has strides"):
        ctc_greedy(torch.zeros(8, 4, device=DEVICE).T, cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"logits has no columns"):
        ctc_greedy(torch.zeros(4, 0, device=DEVICE), cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64; it must be int32"):
        ctc_greedy(logits, cu_seqlens.long(), 0)
    with pytest.raises(ValueError, match=r"cu_seqlens is empty"):
        ctc_greedy(logits, cu_seqlens[:0], 0)
    with pytest.raises(ValueError, match=r"cu_seqlens is on meta"):
        ctc_greedy(logits, cu_seqlens.to("meta"), 0)
