"""The linear kernels against their plain twins in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csrc_triton.gemm import linear, linear_glu
from csrc_triton.gemm.config import LinearConfig
from w2vbert_fast import ops

LENGTHS = [0, 1, 2, 31, 63, 64, 65, 217, 300]
ACTIVATIONS = [None, "linear", "silu", "swish", "gelu", "gelu_new", "relu", "selu"]
DTYPES = [torch.float32, torch.float16]
KINDS = ["bias", "silu", "glu"]


def padded(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values in a view whose rows are strided and whose surroundings are NaN."""
    rows, columns = shape
    buffer = torch.full((rows + 2, columns + 24), math.nan, dtype=dtype)
    view = buffer[1:-1, 8 : 8 + columns]
    return view.copy_(torch.randn(shape, dtype=torch.float64))


def inputs(num_tokens: int, in_features: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = padded(num_tokens, in_features, dtype=dtype)
    weight = padded(rows, in_features, dtype=dtype)
    weight /= math.sqrt(max(in_features, 1))
    return x, weight, torch.randn(rows, dtype=torch.float64).to(dtype)


def twin(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if kind == "glu":
        return ops.linear_glu(x, weight, bias)
    return ops.linear(x, weight, bias, "silu" if kind == "silu" else None)


def kernel(
    kind: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    if kind == "glu":
        return linear_glu(x, weight, bias, out=out, config=config)
    activation = "silu" if kind == "silu" else None
    return linear(x, weight, bias, activation=activation, out=out, config=config)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm().clamp(min=1e-300))


def check(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`result` is as near to `exact` as its dtype asks for."""
    assert result.shape == exact.shape
    assert result.dtype == dtype
    if dtype == torch.float32:
        assert error(result, exact) <= 1e-6
    else:
        # Rounded once, at the store: no twin that works in this dtype comes nearer.
        assert error(result, exact) <= 1.1 * error(exact.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_lengths(kind: str, num_tokens: int, dtype: torch.dtype) -> None:
    columns = 24
    arguments = inputs(num_tokens, 40, columns * (2 if kind == "glu" else 1), dtype)
    exact = twin(kind, *(tensor.double() for tensor in arguments))
    check(kernel(kind, *arguments), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (16, 3), (31, 33), (64, 32), (96, 31), (100, 65)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_any_size(kind: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    rows = out_features * (2 if kind == "glu" else 1)
    arguments = inputs(37, in_features, rows, dtype)
    exact = twin(kind, *(tensor.double() for tensor in arguments))
    check(kernel(kind, *arguments), exact, dtype)


@pytest.mark.parametrize(
    ("config", "out_features"),
    [
        (LinearConfig(16, 16, 16, 1, 1, group_m=3), 40),
        (LinearConfig(32, 16, 64, 1, 1, group_m=100), 40),
        (LinearConfig(32, 256, 32, 1, 1, group_m=1), 300),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_any_tile(kind: str, config: LinearConfig, out_features: int) -> None:
    rows = out_features * (2 if kind == "glu" else 1)
    arguments = inputs(67, 48, rows, torch.float32)
    exact = twin(kind, *(tensor.double() for tensor in arguments))
    check(kernel(kind, *arguments, config=config), exact, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_nothing_beside_its_output(kind: str) -> None:
    sentinel = -77.0
    arguments = inputs(65, 40, 66 if kind == "glu" else 33, torch.float32)
    buffer = torch.full((70, 50), sentinel)
    out = buffer[2:67, 9:42]
    assert kernel(kind, *arguments, out=out) is out
    exact = twin(kind, *(tensor.double() for tensor in arguments))
    assert error(out, exact) <= 1e-6
    out.fill_(sentinel)
    assert (buffer == sentinel).all()


@pytest.mark.parametrize(("in_features", "out_features"), [(32, 33), (45, 31)])
@pytest.mark.parametrize("kind", KINDS)
def test_touches_nothing_past_an_end(
    kind: str, in_features: int, out_features: int, guarded: Callable[[Tensor], Tensor]
) -> None:
    rows = out_features * (2 if kind == "glu" else 1)
    arguments = tuple(map(guarded, inputs(33, in_features, rows, torch.float32)))
    out = guarded(torch.zeros(33, out_features))
    exact = twin(kind, *(tensor.double() for tensor in arguments))
    assert error(kernel(kind, *arguments, out=out), exact) <= 1e-6


@pytest.mark.parametrize("kind", ["linear", "glu"])
def test_without_bias(kind: str) -> None:
    x, weight, _ = inputs(33, 40, 34, torch.float32)
    wide = (x.double(), weight.double())
    if kind == "linear":
        result, exact = linear(x, weight), ops.linear(*wide)
    else:
        result, exact = linear_glu(x, weight), ops.linear_glu(*wide)
    assert error(result, exact) <= 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on overflow, inf, NaN
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None) -> None:
    # The identity matrix passes x through exactly, so that only the activation can err.
    x = torch.cat(
        [torch.linspace(-30.0, 30.0, 961), torch.logspace(-6, 0, 31), -torch.logspace(-6, 0, 32)]
    )
    result = linear(x.reshape(32, 32), torch.eye(32), activation=activation).flatten()
    exact = ops.linear(x[:, None].double(), torch.ones(1, 1).double(), None, activation).flatten()
    assert error(result, exact) <= 3e-7
    # gelu's tail is a difference of numbers near 1, in every fp32 form of it: hence the 1e-7.
    torch.testing.assert_close(result.double(), exact, rtol=2e-6, atol=1e-7)


def test_selu_does_not_cancel_near_zero() -> None:
    x = -torch.logspace(-7, math.log10(0.2), 256)
    result = linear(x.reshape(16, 16), torch.eye(16), activation="selu").flatten().double()
    exact = torch.selu(x.double())
    near = x > -0.125
    assert ((result - exact) / exact)[near].abs().max() <= 2e-7
    assert ((result - exact) / exact).abs().max() <= 6e-7


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on overflow, inf, NaN
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "relu", "selu"])
def test_activations_of_extreme_values(activation: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e30, 100.0, -100.0, math.nan, math.inf])
    rows = torch.zeros(9, 16)
    rows[:, 0] = x
    weight = torch.zeros(16, 16)
    weight[0, 0] = 1.0
    result = linear(rows, weight, activation=activation)
    expected = ops.get_activation(activation)(x.double())
    torch.testing.assert_close(
        result[:, 0].double(), expected, rtol=1e-6, atol=1e-30, equal_nan=True
    )
    assert (result[:7, 1:] == 0).all()


def test_nan_stays_in_its_token() -> None:
    x, weight, bias = inputs(65, 40, 34, torch.float32)
    x[12] = math.nan
    for result in (linear(x, weight, bias, activation="relu"), linear_glu(x, weight, bias)):
        bad = result.isnan()
        assert bad[12].all()
        assert bad.sum() == result.shape[1]


def test_rows_beyond_32_bit_offsets(tmp_path: Path) -> None:
    stride = 2**30 + 8
    # A sparse file: only the pages that are touched exist.
    size = 2 * stride + 64
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    x = file.as_strided((3, 32), (stride, 1))
    x.copy_(torch.randn(3, 32))
    out = file.as_strided((3, 16), (stride, 1), 32)
    weight = torch.randn(16, 32).half()
    linear(x, weight, out=out)
    exact = x.double() @ weight.double().T
    assert error(out, exact) <= 1e-3


def test_no_input_features() -> None:
    bias = torch.randn(5)
    result = linear(torch.empty(3, 0), torch.empty(5, 0), bias)
    torch.testing.assert_close(result, bias.expand(3, 5), rtol=0, atol=0)


def test_errors_name_the_argument() -> None:
    x, weight, bias = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6)
    with pytest.raises(ValueError, match=r"x has shape \(8,\)"):
        linear(x[0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(6, 7\)"):
        linear(x, torch.zeros(6, 7))
    with pytest.raises(ValueError, match=r"weight is torch.float16; it must be float32"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        linear(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"bias has shape \(5,\)"):
        linear(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"x has strides \(1, 4\)"):
        linear(torch.zeros(8, 4).T, weight)
    with pytest.raises(ValueError, match=r"weight has strides"):
        linear(x, torch.zeros(8, 6).T)
    with pytest.raises(ValueError, match=r"out has shape \(4, 6\); it must be \(4, 3\)"):
        linear_glu(x, weight, bias, out=torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"weight has 5 rows; a gated unit needs an even number"):
        linear_glu(x, weight[:5])
    with pytest.raises(ValueError, match=r"activation is 'tanh'"):
        linear(x, weight, activation="tanh")
    with pytest.raises(ValueError, match=r"weight is on meta"):
        linear(x, weight.to("meta"))
