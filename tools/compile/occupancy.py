"""How many blocks of a kernel a multiprocessor holds at once, by the limits of architectures."""

from __future__ import annotations

from csrc_triton.architectures import ARCHITECTURES

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
        arch: one of `ARCHITECTURES`.
        num_warps: warps of a block.
        registers: of a thread.
        shared_bytes: shared memory of a block.
        tensor_memory_columns: tensor memory of a block.
    """
    limits = ARCHITECTURES[arch]
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
