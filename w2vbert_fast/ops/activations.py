"""Activation functions by the names that checkpoints use (`hidden_act`, `adapter_act`).

Every name of transformers' table but `prelu` and `xielu`, which have parameters of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """Tanh approximation of GELU (Hendrycks and Gimpel 2016), named `gelu_new` in checkpoints."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """`relu(x)^2` (So et al. 2021)."""
    return F.relu(x).square()


def clipped_gelu(x: Tensor) -> Tensor:
    """GELU limited to -10..10."""
    return F.gelu(x).clamp(-10.0, 10.0)


def laplace(x: Tensor) -> Tensor:
    """The normal distribution function that approximates squared ReLU (Ma et al. 2022)."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def sqrt_softplus(x: Tensor) -> Tensor:
    """`sqrt(softplus(x))`."""
    return F.softplus(x).sqrt()


def gelu_by_tanh(x: Tensor) -> Tensor:
    """PyTorch's own tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": clipped_gelu,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_by_tanh,
    "gelu_pytorch_tanh": gelu_by_tanh,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": identity,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu_squared,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def get_activation(
    activation: str | Callable[[Tensor], Tensor],
) -> Callable[[Tensor], Tensor]:
    """The function behind a name of `hidden_act`; a callable is returned as it is.

    Raises:
        ValueError: no activation has this name.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[activation]
