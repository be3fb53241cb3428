"""Linear layers and what follows them in the same breath: activation or gated linear unit."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .activations import get_activation


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS`, a function, or `None`.

    Returns:
        `[num_tokens, out_features]`.
    """
    y = F.linear(x, weight, bias)
    return y if activation is None else get_activation(activation)(y)


def linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gated linear unit `a * sigmoid(b)` with `[a, b] = x @ weight.T + bias` (Dauphin et al. 2017).

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[2 * out_features, in_features]`; the first half gives `a`, the second the gate.
        bias: `[2 * out_features]` or `None`.

    Returns:
        `[num_tokens, out_features]`.
    """
    return F.glu(F.linear(x, weight, bias), dim=-1)
