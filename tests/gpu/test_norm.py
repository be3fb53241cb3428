"""The norm kernels on the device, at model size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.norm import layer_norm, residual_double_layer_norm, residual_layer_norm
from tests.gpu.lane import DTYPES, LENGTHS, LONG, Judge, Sentinels, choose, random, strided, wide
from w2vbert_fast.ops import norm as plain

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_buffers")]

EPS = 1e-5
WIDTHS = choose([1024, 4096, 160, 48, 8192], [48, 65])
TOKENS = choose([1, 2, 65, sum(LENGTHS), LONG], [1, 33])


def make(tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Residual, x, two norms' weights and biases."""
    rows = [strided(random(tokens, width, dtype=dtype, scale=2.0)) for _ in range(2)]
    return rows + [random(width, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in TOKENS:
        _, x, weight, bias, *_ = make(tokens, width, dtype)
        exact = plain.layer_norm(*wide(x, weight, bias), EPS)
        theirs = plain.layer_norm(x, weight, bias, EPS)
        judge("layer_norm", layer_norm(x, weight, bias, EPS), exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_residual_norms(scale: float, width: int, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in TOKENS:
        residual, x, *norms = make(tokens, width, dtype)
        exact = plain.residual_layer_norm(*wide(residual, x), scale, *wide(*norms[:2]), EPS)
        theirs = plain.residual_layer_norm(residual, x, scale, *norms[:2], EPS)
        ours = residual_layer_norm(residual, x, scale, *norms[:2], EPS)
        judge("residual_layer_norm/sum", ours[0], exact[0], theirs[0])
        judge("residual_layer_norm", ours[1], exact[1], theirs[1])

        ours = residual_double_layer_norm(residual, x, scale, *norms, EPS)
        judge("double_layer_norm/first", ours[0], exact[1], theirs[1])
        exact_second = plain.layer_norm(exact[1], *wide(*norms[2:]), EPS)
        theirs_second = plain.layer_norm(theirs[1], *norms[2:], EPS)
        judge("double_layer_norm", ours[1], exact_second, theirs_second)
        # The second norm is taken of what is stored: two launches give the same bits.
        assert torch.equal(ours[1], layer_norm(ours[0], *norms[2:], EPS))


def test_offset_rows_keep_their_precision(judge: Judge) -> None:
    x = random(choose(217, 5), WIDTHS[0], dtype=torch.float32) + 4096.0
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    exact = plain.layer_norm(*wide(x, weight, bias), EPS)
    # The mean itself is known to half a unit in the last place of 4096.
    judge("layer_norm/offset", layer_norm(x, weight, bias, EPS), exact, tolerance=3e-4)


def test_rows_that_hardly_vary(judge: Judge) -> None:
    """A variance below the constant that is added to it."""
    x = random(choose(217, 5), WIDTHS[0], dtype=torch.float32, scale=1e-3)
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    exact = plain.layer_norm(*wide(x, weight, bias), EPS)
    judge("layer_norm/small_variance", layer_norm(x, weight, bias, EPS), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_its_output_and_nothing_else(dtype: torch.dtype, judge: Judge) -> None:
    width = WIDTHS[0]
    residual, x, *norms = make(choose(217, 9), width, dtype)
    expected = residual_layer_norm(residual, x, 0.5, *norms[:2], EPS)
    sentinels = [Sentinels(len(x), width, dtype) for _ in range(2)]
    out = (sentinels[0].out, sentinels[1].out)
    residual_layer_norm(residual, x, 0.5, *norms[:2], EPS, out=out)
    for got, wanted in zip(out, expected, strict=True):
        assert torch.equal(got, wanted)
    assert all(sentinel.untouched() for sentinel in sentinels)
    judge.counted("residual_layer_norm/out", dtype)


def test_no_tokens() -> None:
    residual, x, *norms = make(0, WIDTHS[0], torch.float32)
    assert layer_norm(x, *norms[:2], EPS).shape == x.shape
    assert residual_double_layer_norm(residual, x, 1.0, *norms, EPS)[1].shape == x.shape


def test_nan_stays_in_its_row() -> None:
    _, x, weight, bias, *_ = make(9, WIDTHS[0], torch.float32)
    x[2, 5] = float("nan")
    rows = layer_norm(x, weight, bias, EPS).isnan()
    assert rows.all(1).tolist() == rows.any(1).tolist() == [row == 2 for row in range(9)]
