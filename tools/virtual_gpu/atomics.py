"""Rules of atomics: `atom` and `red`, each lane once, one after another; and of memory's fences."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .block import (
    Blocks,
    Mask,
    Step,
    address,
    reader,
    unsigned,
    unsupported,
    vector,
    writer,
)
from .block_order import Ordering
from .faults import Fault
from .numbers import bfloat16_to_float32, float32_to_bfloat16, float32_to_float16, flush
from .ptx import Instruction, Program
from .rules import rule
from .transfers import chosen, spread


def _add_float32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PTX ISA, "atom": subnormal numbers are flushed, in global memory."""
    return flush(flush(a) + flush(b))


def _add_float16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return float32_to_float16(
        a.view(np.float16).astype(np.float32) + b.view(np.float16).astype(np.float32)
    )


def _add_bfloat16(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return float32_to_bfloat16(bfloat16_to_float32(a) + bfloat16_to_float32(b))


def _swapped(old: np.ndarray, expected: np.ndarray, new: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(old == expected, new, old))


_INTEGERS: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "min": (np.minimum, ("s32", "u32", "s64", "u64")),
    "max": (np.maximum, ("s32", "u32", "s64", "u64")),
    "and": (np.bitwise_and, ("b32", "b64")),
    "or": (np.bitwise_or, ("b32", "b64")),
    "xor": (np.bitwise_xor, ("b32", "b64")),
    "exch": (lambda old, new: new, ("b32", "b64")),
    "cas": (_swapped, ("b16", "b32", "b64")),
}
# By operation and type: the function of what is there and the operands, and their NumPy type.
_FUNCTIONS: dict[tuple[str, str], tuple[Callable[..., np.ndarray], str]] = {
    ("add", "f16"): (_add_float16, "u2"),
    ("add", "bf16"): (_add_bfloat16, "u2"),
    ("add", "f32"): (_add_float32, "f4"),
    ("add", "f64"): (np.add, "f8"),
    **{("add", kind): (np.add, f"u{int(kind[1:]) // 8}") for kind in ("s32", "u32", "s64", "u64")},
    **{
        (how, kind): (function, f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
        for how, (function, kinds) in _INTEGERS.items()
        for kind in kinds
    },
}


@rule(
    r"(atom|red)(?P<modifiers>(?:\.(?:global|shared|relaxed|acquire|release|acq_rel|cta|gpu|sys))+)"
    r"\.(?P<how>add|exch|cas|min|max|and|or|xor)(?:\.noftz)?(?:\.v(?P<count>[248]))?"
    r"\.(?P<type>[subf](?:16|32|64)|bf16)(?P<pair>x2)?"
)
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    modifiers = m["modifiers"].split(".")
    returns = m[1] == "atom"
    to, place, *given = i.operands if returns else ("_", *i.operands)
    shared = "shared" in modifiers
    if (m["how"], m["type"]) not in _FUNCTIONS or shared == ("global" in modifiers):
        raise unsupported(i)
    function, kind = _FUNCTIONS[m["how"], m["type"]]
    if shared and function is _add_float32:
        function = np.add
    dtype = np.dtype(kind)
    size, pair = dtype.itemsize, 2 if m["pair"] else 1
    registers = int(m["count"] or 1)
    if len(given) != 1 + (m["how"] == "cas") or len(vector(given[0])) != registers:
        raise unsupported(i)
    width = unsigned(8 * size * pair)
    reads = [[reader(i, name, width, program) for name in vector(one)] for one in given]
    puts = [writer(i, name, program) for name in vector(to)] if to != "_" else []
    where = address(i, place, 32 if shared else 64, program)
    how = Ordering(
        acquires=not {"acquire", "acq_rel"}.isdisjoint(modifiers),
        releases=not {"release", "acq_rel"}.isdisjoint(modifiers),
        in_block="cta" in modifiers,
    )

    def change(b: Blocks, mask: Mask) -> None:
        threads, at = b.active(mask), chosen(where, b, mask)
        if (wrong := at % (size * pair * registers) != 0).any():
            raise Fault("atomic access that is not aligned to its width", threads[wrong])
        # [operands, elements, threads]; of a vector each element is atomic by itself.
        operands = np.stack(
            [np.stack([chosen(read, b, mask) for read in one], 1).view(dtype).T for one in reads]
        )
        before = [
            b.shared.atomic(at + size * k, function, operands[:, k], threads, b.memory.backwards)
            if shared
            else b.atomic(i, at + at.dtype.type(size * k), function, operands[:, k], threads, how)
            for k in range(registers * pair)
        ]
        found = np.ascontiguousarray(np.stack(before, 1)).view(width)
        for put, column in zip(puts, found.T, strict=False):
            put(b, spread(b, column, mask), mask)

    return change


@rule(r"fence\.(?:acq_rel|sc)\.(?P<scope>cta|gpu|sys)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def fence(b: Blocks, mask: Mask) -> None:
        # Threads of one block are ordered by its barriers alone.
        if b.memory.order is not None and m["scope"] != "cta":
            threads = b.active(mask)
            b.memory.order.fence(b.block_of[threads], threads)

    return fence
