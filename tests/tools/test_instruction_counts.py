"""What kernels cost, counted: instructions that a virtual GPU executes, and machine code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from csrc_triton import conv
from csrc_triton.conv import conv_norm_act, conv_norm_act_backward
from csrc_triton.fbank import log_mel_filterbank, normalize_and_stack
from csrc_triton.launch import interpreting
from tools.compile import sass
from tools.compile.shipped import shipped_kernels
from tools.compile.target import Target
from tools.virtual_gpu.driver import activated
from tools.virtual_gpu.executor import Counts, Executor
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.requests import Uncompiled

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing")

MANY = 50_000


def instructions_of_the_first_block(target: str, call: Callable[[], object]) -> dict[str, int]:
    """By launch of a kernel over utterances, how many instructions its warps execute."""
    counted: dict[str, int] = {}

    def count(launch: Launch, counts: Counts) -> None:
        if "cu_seqlens_ptr" in launch.tensors:
            counted[f"{launch.kernel} {len(counted)}"] = counts.instructions.total()

    checks = Checks(races=False, written_once=False, written_whole=False, garbage=False)
    execute = Executor(checks, count)
    with (
        torch.no_grad(),
        activated(target, lambda launch: execute(replace(launch, grid=(1, 1, 1)))),
    ):
        call()
    return counted


def convolve(lengths: Tensor) -> None:
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    x = torch.randn(int(cu_seqlens[-1]), 64, dtype=torch.bfloat16)
    arguments = (torch.ones(64, 31), torch.ones(64), torch.ones(64), 1e-5, "silu", cu_seqlens)
    conv_norm_act(x, *arguments)
    conv_norm_act_backward(x, x, *arguments)


def features(lengths: Tensor) -> None:
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0) * 400, (1, 0)).int()
    mel, cu_seqlens = log_mel_filterbank(torch.randn(int(cu_seqlens[-1])), cu_seqlens)
    normalize_and_stack(mel, cu_seqlens)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("call", [convolve, features])
def test_a_block_finds_its_utterance_among_many(
    call: Callable[[Tensor], None], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but the first have no frame, so that little is to be done; for the convolution's tile they
    # shall be many.
    monkeypatch.setattr(conv.forward, "device_multiprocessors", lambda device: 1)
    few, many = (
        instructions_of_the_first_block(
            target, lambda batch=batch: call(torch.tensor([40] + (batch - 1) * [0]))
        )
        for batch in (16, MANY)
    )
    assert few.keys() == many.keys() and len(few) >= 3
    for name, count in few.items():
        assert count < many[name] <= 1.2 * count, name


def of_the_largest_tile(name: str, target: str, dtype: str) -> tuple[Uncompiled, str]:
    """A kernel that ships, which comes first, and its machine code as text."""
    kernels = {kernel.name: kernel for kernel in shipped_kernels(Target.parse(target), dtype)}
    request = kernels[name].request
    return request, sass.disassemble(request.compiled().asm["cubin"])


@pytest.mark.parametrize(
    ("name", "outputs", "dtype", "limit"),
    [
        ("linear/linear_silu", 128 * 256, "bfloat16", 1000),
        ("linear/linear_glu", 128 * 128, "bfloat16", 500),
        ("linear/linear_silu", 128 * 256, "float16", 1200),
        ("linear/linear_glu", 128 * 128, "float16", 500),
    ],
)
def test_epilogues(name: str, outputs: int, dtype: str, limit: int) -> None:
    """Of a tile of 128 x 256 on sm_90: few instructions, and one special function an output, or two
    where tanh is too far off."""
    request, text = of_the_largest_tile(name, "cuda:90", dtype)
    assert (request.constants["BLOCK_M"], request.constants["BLOCK_N"]) == (128, 256)
    code, loop = sass.instructions(text), sass.hot_loop(text)
    assert loop is not None and loop.tensor_core
    epilogue = [instruction.name for instruction in code[loop.end + 1 :]]
    functions = 1 if dtype == "bfloat16" else 2
    assert epilogue.count("MUFU") == functions * outputs / (32 * request.options["num_warps"])
    assert len(epilogue) <= limit


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_convolution(target: str) -> None:
    """Of 16 rows and 31 taps, the loop over taps turn by turn."""
    request, text = of_the_largest_tile("conv_norm_act_fwd/conv_norm_act", target, "bfloat16")
    code, loop = sass.instructions(text), sass.hot_loop(text)
    taps, unrolled = request.constants["K"], request.constants["UNROLL"]
    assert loop is not None and taps >= 2 * unrolled
    multiplications = sum(n for name, n in loop.opcodes.items() if name.split(".")[0] == "FFMA")
    assert multiplications == unrolled * 16 * 2  # rows and channels of a thread
    assert len(code) + (taps // unrolled - 1) * len(loop) <= 2750
