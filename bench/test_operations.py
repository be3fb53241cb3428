"""Micro-benchmarks of each operation, plain and fast, on the GPU if there is one, else the CPU.

    python -m pytest bench -q --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

Real width and ten seconds of audio: 500 tokens in one utterance, and the same number in five.
"fast" is what `use_fast_kernels=True` runs on this device. Results are compared before timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
REAL = Sizes(
    width=1024, inner=4096, heads=16, head_size=64, left=64, right=8, taps=31, vocabulary=100
)
LENGTHS = {"1 utterance": (500,), "5 utterances": (230, 130, 80, 40, 20)}
BY_UTTERANCE = ("conv_norm_act", "shaw_attention", "ctc_greedy")
# The work list of another one, and what `test_features` times.
LEFT_OUT = ("attention_tile_map", "log_mel_filterbank", "normalize_and_stack")


def _cases() -> list[Any]:
    return [
        pytest.param(name, lengths, id=f"{name}-{len(LENGTHS[lengths])}")
        for name in OPERATIONS
        if name not in LEFT_OUT and not name.endswith("_backward")
        for lengths in (LENGTHS if name in BY_UTTERANCE else list(LENGTHS)[:1])
    ]


def _arguments(name: str, lengths: str, dtype: torch.dtype) -> list[Any]:
    """With weights laid out as models lay them."""
    sizes = replace(REAL, lengths=LENGTHS[lengths])
    arguments = list(example(name, sizes, dtype=dtype, device=DEVICE))
    if name == "conv_norm_act":
        (arguments[1],) = ops.tap_major([arguments[1]])
    if name == "linear_stacked":
        arguments[1:] = [list(torch.cat(parts).chunk(len(parts))) for parts in arguments[1:]]
    if name == "shaw_attention":
        arguments[5] *= REAL.head_size**-0.5  # positions move scores less than keys do
        arguments += [None, False]  # nobody asks for the log-sum-exp
    return arguments


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
    arguments = _arguments(name, lengths, dtype)
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
