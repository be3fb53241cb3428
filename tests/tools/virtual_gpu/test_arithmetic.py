"""Rules of arithmetic against Python's integers and fractions, and PyTorch's conversions."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.tools.virtual_gpu.kernels import computed

WORDS = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF]
MASK = 2**32 - 1


def words(values: list[int]) -> torch.Tensor:
    return torch.tensor((values * 32)[:32], dtype=torch.int64)


def signed(value: int, width: int = 32) -> int:
    value &= 2**width - 1
    return value - (value >> width - 1 << width)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(WORDS), (2, 32), generator=generator)
    return tuple(torch.tensor(WORDS)[row] for row in chosen)  # type: ignore[return-value]


def truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b) if b else 0
    return -quotient if (a < 0) != (b < 0) else quotient


INTEGER = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << min(b, 32),
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.s32": lambda a, b: truncated(signed(a), signed(b)),
    "rem.s32": lambda a, b: signed(a) - truncated(signed(a), signed(b)) * signed(b),
    "div.u32": lambda a, b: a // b,
}


@pytest.mark.parametrize("opcode", INTEGER)
def test_integers_are_those_of_python(opcode: str) -> None:
    a, b = pairs()
    if opcode.startswith(("div", "rem")):
        b = b.clamp(min=1)
    got = computed(f"{opcode} %r25, %r20, %r21;", a, b)
    right = [INTEGER[opcode](x, y) & MASK for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.tolist() == right


def test_wide_products_keep_their_sign() -> None:
    a, b = pairs()
    for kind, value in (("s32", signed), ("u32", int)):
        got = computed(f"mul.wide.{kind} %rd25, %r20, %r21;", a, b)
        right = [
            signed(value(x) * value(y), 64) for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert got.tolist() == right


def field_by_the_manual(kind: str, a: int, start: int, length: int) -> int:
    """PTX ISA, "bfe": its pseudo code, bit by bit."""
    msb, start, length = 31, start & 0xFF, length & 0xFF
    signed_field = kind == "s32" and length > 0
    sign = a >> min(start + length - 1, msb) & 1 if signed_field else 0
    d = 0
    for i in range(msb + 1):
        d |= (a >> start + i & 1 if i < length and start + i <= msb else sign) << i
    return d


@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 5), (0, 32), (28, 8), (31, 1), (5, 0)])
def test_bit_fields_are_those_of_the_manual(kind: str, start: int, length: int) -> None:
    a, _ = pairs()
    got = computed(f"bfe.{kind} %r25, %r20, {start}, {length};", a)
    assert got.tolist() == [field_by_the_manual(kind, x, start, length) for x in a.tolist()]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("popc", lambda a: bin(a).count("1")),
        ("clz", lambda a: 32 - a.bit_length()),
        ("brev", lambda a: int(f"{a:032b}"[::-1], 2)),
    ],
)
def test_bits_are_counted_and_turned_round(name: str, formula: Callable[[int], int]) -> None:
    a = pairs()[0] & 0xFFFFFFFF
    a[:3] = torch.tensor([0, 1, 0xFFFFFFFF])
    assert computed(f"{name}.b32 %r25, %r20;", a).tolist() == [formula(x) for x in a.tolist()]


@pytest.mark.parametrize("chosen", [0x5410, 0x7632, 0x3210, 0x0123, 0xB8F0, 0xCCCC, 0x6666])
def test_bytes_are_permuted_as_in_the_manual(chosen: int) -> None:
    """PTX ISA, "prmt": four bits choose each byte, the highest its sign alone."""
    a, b = (x & 0xFFFFFFFF for x in pairs())

    def one(x: int, y: int) -> int:
        every = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        found = 0
        for place in range(4):
            code = chosen >> 4 * place & 15
            byte = every[code & 7]
            found |= (255 * (byte >> 7) if code & 8 else byte) << 8 * place
        return found

    got = computed(f"prmt.b32 %r25, %r20, %r21, {chosen};", a, b)
    assert got.tolist() == [one(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def bits(values: np.ndarray | list[float]) -> torch.Tensor:
    array = np.resize(np.asarray(values, np.float32), 32)
    return torch.from_numpy(array.view(np.uint32).astype(np.int64))


def floats(result: torch.Tensor) -> np.ndarray:
    return result.numpy().astype(np.uint32).view(np.float32)


def rounded(exact: Fraction) -> float:
    """A fraction as the nearest float32, ties to even. Within the range of normal numbers."""
    if exact == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(exact))) - 23
    step = Fraction(2) ** exponent
    return float(round(exact / step) * step)  # round: ties to even


def test_a_fused_multiply_add_rounds_once() -> None:
    """Among them a product half way between two float32 numbers that the addend moves off it: it
    takes more than float64 has to see that."""
    half_way = 1 + 2.0**-12  # its square: 1 + 2^-11 + 2^-24
    a = [half_way, half_way, half_way, 3.0, 1e10, 1 / 3, -half_way]
    b = [half_way, half_way, half_way, 1 / 3, 1e-10, 3.0, half_way]
    c = [2.0**-80, -(2.0**-80), 0.0, -1.0, -1.0, 1e-8, 2.0**-80]
    generator = np.random.default_rng(0)
    a, b, c = (np.float32([*v, *generator.standard_normal(25)]) for v in (a, b, c))
    got = floats(computed("fma.rn.f32 %r25, %r20, %r21, %r22;", bits(a), bits(b), bits(c)))
    right = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert got.tolist() == right
    assert got[0] > got[1]


def test_float64_rounds_once() -> None:
    generator = np.random.default_rng(1)
    a, b, c = generator.standard_normal((3, 32))
    c[:8] = -(a[:8] * b[:8])  # what is left is the product's own rounding error
    a[8:12], b[8:12], c[8:12] = 1 + 2.0**-27, 1 + 2.0**-27, [2.0**-120, -(2.0**-120), 0, 1e300]
    a[12:15], b[12:15], c[12:15] = [np.inf, np.nan, 0.0], 1.0, [1.0, 1.0, -0.0]
    raw = [torch.from_numpy(x.view(np.int64).copy()) for x in (a, b, c)]

    def of(statement: str, count: int) -> np.ndarray:
        return computed(statement, *raw[:count]).numpy().view(np.float64)

    fused = of("fma.rn.f64 %rd25, %rd20, %rd21, %rd22;", 3)
    right = [
        float(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(a[15:], b[15:], c[15:], strict=True)
    ]
    assert fused[15:].tolist() == right
    for at in range(12):
        assert fused[at] == float(Fraction(a[at]) * Fraction(b[at]) + Fraction(c[at]))
    assert fused[12] == np.inf and np.isnan(fused[13]) and fused[14] == 0
    quotient = of("div.rn.f64 %rd25, %rd20, %rd21;", 2)
    assert quotient[15:].tolist() == [
        float(Fraction(x) / Fraction(y)) for x, y in zip(a[15:], b[15:], strict=True)
    ]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "geu", "num"])
def test_halves_are_compared(compare: str, kind: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), 65504.0, 6e-8])
    values = values.to(torch.float16 if kind == "f16" else torch.bfloat16)
    a, b = (x.reshape(-1)[:32] for x in torch.meshgrid(values, values, indexing="ij"))
    x, y = (v.view(torch.int16).long() & 0xFFFF for v in (a, b))
    statement = (
        "cvt.u16.u32 %rs0, %r20;\ncvt.u16.u32 %rs1, %r21;\n"
        f"setp.{compare}.{kind} %p0, %rs0, %rs1;\n"
        "selp.b32 %r25, 1, 0, %p0;"
    )
    unordered = a.isnan() | b.isnan()
    right = {
        "eq": a == b,
        "ne": (a != b) & ~unordered,
        "lt": a < b,
        "geu": (a >= b) | unordered,
        "num": ~unordered,
    }[compare]
    assert computed(statement, x, y).tolist() == right.long().tolist()


AWKWARD = [0.0, -0.0, 1.0, -1.5, 3.0e38, 3.4e38, 65504.0, 65520.0, 1e-8, 1e-40, math.inf]
AWKWARD += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -math.inf, 6e-8, 1 / 3]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrow_formats_round_as_pytorch_rounds(name: str, dtype: torch.dtype) -> None:
    x = bits(AWKWARD)
    right = torch.from_numpy(floats(x)).to(dtype)
    got = computed(f"cvt.rn.{name}.f32 %rs0, %r20;\ncvt.u32.u16 %r25, %rs0;", x)
    assert got.tolist() == (right.view(torch.int16).long() & 0xFFFF).tolist()
    packed = computed(f"cvt.rn.{name}x2.f32 %r25, %r20, %r21;", x, bits([1.0]))
    one = int(torch.ones((), dtype=dtype).view(torch.int16))
    assert packed.tolist() == [value << 16 | one for value in got.tolist()]
    back = computed(f"cvt.u16.u32 %rs0, %r20;\ncvt.f32.{name} %r25, %rs0;", got)
    np.testing.assert_array_equal(floats(back), right.float().numpy())
    nan = computed(f"cvt.rn.{name}.f32 %rs0, %r20;\ncvt.u32.u16 %r25, %rs0;", bits([math.nan]))
    assert nan.tolist() == [0x7FFF] * 32


def test_tf32_rounds_to_eleven_bits_ties_away() -> None:
    x = bits([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-11 - 2.0**-23, 1 / 3, 1e30, math.inf])
    got = floats(computed("cvt.rna.tf32.f32 %r25, %r20;", x))
    for value, result in zip(floats(x).tolist(), got.tolist(), strict=True):
        if math.isinf(value):
            assert result == value
            continue
        step = Fraction(2) ** (math.floor(math.log2(abs(value))) - 10)
        steps = math.floor(abs(Fraction(value)) / step + Fraction(1, 2))
        assert result == math.copysign(float(steps * step), value)


def test_comparisons_smaller_and_larger_with_nan_and_zeros() -> None:
    a, b = bits([math.nan, 1.0, 1.0, 0.0, -0.0, 2.0]), bits([1.0, math.nan, 1.0, -0.0, 0.0, 1.0])
    for compare, right in {
        "lt": [0, 0, 0, 0, 0, 0],
        "eq": [0, 0, 1, 1, 1, 0],
        "ne": [0, 0, 0, 0, 0, 1],
        "neu": [1, 1, 0, 0, 0, 1],
        "ltu": [1, 1, 0, 0, 0, 0],
        "nan": [1, 1, 0, 0, 0, 0],
        "num": [0, 0, 1, 1, 1, 1],
    }.items():
        statement = f"setp.{compare}.f32 %p0, %r20, %r21;\nselp.b32 %r25, 1, 0, %p0;"
        assert computed(statement, a, b)[:6].tolist() == right, compare
    smaller = computed("min.f32 %r25, %r20, %r21;", a, b)[:6].tolist()
    larger = computed("max.f32 %r25, %r20, %r21;", a, b)[:6].tolist()
    as_bits = {v: struct.unpack("<I", struct.pack("<f", v))[0] for v in (1.0, 2.0)}
    assert smaller == [as_bits[1.0]] * 3 + [1 << 31] * 2 + [as_bits[1.0]]
    assert larger == [as_bits[1.0]] * 3 + [0] * 2 + [as_bits[2.0]]
    kept = floats(computed("min.NaN.f32 %r25, %r20, %r21;", a, b))
    assert np.isnan(kept[:6]).tolist() == [True, True, False, False, False, False]


def test_ftz_flushes_what_goes_in_and_what_comes_out() -> None:
    tiny, half = bits([1e-40, -1e-40, 2.0**-126]), bits([1.0, 1.0, 0.5])
    plain = floats(computed("mul.f32 %r25, %r20, %r21;", tiny, half))[:3]
    flushed = computed("mul.ftz.f32 %r25, %r20, %r21;", tiny, half)[:3]
    assert (plain != 0).all()
    assert flushed.tolist() == [0, 1 << 31, 0]


def test_float64_is_narrowed_and_counted_with_one_rounding() -> None:
    values = [1 / 3, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 2.5, -3.5, 1e10, 7.9]
    a = torch.tensor((values * 4), dtype=torch.float64).view(torch.int64)
    narrowed = floats(computed("cvt.rn.f32.f64 %r25, %rd20;", a))[:8]
    assert narrowed.tolist() == [rounded(Fraction(x)) for x in values]
    for rounding, formula in {
        "rzi": math.trunc,
        "rni": round,
        "rmi": math.floor,
        "rpi": math.ceil,
    }.items():
        whole = computed(f"cvt.{rounding}.s64.f64 %rd25, %rd20;", a)[:8]
        assert whole.tolist() == [formula(x) for x in values]
        narrow = computed(f"cvt.{rounding}.s32.f64 %r25, %rd20;", a)[:8].tolist()
        assert narrow == [min(formula(x), 2**31 - 1) & MASK for x in values]
    for kind, numbers in (
        ("s64", [2**53 + 1, -(2**63), 7, -(2**53) - 3]),
        ("u32", [2**32 - 1, 5, 0, 1]),
    ):
        source = "%rd20" if kind == "s64" else "%r20"
        got = computed(f"cvt.rn.f64.{kind} %rd25, {source};", torch.tensor(numbers * 8))[:4]
        assert got.view(torch.float64).tolist() == [float(x) for x in numbers]
        short = floats(computed(f"cvt.rn.f32.{kind} %r25, {source};", torch.tensor(numbers * 8)))
        assert short[:4].tolist() == [rounded(Fraction(x)) for x in numbers]
    wide = computed("cvt.f64.f32 %rd25, %r20;", bits([1 / 3, -2.5])).view(torch.float64)
    assert wide[:2].tolist() == [float(np.float32(1 / 3)), -2.5]


def test_integers_of_floats_saturate() -> None:
    x = bits([1.7, -1.7, 3e9, -3e9, math.nan, 2.5])
    got = computed("cvt.rzi.s32.f32 %r25, %r20;", x)[:6].tolist()
    assert got == [v & MASK for v in (1, -1, 2**31 - 1, -(2**31), 0, 2)]
    assert computed("cvt.rni.s32.f32 %r25, %r20;", x)[5] == 2
