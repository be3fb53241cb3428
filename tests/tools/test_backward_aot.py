"""The compiler lane for the gradients: every kernel as it ships, on GPUs that need not be there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from csrc_triton.architectures import warp_size
from csrc_triton.norm.config import norm_backward_config
from csrc_triton.specs import KernelSpec
from tools.compile.aot import check_kernel, shipped_kernels
from tools.compile.machine_code import Target, default_cache

TENSOR_CORES = {"cuda:80": "HMMA", "cuda:90": "HGMMA", "hip:gfx942": "MFMA"}
# Without the second form of a kernel that differs in a flag alone.
SKIPPED = ("no_positions", "conv_again", "scaled", "bias_silu_output")


def shipped(arch: str, dtype: str) -> list[KernelSpec]:
    return [spec for spec in shipped_kernels(arch, dtype) if "_bwd" in spec.name]


def test_strides_and_sizes_of_one_compile() -> None:
    # Triton makes a constant of an argument whose value is 1, unless it is told not to.
    for spec in shipped("sm_80", "bfloat16"):
        if any(text in spec.name for text in SKIPPED):
            continue
        fixed = {*spec.kernel.do_not_specialize, *spec.kernel.do_not_specialize_on_alignment}
        ones = [
            name for name, type_ in spec.signature.items() if type_ == "i32" and name not in fixed
        ]
        assert ones, spec.name
        changed = replace(
            spec,
            signature={name: t for name, t in spec.signature.items() if name not in ones},
            constants={**spec.constants, **dict.fromkeys(ones, 1)},
            divisible_by_16=spec.divisible_by_16 - set(ones),
        )
        assert check_kernel(changed, Target.parse("cuda:80"), {}, default_cache()).code, spec.name


@pytest.mark.parametrize("target", list(TENSOR_CORES))
def test_compiles_without_spills_and_with_tensor_cores(target: str) -> None:
    parsed = Target.parse(target)
    for spec in shipped(parsed.arch, "bfloat16"):
        if any(text in spec.name for text in SKIPPED):
            continue
        row = check_kernel(spec, parsed, {}, default_cache())
        assert row.problems == (), f"{spec.name}: {row.problems}"
        assert row.code is not None
        assert row.code.spills == 0, spec.name
        if spec.name.startswith("shaw_attention_bwd"):
            assert spec.kind == "gemm", spec.name
            assert TENSOR_CORES[target] in row.code.tensor_core, spec.name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("width", [1, 100, 256, 512, 1000, 1024, 2048, 4096, 8192])
def test_a_thread_of_a_norm_holds_at_most_16_elements_of_a_row(width: int, arch: str) -> None:
    config = norm_backward_config(width, torch.bfloat16, arch)
    assert config.block_width >= width
    threads = config.num_warps * warp_size(arch)
    assert config.rows * config.block_width <= 16 * threads
