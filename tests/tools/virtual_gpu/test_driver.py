"""The driver without a GPU, and what it says that a launch was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver as triton_drivers

from tests.tools.virtual_gpu.kernels import VERSION
from tests.tools.virtual_gpu.scripts import described_product, vector_addition
from tools.compile.sass import resource_usage
from tools.virtual_gpu.cubin import resources
from tools.virtual_gpu.driver import Driver, activated
from tools.virtual_gpu.executor import Executor
from tools.virtual_gpu.global_memory import Checks
from tools.virtual_gpu.record import Launch, Recorder

TARGETS = ("sm_80", "sm_90", "sm_120")


@triton.jit
def scale_kernel(out_ptr, x_ptr, stride, factor, bias, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * stride) * factor
    if bias is not None:
        x += bias
    tl.store(out_ptr + offsets, x)


def recorded(target: str, call) -> list[Launch]:
    launches: list[Launch] = []
    with activated(target, launches.append):
        call()
    return launches


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_is_compiled_for_the_target_and_handed_over(target: str) -> None:
    x = torch.zeros(1000)
    (launch,) = recorded(target, lambda: vector_addition.add(x, x))
    assert f".target {target}" in launch.ptx
    assert launch.kernel.endswith("vector_addition:add_kernel") and launch.name == "add_kernel"
    assert launch.grid == (4, 1, 1)
    assert launch.constants == {"BLOCK": 256}
    assert launch.signature == {
        "x_ptr": "*fp32",
        "y_ptr": "*fp32",
        "out_ptr": "*fp32",
        "n": "i32",
        "BLOCK": "constexpr",
    }
    assert launch.options["num_warps"] == 4 and launch.options["num_stages"] == 3
    assert [a.name for a in launch.arguments] == ["x_ptr", "y_ptr", "out_ptr", "n"]
    assert launch.arguments[0].value is x and launch.arguments[3].value == 1000


def test_specialisation_is_that_of_the_arguments() -> None:
    """1,000 is no multiple of 16 and 1,008 is; a view that starts at element 1 is not aligned to
    16 bytes; 1 and None are compiled in."""
    x, out = torch.zeros(2001), torch.zeros(64)

    def calls() -> None:
        vector_addition.add(x[:1008], x[1:1009])
        scale_kernel[(1,)](out, x, 1, 0.5, None, BLOCK=64, num_warps=2, num_stages=5)
        scale_kernel[(1,)](out, x, 2, 0.5, 3.0, BLOCK=64)

    added, scaled, strided = recorded("sm_80", calls)
    multiple = {"tt.divisibility": 16}
    assert added.hints == {"x_ptr": multiple, "out_ptr": multiple, "n": multiple}
    assert scaled.constants == {"stride": 1, "bias": None, "BLOCK": 64}
    assert scaled.options["num_warps"] == 2 and scaled.options["num_stages"] == 5
    assert [(a.name, a.value) for a in scaled.arguments[2:]] == [("factor", 0.5)]
    assert strided.constants == {"BLOCK": 64}
    assert strided.hints == {"out_ptr": multiple, "x_ptr": multiple}


def test_both_targets_in_one_process_and_the_driver_before_is_the_driver_after() -> None:
    before = triton_drivers._active
    x = torch.zeros(64)
    seen = [recorded(target, lambda: vector_addition.add(x, x))[0] for target in TARGETS * 2]
    assert [f".target {launch.target}" in launch.ptx for launch in seen] == [True] * 6
    assert triton_drivers._active is before
    with pytest.raises(RuntimeError, match="in the script"), activated("sm_80", lambda _: None):
        raise RuntimeError("in the script")
    assert triton_drivers._active is before


def test_a_recording_is_a_line_of_json_a_launch(tmp_path: Path) -> None:
    x = torch.zeros(4, 32)
    with (tmp_path / "launches").open("w") as file, activated("sm_90", Recorder(file)):
        vector_addition.add(x[0], x[1])
        vector_addition.add(x[:, 0], x[:, 1])
    first, second = map(json.loads, (tmp_path / "launches").read_text().splitlines())
    assert first["arguments"]["y_ptr"] == {
        "dtype": "float32",
        "shape": [32],
        "strides": [1],
        "storage_offset": 32,
        "storage_bytes": 512,
    }
    assert second["arguments"]["x_ptr"]["strides"] == [32]
    assert second["arguments"]["n"] == 4
    assert first["target"] == "sm_90" and first["hints"]["n"] == {"tt.divisibility": 16}
    assert first["options"]["num_warps"] == 4


@triton.jit
def share_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    """Every element is held in a register until the sum is known."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x / tl.sum(x, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_s_registers_and_spills_are_those_that_cuobjdump_prints(target: str) -> None:
    x = torch.zeros(4096)
    seen = []
    with activated(target, lambda _: None):
        for most in (None, 40):
            kernel = share_kernel.warmup(x, x, BLOCK=4096, grid=(1,), num_warps=1, maxnreg=most)
            kernel._init_handles()
            registers, stack = resource_usage(kernel.asm["cubin"])
            assert (kernel.n_regs, kernel.n_spills) == (registers, stack // 4)
            seen.append((registers, stack))
    # 128 elements a thread: in registers, or for the most part in memory.
    assert seen[0][0] > 128 and seen[0][1] == 0
    assert seen[1][0] <= 40 and seen[1][1] > 4 * 64


def test_what_is_no_cubin_of_the_kernel_is_said() -> None:
    with pytest.raises(ValueError, match=r"binary of k is no cubin: it begins with b'// PT'"):
        resources(b"// PTX", "k")
    x = torch.zeros(64)
    with activated("sm_80", lambda _: None):
        kernel = share_kernel.warmup(x, x, BLOCK=64, grid=(1,))
    with pytest.raises(ValueError, match="nothing of the registers of a kernel other_kernel"):
        resources(kernel.asm["cubin"], "other_kernel")


def test_what_there_is_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'sm_70'; there are sm_80, sm_90, sm_120"):
        recorded("sm_70", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        recorded("sm_80", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET")
    meta = torch.empty(64, device="meta")
    with pytest.raises(ValueError, match=r"add_kernel: x_ptr is on meta"):
        recorded("sm_80", lambda: vector_addition.add(meta, meta))


def test_a_descriptor_is_a_map_or_the_tensor_and_what_is_known_of_it() -> None:
    x, y = torch.zeros(64, 32), torch.zeros(32, 64)
    flags = ["i1"] if VERSION < (3, 7) else ["i1", "i1"]  # of NaN, and of tf32
    of_sm_80 = ["*i8", *["i64"] * 4, *flags]
    for target, first in (("sm_80", of_sm_80), ("sm_90", ["nvTmaDesc"])):
        (launch,) = recorded(target, lambda: described_product.product(x, y, from_host=True))
        given = [a for a in launch.arguments if a.name.startswith("a.")]
        assert [a.type for a in given] == [*first, *["i32"] * 2, *["i64"] * 2]
        assert [a.value for a in given[-4:]] == [64, 32, 32, 1]
        assert launch.tensors["a"] is x  # behind the kernel's own parameters
        assert target == "sm_90" or given[0].value is x


def test_clusters_are_refused_by_name() -> None:
    x = torch.zeros(64)
    with pytest.raises(NotImplementedError, match=r"scale_kernel has num_ctas=2; there are no clu"):
        recorded("sm_90", lambda: scale_kernel[(1,)](x, x, 1, 0.5, None, BLOCK=64, num_ctas=2))


def test_triton_s_own_memory_is_as_large_as_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Driver.launch

    def asking(driver: Driver, source: Any, metadata: Any, *others: Any) -> Launch:
        return launch(driver, source, metadata._replace(global_scratch_size=96), *others)

    monkeypatch.setattr(Driver, "launch", asking)
    x = torch.zeros(1000)
    (seen,) = recorded("sm_80", lambda: vector_addition.add(x, x))
    *_, own, profile = seen.arguments
    assert (own.name, own.value.shape, own.value.dtype) == (
        "global_scratch",
        (4 * 96,),
        torch.uint8,
    )
    assert (profile.name, profile.value.numel()) == ("profile_scratch", 0)
    # It lies behind the kernel's own parameters. What blocks leave there is no result.
    last = seen.ptx.index("ret;")
    writes = "ld.param.b64 %rd1, [add_kernel_param_4];\nst.global.b32 [%rd1], %tid.x;\n"
    Executor(Checks(written_once=False))(
        dataclasses.replace(seen, ptx=seen.ptx[:last] + writes + seen.ptx[last:])
    )
    assert own.value.any()
