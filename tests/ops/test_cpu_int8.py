"""8-bit linear layers on the CPU against their formula in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from w2vbert_fast import ops
from w2vbert_fast.ops.cpu import gemm, int8

pytestmark = pytest.mark.skipif(bool(int8.reasons()), reason="; ".join(int8.reasons()))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def rounded(x: Tensor, limit: int) -> Tensor:
    """What is left of the rows of `x` after rounding to `limit` steps on either side, float64."""
    scale = x.double().abs().amax(1, keepdim=True) / limit
    return torch.nan_to_num((x.double() / scale).round()) * scale


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_is_that_of_the_rounded_factors(activation: str | None, has_bias: bool) -> None:
    weight, bias = torch.randn(48, 160), torch.randn(48) if has_bias else None
    # Rows of very different size: a scale for the whole tensor would lose the small ones.
    x = torch.randn(217, 160) * torch.logspace(-4, 4, 217)[:, None]
    x[5] = 0
    packed = int8.quantize_weight(weight)
    exact = rounded(x, 127) @ rounded(weight, int8._weight_limit()).T
    exact = exact if bias is None else exact + bias.double()
    expected = exact if activation is None else ops.get_activation(activation)(exact)
    got = int8.linear_int8(x, packed, bias, activation)
    for row in range(217):
        # A value halfway between two steps may round the other way in fp32: one step of one in 160.
        assert relative_error(got[row], expected[row]) <= 1e-3
    assert relative_error(got, expected) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1 << 30, 50_000])
def test_layers_stay_near_the_unrounded_ones(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "_BLOCK_BYTES", block_bytes)
    first, second = torch.randn(256, 160) / 12, torch.randn(40, 256) / 16
    bias1, bias2 = torch.randn(256), torch.randn(40)
    packed1, packed2 = int8.quantize_weight(first), int8.quantize_weight(second)
    for tokens in (0, 1, 63, 300):
        x = torch.randn(tokens, 160).to(dtype)
        expected = ops.linear(x.double(), first.double(), bias1.double())
        got = int8.linear_int8(x, packed1, bias1, None)
        assert got.dtype == dtype
        assert relative_error(got, expected) <= 0.015
        shared = int8.linears_int8(x, [(packed1, bias1), (packed1, None)])[0]
        assert torch.equal(shared, got)
        hidden = ops.linear(x.double(), first.double(), bias1.double(), "silu")
        expected = ops.linear(hidden, second.double(), bias2.double())
        got = int8.feed_forward_int8(x, packed1, bias1, "silu", packed2, bias2)
        assert got.dtype == dtype
        assert relative_error(got, expected) <= 0.015


@pytest.mark.parametrize("activation", sorted(int8._LEAST))
def test_no_activation_falls_below_its_bound(activation: str) -> None:
    x = torch.linspace(-20, 20, 1_000_001)
    least = float(ops.get_activation(activation)(x).min())
    assert int8._LEAST[activation] <= least <= int8._LEAST[activation] + 1e-4


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh"])
def test_values_between_two_layers_may_be_negative_or_small(activation: str) -> None:
    """Rows near the activation's minimum, far smaller than it, and usual ones: as one layer after
    the other, which knows no bound."""
    packed1, packed2 = (int8.quantize_weight(torch.randn(*s)) for s in ((256, 64), (40, 256)))
    x = torch.cat([torch.randn(3, 64) * scale for scale in (1e-2, 1e-4, 1.0)])
    for bias in (torch.full((256,), -1.28), torch.zeros(256)):
        expected = int8.linear_int8(
            int8.linear_int8(x, packed1, bias, activation), packed2, None, None
        )
        got = int8.feed_forward_int8(x, packed1, bias, activation, packed2, None)
        assert torch.equal(got, expected)


def test_tokens_do_not_touch_each_other() -> None:
    packed = int8.quantize_weight(torch.randn(24, 40))
    x = torch.randn(9, 40)
    expected = int8.linear_int8(x, packed, None, None)
    x[4] = math.nan
    x[7] = 1e6
    got = int8.linear_int8(x, packed, None, None)
    assert got[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(got[others], expected[others])


def test_quantising_leaves_its_argument_alone() -> None:
    x = torch.randn(9, 40)
    before = x.clone()
    int8.quantize_tokens(x)
    assert torch.equal(x, before)


def test_a_row_of_zeros_gives_zeros() -> None:
    weight = torch.randn(24, 40)
    weight[3] = 0
    got = int8.linear_int8(torch.randn(9, 40), int8.quantize_weight(weight), None, None)
    assert (got[:, 3] == 0).all()
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"weight is torch.float32 \(3,\) on cpu; it must be"),
        (torch.ones(3, 4, dtype=torch.int8), "weight is torch.int8"),
        (torch.ones(3, 4, device="meta"), "on meta"),
        (torch.tensor([[1.0, math.nan]]), "must be finite"),
        (torch.tensor([[1.0, math.inf]]), "must be finite"),
    ],
)
def test_weights_that_cannot_be_quantised(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8.quantize_weight(weight)


def test_bad_arguments_of_a_layer() -> None:
    packed = int8.quantize_weight(torch.randn(24, 40))
    with pytest.raises(ValueError, match="x has 39 features; weight needs 40"):
        int8.linear_int8(torch.randn(2, 39), packed, None, None)
    with pytest.raises(ValueError, match="activation is 'swash'"):
        int8.linear_int8(torch.randn(2, 40), packed, None, "swash")


def test_a_machine_without_the_operation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "reasons", lambda: ("no such thing",))
    with pytest.raises(RuntimeError, match="do not run here: no such thing"):
        int8.quantize_weight(torch.randn(3, 4))
