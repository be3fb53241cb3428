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
from w2vbert_fast.ops.examples import Sizes, example
from w2vbert_fast.ops.operation import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = {"1 utterance": (500,), "5 utterances": (230, 130, 80, 40, 20)}
NAMES = (
    "linear",
    "linear_glu",
    "linear_stacked",
    "layer_norm",
    "residual_layer_norm",
    "residual_double_layer_norm",
    "conv_norm_act",
    "shaw_attention",
)


def sizes(lengths: str) -> Sizes:
    """The published model's, and a vocabulary of 100."""
    return Sizes(
        lengths=LENGTHS[lengths],
        width=1024,
        inner=4096,
        heads=16,
        head_size=64,
        left=64,
        right=8,
        taps=31,
        vocabulary=100,
    )


BY_UTTERANCE = ("conv_norm_act", "shaw_attention")


def _cases() -> list[Any]:
    return [
        pytest.param(name, lengths, id=f"{name}-{len(LENGTHS[lengths])}")
        for name in NAMES
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
    arguments = list(example(name, sizes(lengths), dtype=dtype, device=DEVICE))
    if name == "conv_norm_act":
        (arguments[1],) = ops.tap_major([arguments[1]])
    if name == "shaw_attention":
        arguments += [None, False]  # nobody asks for the log-sum-exp
    operation = OPERATIONS[name]
    with torch.inference_mode():
        plain, fast = (_tensors(run(*arguments)) for run in (operation.plain, operation.call))
        # bf16 results of two roundings differ by some units in the last of 8 bits.
        assert relative_error(fast, plain) < (1e-5 if dtype == torch.float32 else 1e-2)
        run = operation.call if form == "fast" else operation.plain
        _time(benchmark, lambda: run(*arguments), rounds=20)


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
    arguments = example("ctc_greedy", sizes("5 utterances"), device=DEVICE)
    plain_form = contextlib.nullcontext if form == "fast" else lambda: ops.dispatch.force("plain")
    with torch.inference_mode(), plain_form():
        _time(benchmark, lambda: ops.ctc_greedy(*arguments), rounds=20)
