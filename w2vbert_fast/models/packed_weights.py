"""Linear layers whose weight lies in memory as the CPU multiplies it: for inference only."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn

from ..ops import dispatch


class PackedLinear(nn.Module):
    """A linear layer, or a pointwise convolution on `[num_tokens, channels]`, with a packed weight.

    The original weight is not kept, so there is none for a state dict to hold.

    Args:
        layer: what to pack, in fp32 or bf16 on a CPU; its bias is taken over.
    """

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

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """A copy that shares the packed weight, which nothing writes to."""
        copied = PackedLinear.__new__(PackedLinear)
        memo[id(self)], memo[id(self.packed)] = copied, self.packed
        copied.__dict__.update({key: deepcopy(value, memo) for key, value in vars(self).items()})
        return copied

    def __getstate__(self) -> NoReturn:
        # The packed weight is opaque.
        raise TypeError("a model with packed weights cannot be pickled; load it again")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"dtype={self.packed.dtype}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise ValueError(
            f"{prefix.rstrip('.')} has a packed weight, which a checkpoint cannot hold; save the "
            "model before pack_weights()"
        )


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
