"""f16 and bf16 against exact fractions, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.tools.virtual_gpu.kernels import computed
from tests.tools.virtual_gpu.test_arithmetic import rounded

# Bits of the significand, the exponent of the least normal number and the largest number.
FORMATS = {
    "f16": (torch.float16, 11, -14, Fraction(65504)),
    "bf16": (torch.bfloat16, 8, -126, Fraction(torch.finfo(torch.bfloat16).max)),
}
KINDS = sorted(FORMATS)


def nearest(exact: Fraction, kind: str) -> float:
    """IEEE 754, 4.3.1: to the nearest, ties to even, subnormal numbers included."""
    _, bits, least, largest = FORMATS[kind]
    if exact == 0:
        return 0.0
    exponent = least
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - bits + 1)
    value = round(exact / step) * step
    return math.copysign(math.inf, exact) if abs(value) > largest else float(value)


def numbers(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    dtype = FORMATS[kind][0]
    scale = 2.0 ** torch.linspace(-20, 12, 32)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 32, generator=generator) * scale[torch.randperm(32)]
    values[:, :4] = torch.tensor([1.0, -1.0, 0.5, 3.0])
    return values.to(dtype)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16).long() & 0xFFFF


def halves(found: torch.Tensor, kind: str) -> list[float]:
    return found.to(torch.int16).view(FORMATS[kind][0]).double().tolist()


EXACT: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma.rn": lambda a, b, c: a * b + c,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXACT)
def test_halves_round_once(name: str, kind: str) -> None:
    count = 3 if name.startswith("fma") else 2
    sources = numbers(kind, count)
    if count == 3:  # a product half way between two halves, which the addend moves off it
        a, b, tiny = (3.0, 683.0, 2.0**-24) if kind == "f16" else (7.0, 37.0, 2.0**-60)
        sources[:, 5] = torch.tensor([a, b, tiny])
        sources[:, 6] = torch.tensor([a, b, -tiny])
    of = ", ".join(f"%rs{i}" for i in range(count))
    load = "".join(f"cvt.u16.u32 %rs{i}, %r{20 + i};\n" for i in range(count))
    statement = f"{load}{name}.{kind} %rs5, {of};\ncvt.u32.u16 %r25, %rs5;"
    got = computed(statement, *map(bits, sources))
    right = [
        nearest(EXACT[name](*(Fraction(float(x)) for x in column)), kind) for column in sources.T
    ]
    assert halves(got, kind) == right
    # Two in a register: these, and above them others.
    other = numbers(kind, count, seed=1)
    packed = [bits(low) | bits(high) << 16 for low, high in zip(sources, other, strict=True)]
    words = ", ".join(f"%r{20 + i}" for i in range(count))
    both = computed(f"{name}.{kind}x2 %r25, {words};", *packed)
    assert halves(both & 0xFFFF, kind) == right
    assert halves(both >> 16, kind) == [
        nearest(EXACT[name](*(Fraction(float(x)) for x in column)), kind) for column in other.T
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_signs_of_halves(kind: str) -> None:
    a = numbers(kind, 1)[0]
    a[7:9] = torch.tensor([math.inf, -0.0])
    for name, right in (("neg", -a), ("abs", a.abs())):
        statement = f"cvt.u16.u32 %rs0, %r20;\n{name}.{kind} %rs5, %rs0;\ncvt.u32.u16 %r25, %rs5;"
        assert torch.equal(computed(statement, bits(a)), bits(right))
        both = computed(f"{name}.{kind}x2 %r25, %r20;", bits(a) << 16 | bits(a))
        assert torch.equal(both, bits(right) << 16 | bits(right))


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_is_smaller_than_nan_unless_nan_is_asked_for(kind: str) -> None:
    dtype = FORMATS[kind][0]
    a = torch.tensor([math.nan, 1.0, -0.0, 0.0] * 8, dtype=dtype)
    b = torch.tensor([1.0, math.nan, 0.0, -0.0] * 8, dtype=dtype)
    load = "cvt.u16.u32 %rs0, %r20;\ncvt.u16.u32 %rs1, %r21;\n"
    store = "\ncvt.u32.u16 %r25, %rs5;"
    smaller = computed(f"{load}min.{kind} %rs5, %rs0, %rs1;{store}", bits(a), bits(b))
    minus_zero = torch.tensor([1.0, 1.0, -0.0, -0.0] * 8, dtype=dtype)
    assert torch.equal(smaller, bits(minus_zero))
    kept = computed(f"{load}max.NaN.{kind} %rs5, %rs0, %rs1;{store}", bits(a), bits(b))
    assert kept[:4].tolist() == [0x7FFF, 0x7FFF, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ex2", "tanh"])
def test_approximations_of_halves_are_the_nearest_halves(name: str, kind: str) -> None:
    dtype = FORMATS[kind][0]
    a = torch.linspace(-6, 6, 32).to(dtype)
    function = np.exp2 if name == "ex2" else np.tanh
    ftz = ".ftz" if (name, kind) == ("ex2", "bf16") else ""
    statement = f"cvt.u16.u32 %rs0, %r20;\n{name}.approx{ftz}.{kind} %rs5, %rs0;\n"
    got = computed(f"{statement}cvt.u32.u16 %r25, %rs5;", bits(a))
    right = [nearest(Fraction(float(function(float(x)))), kind) for x in a]
    assert halves(got, kind) == right


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_halves_and_float32_are_float32(kind: str) -> None:
    """PTX ISA, mixed precision add, sub and fma: halves become float32, the result rounds once."""
    a, b = numbers(kind, 2)
    c = torch.randn(32, generator=torch.Generator().manual_seed(3))
    words = c.view(torch.int32).long() & 0xFFFFFFFF
    load = "cvt.u16.u32 %rs0, %r20;\ncvt.u16.u32 %rs1, %r21;\n"
    for name, sources, exact in (
        ("add", "%rs0, %r22", lambda x, y, z: x + z),
        ("sub", "%rs0, %r22", lambda x, y, z: x - z),
        ("fma", "%rs0, %rs1, %r22", lambda x, y, z: x * y + z),
    ):
        got = computed(f"{load}{name}.rn.f32.{kind} %r25, {sources};", bits(a), bits(b), words)
        found = got.to(torch.int32).view(torch.float32).tolist()
        columns = zip(a, b, c, strict=True)
        assert found == [rounded(exact(*(Fraction(float(v)) for v in one))) for one in columns]


def test_two_float32_in_a_register_are_each_as_one() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b, c = torch.randn(3, 32, 2, generator=generator)
    a[0], b[0], c[0] = 1 + 2.0**-12, 1 + 2.0**-12, torch.tensor([2.0**-80, -(2.0**-80)])
    packed = [x.contiguous().view(torch.int64)[:, 0] for x in (a, b, c)]
    for name, right in (("add", a + b), ("sub", a - b), ("mul", a * b)):
        got = computed(f"{name}.f32x2 %rd25, %rd20, %rd21;", *packed[:2])
        assert torch.equal(got[:, None].view(torch.float32), right)
    got = computed("fma.rn.f32x2 %rd25, %rd20, %rd21, %rd22;", *packed)[:, None].view(torch.float32)
    for half in range(2):
        words = [x[:, half].contiguous().view(torch.int32).long() & 0xFFFFFFFF for x in (a, b, c)]
        one = computed("fma.rn.f32 %r25, %r20, %r21, %r22;", *words)
        assert torch.equal(one.to(torch.int32).view(torch.float32), got[:, half])
    assert got[0, 0] > got[0, 1]


def test_the_largest_of_three() -> None:
    a, b, c = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    a[0], b[1] = math.nan, math.nan
    words = [x.view(torch.int32).long() & 0xFFFFFFFF for x in (a, b, c)]
    for name, function in (("max", torch.fmax), ("min", torch.fmin)):
        got = computed(f"{name}.f32 %r25, %r20, %r21, %r22;", *words)
        found = got.to(torch.int32).view(torch.float32)
        assert torch.equal(found, function(function(a, b), c))
    kept = computed("max.NaN.f32 %r25, %r20, %r21, %r22;", *words).to(torch.int32)
    assert kept.view(torch.float32).isnan().tolist() == [True, True] + [False] * 30
