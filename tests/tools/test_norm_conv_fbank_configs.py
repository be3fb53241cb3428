"""Launch configurations of the norm, convolution and filterbank kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from csrc_triton.architectures import ARCHITECTURES, warp_size
from csrc_triton.conv.config import conv_candidates, conv_config
from csrc_triton.fbank.config import fbank_config, normalize_config
from csrc_triton.launch import num_blocks
from csrc_triton.norm.config import norm_config

GPUS = tuple(ARCHITECTURES)
PLACES = (*GPUS, "interpreter")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 16, 80, 160, 512, 768, 1000, 1024, 1280, 2048)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("arch", PLACES)
@pytest.mark.parametrize("width", [*WIDTHS, 4096, 8192])
def test_norm_config(width: int, arch: str) -> None:
    for dtype in DTYPES:
        config = norm_config(width, dtype, arch)
        assert config == norm_config(width, dtype, arch)
        assert width <= config.block_width <= max(16, 2 * width - 1)
        for number in dataclasses.astuple(config):
            assert is_power_of_two(number)
        if arch != "interpreter":
            threads = config.num_warps * warp_size(arch)
            assert threads <= 1024
            # Elements of one tensor that a thread holds in fp32 registers.
            assert config.rows * config.block_width // threads <= 32


@pytest.mark.parametrize("arch", PLACES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_conv_config(channels: int, arch: str) -> None:
    for kernel_size in (3, 31, 63):
        for config in conv_candidates(channels, kernel_size, torch.bfloat16, arch):
            assert channels <= config.block_channels <= max(16, 2 * channels - 1)
            assert is_power_of_two(config.rows)
            assert is_power_of_two(config.block_channels)
            assert is_power_of_two(config.num_warps)
            assert config.rows >= 2
            if arch != "interpreter":
                threads = config.num_warps * warp_size(arch)
                assert threads <= 1024
                window_and_sums = 2 * config.rows * config.block_channels // threads
                # A multiprocessor has 65536 registers; a third of a thread's is for the rest.
                assert window_and_sums <= min(255, 65536 // threads) * 2 // 3


@pytest.mark.parametrize("arch", PLACES)
def test_convolution_loads_at_most_6_elements_an_output(arch: str) -> None:
    for channels in (512, 768, 1024):
        config = conv_candidates(channels, 31, torch.bfloat16, arch)[0]
        rows_of_x_and_taps = config.rows + 31 + 31
        assert rows_of_x_and_taps / config.rows <= 6


@pytest.mark.parametrize(
    ("arch", "count"), [("sm_80", 108), ("sm_89", 142), ("sm_90", 114), ("sm_90", 132)]
)
def test_a_short_batch_gives_every_multiprocessor_a_convolution(arch: str, count: int) -> None:
    def rows_of(tokens: int) -> int:
        return conv_config(tokens, 1024, 31, torch.bfloat16, arch, count).rows

    rows = [rows_of(tokens) for tokens in range(1, 50_000, 7)]
    assert rows == sorted(rows)
    assert [config.rows for config in conv_candidates(1024, 31, torch.bfloat16, arch)] == sorted(
        set(rows), reverse=True
    )
    assert rows[0] == 2 and rows[-1] == 16
    for tokens in (500, 501, 1500, 16 * count, 24_000):
        assert tokens // rows_of(tokens) >= count
    assert rows_of(16 * count - 1) == 8


@pytest.mark.parametrize("arch", PLACES)
def test_fbank_config(arch: str) -> None:
    for dtype in (torch.float64, torch.float32):
        config = fbank_config(dtype, arch)
        for number in dataclasses.astuple(config):
            assert is_power_of_two(number)
        assert min(config.frames, config.block_k, config.block_n) >= 16  # smallest matrix product
        assert 128 % config.block_n == 0
        assert 128 % config.block_k == 0  # the basis is padded to 128 rows
    normalize = normalize_config(arch)
    assert normalize.frames % normalize.tile_frames == 0


@pytest.mark.parametrize("arch", GPUS)
def test_wave_size_keeps_the_number_of_threads(arch: str) -> None:
    reference = norm_config(1024, torch.bfloat16, "sm_90").num_warps * 32
    assert norm_config(1024, torch.bfloat16, arch).num_warps * warp_size(arch) == reference
    reference = conv_config(9999, 1024, 31, torch.bfloat16, "sm_90").num_warps * 32
    config = conv_config(9999, 1024, 31, torch.bfloat16, arch)
    assert config.num_warps * warp_size(arch) == reference


def test_configurations_are_frozen() -> None:
    for config in (
        norm_config(1024, torch.float16, "sm_80"),
        conv_config(1, 1024, 31, torch.float16, "sm_80"),
        fbank_config(torch.float64, "sm_80"),
        normalize_config("sm_80"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.num_warps = 1  # type: ignore[misc]


def test_shapes_that_no_configuration_fits() -> None:
    for width in (0, 8193):
        with pytest.raises(ValueError, match=f"width is {width}"):
            norm_config(width, torch.float16, "sm_80")
    with pytest.raises(ValueError, match="channels is 2049"):
        conv_config(1, 2049, 31, torch.float16, "sm_80")
    for kernel_size in (2, 64):
        with pytest.raises(ValueError, match=f"kernel_size is {kernel_size}"):
            conv_config(1, 1024, kernel_size, torch.float16, "sm_80")


@pytest.mark.parametrize("block", [1, 16, 256])
def test_every_row_has_a_block(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 7, 40):
        lengths = torch.randint(0, 300, (batch,), generator=generator) * (batch != 7)
        starts = [0, *lengths.cumsum(0).tolist()]
        first_blocks = [start // block + sequence for sequence, start in enumerate(starts)]
        assert first_blocks[0] == 0
        assert first_blocks[-1] == num_blocks(starts[-1], batch, block)
        for sequence, length in enumerate(lengths.tolist()):
            count = first_blocks[sequence + 1] - first_blocks[sequence]
            assert -(-length // block) <= count <= length // block + 1 + (length % block > 0)
