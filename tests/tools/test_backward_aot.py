"""The compiler lane for the gradients: every kernel as it ships, on GPUs that need not be there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from csrc_triton.architectures import warp_size
from csrc_triton.norm.config import norm_backward_config
from tools.compile.aot import check_kernel
from tools.compile.machine_code import default_cache
from tools.compile.shipped import Shipped, shipped_kernels
from tools.compile.target import Target
from tools.virtual_gpu.requests import requests

TENSOR_CORES = {"cuda:80": "HMMA", "cuda:90": "HGMMA", "hip:gfx942": "MFMA"}
# Without the second form of a kernel that differs in a flag alone.
SKIPPED = ("no_positions", "unscaled", "feed_forward", "seqused")


def backward(target: Target) -> list[Shipped]:
    return [
        kernel
        for kernel in shipped_kernels(target, "bfloat16")
        if "_bwd" in kernel.name or kernel.name.startswith("slide/")
        if not any(text in kernel.name for text in SKIPPED)
        if kernel.name != "slide/conv_norm_act"
    ]


def test_strides_and_sizes_of_one_compile() -> None:
    # Triton makes a constant of an argument whose value is 1, unless it is told not to.
    target = Target.parse("cuda:80")
    for kernel in backward(target):
        function = kernel.request.source.fn
        fixed = {*function.do_not_specialize, *function.do_not_specialize_on_alignment}
        ones = {
            a.name: 1 for a in kernel.request.arguments if a.type == "i32" and a.name not in fixed
        }
        assert ones or "distances" in kernel.name, kernel.name
        values = {a.name: a.value for a in kernel.request.arguments} | kernel.request.constants
        options = kernel.request.options
        with requests(target.gpu) as found:
            function[kernel.request.grid](**(values | ones), **options)
        assert set(ones) <= set(found[0].constants)
        changed = replace(kernel, request=found[0])
        assert check_kernel(changed, {}, default_cache()).code, kernel.name


@pytest.mark.parametrize("target", list(TENSOR_CORES))
def test_compiles_without_spills_and_with_tensor_cores(target: str) -> None:
    kernels = backward(Target.parse(target))
    assert len(kernels) == 15
    for kernel in kernels:
        row = check_kernel(kernel, {}, default_cache())
        assert row.problems == (), f"{kernel.name}: {row.problems}"
        assert row.code is not None
        assert row.code.spills == 0, kernel.name
        if target == "cuda:90" and kernel.name == "shaw_attention_bwd_queries/relative_key":
            assert row.blocks == 2
        if "shaw_attention_bwd" in kernel.name and "distances" not in kernel.name:
            assert row.code.products == {"bfloat16": row.code.products["bfloat16"]}, kernel.name
            # The product of shares has 32 rows, one a distance; `wgmma` takes 64.
            is_small = target == "cuda:90" and "bwd_shares" in kernel.name
            instruction = "HMMA" if is_small else TENSOR_CORES[target]
            assert instruction in row.code.tensor_core, kernel.name


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_the_window_of_float32_spills_nothing_where_rows_are_not_read(target: str) -> None:
    """The most that a thread of `_slide_kernel` holds."""
    kernels = {kernel.name: kernel for kernel in shipped_kernels(Target.parse(target), "float32")}
    kernel = kernels["slide/conv_norm_act_seqused/BACKWARDS=True"]
    row = check_kernel(kernel, {}, default_cache())
    assert row.code is not None
    assert row.code.spills == 0 and row.problems == ()


@pytest.mark.parametrize("name", ["relative_key", "relative_key_dropout"])
def test_full_precision_on_sm_89_does_not_spill(name: str) -> None:
    # Of all targets the one whose compiler gave up registers that it needed.
    shipped = shipped_kernels(Target.parse("cuda:89"), "float32")
    (kernel,) = [k for k in shipped if k.name == f"shaw_attention_bwd_queries/{name}"]
    assert check_kernel(kernel, {}, default_cache()).problems == ()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("width", [1, 100, 256, 512, 1000, 1024, 2048, 4096, 8192])
def test_a_thread_of_a_norm_holds_at_most_16_elements_of_a_row(width: int, arch: str) -> None:
    config = norm_backward_config(width, torch.bfloat16, arch)
    assert config.block_width >= width
    threads = config.num_warps * warp_size(arch)
    assert config.rows * config.block_width <= 16 * threads
