"""The convolution kernel on the device, at model size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.conv import conv_norm_act
from tests.gpu.lane import (
    DTYPES,
    LENGTHS,
    LONG,
    WIDTH,
    Judge,
    Sentinels,
    choose,
    packed,
    random,
    strided,
    wide,
)
from w2vbert_fast.ops import conv as plain

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_buffers")]

EPS = 1e-5


def make(tokens: int, channels: int, taps: int, dtype: torch.dtype) -> list[Tensor]:
    """x, convolution weight, norm weight, norm bias."""
    return [
        strided(random(tokens, channels, dtype=dtype)),
        random(channels, taps, dtype=dtype, scale=taps**-0.5),
        random(channels, dtype=dtype),
        random(channels, dtype=dtype),
    ]


def check(
    judge: Judge, tensors: list[Tensor], activation: str, lengths: list[int], name: str = ""
) -> None:
    cu_seqlens = packed(lengths)
    exact = plain.conv_norm_act(*wide(*tensors), EPS, activation, cu_seqlens)
    theirs = plain.conv_norm_act(*tensors, EPS, activation, cu_seqlens)
    kernel_activation = None if activation == "linear" else activation
    ours = conv_norm_act(*tensors, EPS, kernel_activation, cu_seqlens)
    judge(f"conv_norm_act{name}", ours, exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [3, 4, 31, 63])
def test_ragged_batch(taps: int, dtype: torch.dtype, judge: Judge) -> None:
    check(judge, make(sum(LENGTHS), WIDTH, taps, dtype), "silu", LENGTHS)
    if taps == 31:
        for lengths in ([1], [LONG], [1 + i % 3 for i in range(choose(300, 19))]):
            check(judge, make(sum(lengths), WIDTH, taps, dtype), "silu", lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "selu", "linear"])
def test_activations(activation: str, dtype: torch.dtype, judge: Judge) -> None:
    tensors = make(choose(300, 19), WIDTH, 3, dtype)
    check(judge, tensors, activation, [len(tensors[0]) - 5, 5], f"/{activation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", choose([48, 1000, 2048], [17]))
def test_widths(channels: int, dtype: torch.dtype, judge: Judge) -> None:
    check(judge, make(40, channels, 5, dtype), "silu", [30, 10])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_utterances_do_not_see_each_other(dtype: torch.dtype, judge: Judge) -> None:
    lengths = [length for length in LENGTHS if length > 0]
    x, *weights = make(sum(lengths), WIDTH, 31, dtype)
    whole = conv_norm_act(x, *weights, EPS, "silu", packed(lengths))
    alone = [
        conv_norm_act(part, *weights, EPS, "silu", packed([len(part)])) for part in x.split(lengths)
    ]
    assert torch.equal(whole, torch.cat(alone))
    judge.counted("conv_norm_act/alone", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_its_output_and_nothing_else(dtype: torch.dtype, judge: Judge) -> None:
    tensors, cu_seqlens = make(33, WIDTH, 31, dtype), packed([30, 0, 3])
    expected = conv_norm_act(*tensors, EPS, "silu", cu_seqlens)
    sentinels = Sentinels(33, WIDTH, dtype)
    conv_norm_act(*tensors, EPS, "silu", cu_seqlens, out=sentinels.out)
    assert torch.equal(sentinels.out, expected)
    assert sentinels.untouched()
    judge.counted("conv_norm_act/out", dtype)


def test_no_tokens() -> None:
    for lengths in ([], [0, 0]):
        tensors = make(0, WIDTH, 31, torch.float32)
        assert conv_norm_act(*tensors, EPS, "silu", packed(lengths)).shape == (0, WIDTH)


def test_nan_reaches_the_next_taps_of_its_utterance_only() -> None:
    tensors = make(54, WIDTH, 31, torch.float32)
    tensors[0][20] = float("nan")
    bad = conv_norm_act(*tensors, EPS, "silu", packed([44, 10])).isnan()
    assert bad.all(1).tolist() == bad.any(1).tolist() == [20 <= row < 44 for row in range(54)]
