"""The norm kernels against the plain operations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.norm import layer_norm, residual_double_layer_norm, residual_layer_norm
from tests.kernels.judge import Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    LENGTHS,
    LONG,
    Sentinels,
    choose,
    random,
    strided,
    wide,
)
from w2vbert_fast.ops import norm as plain

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

EPS = 1e-5
WIDTHS = choose([1024, 4096, 160, 48, 8192], [48, 16, 65])
TOKENS = choose([1, 2, 65, sum(LENGTHS), LONG], [1, 2, 31, 63, 64, 65, 217])


def tokens_for(width: int, dtype: torch.dtype) -> list[int]:
    """Every number at one width; of rounded results those that are not a matter of luck."""
    if width != WIDTHS[0]:
        return choose(TOKENS, [1, 33])
    return TOKENS if dtype == torch.float32 else choose(TOKENS, [1, 63, 217])


def make(tokens: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """Residual, x, two norms' weights and biases."""
    rows = [
        strided((3.0 * random(tokens, width, dtype=torch.float32) + offset).to(dtype))
        for _ in range(2)
    ]
    return rows + [random(width, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in TOKENS:
        _, x, weight, bias, *_ = make(tokens, width, dtype, offset=5.0)
        exact = plain.layer_norm(*wide(x, weight, bias), EPS)
        theirs = plain.layer_norm(x, weight, bias, EPS)
        judge("layer_norm", layer_norm(x, weight, bias, EPS), exact, theirs)


@pytest.mark.parametrize("width", [1, 1000, 8192])
def test_widths(width: int, judge: Judge) -> None:
    _, x, weight, bias, *_ = make(3, width, torch.float32)
    exact = plain.layer_norm(*wide(x, weight, bias), EPS)
    judge("layer_norm/width", layer_norm(x, weight, bias, EPS), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_residual_norms(scale: float, width: int, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in tokens_for(width, dtype):
        residual, x, *norms = make(tokens, width, dtype)
        exact = plain.residual_layer_norm(*wide(residual, x), scale, *wide(*norms[:2]), EPS)
        theirs = plain.residual_layer_norm(residual, x, scale, *norms[:2], EPS)
        pair = residual_layer_norm(residual, x, scale, *norms[:2], EPS)
        judge("residual_layer_norm/sum", pair[0], exact[0], theirs[0])
        judge("residual_layer_norm", pair[1], exact[1], theirs[1])

        ours = residual_double_layer_norm(residual, x, scale, *norms, EPS)
        judge("double_layer_norm/first", ours[0], exact[1], theirs[1])
        exact_second = plain.layer_norm(exact[1], *wide(*norms[2:]), EPS)
        theirs_second = plain.layer_norm(theirs[1], *norms[2:], EPS)
        judge("double_layer_norm", ours[1], exact_second, theirs_second)
        # The second norm is taken of what is stored: two launches give the same bits.
        assert torch.equal(ours[0], pair[1])
        assert torch.equal(ours[1], layer_norm(ours[0], *norms[2:], EPS))


def test_offset_rows_keep_their_precision(judge: Judge) -> None:
    # With variance as the mean of squares less the squared mean, nothing would be left of this.
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
    for norm, given in (
        (residual_layer_norm, (residual, x, 0.5, *norms[:2], EPS)),
        (residual_double_layer_norm, (residual, x, 0.5, *norms, EPS)),
    ):
        expected = norm(*given)
        sentinels = [Sentinels(len(x), width, dtype) for _ in range(2)]
        out = (sentinels[0].out, sentinels[1].out)
        norm(*given, out=out)
        for got, wanted in zip(out, expected, strict=True):
            assert torch.equal(got, wanted)
        assert all(sentinel.untouched() for sentinel in sentinels)
    judge.counted("residual_layer_norm/out", dtype)


def test_residual_may_be_overwritten() -> None:
    residual, x, weight, bias, *_ = make(7, 64, torch.float32)
    expected = residual_layer_norm(residual, x, 0.5, weight, bias, EPS)
    z = torch.empty_like(x)
    residual_layer_norm(residual, x, 0.5, weight, bias, EPS, out=(residual, z))
    assert torch.equal(residual, expected[0])
    assert torch.equal(z, expected[1])


def test_no_tokens() -> None:
    residual, x, *norms = make(0, 64, torch.float32)
    assert layer_norm(x, *norms[:2], EPS).shape == (0, 64)
    for z in residual_layer_norm(residual, x, 1.0, *norms[:2], EPS):
        assert z.shape == (0, 64)
    for z in residual_double_layer_norm(residual, x, 1.0, *norms, EPS):
        assert z.shape == (0, 64)


def test_nan_stays_in_its_row() -> None:
    _, x, weight, bias, *_ = make(9, WIDTHS[0], torch.float32)
    x[2, 5] = float("nan")
    rows = layer_norm(x, weight, bias, EPS)
    assert rows[2].isnan().all()
    assert rows[[0, 1, 3, 4, 5, 6, 7, 8]].isfinite().all()


def test_arguments_that_do_not_fit() -> None:
    x, weight = random(4, 32, dtype=torch.float32), torch.ones(32, device=DEVICE)
    with pytest.raises(ValueError, match=r"x has shape \(32,\)"):
        layer_norm(x[0], weight, weight, EPS)
    with pytest.raises(ValueError, match=r"bias has shape \(31,\); it must be \(32,\)"):
        layer_norm(x, weight, weight[:31], EPS)
    with pytest.raises(ValueError, match=r"residual is torch\.float16; it must be float32"):
        residual_layer_norm(x.half(), x, 1.0, weight, weight, EPS)
    with pytest.raises(ValueError, match="x has strides"):
        layer_norm(x.t().contiguous().t(), weight, weight, EPS)
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        residual_layer_norm(x, x, 1.0, weight, weight, EPS, out=(x, x[:3]))
    broad = torch.zeros(1, 8193, device=DEVICE)
    with pytest.raises(ValueError, match="width is 8193"):
        layer_norm(broad, broad[0], broad[0], EPS)
