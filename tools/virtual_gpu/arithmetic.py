"""Rules of arithmetic, logic, comparison and conversion.

Approximate functions are models: computed in float64 and rounded once, where the hardware is off by
up to 2 ulp or so (PTX ISA, each instruction's table of errors). `div.full` is off by up to 2 ulp.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from .block import (
    Blocks,
    Mask,
    Step,
    predicate,
    readable,
    reader,
    slot,
    unsigned,
    unsupported,
    vector,
    writable,
    writer,
)
from .numbers import (
    bfloat16_to_float32,
    float32_to_bfloat16,
    float32_to_float16,
    float32_to_tf32,
    flush,
    fused_multiply_add,
)
from .ptx import Instruction, Program
from .rules import rule

INTEGER = r"(?P<type>[sub](?:16|32|64))"
FLOAT = r"(?:\.(?P<ftz>ftz))?\.(?P<type>f32|f64)"


def dtype_of(name: str) -> np.dtype:
    """NumPy's type for a type of PTX; b32 is u32, pred bool."""
    if name == "pred":
        return np.dtype(bool)
    return np.dtype(f"{ {'s': 'i', 'u': 'u', 'b': 'u', 'f': 'f'}[name[0]] }{int(name[1:]) // 8}")


def elementwise(
    i: Instruction,
    program: Program,
    function: Callable[..., np.ndarray],
    *dtypes: np.dtype,
) -> Step:
    """destination = function(*sources), the sources of these types."""
    if len(i.operands) != len(dtypes) + 1:
        raise unsupported(i)
    if (direct := _direct(i, program, function, dtypes)) is not None:
        return direct
    put = writer(i, i.operands[0], program)
    reads = [
        reader(i, operand, dtype, program)
        for operand, dtype in zip(i.operands[1:], dtypes, strict=True)
    ]
    return lambda b, mask: put(b, function(*(read(b) for read in reads)), mask)


def _direct(
    i: Instruction,
    program: Program,
    function: Callable[..., np.ndarray],
    dtypes: Sequence[np.dtype],
) -> Step | None:
    """The step of a function of NumPy that needs nothing else: it writes into the register."""
    if not isinstance(function, np.ufunc):
        return None
    result = writable(i, i.operands[0], program)
    made = function.resolve_dtypes((*dtypes, None))[-1]
    places = [readable(i, name, t, program) for name, t in zip(i.operands[1:], dtypes, strict=True)]
    same = made.itemsize == result.itemsize and (made.kind == "b") == (result.kind == "b")
    slots = [place for place in places if place is not None]
    if not same or len(slots) < len(places):
        return None
    to = slot(program, i.operands[0], made)
    if len(slots) == 1:
        (one,) = slots

        def unary(b: Blocks, mask: Mask) -> None:
            values = b.values
            if mask is None:
                function(values[one], out=values[to])
            else:
                function(values[one], out=values[to], where=mask)

        return unary
    left, right = slots

    def binary(b: Blocks, mask: Mask) -> None:
        values = b.values
        if mask is None:
            function(values[left], values[right], out=values[to])
        else:
            function(values[left], values[right], out=values[to], where=mask)

    return binary


def flushing(function: Callable[..., np.ndarray], ftz: bool) -> Callable[..., np.ndarray]:
    return (lambda *values: flush(function(*map(flush, values)))) if ftz else function


def _through_float64(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *values: function(*(v.astype(np.float64) for v in values)).astype(np.float32)


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A number rather than NaN, and -0 rather than +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def nan_first(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), function(a, b))


_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@rule(rf"(add|sub)\.{INTEGER}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, _BINARY[m[1]], *[dtype_of(m["type"])] * 2)


@rule(rf"(add|sub|mul)(?:\.rn)?{FLOAT}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = flushing(_BINARY[m[1]], bool(m["ftz"]))
    return elementwise(i, program, function, *[dtype_of(m["type"])] * 2)


@rule(rf"fma\.rn{FLOAT}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = flushing(fused_multiply_add, bool(m["ftz"]))
    return elementwise(i, program, function, *[dtype_of(m["type"])] * 3)


@rule(rf"(mul|mad)\.(?P<part>lo|hi|wide)\.{INTEGER}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    dtype = dtype_of(m["type"])
    sources = [dtype] * (3 if m[1] == "mad" else 2)
    if m["part"] == "lo":
        return elementwise(i, program, lambda a, b, *c: sum(c, start=a * b), *sources)
    if dtype.itemsize == 8:
        raise unsupported(i)
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    if m["part"] == "wide":
        sources[2:] = [wide] * len(sources[2:])
        return elementwise(
            i, program, lambda a, b, *c: sum(c, start=a.astype(wide) * b.astype(wide)), *sources
        )

    def high(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        product = a.astype(wide) * b.astype(wide) >> wide.type(8 * dtype.itemsize)
        return sum(c, start=product.astype(dtype))

    return elementwise(i, program, high, *sources)


@rule(r"(div|rem)\.(?P<type>[su](?:16|32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    dtype = dtype_of(m["type"])

    def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # PTX leaves division by zero to the machine, and threads that are masked later do it.
        b = np.where(b == 0, dtype.type(1), b)
        quotient = a // b
        quotient += (quotient < 0) & (quotient * b != a)  # towards zero
        return (quotient if m[1] == "div" else a - quotient * b).astype(dtype)

    return elementwise(i, program, divided, dtype, dtype)


@rule(r"(min|max)\.(?P<type>[su](?:16|32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = np.minimum if m[1] == "min" else np.maximum
    return elementwise(i, program, function, *[dtype_of(m["type"])] * 2)


@rule(r"(min|max)(?:\.(?P<ftz>ftz))?(?:\.(?P<nan>NaN))?\.(?P<type>f32|f64)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    two = smaller if m[1] == "min" else larger
    if m["nan"]:
        two = nan_first(two)

    def function(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        return functools.reduce(two, others, first)

    dtypes = [dtype_of(m["type"])] * (3 if len(i.operands) == 4 else 2)
    return elementwise(i, program, flushing(function, bool(m["ftz"])), *dtypes)


@rule(r"(neg|abs)(?:\.(?P<ftz>ftz))?\.(?P<type>[sf](?:32|64)|s16)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = np.negative if m[1] == "neg" else np.abs
    return elementwise(i, program, flushing(function, bool(m["ftz"])), dtype_of(m["type"]))


@rule(r"(and|or|xor)\.(?P<type>b16|b32|b64|pred)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[m[1]]
    return elementwise(i, program, function, *[dtype_of(m["type"])] * 2)


@rule(r"not\.(?P<type>b16|b32|b64|pred)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, np.invert, dtype_of(m["type"]))


@rule(r"(shl|shr)\.(?P<type>[sub](?:16|32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    dtype = dtype_of(m["type"])
    most = 8 * dtype.itemsize

    def shifted(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        # Shifts by more than there are bits leave zero, or the sign.
        count = np.minimum(by, most - 1).astype(dtype)
        if m[1] == "shl":
            return np.where(by >= most, dtype.type(0), a << count)
        return np.where((by >= most) & (dtype.kind == "u"), dtype.type(0), a >> count)

    return elementwise(i, program, shifted, dtype, np.dtype("u4"))


@rule(r"(popc|clz|brev)\.b32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    def counted(a: np.ndarray) -> np.ndarray:
        bits = np.unpackbits(a.astype(">u4").view(np.uint8)).reshape(-1, 32)  # the highest first
        if m[1] == "popc":
            return bits.sum(1, dtype=np.uint32)
        if m[1] == "clz":
            return np.where(bits.any(1), bits.argmax(1), 32).astype(np.uint32)
        return np.packbits(bits[:, ::-1], axis=1).view(">u4")[:, 0].astype(np.uint32)

    return elementwise(i, program, counted, np.dtype("u4"))


@rule(r"prmt\.b32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    """Four bytes, each chosen of the eight of two words, or the sign of one."""

    def permuted(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        of = np.stack([a, b], 1).view(np.uint8)
        by = (chosen[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)).astype(np.int64)
        found = np.take_along_axis(of, by & 7, 1)
        signs = np.where(found & 128, np.uint8(255), np.uint8(0))
        return np.where(by & 8, signs, found).view(np.uint32)[:, 0]

    return elementwise(i, program, permuted, *[np.dtype("u4")] * 3)


@rule(r"bfe\.(?P<type>[su](?:32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    dtype = dtype_of(m["type"])
    most = 8 * dtype.itemsize

    def field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = (
            np.minimum(v & np.uint32(255), 2 * most).astype(np.int64) for v in (start, length)
        )
        fill = np.zeros(a.shape, bool)
        if dtype.kind == "i":
            # The sign is the field's own highest bit, or the value's where the field ends above it.
            top = np.clip(start + length - 1, 0, most - 1).astype(dtype)
            fill = (a >> top) & dtype.type(1) != 0
        bits = a.view(unsigned(most))
        kind = bits.dtype.type
        low = np.where(start >= most, kind(0), bits >> np.minimum(start, most - 1).astype(kind))
        have = np.clip(np.minimum(length, most - start), 0, most)
        partly = (kind(1) << np.minimum(have, most - 1).astype(kind)) - kind(1)
        ones = np.where(have == most, kind(2**most - 1), partly)
        value = np.where(fill, low & ones | ~ones, low & ones)
        return np.where(length == 0, kind(0), value).view(dtype)

    return elementwise(i, program, field, dtype, np.dtype("u4"), np.dtype("u4"))


@rule(r"selp\.(?P<type>[sub](?:16|32|64)|f32|f64)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    put = writer(i, i.operands[0], program)
    dtype = dtype_of(m["type"])
    a, b = (reader(i, operand, dtype, program) for operand in i.operands[1:3])
    which = predicate(i, i.operands[3], program)
    return lambda block, mask: put(block, np.where(which(block), a(block), b(block)), mask)


_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@rule(rf"setp\.(?P<compare>eq|ne|lt|le|gt|ge)\.{INTEGER}")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, _COMPARE[m["compare"]], *[dtype_of(m["type"])] * 2)


@rule(
    r"setp\.(?P<compare>(?:eq|ne|lt|le|gt|ge)u?|num|nan)"
    r"(?:\.(?P<ftz>ftz))?\.(?P<type>bf16|f16|f32|f64)"
)
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    name = m["compare"]

    def compared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if m["type"] == "bf16":
            a, b = bfloat16_to_float32(a), bfloat16_to_float32(b)
        unordered = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        found = _COMPARE[name[:2]](a, b)
        return found | unordered if name.endswith("u") else found & ~unordered

    dtype = np.dtype("u2") if m["type"] == "bf16" else dtype_of(m["type"])
    if m["ftz"]:
        return elementwise(i, program, lambda a, b: compared(flush(a), flush(b)), dtype, dtype)
    # What NumPy says of NaN is what PTX says but for "ne", which is false of it.
    if m["type"] != "bf16" and name in ("eq", "neu", "lt", "le", "gt", "ge"):
        return elementwise(i, program, _COMPARE[name[:2]], dtype, dtype)
    return elementwise(i, program, compared, dtype, dtype)


def _tanh(x: np.ndarray) -> np.ndarray:
    """With a relative error of up to 2^-11, which is all that the PTX ISA says of `tanh.approx`:
    any number in between, which depends on the argument alone. Of infinity it is 1."""
    bits = x.astype(np.float32).view(np.uint32) * np.uint32(2654435761)
    off = np.where(np.isinf(x), 0, 2.0**-11 * (bits / 2.0**31 - 1))
    return np.clip(np.tanh(x) * (1 + off), -1, 1)


_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": _tanh,
}


@rule(r"(ex2|lg2|sqrt|rsqrt|rcp|sin|cos|tanh)\.(?:approx|rn)(?:\.(?P<ftz>ftz))?\.f32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = _through_float64(_FUNCTIONS[m[1]])
    return elementwise(i, program, flushing(function, bool(m["ftz"])), np.dtype("f4"))


@rule(r"div\.(?:full|approx|rn)(?:\.(?P<ftz>ftz))?\.f32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    # float64 has more than twice the bits: a quotient rounded there and again is rounded right.
    function = _through_float64(np.divide)
    return elementwise(i, program, flushing(function, bool(m["ftz"])), *[np.dtype("f4")] * 2)


@rule(r"div\.rn\.f64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, np.divide, *[np.dtype("f8")] * 2)


@rule(r"(sqrt|rcp)\.rn\.f64")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, _FUNCTIONS[m[1]], np.dtype("f8"))


@rule(r"mov\.(?P<type>[sub](?:16|32|64)|f32|f64|pred)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    to, source = i.operands
    if m["type"] == "pred":
        return elementwise(i, program, lambda a: a, np.dtype(bool))
    dtype = unsigned(int(m["type"][1:]))
    if not (to.startswith("{") or source.startswith("{")):
        return elementwise(i, program, np.positive, dtype)
    parts = vector(to if to.startswith("{") else source)
    part = unsigned(8 * dtype.itemsize // len(parts))
    if to.startswith("{"):
        puts = [writer(i, name, program) for name in parts]
        read = reader(i, source, dtype, program)

        def unpack(b: Blocks, mask: Mask) -> None:
            values = np.ascontiguousarray(read(b)).view(part).reshape(-1, len(parts))
            for put, column in zip(puts, values.T, strict=True):
                put(b, np.ascontiguousarray(column), mask)

        return unpack
    put = writer(i, to, program)
    reads = [reader(i, name, part, program) for name in parts]
    return lambda b, mask: put(b, np.stack([r(b) for r in reads], 1).view(dtype)[:, 0], mask)


@rule(r"cvt\.(?P<to>[su](?:8|16|32|64))\.(?P<type>[su](?:8|16|32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    to = dtype_of(m["to"])
    return elementwise(i, program, lambda a: a.astype(to), dtype_of(m["type"]))


@rule(r"cvt\.rn\.(?P<to>f32|f64)\.(?P<type>[su](?:8|16|32|64))")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    to = dtype_of(m["to"])
    return elementwise(i, program, lambda a: a.astype(to), dtype_of(m["type"]))


@rule(r"cvt\.(?:rn\.)?(?P<to>f32|f64)\.(?P<type>f32|f64)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    to = dtype_of(m["to"])
    return elementwise(i, program, lambda a: a.astype(to), dtype_of(m["type"]))


@rule(r"cvt\.(?P<round>rzi|rni|rmi|rpi)\.(?P<to>[su](?:32|64))\.(?P<type>f32|f64)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    function = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[m["round"]]
    to = dtype_of(m["to"])
    least, most = np.iinfo(to).min, np.iinfo(to).max

    def converted(a: np.ndarray) -> np.ndarray:
        whole = function(a.astype(np.float64))
        inside = (whole > least) & (whole < most)
        low = np.where(whole <= least, to.type(least), to.type(0))
        ends = np.where(whole >= most, to.type(most), low)  # NaN: 0
        return np.where(inside, np.where(inside, whole, 0).astype(to), ends)

    return elementwise(i, program, converted, dtype_of(m["type"]))


@rule(r"cvt\.f32\.(?P<type>bf16|f16)")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    if m["type"] == "bf16":
        return elementwise(i, program, bfloat16_to_float32, np.dtype("u2"))
    return elementwise(i, program, lambda a: a.astype(np.float32), np.dtype("f2"))


_NARROW = {"bf16": float32_to_bfloat16, "f16": float32_to_float16}


@rule(r"cvt\.rn\.(?P<to>bf16|f16)\.f32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, _NARROW[m["to"]], np.dtype("f4"))


@rule(r"cvt\.rn\.(?P<to>bf16|f16)x2\.f32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    narrow = _NARROW[m["to"]]

    def packed(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)

    return elementwise(i, program, packed, np.dtype("f4"), np.dtype("f4"))


@rule(r"cvt\.rna\.tf32\.f32")
def _(i: Instruction, m: re.Match[str], program: Program) -> Step:
    return elementwise(i, program, float32_to_tf32, np.dtype("u4"))
