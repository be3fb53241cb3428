"""Launch configurations of the linear and CTC kernels, and the code that comes of them."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest
import torch

from csrc_triton import ctc
from csrc_triton.architectures import ARCHITECTURES, warp_size
from csrc_triton.ctc import ctc_config
from csrc_triton.gemm.config import (
    TILES,
    instructions_of_multiply_add,
    instructions_outside,
    linear_candidates,
    linear_config,
    predicted_clocks,
)
from csrc_triton.gemm.forward import _linear_kernel
from tools.compile.machine_code import default_cache, machine_code
from tools.compile.occupancy import blocks_per_multiprocessor
from tools.compile.shipped import shipped_kernels
from tools.compile.target import Target


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "interpreter"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tiles_fit_the_architecture(arch: str, dtype: torch.dtype) -> None:
    for config in linear_candidates(dtype, arch):
        for size in (config.block_m, config.block_n, config.block_k):
            assert size >= 16 and size & (size - 1) == 0
        accumulators = config.block_m * config.block_n
        if arch != "interpreter":
            threads = config.num_warps * warp_size(arch)
            assert accumulators <= 128 * threads
            step = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
            # Matrix instructions that read shared memory by themselves hold a step's buffer longer.
            asynchronous = arch in ("sm_90", "sm_100")
            buffers = max(1, config.num_stages - (0 if asynchronous else 1))
            assert step * buffers <= ARCHITECTURES[arch].block_shared_bytes


def test_tiles_go_from_large_to_small() -> None:
    for row in TILES.values():
        for tiles in (row.half, row.fp32):
            sizes = [config.block_m * config.block_n for config in tiles]
            assert sizes == sorted(set(sizes), reverse=True)


# K and columns of the products of a model: feed-forward, projections of attention one by one and
# stacked, the gated unit, the features and a head.
SHAPES = (
    (1024, 4096),
    (4096, 1024),
    (1024, 1024),
    (1024, 3072),
    (1024, 2048),
    (160, 1024),
    (1024, 32),
)
DEVICES = (
    ("sm_75", 40),
    ("sm_80", 108),
    ("sm_86", 84),
    ("sm_89", 142),
    ("sm_90", 114),
    ("sm_90", 132),
    ("sm_100", 148),
    ("sm_120", 170),
    ("gfx942", 304),
)


@pytest.mark.parametrize(("arch", "count"), DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tile_is_that_of_the_shortest_prediction(
    arch: str, count: int, dtype: torch.dtype
) -> None:
    candidates = linear_candidates(dtype, arch)
    assert len(candidates) <= 4  # which are the compilations of a layer's shape
    for in_features, columns in SHAPES:
        before, last, changes = 0.0, None, 0
        for tokens in range(64, 50_000, 97):
            size = (tokens, columns, in_features, dtype, arch, count)
            chosen = linear_config(*size)
            clocks = predicted_clocks(chosen, *size)
            assert clocks <= 1.1 * min(predicted_clocks(config, *size) for config in candidates)
            assert clocks >= before
            before, changes, last = clocks, changes + (chosen != last), chosen
        assert changes <= 64


def test_a_step_of_the_prediction_is_a_wave() -> None:
    """As much as a round of the tile's programs, and no more."""
    size = (1024, 4096, torch.bfloat16, "sm_90", 132)
    for config in linear_candidates(torch.bfloat16, "sm_90"):
        of_round = predicted_clocks(config, config.block_m, *size)
        times = [predicted_clocks(config, tokens, *size) for tokens in range(1, 50_000, 31)]
        steps = [after - before for before, after in pairwise(times)]
        assert min(steps) == 0 < max(steps) <= of_round


def test_model_size_choices() -> None:
    tiles = linear_candidates(torch.bfloat16, "sm_90")
    h100 = (torch.bfloat16, "sm_90", 132)
    # 16 utterances of 30 s; one of 3 s.
    assert linear_config(24_000, 4096, 1024, *h100) == tiles[0]
    assert linear_config(150, 1024, 4096, *h100) == tiles[-1]
    # 128 large tiles are 3 % less than there are multiprocessors: still better than small ones.
    size = (4096, 1024, 4096, *h100)
    assert linear_config(*size) == tiles[0]
    assert predicted_clocks(tiles[0], *size) < predicted_clocks(tiles[-1], *size) / 2


def test_predictions_are_near_what_others_measured() -> None:
    """450 to 500 TFLOP/s at K = 1024 by Triton without descriptors on an H100, at some 1.7 GHz."""
    tokens, columns, inner = 24_000, 4096, 1024
    size = (tokens, columns, inner, torch.bfloat16, "sm_90", 132)
    seconds = predicted_clocks(linear_config(*size), *size) / 1.7e9
    assert 400e12 < 2 * tokens * columns * inner / seconds < 575e12


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_predictions_count_the_machine_code(target: str, dtype: str) -> None:
    """Instructions outside of the loop or of a multiply-add, and resident programs, with SiLU."""
    parsed = Target.parse(target)
    codes = {
        (constants["BLOCK_M"], constants["BLOCK_N"]): machine_code(kernel.request, default_cache())
        for kernel in shipped_kernels(parsed, dtype)
        if kernel.name.startswith("linear/linear_silu")
        for constants in [kernel.request.constants]
    }
    candidates = linear_candidates(getattr(torch, dtype), parsed.arch)
    assert len(codes) == len(candidates)
    for config in candidates:
        code = codes[config.block_m, config.block_n]
        assert code.hot_loop is not None
        if dtype == "float32":
            outputs = config.block_m * config.block_n // (32 * config.num_warps)
            counted = code.hot_loop / (outputs * config.block_k)
            assert 0.97 < instructions_of_multiply_add(config, parsed.arch) / counted < 1.03
        else:
            outside = code.instructions - code.hot_loop
            assert 0.85 < instructions_outside(config, parsed.arch) / outside < 1.15
        resident = (config.num_warps, code.registers, code.shared_bytes)
        assert blocks_per_multiprocessor(parsed.arch, *resident) == config.blocks


def test_ctc_blocks() -> None:
    for vocabulary, arch in product((1, 2, 32, 33, 1000, 1025, 100_000), ARCHITECTURES):
        config = ctc_config(vocabulary, arch)
        assert config.block_vocabulary <= 1024
        assert config.block_vocabulary >= min(vocabulary, 1024)
        assert config.block_vocabulary * config.block_frames <= 2048


def test_each_tile_is_launched_with_each_epilogue() -> None:
    target = Target.parse("cuda:90")
    tiles = {(c.block_m, c.block_n) for c in linear_candidates(torch.bfloat16, "sm_90")}
    found: dict[str, set[tuple[int, int]]] = {}
    for kernel in shipped_kernels(target, "bfloat16"):
        if kernel.request.name == "linear":
            constants = kernel.request.constants
            tile = (constants["BLOCK_M"], constants["BLOCK_N"])
            found.setdefault(kernel.name.split("/")[1], set()).add(tile)
    assert len(tiles) == 4
    assert found == dict.fromkeys(
        ("linear_silu", "linear", "linear_no_bias", "linear_features", "linear_glu"), tiles
    )


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (_linear_kernel, "num_tokens"),
        (_linear_kernel, "in_features"),
        (ctc._ctc_argmax_kernel, "num_frames"),
        (ctc._ctc_collapse_kernel, "blank"),
    ],
)
def test_lengths_and_sizes_do_not_specialise(kernel: object, name: str) -> None:
    (parameter,) = [p for p in kernel.params if p.name == name]  # type: ignore[attr-defined]
    assert parameter.do_not_specialize
    assert not parameter.is_constexpr


@pytest.mark.parametrize("name", ["linear_silu", "linear_glu", "linear"])
def test_each_output_is_stored_once_and_wide(name: str) -> None:
    kernels = {
        kernel.name: kernel for kernel in shipped_kernels(Target.parse("cuda:90"), "bfloat16")
    }
    request = kernels[f"linear/{name}/BLOCK_M=64,BLOCK_N=64"].request
    ptx = request.compiled().asm["ptx"]

    assert "wgmma.mma_async" in ptx
    assert "ld.local" not in ptx and "st.local" not in ptx
    stores = re.findall(r"\bst\.global(?:\.v(\d))?\.b(\d+)", ptx)
    assert {int(count or 1) * int(bits) for count, bits in stores} == {128}
    stored = len(stores) * 16 * 32 * request.options["num_warps"]
    assert stored == 64 * 64 * torch.bfloat16.itemsize // (2 if name == "linear_glu" else 1)
    # Beside the bias, nothing is read but by the asynchronous copies of the loop.
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    assert all(int(count or 1) * int(bits) < 128 for count, bits in loads)
