"""Linear layers and what follows them in the same breath: activation or gated linear unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import get_activation
from .dispatch import runs_triton, takes_fast_path

TRITON_ACTIVATIONS = ("gelu", "gelu_new", "relu", "selu", "silu", "swish")
"""Activations that the Triton epilogues have; others run after the matrix product."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] | None = None,
    *,
    fast: bool = False,
) -> Tensor:
    """`act(x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS`, a function, or `None`.
        fast: use the device's fast implementation, `torch.ops.w2vbert.linear`.

    Returns:
        `[num_tokens, out_features]`.
    """
    if takes_fast_path(fast, x, weight, bias):
        inside = isinstance(activation, str) and activation in TRITON_ACTIVATIONS
        y: Tensor = linear_op(x, weight, bias, activation if inside else None)
        activation = None if inside else activation
    else:
        y = F.linear(x, weight, bias)
    return y if activation is None else get_activation(activation)(y)


def linear_glu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """Gated linear unit `a * sigmoid(b)` with `[a, b] = x @ weight.T + bias` (Dauphin et al. 2017).

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[2 * out_features, in_features]`; the first half gives `a`, the second the gate.
        bias: `[2 * out_features]` or `None`.
        fast: use the device's fast implementation, `torch.ops.w2vbert.linear_glu`.

    Returns:
        `[num_tokens, out_features]`.
    """
    if takes_fast_path(fast, x, weight, bias):
        y: Tensor = linear_glu_op(x, weight, bias)
        return y
    return F.glu(F.linear(x, weight, bias), dim=-1)


@torch.library.custom_op("w2vbert::linear", mutates_args=())
def linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if runs_triton(x):
        from csrc_triton.linear import linear as kernel

        return kernel(x, weight, bias, activation=activation)
    return linear(x, weight, bias, activation)


@linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("w2vbert::linear_glu", mutates_args=())
def linear_glu_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if runs_triton(x):
        from csrc_triton.linear import linear_glu as kernel

        return kernel(x, weight, bias)
    return linear_glu(x, weight, bias)


@linear_glu_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)
