"""The linear kernels on the device, at model size, each epilogue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.gemm import linear, linear_glu
from csrc_triton.gemm.config import linear_candidates
from tests.gpu.lane import (
    DEVICE,
    DTYPES,
    INNER,
    LENGTHS,
    LONG,
    WIDTH,
    Judge,
    Sentinels,
    choose,
    random,
    strided,
)
from w2vbert_fast import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_buffers")]

ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu", "selu")
KINDS = ("bias", "no_bias", *ACTIVATIONS, "glu", "glu_bias")
TOKENS = choose([1, 2, 63, 64, 65, 217, sum(LENGTHS), LONG], [1, 2, 65])


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
    judge(f"linear/{kind}", result, exact, twin(kind, *arguments))


def in_out(kind: str) -> tuple[int, int]:
    """Features in and out, as in the model, where a product without a bias ends the convolution."""
    return (INNER, WIDTH) if kind == "bias" else (WIDTH, WIDTH if "glu" in kind else INNER)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_model_size(kind: str, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in TOKENS:
        check(judge, kind, make(kind, tokens, *in_out(kind), dtype))
    empty = kernel(kind, *make(kind, 0, *in_out(kind), dtype))
    assert empty.shape == (0, in_out(kind)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "glu", "bias"])
def test_every_tile(kind: str, dtype: torch.dtype, judge: Judge) -> None:
    for config in linear_candidates(dtype, architecture(DEVICE)):
        for tokens in choose([1, 300], [33]):
            check(judge, kind, make(kind, tokens, *in_out(kind), dtype), config=config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bias", "glu"])
@pytest.mark.parametrize(("in_features", "out_features"), [(160, WIDTH), (31, 33), (WIDTH, 1)])
def test_sizes_that_fill_no_tile(
    kind: str, in_features: int, out_features: int, dtype: torch.dtype, judge: Judge
) -> None:
    check(judge, kind, make(kind, 37, in_features, out_features, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bias", "glu"])
def test_writes_its_output_and_nothing_else(kind: str, dtype: torch.dtype, judge: Judge) -> None:
    for tokens in (1, choose(217, 33)):
        arguments = make(kind, tokens, 96, 65, dtype)
        sentinels = Sentinels(tokens, 65, dtype)
        check(judge, kind, arguments, out=sentinels.out)
        assert sentinels.untouched()


def test_nan_stays_in_its_token(judge: Judge) -> None:
    x, weight, bias = make("bias", 65, WIDTH, INNER, torch.float32)
    x[12] = math.nan
    bad = linear(x, weight, bias, activation="relu").isnan()
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
