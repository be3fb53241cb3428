"""The GPU architectures that kernels are tuned for: the one table of what each of them has.

An architecture bears the name that its vendor gives it, "sm_90" or "gfx942"; "interpreter" is the
CPU, where Triton's interpreter runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton

Row = TypeVar("Row")


@dataclass(frozen=True)
class Architecture:
    """What an architecture has; a multiprocessor is AMD's compute unit.

    Attributes:
        multiprocessors: of its usual device.
        warp_size: threads of a warp.
        warps: resident warps of a multiprocessor.
        blocks: resident blocks of a multiprocessor.
        registers: 32-bit registers of all threads of a multiprocessor.
        register_unit: registers of a thread are rounded up to a multiple of it.
        shared_bytes: shared memory of all blocks of a multiprocessor.
        block_shared_bytes: shared memory that one block may have.
        block_reserved_bytes: shared memory that each block takes besides its own.
        tensor_memory_columns: of all blocks of a multiprocessor; 0 where there is none.
        matrix_types: what its matrix instructions multiply as it is, by dtype's name. NVIDIA's have
            no product of float32 in full precision, and Triton uses none before sm_80.
        matrix_rate: multiply-adds of 16-bit numbers of a multiprocessor's matrix units in a clock.
        vector_rate: multiply-adds of fp32 numbers of a multiprocessor in a clock.
        l2_rate: bytes that a multiprocessor reads from L2 in a clock where all of them do.
        nearest: the architecture whose tiles it takes where a table has none for it.
    """

    multiprocessors: int
    warp_size: int
    warps: int
    blocks: int
    registers: int
    register_unit: int
    shared_bytes: int
    block_shared_bytes: int
    matrix_types: tuple[str, ...]
    matrix_rate: int
    vector_rate: int
    l2_rate: int
    block_reserved_bytes: int = 0
    tensor_memory_columns: int = 0
    nearest: str | None = None


def _nvidia(
    multiprocessors: int,
    *,
    warps: int,
    blocks: int,
    shared_kib: int,
    block_kib: int,
    rates: tuple[int, int, int],
    columns: int = 0,
    matrix_types: tuple[str, ...] = ("float16", "bfloat16"),
    nearest: str | None = None,
) -> Architecture:
    return Architecture(
        multiprocessors=multiprocessors,
        warp_size=32,
        warps=warps,
        blocks=blocks,
        registers=65536,
        register_unit=8,
        shared_bytes=shared_kib * 1024,
        block_shared_bytes=block_kib * 1024,
        matrix_types=matrix_types,
        matrix_rate=rates[0],
        vector_rate=rates[1],
        l2_rate=rates[2],
        block_reserved_bytes=(shared_kib - block_kib) * 1024,
        tensor_memory_columns=columns,
        nearest=nearest,
    )


def _cdna(
    multiprocessors: int,
    *,
    shared_kib: int,
    rates: tuple[int, int, int],
    nearest: str | None = None,
) -> Architecture:
    """4 SIMDs of 512 registers a lane and 8 waves."""
    return Architecture(
        multiprocessors=multiprocessors,
        warp_size=64,
        warps=32,
        blocks=16,
        registers=4 * 512 * 64,
        register_unit=8,
        shared_bytes=shared_kib * 1024,
        block_shared_bytes=shared_kib * 1024,
        matrix_types=("float16", "bfloat16", "float32"),
        matrix_rate=rates[0],
        vector_rate=rates[1],
        l2_rate=rates[2],
        nearest=nearest,
    )


# CUDA C++ Programming Guide, "Technical specifications per compute capability"; AMD CDNA 3 and
# CDNA 4 instruction set guides. sm_120 has shared memory and tensor cores as before Hopper's.
# Rates: matrix and vector units by the vendors' peak rates; L2 by what is measured in public, which
# is half of what the buses are built for or less.
ARCHITECTURES: dict[str, Architecture] = {
    "sm_75": _nvidia(
        40, warps=32, blocks=16, shared_kib=64, block_kib=64, rates=(512, 64, 24), matrix_types=()
    ),
    "sm_80": _nvidia(108, warps=64, blocks=32, shared_kib=164, block_kib=163, rates=(1024, 64, 32)),
    "sm_86": _nvidia(
        84, warps=48, blocks=16, shared_kib=100, block_kib=99, rates=(512, 128, 20), nearest="sm_80"
    ),
    "sm_89": _nvidia(
        128,
        warps=48,
        blocks=24,
        shared_kib=100,
        block_kib=99,
        rates=(512, 128, 20),
        nearest="sm_86",
    ),
    "sm_90": _nvidia(
        132, warps=64, blocks=32, shared_kib=228, block_kib=227, rates=(2048, 128, 32)
    ),
    "sm_100": _nvidia(
        148,
        warps=64,
        blocks=32,
        shared_kib=228,
        block_kib=227,
        rates=(4096, 128, 48),
        columns=512,
        nearest="sm_90",
    ),
    "sm_120": _nvidia(
        170,
        warps=48,
        blocks=24,
        shared_kib=100,
        block_kib=99,
        rates=(512, 128, 20),
        nearest="sm_89",
    ),
    "gfx942": _cdna(304, shared_kib=64, rates=(1024, 128, 32)),
    "gfx950": _cdna(256, shared_kib=160, rates=(2048, 128, 32), nearest="gfx942"),
}
"""By name, those of a vendor from old to new."""

INTERPRETER = "interpreter"


def cpu_architecture() -> str | None:
    """Whose kernels run on CPU tensors.

    `"interpreter"` in Triton's interpreter; where the active Triton driver has the CPU for its
    device (`tools.virtual_gpu`), the architecture that it compiles for; else `None`.
    """
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    try:
        active = triton.runtime.driver.active
    except RuntimeError:  # Triton's, where there is no device
        return None
    if active.get_active_torch_device().type != "cpu":
        return None
    target = active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def architecture(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, ... of a device; for the CPU `cpu_architecture`."""
    if device.type != "cuda":
        return cpu_architecture() or INTERPRETER
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def listed_architecture(arch: str) -> str:
    """The row of `ARCHITECTURES` that `arch` is served as, or `"interpreter"`.

    A device of NVIDIA takes the newest row that is not newer than itself; any of AMD's that is not
    listed takes `gfx942`.

    Raises:
        ValueError: it is no name of an architecture, or older than all that are listed.
    """
    if arch in ARCHITECTURES or arch == INTERPRETER:
        return arch
    if re.fullmatch(r"gfx\w+", arch):
        return "gfx942"
    if match := re.fullmatch(r"sm_(\d+)[af]?", arch):
        version = int(match[1])
        listed = [int(name[3:]) for name in ARCHITECTURES if name.startswith("sm_")]
        if older := [number for number in listed if number <= version]:
            return f"sm_{max(older)}"
    known = [*ARCHITECTURES, INTERPRETER]
    raise ValueError(f"arch is {arch!r}; it must be one of {known} or newer")


def tiles_for(table: Mapping[str, Row], arch: str) -> Row:
    """The row of a table of tiles that `arch` takes: its own, or that of the nearest one.

    Raises:
        ValueError: as `listed_architecture`.
    """
    name: str | None = listed_architecture(arch)
    while name is not None and name not in table:
        name = ARCHITECTURES[name].nearest
    assert name is not None, f"no tiles for {arch}"
    return table[name]


def multiprocessors(arch: str) -> int:
    """Multiprocessors of the usual device of an architecture; 1 in the interpreter."""
    name = listed_architecture(arch)
    return 1 if name == INTERPRETER else ARCHITECTURES[name].multiprocessors


@functools.cache
def device_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; for the CPU `multiprocessors` of its architecture."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return multiprocessors(architecture(device))


def warp_size(arch: str) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs, else 32."""
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch].warp_size
    return 64 if arch.startswith("gfx9") else 32
