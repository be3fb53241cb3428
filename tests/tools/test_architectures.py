"""The table of GPU architectures, and how a table of tiles is read by it."""

from __future__ import annotations

import pytest
import torch

from csrc_triton.architectures import (
    ARCHITECTURES,
    architecture,
    listed_architecture,
    multiprocessors,
    tiles_for,
    warp_size,
)
from csrc_triton.attention.config import attention_backward_config, attention_config
from csrc_triton.gemm.config import linear_config


@pytest.mark.parametrize(
    ("arch", "listed"),
    [
        ("sm_80", "sm_80"),
        ("sm_87", "sm_86"),
        ("sm_90a", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_130", "sm_120"),
        ("gfx950", "gfx950"),
        ("gfx90a", "gfx942"),
        ("gfx1100", "gfx942"),
        ("interpreter", "interpreter"),
    ],
)
def test_unlisted_architectures_are_served_as_a_listed_one(arch: str, listed: str) -> None:
    assert listed_architecture(arch) == listed
    assert multiprocessors(arch) == multiprocessors(listed)
    dtype = torch.float16
    assert linear_config(9999, 999, 99, dtype, arch) == linear_config(9999, 999, 99, dtype, listed)
    assert attention_config(64, dtype, arch) == attention_config(64, dtype, listed)
    wide = (128, dtype)
    assert attention_backward_config(*wide, arch) == attention_backward_config(*wide, listed)


@pytest.mark.parametrize("arch", ["", "cuda", "cpu", "sm_", "sm_70", "sm_x", "h100"])
def test_unknown_architectures_are_refused(arch: str) -> None:
    with pytest.raises(ValueError, match="arch is"):
        linear_config(1, 1, 1, torch.float16, arch)
    with pytest.raises(ValueError, match="arch is"):
        attention_config(64, torch.float16, arch)


def test_an_architecture_without_tiles_takes_those_of_the_nearest() -> None:
    table = {"sm_80": "Ampere", "sm_90": "Hopper", "gfx942": "CDNA 3", "interpreter": "none"}
    for arch, expected in (
        ("sm_89", "Ampere"),
        ("sm_120", "Ampere"),  # shared memory and tensor cores as before Hopper's
        ("sm_130", "Ampere"),
        ("sm_103", "Hopper"),
        ("gfx950", "CDNA 3"),
        ("interpreter", "none"),
    ):
        assert tiles_for(table, arch) == expected
    assert tiles_for({**table, "sm_86": "own"}, "sm_89") == "own"
    assert tiles_for({**table, "sm_86": "own"}, "sm_80") == "Ampere"


def test_the_nearest_is_an_architecture_of_the_table() -> None:
    for name, facts in ARCHITECTURES.items():
        assert listed_architecture(name) == name
        if facts.nearest is not None:
            assert facts.nearest in ARCHITECTURES and facts.nearest != name
            assert facts.nearest[:2] == name[:2]
            assert ARCHITECTURES[facts.nearest].warp_size == facts.warp_size


def test_warps() -> None:
    assert [warp_size(arch) for arch in ("sm_90", "sm_103", "gfx942", "gfx90a")] == [32, 32, 64, 64]
    assert warp_size("gfx1100") == 32  # of graphics cards


def test_the_cpu_is_the_interpreter() -> None:
    assert architecture(torch.device("cpu")) == "interpreter"
