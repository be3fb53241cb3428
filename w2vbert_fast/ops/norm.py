"""Layer normalisation, alone and fused with the residual connection before it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`LN(x)` over the last dimension.

    Args:
        x: `[num_tokens, hidden]`.
        weight: `[hidden]`.
        bias: `[hidden]`.
        eps: added to the variance.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def residual_layer_norm(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`y = residual + scale * x` and `z = LN(y)`.

    Args:
        residual: `[num_tokens, hidden]`.
        x: `[num_tokens, hidden]`, the output of the block that ends here.
        scale: 0.5 for the Conformer's half-step feed-forwards, else 1.
        weight: `[hidden]` of the norm that opens the next block.
        bias: `[hidden]`.
        eps: added to the variance.

    Returns:
        `(y, z)`, both `[num_tokens, hidden]`.
    """
    y = residual + (x if scale == 1.0 else x * scale)
    return y, layer_norm(y, weight, bias, eps)
