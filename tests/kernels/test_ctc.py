"""Greedy CTC decoding against its plain twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.ctc import CtcConfig, ctc_greedy
from w2vbert_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

LENGTHS = [0, 1, 2, 31, 63, 64, 65, 217, 0]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check(logits: Tensor, lengths: list[int], blank: int, config: CtcConfig | None = None) -> None:
    """The kernel's tokens are those of the twin, which takes the same utterances padded."""
    cu_seqlens = offsets(lengths)
    token_ids, counts = ctc_greedy(logits, cu_seqlens, blank, config=config)
    assert token_ids.shape == (len(logits),)
    assert counts.shape == (len(lengths),)
    assert token_ids.dtype == counts.dtype == torch.int32

    padded = torch.zeros(len(lengths), max(lengths, default=0), logits.shape[1], dtype=logits.dtype)
    for row, utterance in zip(padded, logits.split(lengths), strict=True):
        row[: len(utterance)] = utterance
    expected = ops.greedy_decode(padded, torch.tensor(lengths), blank=blank)
    assert counts.tolist() == [len(tokens) for tokens in expected]
    for row, tokens in zip(token_ids.split(lengths), expected, strict=True):
        assert row.tolist() == tokens + [-1] * (len(row) - len(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "blank"), [(1, 0), (2, 1), (3, 0), (32, 31), (33, 5)])
def test_ragged_lengths(vocabulary: int, blank: int, dtype: torch.dtype) -> None:
    # Whole numbers: many equals within a frame, many repeats between frames.
    logits = torch.randn(sum(LENGTHS), vocabulary).round().to(dtype)
    check(logits, LENGTHS, blank)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_repeats_across_blocks(length: int) -> None:
    for period in (1, 2, 3, 64, 1000):
        best = torch.arange(length) // period % 2
        check(torch.nn.functional.one_hot(best, 3).float(), [length], 2)


def test_utterances_do_not_run_into_each_other() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([1, 1, 1, 1, 2, 2]), 3).float()
    token_ids, counts = ctc_greedy(logits, offsets([2, 1, 3]), 0)
    assert counts.tolist() == [1, 1, 2]
    assert token_ids.tolist() == [1, -1, 1, 1, 2, -1]


@pytest.mark.parametrize("vocabulary", [1023, 1025, 2500])
def test_large_vocabulary(vocabulary: int) -> None:
    lengths = [3, 20, 0, 17]
    logits = torch.randn(sum(lengths), vocabulary)
    # The largest logit twice, in the same and in another block of columns: the lower id wins.
    logits[2, [700, 701]] = 9.0
    logits[3, [5, 1022]] = 9.0
    logits[4, vocabulary - 1] = 9.0
    logits[5, [0, vocabulary - 1]] = 9.0
    check(logits, lengths, 0)
    check(logits, lengths, 5, CtcConfig(4, 256, 16, 1))


def test_special_values() -> None:
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
        ]
    )
    logits[7, 2] = -logits[7, 2]  # NaN with its sign bit set
    check(logits.repeat_interleave(2, 0), [20], 2)
    for row in logits:
        check(row[None], [1], 7)


def test_strided_rows() -> None:
    buffer = torch.full((68, 40), math.inf)
    logits = buffer[2:67, 4:27]
    logits.copy_(torch.randn(65, 23))
    check(logits, [64, 1], 3)


def test_touches_nothing_past_an_end(guarded: Callable[[Tensor], Tensor]) -> None:
    logits = guarded(torch.randn(65, 30)[:, :23])
    token_ids, counts = ctc_greedy(logits, guarded(offsets([64, 1])), 3)
    expected = ops.greedy_decode(logits[None, :64], torch.tensor([64]), blank=3)
    assert token_ids[: counts[0]].tolist() == expected[0]


def test_writes_only_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each buffer that the launcher allocates lies in a larger one.
    owners = []

    def embedded(size: int, **options: Any) -> Tensor:
        owners.append(torch.full((size + 128,), -55, **options))
        return owners[-1][64 : size + 64]

    monkeypatch.setattr(torch, "empty", embedded)
    monkeypatch.setattr(torch, "empty_like", lambda like: embedded(len(like), dtype=like.dtype))
    logits = torch.randn(99, 5)
    token_ids, counts = ctc_greedy(logits, offsets([0, 66, 33, 0]), 4)
    assert (token_ids >= -1).all() and (counts >= 0).all()
    assert len(owners) == 3
    for owner in owners:
        assert (owner[:64] == -55).all() and (owner[-64:] == -55).all()


def test_rows_beyond_32_bit_offsets(tmp_path: Path) -> None:
    stride = 2**30 + 8
    # A sparse file: only the pages that are touched exist.
    size = 2 * stride + 32
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    logits = file.as_strided((3, 32), (stride, 1))
    logits.copy_(torch.randn(3, 32))
    token_ids, counts = ctc_greedy(logits, offsets([3]), 40)
    expected = ops.greedy_decode(logits.clone()[None], torch.tensor([3]), blank=40)
    assert token_ids[: counts[0]].tolist() == expected[0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_frames(lengths: list[int]) -> None:
    token_ids, counts = ctc_greedy(torch.empty(0, 8), offsets(lengths), 0)
    assert token_ids.shape == (0,)
    assert counts.tolist() == [0] * len(lengths)


def test_errors_name_the_argument() -> None:
    logits, cu_seqlens = torch.zeros(4, 8), offsets([4])
    with pytest.raises(ValueError, match=r"logits has shape \(8,\)"):
        ctc_greedy(logits[0], cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"logits is torch.int64"):
        ctc_greedy(logits.long(), cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"logits has strides"):
        ctc_greedy(torch.zeros(8, 4).T, cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"logits has no columns"):
        ctc_greedy(torch.zeros(4, 0), cu_seqlens, 0)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64; it must be int32"):
        ctc_greedy(logits, cu_seqlens.long(), 0)
    with pytest.raises(ValueError, match=r"cu_seqlens is empty"):
        ctc_greedy(logits, cu_seqlens[:0], 0)
    with pytest.raises(ValueError, match=r"cu_seqlens is on meta"):
        ctc_greedy(logits, cu_seqlens.to("meta"), 0)
