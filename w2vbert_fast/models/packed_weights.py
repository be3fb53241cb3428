"""Linear layers whose weight lies in memory as the CPU multiplies it: for inference only."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..ops import dispatch
from .opaque_linear import OpaqueLinear


class PackedLinear(OpaqueLinear):
    """A linear layer, or a pointwise convolution on `[num_tokens, channels]`, with a packed weight.

    The original weight is not kept, so there is none for a state dict to hold.

    Args:
        layer: what to pack, in fp32 or bf16 on a CPU; its bias is taken over.
    """

    WEIGHT = "packed"
    STATE = "packed by pack_weights()"

    def __init__(self, layer: nn.Linear | nn.Conv1d) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        self.out_features, self.in_features = weight.shape
        self.packed = dispatch.packed_kernels().pack_weight(weight)
        self.bias = layer.bias

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """`act(x @ weight.T + bias)`: `[num_tokens, in_features]` -> `[num_tokens, out_features]`.

        Args:
            x: in the weight's dtype.
            activation: a name of `ops.activations.ACTIVATIONS` or `None`.

        Raises:
            ValueError: `x` has another dtype, width or device than the weight.
        """
        with torch.no_grad():
            y: Tensor = dispatch.packed_kernels().linear(x, self.packed, self.bias, activation)
        return y

    def glu(self, x: Tensor) -> Tensor:
        """`a * sigmoid(g)` with `[a, g] = x @ weight.T + bias`; as `forward`."""
        with torch.no_grad():
            y: Tensor = dispatch.packed_kernels().linear_glu(x, self.packed, self.bias)
        return y


def packed_feed_forward(
    x: Tensor, first: PackedLinear, second: PackedLinear, activation: str | None
) -> Tensor:
    """`second(first(x, activation))`, a block of tokens at a time."""
    with torch.no_grad():
        y: Tensor = dispatch.packed_kernels().feed_forward(
            x, first.packed, first.bias, activation, second.packed, second.bias
        )
    return y


def pack_encoder(encoder: nn.Module) -> int:
    """Replace an encoder's plain linear layers and pointwise convolutions by `PackedLinear`.

    What has hooks or is of another class (LoRA, int8) stays as it is.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(encoder.modules()):
        for name, layer in list(parent.named_children()):
            if _is_plain(layer):
                setattr(parent, name, PackedLinear(layer))
                count += 1
    return count


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    from .layers import is_untouched

    if is_untouched(layer, nn.Linear):
        return True
    if not is_untouched(layer, nn.Conv1d):
        return False
    return layer.kernel_size == (1,) and layer.stride == (1,) and layer.groups == 1
