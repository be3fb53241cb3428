"""How many blocks of a kernel a multiprocessor holds at once, by the limits of architectures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor (on AMD a compute unit) has to share among blocks.

    Attributes:
        warp_size: threads of a warp.
        warps: resident warps.
        blocks: resident blocks.
        registers: 32-bit registers of all threads.
        register_unit: registers of a thread are rounded up to a multiple of it.
        shared_bytes: shared memory of all blocks.
        block_shared_bytes: shared memory that one block may have.
        block_reserved_bytes: shared memory that each block takes besides its own.
        tensor_memory_columns: of all blocks; 0 where there is none.
    """

    warp_size: int
    warps: int
    blocks: int
    registers: int
    register_unit: int
    shared_bytes: int
    block_shared_bytes: int
    block_reserved_bytes: int = 0
    tensor_memory_columns: int = 0


def _nvidia(warps: int, blocks: int, kib: int, block_kib: int, columns: int = 0) -> Limits:
    reserved = (kib - block_kib) * 1024
    return Limits(32, warps, blocks, 65536, 8, kib * 1024, block_kib * 1024, reserved, columns)


# CUDA C++ Programming Guide, "Technical specifications per compute capability"; AMD CDNA 3 and
# CDNA 4 instruction set guides: 4 SIMDs of 512 registers a lane and 8 waves.
LIMITS = {
    "sm_75": _nvidia(32, 16, 64, 64),
    "sm_80": _nvidia(64, 32, 164, 163),
    "sm_86": _nvidia(48, 16, 100, 99),
    "sm_89": _nvidia(48, 24, 100, 99),
    "sm_90": _nvidia(64, 32, 228, 227),
    "sm_100": _nvidia(64, 32, 228, 227, columns=512),
    "sm_120": _nvidia(48, 24, 100, 99),
    "gfx942": Limits(64, 32, 16, 4 * 512 * 64, 8, 64 * 1024, 64 * 1024),
    "gfx950": Limits(64, 32, 16, 4 * 512 * 64, 8, 160 * 1024, 160 * 1024),
}
"""By architecture, as of `runtime.architecture`."""

_SCHEDULERS = 4
"""Parts of a multiprocessor; each has a quarter of the registers, and a warp stays in one."""


def blocks_per_multiprocessor(
    arch: str,
    num_warps: int,
    registers: int,
    shared_bytes: int,
    tensor_memory_columns: int = 0,
) -> int:
    """Resident blocks of a kernel; 0 when a block asks for more than there is.

    Args:
        arch: one of `LIMITS`.
        num_warps: warps of a block.
        registers: of a thread.
        shared_bytes: shared memory of a block.
        tensor_memory_columns: tensor memory of a block.
    """
    limits = LIMITS[arch]
    if shared_bytes > limits.block_shared_bytes:
        return 0
    unit = limits.register_unit
    of_warp = max(-(-registers // unit) * unit, unit) * limits.warp_size
    warps = min(limits.warps, _SCHEDULERS * (limits.registers // _SCHEDULERS // of_warp))
    bounds = [limits.blocks, warps // num_warps]
    if shared_bytes:
        bounds.append(limits.shared_bytes // (shared_bytes + limits.block_reserved_bytes))
    if tensor_memory_columns:
        bounds.append(limits.tensor_memory_columns // tensor_memory_columns)
    return min(bounds)
