"""Launches that are listed, and neither compiled nor made."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tools.virtual_gpu.requests import Uncompiled, requests

SM_90 = GPUTarget("cuda", 90, 32)
GFX942 = GPUTarget("hip", "gfx942", 64)


@triton.jit(do_not_specialize=["length"])
def _scale_kernel(pair, out_ptr, length, stride, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pair[0] + offsets * stride, mask=offsets < length)
    y = tl.load(pair[1] + offsets * stride, mask=offsets < length)
    tl.store(out_ptr + offsets * stride, (x + y) * factor, mask=offsets < length)


def scale(gpu: GPUTarget, x: torch.Tensor, stride: int = 32, **options: int) -> Uncompiled:
    with requests(gpu) as found:
        grid = lambda arguments: (triton.cdiv(x.numel(), arguments["BLOCK"]), 2)  # noqa: E731
        result = _scale_kernel[grid]((x, x), x, x.numel(), stride, 0.5, BLOCK=64, **options)
        assert result is None
    (request,) = found
    return request


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_launch_asks_for(device: str) -> None:
    x = torch.full((200,), 7.0).to(device)
    request = scale(SM_90, x, num_warps=2, maxnreg=64)
    assert request.kernel == f"{__name__}:_scale_kernel" and request.name == "scale"
    assert (request.target, request.grid) == ("sm_90", (4, 2, 1))
    assert request.constants == {"BLOCK": 64}
    assert request.options == {"num_warps": 2, "maxnreg": 64, "num_ctas": 1, "num_stages": 3}
    assert [(a.name, a.type) for a in request.arguments] == [
        ("pair.0", "*fp32"),
        ("pair.1", "*fp32"),
        ("out_ptr", "*fp32"),
        ("length", "i32"),
        ("stride", "i32"),
        ("factor", "fp32"),
    ]
    assert request.arguments[2].value is x
    aligned = {"tt.divisibility": 16}
    assert request.hints == dict.fromkeys(("pair.0", "pair.1", "out_ptr", "stride"), aligned)
    assert (x.to("cpu") == 7.0).all() if device == "cpu" else True


def test_what_triton_specialises_on_is_another_compilation() -> None:
    x = torch.zeros(200)
    keys = {
        scale(SM_90, x).key,
        scale(SM_90, x, stride=2).key,
        scale(SM_90, x, stride=1).key,
        scale(SM_90, x, num_stages=1).key,
        scale(SM_90, torch.zeros(201)[1:]).key,
        scale(SM_90, x.double()).key,
    }
    assert len(keys) == 6
    assert scale(SM_90, torch.zeros(333)).key == scale(SM_90, x).key
    assert "stride" in scale(SM_90, x, stride=1).constants


def test_amd_is_told_of_tensors_that_32_bits_address() -> None:
    small = scale(GFX942, torch.empty(100, device="meta"))
    large = scale(GFX942, torch.empty(2**29, device="meta"))
    assert small.target == "gfx942" and small.options["num_stages"] == 2
    assert small.hints["out_ptr"] == {"tt.divisibility": 16, "tt.pointer_range": 32}
    assert large.hints["out_ptr"] == {"tt.divisibility": 16}


@pytest.mark.parametrize(("gpu", "code"), [(SM_90, "ptx"), (GFX942, "amdgcn")])
def test_it_compiles_as_the_launch_would(gpu: GPUTarget, code: str) -> None:
    request = scale(gpu, torch.zeros(64), num_warps=1)
    kernel = request.compiled()
    assert "_scale_kernel" in kernel.asm[code]
    assert kernel.metadata.num_warps == 1
    assert kernel.metadata.num_stages == request.options["num_stages"]


def test_everything_is_as_before_afterwards() -> None:
    before = driver._active, JITFunction.run, knobs.runtime.jit_cache_hook
    with pytest.raises(ZeroDivisionError), requests(SM_90):
        assert driver.active.get_current_target() == SM_90
        raise ZeroDivisionError
    assert (driver._active, JITFunction.run, knobs.runtime.jit_cache_hook) == before
