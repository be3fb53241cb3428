"""Micro-benchmarks of each operation, plain and fast, on the GPU if there is one, else the CPU.

    python -m pytest bench -q --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

Real width and ten seconds of audio: 500 tokens in one utterance, and the same number in five.
"fast" is what `use_fast_kernels=True` runs on this device. Results are compared before timing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import relative_error
from bench.workloads import speech
from w2vbert_fast import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, C, F, HEADS, TAPS, LEFT, RIGHT = 500, 1024, 4096, 16, 31, 64, 8
EPS = 1e-5
LENGTHS = {"1 utterance": (500,), "5 utterances": (230, 130, 80, 40, 20)}


class Inputs:
    """Random tensors of one dtype, and the utterances' offsets."""

    def __init__(self, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
        self.dtype, self.max_seqlen = dtype, max(lengths)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.cu_seqlens = offsets.to(DEVICE, torch.int32)
        torch.manual_seed(0)

    def rows(self, width: int = C) -> Tensor:
        return torch.randn(TOKENS, width, device=DEVICE, dtype=self.dtype)

    def weight(self, out: int, width: int = C) -> Tensor:
        return torch.randn(out, width, device=DEVICE, dtype=self.dtype) * width**-0.5

    def vector(self, size: int = C) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=self.dtype)


def _linear(i: Inputs) -> Callable[..., Any]:
    x, w, b = i.rows(), i.weight(F), i.vector(F)
    return lambda **k: ops.linear(x, w, b, "swish", **k)


def _linear_glu(i: Inputs) -> Callable[..., Any]:
    x, w = i.rows(), i.weight(2 * C)
    return lambda **k: ops.linear_glu(x, w, **k)


def _linear_stacked(i: Inputs) -> Callable[..., Any]:
    x, weights, biases = i.rows(), i.weight(3 * C).chunk(3), i.vector(3 * C).chunk(3)
    return lambda **k: ops.linear_stacked(x, weights, biases, **k)


def _layer_norm(i: Inputs) -> Callable[..., Any]:
    x, w, b = i.rows(), i.vector(), i.vector()
    return lambda **k: ops.layer_norm(x, w, b, EPS, **k)


def _residual_layer_norm(i: Inputs) -> Callable[..., Any]:
    x, y, w, b = i.rows(), i.rows(), i.vector(), i.vector()
    return lambda **k: ops.residual_layer_norm(x, y, 0.5, w, b, EPS, **k)


def _residual_double_layer_norm(i: Inputs) -> Callable[..., Any]:
    x, y, v = i.rows(), i.rows(), [i.vector() for _ in range(4)]
    return lambda **k: ops.residual_double_layer_norm(x, y, 0.5, *v, EPS, **k)


def _conv_norm_act(i: Inputs) -> Callable[..., Any]:
    x, nw, nb = i.rows(), i.vector(), i.vector()
    (w,) = ops.tap_major([i.weight(C, TAPS)])
    return lambda **k: ops.conv_norm_act(x, w, nw, nb, EPS, "swish", i.cu_seqlens, **k)


def _shaw_attention(i: Inputs) -> Callable[..., Any]:
    q, k, v = (i.rows().view(TOKENS, HEADS, C // HEADS) for _ in range(3))
    e = i.weight(LEFT + RIGHT + 1, C // HEADS)
    return lambda **options: ops.shaw_attention(
        q,
        k,
        v,
        i.cu_seqlens,
        i.max_seqlen,
        distance_embedding=e,
        left_max_position=LEFT,
        right_max_position=RIGHT,
        **options,
    )[0]


OPERATIONS = {
    function.__name__[1:]: function
    for function in (
        _linear,
        _linear_glu,
        _linear_stacked,
        _layer_norm,
        _residual_layer_norm,
        _residual_double_layer_norm,
        _conv_norm_act,
        _shaw_attention,
    )
}
BY_UTTERANCE = ("conv_norm_act", "shaw_attention")


def _cases() -> list[Any]:
    return [
        pytest.param(name, lengths, id=f"{name}-{len(LENGTHS[lengths])}")
        for name in OPERATIONS
        for lengths in (LENGTHS if name in BY_UTTERANCE else list(LENGTHS)[:1])
    ]


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _time(benchmark: Any, run: Callable[[], Any], rounds: int) -> None:
    def synchronized() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=3)


@pytest.mark.parametrize("form", ["plain", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "lengths"), _cases())
def test_operation(benchmark: Any, name: str, lengths: str, dtype: torch.dtype, form: str) -> None:
    benchmark.group = f"{name}, {lengths}, {str(dtype).removeprefix('torch.')}, {DEVICE.type}"
    call = OPERATIONS[name](Inputs(dtype, LENGTHS[lengths]))
    with torch.inference_mode():
        plain, fast = _tensors(call(fast=False)), _tensors(call(fast=True))
        # bf16 results of two roundings differ by some units in the last of 8 bits.
        assert relative_error(fast, plain) < (1e-5 if dtype == torch.float32 else 1e-2)
        _time(benchmark, lambda: call(fast=form == "fast"), rounds=20)


@pytest.mark.parametrize("form", ["plain", "fast"])
def test_features(benchmark: Any, form: str) -> None:
    benchmark.group = f"log-mel filterbank and normalisation, 8 x 10 s, {DEVICE.type}"
    waveforms, _ = speech((10.0,) * 8)
    samples = torch.cat([torch.from_numpy(w) for w in waveforms]).to(DEVICE)
    ends = torch.tensor([0] + [len(w) for w in waveforms]).cumsum(0)
    offsets = ends.to(DEVICE, torch.int32)

    def call(fast: bool) -> Tensor:
        mels, frames = ops.log_mel_filterbank(samples, offsets, fast=fast)
        return ops.normalize_and_stack(mels, frames, fast=fast)[0]

    with torch.inference_mode():
        assert relative_error([call(True)], [call(False)]) < 1e-3
        _time(benchmark, lambda: call(form == "fast"), rounds=10)


@pytest.mark.parametrize("form", ["plain", "fast"])
def test_ctc_greedy(benchmark: Any, form: str) -> None:
    benchmark.group = f"ctc_greedy, 5 utterances, vocabulary of 100, {DEVICE.type}"
    inputs = Inputs(torch.float32, LENGTHS["5 utterances"])
    logits = inputs.rows(100)
    plain_form = contextlib.nullcontext if form == "fast" else lambda: ops.dispatch.force("plain")
    with torch.inference_mode(), plain_form():
        _time(benchmark, lambda: ops.ctc_greedy(logits, inputs.cu_seqlens, 0), rounds=20)
