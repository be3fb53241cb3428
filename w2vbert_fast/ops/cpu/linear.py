"""Linear layers on oneDNN, with the activation in its epilogue where it has one.

`F.linear` in fp32 goes to MKL, which on AMD processors reaches less than half of what oneDNN does.
oneDNN takes the weight as it is stored: a prepacked copy gains 2 to 4 % and would have to be kept
in step with the parameter, so there is none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import get_activation
from .capability import onednn_linear

# Name of an activation -> oneDNN's name and variant.
_EPILOGUES = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}


_BLOCK_BYTES = 24 << 20
"""Intermediate values in flight: below the 32 MB from which glibc maps memory for every request."""


def matmul_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` on oneDNN for `x` `[num_rows, K]` and `weight` `[M, K]`.

    The rows or the columns of `weight` are contiguous and fill its memory: at other strides oneDNN
    falls into a reference loop a thousand times slower.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """`act(x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`, any strides.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS` or `None`; silu (swish), gelu, gelu_new
            and relu are part of the product, the others are a pass over its result.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.

    Raises:
        ValueError: no activation has this name.
    """
    if not _takes_onednn(x, weight, bias):
        plain = F.linear(x, weight, bias)
        return plain if activation is None else get_activation(activation)(plain)
    name, variant = _EPILOGUES.get(activation, ("none", ""))
    # See matmul_transposed about strides.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.contiguous(), bias, name, [], variant)
    if activation in _EPILOGUES:
        return y
    if activation == "selu":
        return F.selu(y, inplace=True)
    return get_activation(activation)(y) if activation is not None else y


def linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`a * sigmoid(g)` with `[a, g] = x @ weight.T + bias`.

    The gate is a pass of its own: two products with a sigmoid and a product in their epilogues take
    longer.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[2 * out_features, in_features]`; the first half gives `a`, the second the gate.
        bias: `[2 * out_features]` or `None`.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.
    """
    blocks = row_blocks(x.shape[0], weight.shape[0] * x.element_size())
    if len(blocks) == 1:
        return F.glu(linear(x, weight, bias, None), dim=-1)
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    for rows in blocks:
        out[rows] = F.glu(linear(x[rows], weight, bias, None), dim=-1)
    return out


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str | None,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    """`linear(linear(x, weight1, bias1, activation), weight2, bias2)`, a block of tokens at a time.

    The intermediate values of a long batch take hundreds of megabytes, which the allocator fetches
    from the system anew at every call; those of a block stay in cache and in the heap.

    Args:
        x: `[num_tokens, hidden]`.
        weight1: `[intermediate, hidden]`.
        bias1: `[intermediate]` or `None`.
        activation: as in `linear`.
        weight2: `[hidden_out, intermediate]`.
        bias2: `[hidden_out]` or `None`.

    Returns:
        `[num_tokens, hidden_out]` in the dtype of `x`.

    Raises:
        ValueError: no activation has this name.
    """
    blocks = row_blocks(x.shape[0], weight1.shape[0] * x.element_size())
    if len(blocks) == 1:
        return linear(linear(x, weight1, bias1, activation), weight2, bias2, None)
    out = x.new_empty(x.shape[0], weight2.shape[0])
    for rows in blocks:
        out[rows] = linear(linear(x[rows], weight1, bias1, activation), weight2, bias2, None)
    return out


def row_blocks(num_rows: int, row_bytes: int) -> list[slice]:
    """Blocks of rows, about equal, whose intermediate values take at most `_BLOCK_BYTES`.

    At least one block, which may be empty.
    """
    count = max(1, -(-num_rows * row_bytes // _BLOCK_BYTES))
    step = max(1, -(-num_rows // count))
    return [slice(start, start + step) for start in range(0, max(num_rows, 1), step)]


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: float
) -> Tensor:
    """`residual + scale * (x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        residual: `[num_tokens, out_features]`.
        scale: of the linear layer.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.
    """
    y = linear(x, weight, bias, None)
    return torch.add(residual, y, alpha=scale, out=y)


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    same = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return same and x.numel() > 0 and weight.numel() > 0 and onednn_linear(x.dtype)
