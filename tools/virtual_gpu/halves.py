"""Rules of arithmetic with f16 and bf16, and with two numbers in a register, rounded once.

A sum or product of two halves rounds to the same half whether it goes through float32 or not
(float32 has more than twice their bits and two); the sum of a product and a half is rounded to odd
on its way.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import elementwise, flushing, larger, nan_first, smaller
from .block import Step
from .numbers import (
    bfloat16_to_float32,
    float32_to_bfloat16,
    float32_to_float16,
    float64_to_float32_odd,
    fused_multiply_add,
    sum_rounded_to_odd,
)
from .ptx import Instruction, Program
from .rules import rule

_WIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": bfloat16_to_float32,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
}
_NARROW = {"bf16": float32_to_bfloat16, "f16": float32_to_float16}


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = a.astype(np.float64) * b.astype(np.float64)
    return float64_to_float32_odd(sum_rounded_to_odd(product, c.astype(np.float64)))


_FUNCTIONS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "fma": (3, _fused),
    "min": (2, smaller),
    "max": (2, larger),
    "ex2": (1, lambda x: np.exp2(x.astype(np.float64)).astype(np.float32)),
    "tanh": (1, lambda x: np.tanh(x.astype(np.float64)).astype(np.float32)),
}


def _of_halves(
    i: Instruction,
    m: re.Match[str],
    program: Program,
    count: int,
    function: Callable[..., np.ndarray],
) -> Step:
    wide, narrow, pairs = _WIDE[m["type"]], _NARROW[m["type"]], bool(m["pairs"])

    def computed(*sources: np.ndarray) -> np.ndarray:
        values = (wide(np.ascontiguousarray(bits).view(np.uint16)) for bits in sources)
        return narrow(function(*values)).view(np.uint32 if pairs else np.uint16)

    return elementwise(i, program, computed, *[np.dtype("u4" if pairs else "u2")] * count)


@rule(r"(add|sub|mul|fma)(?:\.rn)?\.(?P<type>bf16|f16)(?P<pairs>x2)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count, function = _FUNCTIONS[m[1]]
    return _of_halves(i, m, program, count, function)


@rule(r"(min|max)(?P<nan>\.NaN)?\.(?P<type>bf16|f16)(?P<pairs>x2)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count, function = _FUNCTIONS[m[1]]
    if m["nan"]:
        function = nan_first(function)
    return _of_halves(i, m, program, count, function)


@rule(r"(ex2|tanh)\.approx(?:\.ftz)?\.(?P<type>bf16|f16)(?P<pairs>x2)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    count, function = _FUNCTIONS[m[1]]
    return _of_halves(i, m, program, count, function)


@rule(r"(neg|abs)\.(?:bf16|f16)(?P<pairs>x2)?")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    dtype = np.dtype("u4" if m["pairs"] else "u2")
    signs = dtype.type(0x80008000 if m["pairs"] else 0x8000)
    if m[1] == "neg":
        return elementwise(i, program, lambda a: a ^ signs, dtype)
    return elementwise(i, program, lambda a: a & ~signs, dtype)


_FLOAT32: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused_multiply_add,
}


@rule(r"(add|sub|fma)\.rn\.f32\.(?P<type>bf16|f16)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    """Halves and, last, a float32: the result is float32."""
    wide = _WIDE[m["type"]]
    function = _FLOAT32[m[1]]

    def computed(*sources: np.ndarray) -> np.ndarray:
        *narrow, last = sources
        return function(*map(wide, narrow), last.view(np.float32))

    narrow = [np.dtype("u2")] * (2 if m[1] == "fma" else 1)
    return elementwise(i, program, computed, *narrow, np.dtype("u4"))


@rule(r"(add|sub|mul|fma)(?:\.rn)?(?:\.(?P<ftz>ftz))?\.f32x2")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = flushing(_FLOAT32[m[1]], bool(m["ftz"]))

    def computed(*sources: np.ndarray) -> np.ndarray:
        values = (np.ascontiguousarray(words).view(np.float32) for words in sources)
        return function(*values).view(np.uint64)

    return elementwise(i, program, computed, *[np.dtype("u8")] * (3 if m[1] == "fma" else 2))
