"""Functions that several kernels inline.

`activate` is every pointwise activation that follows a product or a norm. The name is a constant
of compilation, so a kernel carries the code of one.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "linear": "identity",
    "relu": "relu",
    "selu": "selu",
    "silu": "silu",
    "swish": "silu",
}
"""The names that checkpoints use, and what `activate` calls them."""


def activation_constant(activation: str | None) -> str:
    """The `ACTIVATION` constant of a kernel, for a name that checkpoints use.

    Raises:
        ValueError: the kernels do not have this activation.
    """
    if activation is None:
        return "identity"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be None or {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION(x)` of an fp32 tile of any shape."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u; u = sqrt(2 / pi) (x + 0.044715 x^3).
        x = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif ACTIVATION == "relu":
        # A comparison and not a maximum: NaN must stay NaN.
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "selu":
        # exp(x) - 1 cancels near 0. Its Taylor series takes over there: the first term left out is
        # below 5e-8 of the sum where |x| < 0.125.
        series = 1.0 + x * (1.0 / 5)
        series = 1.0 + x * (1.0 / 4) * series
        series = 1.0 + x * (1.0 / 3) * series
        series = x * (1.0 + x * 0.5 * series)
        negative = tl.where(x > -0.125, series, tl.exp(x) - 1.0)
        x = 1.0507009873554805 * tl.where(x > 0.0, x, 1.6732632423543772 * negative)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown ACTIVATION")
    return x
