"""Functions of one number, and quotients, against decimals of many digits; signs and bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.tools.virtual_gpu.kernels import computed
from tests.tools.virtual_gpu.test_arithmetic import bits, floats, rounded

LOG_2 = Decimal("0.693147180559945309417232121458176568075500134360255254120680")


def _series(x: Decimal, first: int) -> Decimal:
    """Of sine (from the first power on) or cosine (from the zeroth)."""
    return sum(
        ((-1) ** (n // 2) * x**n / math.factorial(n) for n in range(first, 80, 2)), Decimal(0)
    )


FUNCTIONS: dict[str, tuple[Callable[[Decimal], Decimal], float]] = {
    "ex2": (lambda x: (x * LOG_2).exp(), -20),
    "lg2": (lambda x: x.ln() / LOG_2, 0.01),
    "sqrt": (Decimal.sqrt, 0.01),
    "rsqrt": (lambda x: 1 / x.sqrt(), 0.01),
    "rcp": (lambda x: 1 / x, 0.01),
    "sin": (lambda x: _series(x, 1), -4),
    "cos": (lambda x: _series(x, 0), -4),
    "tanh": (lambda x: 1 - 2 / ((2 * x).exp() + 1), -4),
}
"""With the least argument that is tried; the largest is 10."""
INFINITY, NAN = math.inf, math.nan
SPECIAL = {
    # PTX ISA, the table of each instruction.
    "ex2": {-INFINITY: 0.0, 0.0: 1.0, INFINITY: INFINITY, -130.0: 2.0**-130},
    "lg2": {0.0: -INFINITY, 1.0: 0.0, INFINITY: INFINITY, -1.0: NAN},
    "sqrt": {0.0: 0.0, INFINITY: INFINITY, -1.0: NAN},
    "rsqrt": {0.0: INFINITY, INFINITY: 0.0, -1.0: NAN},
    "rcp": {0.0: INFINITY, INFINITY: 0.0, -INFINITY: 0.0},
    "sin": {0.0: 0.0, INFINITY: NAN},
    "cos": {0.0: 1.0, INFINITY: NAN},
    "tanh": {0.0: 0.0, INFINITY: 1.0, -INFINITY: -1.0},
}


def exact(function: Callable[[Decimal], Decimal], x: float) -> Fraction:
    with localcontext() as context:
        context.prec = 60
        return Fraction(function(Decimal(float(x))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_nearest_float32_but_tanh(name: str) -> None:
    """It is as far off as the manual lets it be."""
    function, least = FUNCTIONS[name]
    x = np.linspace(least, 10, 32).astype(np.float32)
    got = floats(computed(f"{name}.approx.f32 %r25, %r20;", bits(x)))
    right = [exact(function, value) for value in x]
    if name == "tanh":
        relative = [abs(Fraction(float(g)) / r - 1) for g, r in zip(got, right, strict=True)]
        assert 2**-13 < max(relative) <= 2**-11
    else:
        assert got.tolist() == [rounded(value) for value in right]


@pytest.mark.parametrize("name", SPECIAL)
def test_functions_of_special_numbers_are_those_of_the_manual(name: str) -> None:
    special = SPECIAL[name] | {NAN: NAN}
    got = floats(computed(f"{name}.approx.f32 %r25, %r20;", bits(list(special))))
    np.testing.assert_array_equal(got[: len(special)], np.float32(list(special.values())))


def test_functions_flush_where_they_are_told_to() -> None:
    got = computed("ex2.approx.ftz.f32 %r25, %r20;", bits([-130.0, 1e-40]))
    assert got[:2].tolist() == [0, 0x3F800000]
    assert floats(computed("rcp.approx.ftz.f32 %r25, %r20;", bits([1e-40])))[0] == math.inf
    assert computed("div.full.ftz.f32 %r25, %r20, %r21;", bits([2.0**-126]), bits([2.0]))[0] == 0


@pytest.mark.parametrize("how", ["full", "approx", "rn"])
def test_quotients_are_the_nearest_float32(how: str) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 32)).astype(np.float32)
    got = floats(computed(f"div.{how}.f32 %r25, %r20, %r21;", bits(a), bits(b)))
    pairs = zip(a, b, strict=True)
    assert got.tolist() == [rounded(Fraction(float(x)) / Fraction(float(y))) for x, y in pairs]
    special = bits([1.0, -1.0, 0.0, 1.0]), bits([0.0, 0.0, 0.0, math.inf])
    got = floats(computed(f"div.{how}.f32 %r25, %r20, %r21;", *special))[:4]
    np.testing.assert_array_equal(got, np.float32([math.inf, -math.inf, math.nan, 0.0]))


SUMS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_products_round_once(name: str) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 32))
    a[:4], b[:4] = 1.0, [2.0**-24, 3 * 2.0**-24, 2.0**-24 * (1 + 2.0**-20), 2.0**-53]
    single = [x.astype(np.float32) for x in (a, b)]
    got = floats(computed(f"{name}.f32 %r25, %r20, %r21;", *map(bits, single)))
    exactly = [
        SUMS[name](Fraction(float(x)), Fraction(float(y))) for x, y in zip(*single, strict=True)
    ]
    assert got.tolist() == [rounded(value) for value in exactly]
    double = [torch.from_numpy(x.view(np.int64).copy()) for x in (a, b)]
    wide = computed(f"{name}.f64 %rd25, %rd20, %rd21;", *double).numpy().view(np.float64)
    pairs = zip(a, b, strict=True)
    assert wide.tolist() == [float(SUMS[name](Fraction(x), Fraction(y))) for x, y in pairs]


LONG: dict[str, Callable[[int, int], int]] = {
    "add.s64": lambda a, b: a + b,
    "sub.s64": lambda a, b: a - b,
    "mul.lo.s64": lambda a, b: a * b,
    "min.s64": min,
    "max.s64": max,
    "or.b64": lambda a, b: a | b,
    "xor.b64": lambda a, b: a ^ b,
}


@pytest.mark.parametrize("opcode", LONG)
def test_integers_of_64_bits_are_those_of_python(opcode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-(2**63), 2**63 - 1, (2, 32), generator=generator)
    a[:2], b[:2] = torch.tensor([-(2**63), 2**63 - 1]), torch.tensor([-1, 2])
    got = computed(f"{opcode} %rd25, %rd20, %rd21;", a, b).tolist()
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert [x & 2**64 - 1 for x in got] == [LONG[opcode](x, y) & 2**64 - 1 for x, y in pairs]


def test_integers_of_64_bits_are_compared_chosen_shifted_and_made_of_32() -> None:
    a = torch.tensor([-1, 5, 2**62, -(2**63)] * 8)
    b = torch.tensor([1, 5, -(2**62), 2**63 - 1] * 8)
    choose = "selp.b64 %rd25, %rd20, %rd21, %p0;"
    for kind, wanted in (("s64", a < b), ("u64", (a ^ -(2**63)) < (b ^ -(2**63)))):
        got = computed(f"setp.lt.{kind} %p0, %rd20, %rd21;\n{choose}", a, b)
        assert torch.equal(got, torch.where(wanted, a, b))
    assert torch.equal(computed("shr.s64 %rd25, %rd20, 3;", a), a >> 3)
    assert computed("shr.u64 %rd25, %rd20, 3;", a).tolist() == [
        (x & 2**64 - 1) >> 3 for x in a.tolist()
    ]
    low = [x - (x >> 31 << 32) for x in (a & 0xFFFFFFFF).tolist()]
    assert computed("cvt.s64.s32 %rd25, %r20;", a).tolist() == low
    wide = computed("mad.wide.s32 %rd25, %r20, -7, %rd21;", a, b)
    assert wide.tolist() == [x * -7 + y for x, y in zip(low, b.tolist(), strict=True)]
    assert computed("mad.lo.s64 %rd25, %rd20, 2, %rd21;", a, b).tolist() == (a * 2 + b).tolist()
    assert floats(computed("cvt.rn.f32.s32 %r25, %r20;", a)).tolist() == [
        rounded(Fraction(x)) for x in low
    ]


def test_roots_and_reciprocals_of_float64_round_once() -> None:
    x = np.random.default_rng(0).uniform(0.1, 1e9, 32)
    raw = torch.from_numpy(x.view(np.int64).copy())
    for name, function in (("sqrt", Decimal.sqrt), ("rcp", lambda value: 1 / value)):
        got = computed(f"{name}.rn.f64 %rd25, %rd20;", raw).numpy().view(np.float64)
        assert got.tolist() == [float(exact(function, value)) for value in x]


def test_signs_of_numbers() -> None:
    whole = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 5, -7, 12] * 4)
    negated = computed("neg.s32 %r25, %r20;", whole)
    assert negated.tolist() == [-x & 0xFFFFFFFF for x in whole.tolist()]
    absolute = computed("abs.s32 %r25, %r20;", whole)
    assert absolute.tolist() == [abs(x) & 0xFFFFFFFF for x in whole.tolist()]
    assert computed("neg.s64 %rd25, %rd20;", whole).tolist() == (-whole).tolist()
    x = [0.0, -0.0, 1.5, -1.5, math.inf, -math.inf, 1e-40, -1e-40]
    raw = bits(x)
    assert computed("neg.f32 %r25, %r20;", raw).tolist() == (raw ^ 1 << 31).tolist()
    assert computed("abs.f32 %r25, %r20;", raw).tolist() == (raw & (1 << 31) - 1).tolist()
    assert computed("neg.ftz.f32 %r25, %r20;", raw)[6:8].tolist() == [1 << 31, 0]
    wide = torch.tensor(x * 4, dtype=torch.float64).view(torch.int64)
    assert computed("abs.f64 %rd25, %rd20;", wide).tolist() == (wide & (1 << 63) - 1).tolist()


def test_bits_of_every_width_and_predicates() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-(2**62), 2**62, (2, 32), generator=generator)
    low = [x.tolist() for x in (a & 0xFFFFFFFF, b & 0xFFFFFFFF)]
    pairs = list(zip(*low, strict=True))
    assert computed("or.b32 %r25, %r20, %r21;", a, b).tolist() == [x | y for x, y in pairs]
    assert computed("not.b32 %r25, %r20;", a).tolist() == [x ^ 0xFFFFFFFF for x in low[0]]
    wide = computed("and.b64 %rd25, %rd20, %rd21;", a, b)
    assert wide.tolist() == [x & y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert computed("not.b64 %rd25, %rd20;", a).tolist() == [~x for x in a.tolist()]
    shifted = computed("shl.b64 %rd25, %rd20, 65;", a)  # by all there is, not by 65 modulo 64
    assert shifted.tolist() == [0] * 32
    half = "cvt.u16.u32 %rs0, %r20;\ncvt.u16.u32 %rs1, %r21;\n{} %rs2, %rs0, %rs1;\n"
    half += "cvt.u32.u16 %r25, %rs2;"
    for name in ("and", "or", "xor"):
        got = computed(half.format(f"{name}.b16"), a, b).tolist()
        function = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[name]
        assert got == [function(x, y) & 0xFFFF for x, y in pairs]
        # Of predicates: whether the lowest and the next bit are set.
        statement = (
            "and.b32 %r22, %r20, 1;\nsetp.ne.u32 %p0, %r22, 0;\n"
            "and.b32 %r23, %r20, 2;\nsetp.eq.u32 %p1, %r23, 2;\nnot.pred %p1, %p1;\n"
            f"not.pred %p1, %p1;\n{name}.pred %p2, %p0, %p1;\nmov.pred %p3, %p2;\n"
            "selp.u32 %r25, 5, 9, %p3;"
        )
        wanted = [5 if function(x & 1, x >> 1 & 1) else 9 for x in low[0]]
        assert computed(statement, a).tolist() == wanted


def test_parts_of_a_register_lie_from_the_lowest_up() -> None:
    a = torch.tensor([0x1122334455667788] * 32)
    halves = "mov.b64 {%r22, %r23}, %rd20;\nmov.b64 %rd25, {%r23, %r22};"
    assert computed(halves, a)[0] == 0x5566778811223344
    quarters = "mov.b32 {%rs0, %rs1}, %r20;\nmov.b32 %r25, {%rs1, %rs0};"
    assert computed(quarters, a)[0] == 0x77885566


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_integers_are_compared_with_and_without_sign(compare: str) -> None:
    a = torch.tensor([0, 1, 2**31, 2**32 - 1, 5, 7, 7, 2**31 - 1] * 4)
    b = a.roll(1)
    for kind in ("u32", "s32"):
        statement = f"setp.{compare}.{kind} %p0, %r20, %r21;\nselp.b32 %r25, 1, 0, %p0;"
        x, y = ((v - (v >> 31 << 32) if kind == "s32" else v) for v in (a, b))
        assert torch.equal(computed(statement, a, b), getattr(torch, compare)(x, y).long())


def test_integers_are_widened_by_their_sign_and_narrowed_by_their_low_bits() -> None:
    a = torch.tensor([0x80, 0x7F, 0xFF, 0x12345, -1, -128, 128, 0] * 4)
    low = [x & 0xFF for x in a.tolist()]
    signed = [x - (x >> 7 << 8) for x in low]
    narrow = "cvt.u16.u32 %rs0, %r20;\n"
    assert computed(f"{narrow}cvt.s64.s8 %rd25, %rs0;", a).tolist() == signed
    assert computed(f"{narrow}cvt.u64.u8 %rd25, %rs0;", a).tolist() == low
    got = floats(computed(f"{narrow}cvt.rn.f32.s8 %r25, %rs0;", a))
    assert got.tolist() == [float(x) for x in signed]
