"""Launch configurations of the attention kernel, its tile map, and the code that comes of them."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from csrc_triton import attention
from csrc_triton.architectures import ARCHITECTURES
from csrc_triton.attention.config import (
    AttentionConfig,
    attention_backward_config,
    attention_config,
    num_programs,
    scratch_layout,
)
from tools.compile import sass
from tools.compile.aot import FAR_LOOP_LIMIT
from tools.compile.occupancy import blocks_per_multiprocessor
from tools.compile.shipped import BATCHES, PUBLISHED, launch, variants
from tools.compile.target import Target
from tools.virtual_gpu.requests import Uncompiled, requests

PLACES = [*ARCHITECTURES, "interpreter"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("arch", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_size_has_a_configuration(arch: str, dtype: torch.dtype) -> None:
    for head_dim in range(1, 129):
        config = attention_config(head_dim, dtype, arch)
        for size in (config.block_m, config.block_n, config.block_p):
            assert size >= 16 and size & (size - 1) == 0
        assert config.num_warps in (1, 2, 4, 8) and config.num_stages >= 1
        if config.max_registers is not None:
            # What the cap is for: registers for a whole number of resident blocks.
            assert config.max_registers % 8 == 0
            assert 65536 // (config.max_registers * config.num_warps * 32) >= 2


@pytest.mark.parametrize("head_dim", [0, -1, 129])
def test_a_head_size_out_of_range_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim is"):
        attention_config(head_dim, torch.float16, "sm_90")


def test_configurations_cannot_be_changed() -> None:
    config = attention_config(64, torch.float16, "sm_90")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_m = 1  # type: ignore[misc]


@pytest.mark.parametrize("arch", PLACES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_takes_no_other_tile(arch: str, head_dim: int, dtype: torch.dtype) -> None:
    kind = (head_dim, dtype, arch)
    with_dropout = attention_config(*kind, has_dropout=True)
    assert with_dropout.block_m == attention_config(*kind).block_m
    assert with_dropout.block_n <= 32 and with_dropout.max_registers is None
    backward = attention_backward_config(*kind, has_dropout=True)
    assert backward.tile == attention_backward_config(*kind).tile
    assert min(backward.key_step, backward.query_step) >= 16


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (128, 32), (128, 64)])
@pytest.mark.parametrize("band", [(0, 0), (64, 8), (3, 0), (0, 17), (200, 100)])
def test_scratch_holds_every_score_and_every_read(
    blocks: tuple[int, int], band: tuple[int, int]
) -> None:
    (block_m, block_n), (left, right) = blocks, band
    layout = scratch_layout(block_m, block_n, left, right)
    assert layout.row_stride % 16 == layout.start % 16 == layout.read_limit % 16 == 0
    written: dict[int, tuple[int, int]] = {}
    for row in range(block_m):
        for distance in range(-left, right + 1):
            address = layout.start + row * (layout.row_stride + 1) + distance
            assert 0 <= address < layout.size and address not in written
            written[address] = (row, distance)
    # Blocks of keys begin anywhere from wholly left of the band to wholly right of it.
    for first in range(-left - block_n + 1, block_m + right + 4 * block_n):
        begin = layout.start + min(first, layout.read_limit)
        assert begin >= 0
        assert begin + (block_m - 1) * layout.row_stride + block_n <= layout.size
        for row in (0, 1, block_m - 1):
            for column in range(first, first + block_n):
                if -left < column - row < right:
                    address = begin + row * layout.row_stride + column - first
                    assert written[address] == (row, column - row)


@pytest.mark.parametrize(
    "lengths",
    [[], [0], [1], [0, 5, 0], [16, 17, 15], [300, 1, 64, 300, 2], [7] * 40, [0, 33, 32, 31, 0]],
)
@pytest.mark.parametrize("slack", [0, 100])
def test_tile_map_lists_every_tile_once_longest_first(lengths: list[int], slack: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths, default=0)
    tile_map = attention.build_tile_map(
        cu_seqlens, 16, num_tokens=sum(lengths), max_seqlen=longest + slack
    )
    assert tile_map.dtype == torch.int32 and tile_map.is_contiguous()
    bound = attention.tile_bound(len(lengths), sum(lengths), longest + slack, 16)
    assert tile_map.shape == (bound, 2)
    entries = [tuple(entry) for entry in tile_map.tolist()]
    used = [entry for entry in entries if entry[0] >= 0]
    assert entries[len(used) :] == [(-1, -1)] * (len(entries) - len(used))
    expected = {
        (sequence, block)
        for sequence, length in enumerate(lengths)
        for block in range(-(-length // 16))
    }
    assert set(used) == expected and len(used) == len(expected)
    order = [lengths[sequence] for sequence, _ in used]
    assert order == sorted(order, reverse=True)


def test_tile_bound_is_exact_for_equal_lengths() -> None:
    assert attention.tile_bound(16, 16 * 1500, 1500, 128) == 16 * 12


def test_a_cpu_tensor_is_refused_outside_the_interpreter() -> None:
    tensor = torch.zeros(4, 1, 16)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        attention.shaw_attention(tensor, tensor, tensor, torch.tensor([0, 4]).int(), 4)


def asked(arch: str, dtype: str, name: str) -> Uncompiled:
    """What the launcher asks for, of the published sizes and 16 utterances of 30 s."""
    sizes = dataclasses.replace(PUBLISHED, lengths=BATCHES[0])
    target = Target.parse(f"cuda:{arch.removeprefix('sm_')}")
    with requests(target.gpu) as found, torch.no_grad():
        launch("shaw_attention", variants("shaw_attention")[name], sizes, dtype, "meta")
    (request,) = (request for request in found if request.name == "shaw_attention_fwd")
    return request


@cache
def machine_code(arch: str, dtype: str, name: str) -> tuple[str, int, int]:
    """Disassembly, bytes of stack, and resident blocks of a multiprocessor."""
    request = asked(arch, dtype, name)
    kernel = request.compiled()
    registers, stack = sass.resource_usage(kernel.asm["cubin"])
    warps, shared = request.options["num_warps"], kernel.metadata.shared
    blocks = blocks_per_multiprocessor(arch, warps, registers, shared)
    return sass.disassemble(kernel.asm["cubin"]), stack, blocks


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["relative_key", "no_positions"])
def test_compiled_kernels_use_tensor_cores_and_do_not_spill(arch: str, name: str) -> None:
    code, stack, _ = machine_code(arch, "bfloat16", name)
    opcodes = sass.opcode_counts(code)
    assert sass.count(opcodes, {"sm_80": "HMMA", "sm_90": "HGMMA"}[arch]) > 0
    assert stack == sass.count(opcodes, (sass.SPILL_LOADS, sass.SPILL_STORES)) == 0
    widths = sass.global_load_widths(opcodes)
    # Whatever the tile: two numbers of the tile map and two offsets are read by themselves, all
    # rows in wide pieces.
    assert widths[32] == 4 and widths[128] > 0 and set(widths) <= {32, 64, 128}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_loops_over_keys_load_ahead(arch: str, dtype: str) -> None:
    """By asynchronous copies alone, without spills, at as many blocks as scratch memory is for."""
    code, stack, blocks = machine_code(arch, dtype, "relative_key")
    inner = [loop for loop in sass.loops(code) if loop.innermost and loop.tensor_core]
    scores, far, band = inner  # of positions, which are few; then of keys
    products = {loop.tensor_core for loop in (far, band)}
    assert len(products) == 1 and scores.tensor_core < min(products)
    tile = asked(arch, dtype, "relative_key").constants
    copies = sass.count(far.opcodes, "LDGSTS")  # of keys and values
    of_scores = copies * tile["BLOCK_M"] * 4 // (2 * tile["BLOCK_D"] * 2)
    assert copies > 0 and sass.count(band.opcodes, "LDGSTS") == copies + of_scores
    for loop in (far, band):
        assert sass.count(loop.opcodes, "LDG") == 0
    assert stack == sass.count(sass.opcode_counts(code), (sass.SPILL_LOADS, sass.SPILL_STORES)) == 0
    assert blocks == attention_config(64, getattr(torch, dtype), arch).blocks


@pytest.mark.parametrize(
    ("arch", "multiprocessors"),
    # A100, L40S, H100 in a PCIe slot, H100 and H200.
    [("sm_80", 108), ("sm_89", 142), ("sm_90", 114), ("sm_90", 132)],
)
def test_scratch_memory_is_that_of_resident_blocks(
    arch: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.forward, "device_multiprocessors", lambda device: multiprocessors)
    request = asked(arch, "bfloat16", "relative_key")
    scratch = request.tensors["scratch_ptr"]
    programs = request.grid[0]
    assert request.grid == (programs, 1, 1)
    assert programs == multiprocessors * attention_config(64, torch.bfloat16, arch).blocks
    assert scratch.numel() == programs * request.constants["SCRATCH_SIZE"]
    assert scratch.numel() * scratch.element_size() <= 16e6


def test_programs_are_no_more_than_tiles_and_scratch_memory() -> None:
    config = AttentionConfig(16, 16, 16, num_warps=4, num_stages=1, blocks=3)
    layout = scratch_layout(16, 16, 4, 4)
    assert num_programs(config, layout, 1000, 10) == 30
    assert num_programs(config, layout, 29, 10) == 29
    assert num_programs(config, layout, 0, 10) == 0
    for programs, limit in ((7, 7), (1, 0)):
        limited = dataclasses.replace(config, scratch_limit=4 * layout.size * limit)
        assert num_programs(limited, layout, 1000, 10) == programs


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_far_loop_is_plain_flash_attention(arch: str) -> None:
    ours, plain = (
        sass.hot_loop(machine_code(arch, "bfloat16", name)[0])
        for name in ("relative_key", "no_positions")
    )
    assert ours is not None and plain is not None
    assert ours.tensor_core == plain.tensor_core
    assert len(ours) <= FAR_LOOP_LIMIT * len(plain)
