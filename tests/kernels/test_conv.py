"""The convolution kernel against the plain operation in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from csrc_triton.conv import conv_norm_act
from tests.kernels.conftest import POISON_INTEGER
from w2vbert_fast.ops import conv as plain

EPS = 1e-5
RAGGED = (0, 1, 2, 31, 0, 63, 64, 65, 0)


def packed(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(
    lengths: Sequence[int], channels: int, taps: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """`x`, convolution weight, norm weight and norm bias; and the offsets."""
    tensors = [
        torch.randn(sum(lengths), channels),
        torch.randn(channels, taps) / taps**0.5,
        torch.randn(channels),
        torch.randn(channels),
    ]
    return [tensor.to(dtype) for tensor in tensors], packed(lengths)


def exactly(tensors: list[Tensor], activation: str | None, cu_seqlens: Tensor) -> Tensor:
    wide = [tensor.double() for tensor in tensors]
    return plain.conv_norm_act(*wide, EPS, activation or "linear", cu_seqlens)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """fp32: within 1e-5 of the largest element."""
    assert ours.shape == exact.shape
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("taps", [3, 4, 5, 31])
def test_ragged_batch(taps: int) -> None:
    tensors, cu_seqlens = make(RAGGED, 24, taps)
    ours = conv_norm_act(*tensors, EPS, "silu", cu_seqlens)
    assert_close(ours, exactly(tensors, "silu", cu_seqlens))


@pytest.mark.parametrize(
    ("lengths", "channels", "taps"),
    [
        ((70, 3), 16, 63),
        ((217, 300), 16, 3),
        ((1,), 16, 31),
        ((1, 1, 1), 40, 9),
        ((17,), 1, 3),
        ((20,), 1024, 5),
        ((9,), 2048, 3),
    ],
)
def test_shapes(lengths: Sequence[int], channels: int, taps: int) -> None:
    tensors, cu_seqlens = make(lengths, channels, taps)
    ours = conv_norm_act(*tensors, EPS, "swish", cu_seqlens)
    assert_close(ours, exactly(tensors, "swish", cu_seqlens))


def test_rows_that_are_not_read() -> None:
    tensors, cu_seqlens = make((0, 2, 17, 40), 24, 5)
    seqused_k = torch.tensor([0, 1, 16, 20], dtype=torch.int32)
    unread = [1, 18, *range(39, 59)]
    exact = exactly(
        [tensors[0].index_fill(0, torch.tensor(unread), 0.0), *tensors[1:]], "silu", cu_seqlens
    )
    tensors[0][unread] = float("nan")
    ours = conv_norm_act(*tensors, EPS, "silu", cu_seqlens, seqused_k=seqused_k)
    assert_close(ours, exact)


@pytest.mark.parametrize("batch", [1, 2, 3, 19])
def test_every_utterance_is_found(batch: int) -> None:
    lengths = [(7 * i + 1) % 20 for i in range(batch)]  # one of 19 has none
    tensors, cu_seqlens = make(lengths, 16, 5)
    ours = conv_norm_act(*tensors, EPS, None, cu_seqlens)
    assert_close(ours, exactly(tensors, None, cu_seqlens))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "selu", None])
def test_activations(activation: str | None) -> None:
    tensors, cu_seqlens = make((19, 5), 16, 3)
    ours = conv_norm_act(*tensors, EPS, activation, cu_seqlens)
    assert_close(ours, exactly(tensors, activation, cu_seqlens))


def test_half_precision() -> None:
    tensors, cu_seqlens = make((63, 2), 48, 31, torch.float16)
    exact = exactly(tensors, "silu", cu_seqlens)
    ours = (conv_norm_act(*tensors, EPS, "silu", cu_seqlens).double() - exact).abs()
    theirs = (plain.conv_norm_act(*tensors, EPS, "silu", cu_seqlens).double() - exact).abs()
    assert ours.square().mean() <= 1.1**2 * theirs.square().mean()
    assert ours.max() <= 1.1 * theirs.max()


def test_utterances_do_not_see_each_other() -> None:
    tensors, cu_seqlens = make((20, 35, 18), 16, 9)
    whole = conv_norm_act(*tensors, EPS, "silu", cu_seqlens)
    alone = [
        conv_norm_act(part, *tensors[1:], EPS, "silu", packed([part.shape[0]]))
        for part in tensors[0].split([20, 35, 18])
    ]
    assert torch.equal(whole, torch.cat(alone))


def test_nan_reaches_the_next_taps_of_its_utterance_only() -> None:
    tensors, cu_seqlens = make((24, 10), 16, 5)
    tensors[0][20] = float("nan")
    bad = conv_norm_act(*tensors, EPS, "silu", cu_seqlens).isnan()
    assert bad.all(1).tolist() == [20 <= row < 24 for row in range(34)]
    assert torch.equal(bad.all(1), bad.any(1))
    tensors[0][20] = 0.0
    tensors[0][3] = float("inf")
    bad = ~conv_norm_act(*tensors, EPS, "silu", cu_seqlens).isfinite()
    assert bad.any(1).tolist() == [3 <= row < 8 for row in range(34)]


def test_strided_rows_and_untouched_surroundings() -> None:
    tensors, cu_seqlens = make((21, 6), 24, 5)
    expected = conv_norm_act(*tensors, EPS, "silu", cu_seqlens)
    frame = torch.full((2, 31, 40), float("nan"))
    frame[0, 2:-2, 8:-8] = tensors[0]
    buffer = torch.full((31, 56), float(POISON_INTEGER))
    out = buffer[2:-2, 16:-16]
    result = conv_norm_act(frame[0, 2:-2, 8:-8], *tensors[1:], EPS, "silu", cu_seqlens, out=out)
    assert result is out
    assert torch.equal(out, expected)
    out.fill_(POISON_INTEGER)
    assert torch.equal(buffer, torch.full_like(buffer, POISON_INTEGER))


def test_weight_layouts() -> None:
    tensors, cu_seqlens = make((21,), 24, 5)
    expected = conv_norm_act(*tensors, EPS, "silu", cu_seqlens)
    x, weight, *norm = tensors
    tap_major = weight.t().contiguous().t()
    assert torch.equal(conv_norm_act(x, tap_major, *norm, EPS, "silu", cu_seqlens), expected)
    scattered = weight.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    assert torch.equal(conv_norm_act(x, scattered, *norm, EPS, "silu", cu_seqlens), expected)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens(lengths: Sequence[int]) -> None:
    tensors, cu_seqlens = make(lengths, 16, 3)
    assert conv_norm_act(*tensors, EPS, "silu", cu_seqlens).shape == (0, 16)


def test_offsets_beyond_the_tokens_write_nothing_there() -> None:
    tensors, _ = make((40,), 16, 3)
    expected = conv_norm_act(*tensors, EPS, "silu", packed([40]))
    buffer = torch.full((60, 16), float(POISON_INTEGER))
    conv_norm_act(*tensors, EPS, "silu", packed([55]), out=buffer[:40])
    assert torch.equal(buffer[:32], expected[:32])
    assert torch.equal(buffer[40:], torch.full((20, 16), float(POISON_INTEGER)))


def test_arguments_that_do_not_fit() -> None:
    (x, weight, norm_weight, norm_bias), cu_seqlens = make((8,), 16, 3)
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
        conv_norm_act(x, torch.randn(16, 64), *norm, EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        conv_norm_act(x, weight, *norm, EPS, "silu", cu_seqlens, out=x.half())
