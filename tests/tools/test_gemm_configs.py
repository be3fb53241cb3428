"""Launch configurations of the linear and CTC kernels, and the code that comes of them."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from csrc_triton import ctc
from csrc_triton.architectures import ARCHITECTURES, multiprocessors, warp_size
from csrc_triton.ctc import ctc_config
from csrc_triton.gemm.config import (
    TILES,
    linear_candidates,
    linear_config,
)
from csrc_triton.gemm.forward import _linear_kernel
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_large_tile_needs_one_for_each_multiprocessor(arch: str) -> None:
    tiles = linear_candidates(torch.bfloat16, arch)
    large, small = tiles[0], tiles[-1]
    columns = 1024
    per_row = -(-columns // large.block_n)
    rows = -(-multiprocessors(arch) // per_row)
    enough = (rows - 1) * large.block_m + 1
    assert linear_config(enough, columns, torch.bfloat16, arch) == large
    assert linear_config(enough - 1, columns, torch.bfloat16, arch) == small
    assert linear_config(0, columns, torch.bfloat16, arch) == small
    assert linear_config(10**9, columns, torch.bfloat16, arch) == large


def test_model_size_choices() -> None:
    # 16 utterances of 30 s on an H100; one of 3 s.
    large, small = linear_candidates(torch.bfloat16, "sm_90")
    assert linear_config(24_000, 4096, torch.bfloat16, "sm_90") == large
    assert linear_config(150, 4096, torch.bfloat16, "sm_90") == small


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lengths_bring_no_more_kernels_than_tiles(arch: str) -> None:
    chosen = {linear_config(length, 1024, torch.float16, arch) for length in range(1, 40_000, 13)}
    assert len(chosen) <= len(linear_candidates(torch.float16, arch)) <= 2


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
    assert len(tiles) == 2
    assert found == dict.fromkeys(
        ("linear_silu", "linear", "linear_no_bias", "linear_features", "linear_glu"), tiles
    )


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (_linear_kernel, "num_tokens"),
        (ctc._ctc_argmax_kernel, "num_frames"),
        (ctc._ctc_collapse_kernel, "blank"),
    ],
)
def test_lengths_do_not_specialise(kernel: object, name: str) -> None:
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
