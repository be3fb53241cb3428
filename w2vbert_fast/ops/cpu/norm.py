"""LayerNorm and the residual connection before it.

In bf16 PyTorch's own LayerNorm is as fast as memory allows. In fp32 it is not: its running moments
take 2 ns an element on one core. There, five vectorised passes over rows that stay in cache take a
fifth of that, with the variance of the centred values, as a two-pass algorithm has it. For a few
rows the five calls themselves are what takes time, and PyTorch's one call is faster.

The sum of a residual connection is normalised as it is stored, as the plain form does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 21
"""Elements normalised at a time: 8 MB, which five passes find in the last-level cache."""
_FEW_ELEMENTS = 1 << 16
"""So few elements are normalised in one call: the others take 20 microseconds more."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`LN(x)` over the last dimension.

    Args:
        x: `[num_tokens, hidden]`.
        weight: `[hidden]`.
        bias: `[hidden]`.
        eps: added to the variance.

    Returns:
        `[num_tokens, hidden]` in the dtype of `x`, contiguous.
    """
    if not takes_passes(x, weight, bias):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in row_blocks(x):
        layer_norm_into(out[rows], x[rows], weight, bias, eps)
    return out


def takes_passes(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `layer_norm_into` is the faster way for these tensors, and takes them."""
    return x.dtype == weight.dtype == bias.dtype == torch.float32 and x.numel() > _FEW_ELEMENTS


def layer_norm_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """`LN(x)` in fp32 into `out`, which may be `x`; both `[rows, hidden]`."""
    torch.sub(x, x.mean(-1, keepdim=True), out=out)
    length = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
    scale = length.square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
    torch.addcmul(bias, out.mul_(scale), weight, out=out)


def row_blocks(x: Tensor, elements: int = _BLOCK_ELEMENTS) -> list[slice]:
    """Slices of rows of `[rows, hidden]`, of so many elements, to stay in cache over passes."""
    step = max(1, elements // max(x.shape[-1], 1))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def residual_layer_norm(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`y = residual + scale * x` and `z = LN(y)`.

    Args:
        residual: `[num_tokens, hidden]`.
        x: like `residual`.
        scale: of `x`.
        weight: `[hidden]`.
        bias: `[hidden]`.
        eps: added to the variance.

    Returns:
        `(y, z)`, both `[num_tokens, hidden]` in the dtype of `x`, contiguous.
    """
    y = _add(residual, x, scale)
    return y, layer_norm(y, weight, bias, eps)


def residual_double_layer_norm(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    eps1: float,
    weight2: Tensor,
    bias2: Tensor,
    eps2: float,
) -> tuple[Tensor, Tensor]:
    """`z1 = LN1(residual + scale * x)` and `z2 = LN2(z1)`: a layer's end, the next one's beginning.

    Args:
        residual: `[num_tokens, hidden]`.
        x: like `residual`.
        scale: of `x`.
        weight1: `[hidden]` of the first norm.
        bias1: `[hidden]`.
        eps1: added to the first variance.
        weight2: `[hidden]` of the second norm.
        bias2: `[hidden]`.
        eps2: added to the second variance.

    Returns:
        `(z1, z2)`, both `[num_tokens, hidden]` in the dtype of `x`, contiguous.
    """
    z = _add(residual, x, scale)
    if takes_passes(z, weight1, bias1):
        for rows in row_blocks(z):
            layer_norm_into(z[rows], z[rows], weight1, bias1, eps1)
    else:
        z = layer_norm(z, weight1, bias1, eps1)
    return z, layer_norm(z, weight2, bias2, eps2)


def _add(residual: Tensor, x: Tensor, scale: float) -> Tensor:
    return torch.add(residual, x, alpha=scale).to(x.dtype).contiguous()
