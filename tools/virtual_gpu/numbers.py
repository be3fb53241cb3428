"""Formats and roundings of floating point, each rounded once, on NumPy arrays.

bfloat16 values travel as uint16, the rest in NumPy's own types.
"""

from __future__ import annotations

import numpy as np

_LEAST_NORMAL = np.float32(2.0**-126)


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even. NaN becomes 0x7FFF, as `cvt.rn.bf16.f32` makes it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def float32_to_float16(values: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even, as uint16. NaN becomes 0x7FFF."""
    bits = values.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


def float32_to_tf32(bits: np.ndarray) -> np.ndarray:
    """`cvt.rna.tf32.f32` on the bits (uint32): 10 bits of fraction, ties away from zero."""
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, rounded)


def flush(values: np.ndarray) -> np.ndarray:
    """`.ftz`: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(values) < _LEAST_NORMAL, np.copysign(np.float32(0), values), values)


def sum_rounded_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64: what is not exact becomes the neighbour whose last bit is 1."""
    total, error = _sum_and_error(a, b)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (total != 0) & (error != 0) & ((bits & 1) == 0)
    away = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.where(inexact, (bits + away).view(np.float64), total)


def float64_to_float32_odd(values: np.ndarray) -> np.ndarray:
    """What is not exact becomes the neighbour in float32 whose last bit is 1: another rounding, to
    a narrower format, is then as if it were the only one."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    # Cut towards zero, then the last bit set.
    cut = np.where(np.abs(near.astype(np.float64)) > np.abs(values), bits - np.uint32(1), bits)
    inexact = (near != values) & ~np.isnan(values)
    return np.where(inexact, cut | np.uint32(1), bits).view(np.float32)


def _sum_and_error(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product_and_error(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dekker, "A floating-point technique for extending the available precision", 1971."""

    def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        far = np.float64(2**27 + 1) * x
        high = far - (far - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = halves(a), halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, or of float64 within 2**-900 to 2**900, rounded once.

    A sum that is rounded to odd keeps the rounding after it from being a rounding of a rounding
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd", 2008). In float32 the product is exact in float64.
    """
    if a.dtype == np.float32:
        product = a.astype(np.float64) * b.astype(np.float64)
        total = product + c
        rounded = total.astype(np.float32)
        # Rounded twice it is wrong only where the first rounding led half way between two float32
        # numbers, or may have among subnormal ones, which lie further apart.
        doubtful = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
        doubtful |= (np.abs(rounded) <= _LEAST_NORMAL) & (total != 0)
        if doubtful.any():
            exact = sum_rounded_to_odd(product, c.astype(np.float64)).astype(np.float32)
            return np.where(doubtful, exact, rounded)
        return rounded
    high, low = _product_and_error(a, b)
    upper, upper_error = _sum_and_error(c, low)
    total, error = _sum_and_error(high, upper)
    whole = total + sum_rounded_to_odd(upper_error, error)
    return np.where(np.isfinite(low) & np.isfinite(error), whole, a * b + c)
