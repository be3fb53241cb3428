"""The linear kernels against their plain twins in float64: each epilogue, any size, any tile."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.gemm import linear, linear_glu
from csrc_triton.gemm.config import LinearConfig, linear_candidates
from tests.kernels.judge import Errors, Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    INNER,
    INTERPRETED,
    LENGTHS,
    LONG,
    WIDTH,
    Sentinels,
    choose,
    in_memory_of_its_own,
    random,
    strided,
)
from w2vbert_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu", "selu")
KINDS = ("bias", "no_bias", *ACTIVATIONS, "glu", "glu_bias")
TOKENS = choose([1, 2, 63, 64, 65, 217, sum(LENGTHS), LONG], [1, 2, 31, 63, 64, 65, 217, 300])


def tokens_for(kind: str) -> list[int]:
    return TOKENS if kind in ("bias", "silu", "glu_bias") else choose(TOKENS, [1, 2, 65])


def make(kind: str, tokens: int, in_features: int, out_features: int, dtype: torch.dtype) -> Any:
    """x, weight, bias or `None`."""
    rows = out_features * (2 if "glu" in kind else 1)
    has_bias = kind not in ("no_bias", "glu")
    return (
        strided(random(tokens, in_features, dtype=dtype)),
        strided(random(rows, in_features, dtype=dtype, scale=1 / math.sqrt(in_features))),
        random(rows, dtype=dtype) if has_bias else None,
    )


def twin(kind: str, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    if "glu" in kind:
        return ops.linear_glu(x, weight, bias)
    return ops.linear(x, weight, bias, kind if kind in ACTIVATIONS else None)


def kernel(kind: str, x: Tensor, weight: Tensor, bias: Any, **options: Any) -> Any:
    if "glu" in kind:
        return linear_glu(x, weight, bias, **options)
    return linear(x, weight, bias, activation=kind if kind in ACTIVATIONS else None, **options)


def check(judge: Judge, kind: str, arguments: Any, **options: Any) -> None:
    exact = twin(kind, *(None if x is None else x.double() for x in arguments))
    result = kernel(kind, *arguments, **options)
    # PyTorch's product of bf16 on CPUs reads the NaN between strided rows.
    plain = twin(kind, *(None if x is None else x.contiguous() for x in arguments))
    errors = judge(f"linear/{kind}", result, exact, plain)
    if result.dtype != torch.float32:
        # Rounded once, at the store: no twin that works in this dtype comes nearer.
        assert errors.rms <= 1.1 * Errors.of(exact.to(result.dtype), exact).rms
    elif arguments[0].shape[1] <= 128:
        assert errors.rms <= 1e-6


def in_out(kind: str) -> tuple[int, int]:
    """Features in and out, as in the model, where a product without a bias ends the convolution."""
    return (INNER, WIDTH) if kind == "bias" else (WIDTH, WIDTH if "glu" in kind else INNER)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens(kind: str, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in tokens_for(kind):
        check(judge, kind, make(kind, tokens, *in_out(kind), dtype))
    empty = kernel(kind, *make(kind, 0, *in_out(kind), dtype))
    assert empty.shape == (0, in_out(kind)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "glu", "bias"])
def test_every_tile(kind: str, dtype: torch.dtype, judge: Judge) -> None:
    for config in linear_candidates(dtype, architecture(DEVICE)):
        for tokens in choose([1, 300], [33]):
            check(judge, kind, make(kind, tokens, *in_out(kind), dtype), config=config)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, where any tile fits")
@pytest.mark.parametrize(
    ("config", "out_features"),
    [
        (LinearConfig(16, 16, 16, 1, 1, group_m=3), 40),
        (LinearConfig(32, 16, 64, 1, 1, group_m=100), 40),
        (LinearConfig(32, 256, 32, 1, 1, group_m=1), 300),
    ],
)
@pytest.mark.parametrize("kind", ["bias", "silu", "glu"])
def test_any_tile(kind: str, config: LinearConfig, out_features: int, judge: Judge) -> None:
    arguments = make(kind, 67, 48, out_features, torch.float32)
    check(judge, kind, arguments, config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bias", "silu", "glu", "glu_bias"])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(1, 1), (16, 3), (31, 33), (64, 32), (96, 31), (100, 65), (160, WIDTH), (WIDTH, 1)],
)
def test_any_size(
    kind: str, in_features: int, out_features: int, dtype: torch.dtype, judge: Judge
) -> None:
    check(judge, kind, make(kind, 37, in_features, out_features, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bias", "silu", "glu"])
def test_writes_its_output_and_nothing_else(kind: str, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in (1, choose(217, 33)):
        arguments = make(kind, tokens, 96, 65, dtype)
        sentinels = Sentinels(tokens, 65, dtype)
        assert kernel(kind, *arguments, out=sentinels.out) is sentinels.out
        check(judge, kind, arguments, out=sentinels.out)
        assert sentinels.untouched()


@pytest.mark.parametrize(("in_features", "out_features"), [(32, 33), (45, 31)])
@pytest.mark.parametrize("kind", ["bias", "silu", "glu_bias"])
def test_touches_nothing_past_an_end(
    kind: str,
    in_features: int,
    out_features: int,
    guarded: Callable[[Tensor], Tensor],
    judge: Judge,
) -> None:
    arguments = tuple(map(guarded, make(kind, 33, in_features, out_features, torch.float32)))
    out = guarded(torch.zeros(33, out_features, device=DEVICE))
    check(judge, kind, arguments, out=out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on overflow, inf, NaN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "linear", "swish", *ACTIVATIONS])
def test_activations(activation: str | None, dtype: torch.dtype) -> None:
    # The identity matrix passes x through exactly, so that only the activation can err.
    x = torch.cat(
        [torch.linspace(-30.0, 30.0, 961), torch.logspace(-6, 0, 31), -torch.logspace(-6, 0, 32)]
    ).to(DEVICE, dtype)
    identity = torch.eye(32, device=DEVICE, dtype=dtype)
    one = torch.ones(1, 1, device=DEVICE).double()
    result = linear(x.reshape(32, 32), identity, activation=activation).flatten()
    exact = ops.linear(x[:, None].double(), one, None, activation).flatten()
    if dtype == torch.float32:
        assert Errors.of(result, exact).rms <= 3e-7
        relative = 2e-6
    else:  # Rounded once.
        relative = 0.501 * torch.finfo(dtype).eps
    # gelu's tail is a difference of numbers near 1, in every fp32 form of it: hence the 1e-7.
    allowed = relative * exact.abs() + 1e-7
    if dtype == torch.bfloat16 and activation in ("silu", "swish", "gelu_new"):
        allowed += 2**-12 * x.double().abs()  # of half of x, by the special-function unit's tanh
    off = (result.double() - exact).abs()
    assert (off <= allowed).all(), x[off > allowed]


def test_selu_does_not_cancel_near_zero() -> None:
    x = -torch.logspace(-7, math.log10(0.2), 256).to(DEVICE)
    identity = torch.eye(16, device=DEVICE)
    result = linear(x.reshape(16, 16), identity, activation="selu").flatten().double()
    exact = torch.selu(x.double())
    near = x > -0.125
    assert ((result - exact) / exact)[near].abs().max() <= 2e-7
    assert ((result - exact) / exact).abs().max() <= 6e-7


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy on overflow, inf, NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values(activation: str, dtype: torch.dtype) -> None:
    extreme = [0.0, -0.0, 1e4, -1e4, 1e30, 100.0, -100.0, math.nan, math.inf]
    x = torch.tensor(extreme, device=DEVICE, dtype=dtype)
    rows = torch.zeros(9, 16, device=DEVICE, dtype=dtype)
    rows[:, 0] = x
    weight = torch.zeros(16, 16, device=DEVICE, dtype=dtype)
    weight[0, 0] = 1.0
    result = linear(rows, weight, activation=activation)
    expected = ops.get_activation(activation)(x.double())
    relative = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(
        result[:, 0].double(), expected, rtol=relative, atol=1e-30, equal_nan=True
    )
    assert (result[:4, 1:] == 0).all()


def test_nan_stays_in_its_token() -> None:
    x, weight, bias = make("bias", 65, WIDTH, INNER, torch.float32)
    x[12] = math.nan
    for result in (linear(x, weight, bias, activation="relu"), linear_glu(x, weight, bias)):
        bad = result.isnan()
        assert bad[12].all() and int(bad.sum()) == bad.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_equal(dtype: torch.dtype) -> None:
    for kind in ("silu", "glu", "bias"):
        arguments = make(kind, choose(2543, 33), *in_out(kind), dtype)
        assert torch.equal(kernel(kind, *arguments), kernel(kind, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    config = linear_candidates(dtype, architecture(DEVICE))[0]
    x, weight, bias = make("silu", choose(300, 65), WIDTH, INNER, dtype)
    whole = linear(x, weight, bias, activation="silu", config=config)
    # The interpreter's products are NumPy's, which depend on where in a tile a row lies.
    start = choose(17, config.block_m)
    part = linear(x[start:], weight, bias, activation="silu", config=config)
    assert torch.equal(whole[start:], part)


@in_memory_of_its_own
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
    assert Errors.of(out, exact).rms <= 1e-3


def test_no_input_features() -> None:
    bias = random(5, dtype=torch.float32)
    result = linear(torch.empty(3, 0, device=DEVICE), torch.empty(5, 0, device=DEVICE), bias)
    torch.testing.assert_close(result, bias.expand(3, 5), rtol=0, atol=0)


def test_errors_name_the_argument() -> None:
    x, weight, bias = (torch.zeros(shape, device=DEVICE) for shape in ((4, 8), (6, 8), (6,)))
    with pytest.raises(ValueError, match=r"x has shape \(8,\)"):
        linear(x[0], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(6, 7\)"):
        linear(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"weight is torch.float16; it must be float32"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        linear(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"bias has shape \(5,\)"):
        linear(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"x has strides \(1, 4\)"):
        linear(torch.zeros(8, 4, device=DEVICE).T, weight)
    with pytest.raises(ValueError, match=r"weight has strides"):
        linear(x, torch.zeros(8, 6, device=DEVICE).T)
    with pytest.raises(ValueError, match=r"out has shape \(4, 6\); it must be \(4, 3\)"):
        linear_glu(x, weight, bias, out=torch.zeros(4, 6, device=DEVICE))
    with pytest.raises(ValueError, match=r"weight has 5 rows; a gated unit needs an even number"):
        linear_glu(x, weight[:5])
    with pytest.raises(ValueError, match=r"activation is 'tanh'"):
        linear(x, weight, activation="tanh")
    with pytest.raises(ValueError, match=r"weight is on meta"):
        linear(x, weight.to("meta"))
