"""The convolution kernel against the plain operation in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from csrc_triton.conv import conv_norm_act
from tests.kernels.judge import Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    LENGTHS,
    LONG,
    WIDTH,
    Sentinels,
    choose,
    packed,
    random,
    strided,
    wide,
)
from w2vbert_fast.ops import conv as plain

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

EPS = 1e-5


def make(tokens: int, channels: int, taps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, convolution weight, norm weight, norm bias."""
    return [
        strided(random(tokens, channels, dtype=dtype)),
        random(channels, taps, dtype=dtype, scale=taps**-0.5),
        random(channels, dtype=dtype),
        random(channels, dtype=dtype),
    ]


def check(
    judge: Judge,
    tensors: list[Tensor],
    activation: str | None,
    lengths: Sequence[int],
    name: str = "",
) -> None:
    cu_seqlens = packed(lengths)
    plain_activation = activation or "linear"
    exact = plain.conv_norm_act(*wide(*tensors), EPS, plain_activation, cu_seqlens)
    theirs = plain.conv_norm_act(*tensors, EPS, plain_activation, cu_seqlens)
    ours = conv_norm_act(*tensors, EPS, activation, cu_seqlens)
    judge(f"conv_norm_act{name}", ours, exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [3, 4, 31, 63])
def test_ragged_batch(taps: int, dtype: torch.dtype, judge: Judge) -> None:
    lengths = choose(LENGTHS, [0, 1, 2, 31, 0, 63, 64, 65, 0] if taps == 31 else LENGTHS)
    check(judge, make(sum(lengths), WIDTH, taps, dtype), "silu", lengths)
    if taps == 31:
        for lengths in ([1], [LONG], [1 + i % 3 for i in range(choose(300, 19))]):
            check(judge, make(sum(lengths), WIDTH, taps, dtype), "silu", lengths)


@pytest.mark.parametrize(
    ("lengths", "channels", "taps"),
    [
        ((70, 3), 16, 63),
        ((217, 300), 16, 3),
        ((1, 1, 1), 40, 9),
        ((17,), 1, 3),
        ((20,), 1024, 5),
        ((9,), 2048, 3),
    ],
)
def test_shapes(lengths: Sequence[int], channels: int, taps: int, judge: Judge) -> None:
    check(judge, make(sum(lengths), channels, taps), "swish", lengths)


def test_rows_that_are_not_read(judge: Judge) -> None:
    tensors, cu_seqlens = make(59, 24, 5), packed((0, 2, 17, 40))
    seqused_k = torch.tensor([0, 1, 16, 20], dtype=torch.int32, device=DEVICE)
    unread = torch.tensor([1, 18, *range(39, 59)], device=DEVICE)
    read = wide(tensors[0].index_fill(0, unread, 0.0), *tensors[1:])
    exact = plain.conv_norm_act(*read, EPS, "silu", cu_seqlens)
    tensors[0][unread] = float("nan")
    ours = conv_norm_act(*tensors, EPS, "silu", cu_seqlens, seqused_k=seqused_k)
    judge("conv_norm_act/unread", ours, exact)


@pytest.mark.parametrize("batch", [1, 2, 3, 19])
def test_every_utterance_is_found(batch: int, judge: Judge) -> None:
    lengths = [(7 * i + 1) % 20 for i in range(batch)]  # one of 19 has none
    check(judge, make(sum(lengths), 16, 5), None, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "selu", None])
def test_activations(activation: str | None, dtype: torch.dtype, judge: Judge) -> None:
    tensors = make(choose(300, 24), WIDTH, 3, dtype)
    check(judge, tensors, activation, [len(tensors[0]) - 5, 5], f"/{activation}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", choose([48, 1000, 2048], [17]))
def test_widths(channels: int, dtype: torch.dtype, judge: Judge) -> None:
    check(judge, make(40, channels, 5, dtype), "silu", [30, 10])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_utterances_do_not_see_each_other(dtype: torch.dtype, judge: Judge) -> None:
    lengths = choose([length for length in LENGTHS if length > 0], [20, 35, 18])
    x, *weights = make(sum(lengths), WIDTH, choose(31, 9), dtype)
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
    result = conv_norm_act(*tensors, EPS, "silu", cu_seqlens, out=sentinels.out)
    assert result is sentinels.out
    assert torch.equal(sentinels.out, expected)
    assert sentinels.untouched()
    judge.counted("conv_norm_act/out", dtype)


def test_weight_layouts() -> None:
    (x, weight, *norm), cu_seqlens = make(21, 24, 5), packed([21])
    expected = conv_norm_act(x, weight, *norm, EPS, "silu", cu_seqlens)
    tap_major = weight.t().contiguous().t()
    assert torch.equal(conv_norm_act(x, tap_major, *norm, EPS, "silu", cu_seqlens), expected)
    scattered = weight.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    assert torch.equal(conv_norm_act(x, scattered, *norm, EPS, "silu", cu_seqlens), expected)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(lengths: Sequence[int]) -> None:
    tensors = make(0, WIDTH, 31)
    assert conv_norm_act(*tensors, EPS, "silu", packed(lengths)).shape == (0, WIDTH)


@pytest.mark.parametrize("taps", [31, 5])
def test_nan_reaches_the_next_taps_of_its_utterance_only(taps: int) -> None:
    tensors, cu_seqlens = make(54, WIDTH, taps), packed([44, 10])
    end = min(44, 20 + taps - 1 + 1)
    tensors[0][20] = float("nan")
    bad = conv_norm_act(*tensors, EPS, "silu", cu_seqlens).isnan()
    assert bad.all(1).tolist() == bad.any(1).tolist() == [20 <= row < end for row in range(54)]
    tensors[0][20] = 0.0
    tensors[0][3] = float("inf")
    bad = ~conv_norm_act(*tensors, EPS, "silu", cu_seqlens).isfinite()
    assert bad.any(1).tolist() == [3 <= row < 3 + taps for row in range(54)]


def test_offsets_beyond_the_tokens_write_nothing_there() -> None:
    tensors = make(40, 16, 3)
    expected = conv_norm_act(*tensors, EPS, "silu", packed([40]))
    buffer = torch.full((60, 16), -55.0, device=DEVICE)
    conv_norm_act(*tensors, EPS, "silu", packed([55]), out=buffer[:40])
    assert torch.equal(buffer[:32], expected[:32])
    assert (buffer[40:] == -55.0).all()


def test_arguments_that_do_not_fit() -> None:
    (x, weight, norm_weight, norm_bias), cu_seqlens = make(8, 16, 3), packed([8])
    norm = norm_weight, norm_bias
    with pytest.raises(ValueError, match=r"conv_weight has shape \(15, 3\); it must be \(16, "):
        conv_norm_act(x, weight[:15], *norm, EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match=r"conv_weight is torch\.int64"):
        conv_norm_act(x, weight.long(), *norm, EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match="norm_bias has shape"):
        conv_norm_act(x, weight, norm_weight, norm_bias[:3], EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch\.int64; it must be int32"):
        conv_norm_act(x, weight, *norm, EPS, "silu", cu_seqlens.long())
    with pytest.raises(ValueError, match=r"seqused_k has shape \(2,\)"):
        conv_norm_act(x, weight, *norm, EPS, "silu", cu_seqlens, seqused_k=cu_seqlens)
    with pytest.raises(ValueError, match="activation is 'mish'"):
        conv_norm_act(x, weight, *norm, EPS, "mish", cu_seqlens)
    with pytest.raises(ValueError, match="kernel_size is 64"):
        many = torch.zeros(16, 64, device=DEVICE)
        conv_norm_act(x, many, *norm, EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        conv_norm_act(x, weight, *norm, EPS, "silu", cu_seqlens, out=x.half())
