"""Derivatives of the functions of `device`, for kernels to inline."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of `device.activate` at an fp32 tile of any shape."""
    if ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # of the normal distribution
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_new":
        # x times the logistic function of u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
        # Where the gate is 0 the slope may be infinite.
        product = gate * (1.0 - gate)
        return gate + tl.where(product > 0.0, x * product * slope, 0.0 * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, tl.where(x == x, 0.0, x))  # NaN stays NaN
    elif ACTIVATION == "selu":
        negative = 1.6732632423543772 * tl.exp(tl.minimum(x, 0.0))
        return 1.0507009873554805 * tl.where(x > 0.0, 1.0, tl.where(x == x, negative, x))
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown ACTIVATION")
        return tl.full(x.shape, 1.0, tl.float32)
