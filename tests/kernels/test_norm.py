"""The norm kernels against the plain operations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.norm import layer_norm, residual_double_layer_norm, residual_layer_norm
from tests.kernels.conftest import POISON_INTEGER
from w2vbert_fast.ops import norm as plain

EPS = 1e-5
LENGTHS = (1, 2, 31, 63, 64, 65, 217)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def norm_weights(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(width).to(dtype), torch.randn(width).to(dtype)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """fp32: within 1e-5 of the largest element."""
    assert ours.shape == exact.shape
    torch.testing.assert_close(
        ours.double(), exact, rtol=0, atol=1e-5 * max(1.0, exact.abs().max().item())
    )


def assert_as_accurate(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """fp16: an error at most 1.1 times that of the plain operation in fp16."""
    assert ours.dtype == theirs.dtype
    ours_error = (ours.double() - exact).abs()
    their_error = (theirs.double() - exact).abs()
    assert ours_error.square().mean().sqrt() <= 1.1 * their_error.square().mean().sqrt()
    assert ours_error.max() <= 1.1 * their_error.max()


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("width", [16, 48, 65])
def test_layer_norm(num_tokens: int, width: int) -> None:
    x = 3.0 * torch.randn(num_tokens, width) + 5.0
    weight, bias = norm_weights(width, torch.float32)
    ours = layer_norm(x, weight, bias, EPS)
    assert_close(ours, plain.layer_norm(*wide(x, weight, bias), EPS))


@pytest.mark.parametrize("width", [1, 1000, 8192])
def test_widths(width: int) -> None:
    x = torch.randn(3, width)
    weight, bias = norm_weights(width, torch.float32)
    assert_close(layer_norm(x, weight, bias, EPS), plain.layer_norm(*wide(x, weight, bias), EPS))


def test_offset_rows_keep_their_precision() -> None:
    # With variance as the mean of squares less the squared mean, nothing would be left of this.
    x = torch.randn(5, 64) + 4096.0
    weight, bias = torch.ones(64), torch.zeros(64)
    ours = layer_norm(x, weight, bias, EPS).double()
    exact = plain.layer_norm(*wide(x, weight, bias), EPS)
    assert (ours - exact).abs().max() < 1e-3


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_layer_norm(num_tokens: int, scale: float) -> None:
    residual, x = torch.randn(2, num_tokens, 48)
    weight, bias = norm_weights(48, torch.float32)
    y, z = residual_layer_norm(residual, x, scale, weight, bias, EPS)
    exact_residual, exact_x, exact_weight, exact_bias = wide(residual, x, weight, bias)
    exact = plain.residual_layer_norm(exact_residual, exact_x, scale, exact_weight, exact_bias, EPS)
    assert_close(y, exact[0])
    assert_close(z, exact[1])


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_residual_double_layer_norm(num_tokens: int) -> None:
    residual, x = torch.randn(2, num_tokens, 48)
    first, second = norm_weights(48, torch.float32), norm_weights(48, torch.float32)
    z1, z2 = residual_double_layer_norm(residual, x, 0.5, *first, *second, EPS)
    exact_z1 = plain.residual_layer_norm(*wide(residual, x), 0.5, *wide(*first), EPS)[1]
    assert_close(z1, exact_z1)
    assert_close(z2, plain.layer_norm(exact_z1, *wide(*second), EPS))


@pytest.mark.parametrize("num_tokens", [63, 217])
def test_half_precision(num_tokens: int) -> None:
    half = torch.float16
    residual, x = torch.randn(2, num_tokens, 80).to(half)
    first, second = norm_weights(80, half), norm_weights(80, half)

    exact = plain.layer_norm(*wide(x, *first), EPS)
    assert_as_accurate(layer_norm(x, *first, EPS), plain.layer_norm(x, *first, EPS), exact)
    ours = residual_layer_norm(residual, x, 0.5, *first, EPS)
    theirs = plain.residual_layer_norm(residual, x, 0.5, *first, EPS)
    exact_residual, exact_x, *exact_first = wide(residual, x, *first)
    exact_pair = plain.residual_layer_norm(exact_residual, exact_x, 0.5, *exact_first, EPS)
    for our, their, wanted in zip(ours, theirs, exact_pair, strict=True):
        assert_as_accurate(our, their, wanted)

    ours = residual_double_layer_norm(residual, x, 0.5, *first, *second, EPS)
    theirs_second = plain.layer_norm(theirs[1], *second, EPS)
    assert_as_accurate(ours[0], theirs[1], exact_pair[1])
    exact_second = plain.layer_norm(exact_pair[1], *wide(*second), EPS)
    assert_as_accurate(ours[1], theirs_second, exact_second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_double_norm_equals_two_launches(dtype: torch.dtype) -> None:
    residual, x = torch.randn(2, 33, 72).to(dtype)
    first, second = norm_weights(72, dtype), norm_weights(72, dtype)
    z1, z2 = residual_double_layer_norm(residual, x, 1.0, *first, *second, EPS)
    expected_z1 = residual_layer_norm(residual, x, 1.0, *first, EPS)[1]
    assert torch.equal(z1, expected_z1)
    assert torch.equal(z2, layer_norm(expected_z1, *second, EPS))


def test_strided_rows_and_untouched_surroundings() -> None:
    # Rows and columns around both inputs are NaN; those around the outputs must stay as they are.
    frame = torch.full((2, 9, 80), float("nan"))
    frame[:, 1:-1, 8:-8] = torch.randn(2, 7, 64)
    residual, x = frame[0, 1:-1, 8:-8], frame[1, 1:-1, 8:-8]
    first, second = norm_weights(64, torch.float32), norm_weights(64, torch.float32)
    buffers = torch.full((2, 9, 96), float(POISON_INTEGER))
    out = (buffers[0, 1:-1, 16:-16], buffers[1, 1:-1, 16:-16])
    arguments = (residual, x, 0.5, *first, *second, EPS)
    expected = residual_double_layer_norm(*arguments)
    residual_double_layer_norm(*arguments, out=out)
    for got, wanted in zip(out, expected, strict=True):
        assert torch.equal(got, wanted)
        got.fill_(POISON_INTEGER)
    assert torch.equal(buffers, torch.full_like(buffers, POISON_INTEGER))


def test_residual_may_be_overwritten() -> None:
    residual, x = torch.randn(2, 7, 64)
    weight, bias = norm_weights(64, torch.float32)
    expected = residual_layer_norm(residual, x, 0.5, weight, bias, EPS)
    z = torch.empty_like(x)
    residual_layer_norm(residual, x, 0.5, weight, bias, EPS, out=(residual, z))
    assert torch.equal(residual, expected[0])
    assert torch.equal(z, expected[1])


def test_no_tokens() -> None:
    empty = torch.empty(0, 64)
    norm = torch.ones(64), torch.zeros(64)
    assert layer_norm(empty, *norm, EPS).shape == (0, 64)
    for z in residual_layer_norm(empty, empty, 1.0, *norm, EPS):
        assert z.shape == (0, 64)
    for z in residual_double_layer_norm(empty, empty, 1.0, *norm, *norm, EPS):
        assert z.shape == (0, 64)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(6, 32)
    x[2, 5] = float("nan")
    z = layer_norm(x, torch.ones(32), torch.zeros(32), EPS)
    assert z[2].isnan().all()
    assert z[[0, 1, 3, 4, 5]].isfinite().all()


def test_arguments_that_do_not_fit() -> None:
    x, weight = torch.randn(4, 32), torch.ones(32)
    with pytest.raises(ValueError, match=r"x has shape \(32,\)"):
        layer_norm(x[0], weight, weight, EPS)
    with pytest.raises(ValueError, match=r"bias has shape \(31,\); it must be \(32,\)"):
        layer_norm(x, weight, weight[:31], EPS)
    with pytest.raises(ValueError, match=r"residual is torch\.float16; it must be float32"):
        residual_layer_norm(x.half(), x, 1.0, weight, weight, EPS)
    with pytest.raises(ValueError, match="x has strides"):
        layer_norm(torch.randn(32, 4).t(), weight, weight, EPS)
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        residual_layer_norm(x, x, 1.0, weight, weight, EPS, out=(x, x[:3]))
    with pytest.raises(ValueError, match="width is 8193"):
        layer_norm(torch.zeros(1, 8193), torch.zeros(8193), torch.zeros(8193), EPS)
