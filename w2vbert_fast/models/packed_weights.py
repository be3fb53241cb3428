"""Linear layers whose weight lies in memory as the CPU multiplies it: for inference only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from w2vbert_fast.models.opaque_linear import OpaqueLinear
from w2vbert_fast.ops import dispatch

if TYPE_CHECKING:
    from w2vbert_fast.ops.cpu.linear import PackedWeight


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


class StackedLinear(OpaqueLinear):
    """One of several linear layers of one input, whose weights are packed as one matrix.

    By itself it computes them all; `stacked_projections` computes them once for all.

    Args:
        packed: the weights, one above the other.
        bias: `[out_features of all]` or `None`.
        rows: which of them are this layer's.
    """

    WEIGHT = "packed"
    STATE = "packed by pack_weights()"

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, rows: slice) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.shape[1], rows.stop - rows.start
        self.packed, self.bias, self.rows = packed, bias, rows

    def all_outputs(self, x: Tensor) -> Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features of all]`."""
        with torch.no_grad():
            y: Tensor = dispatch.packed_kernels().linear(x, self.packed, self.bias, None)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features]`, as `PackedLinear`."""
        return self.all_outputs(x)[:, self.rows]


def stacked_projections(x: Tensor, layers: Sequence[StackedLinear]) -> list[Tensor]:
    """The output of each layer for one input, of one product where one matrix holds them."""
    if any(layer.packed is not layers[0].packed for layer in layers):
        return [layer(x) for layer in layers]
    outputs = layers[0].all_outputs(x)
    return [outputs[:, layer.rows] for layer in layers]


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

    What has hooks or is of another class (LoRA, int8) stays as it is. Layers that a module names as
    its `projections_of_one_input` become one `StackedLinear` each.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(encoder.modules()):
        count += _stack(parent, getattr(parent, "projections_of_one_input", ()))
        for name, layer in list(parent.named_children()):
            if _is_plain(layer):
                setattr(parent, name, PackedLinear(layer))
                count += 1
    return count


def _stack(parent: nn.Module, names: Sequence[str]) -> int:
    layers = [layer for name in names if _is_plain(layer := getattr(parent, name))]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(layers) != len(names) or len(layers) < 2 or len(biases) not in (0, len(layers)):
        return 0
    weights = [layer.weight.detach().flatten(1) for layer in layers]
    packed = dispatch.packed_kernels().pack_weight(torch.cat(weights))
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    start = 0
    for name, weight in zip(names, weights, strict=True):
        setattr(parent, name, StackedLinear(packed, bias, slice(start, start + len(weight))))
        start += len(weight)
    return len(layers)


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    from w2vbert_fast.models.layers import is_untouched

    if is_untouched(layer, nn.Linear):
        return True
    if not is_untouched(layer, nn.Conv1d):
        return False
    return layer.kernel_size == (1,) and layer.stride == (1,) and layer.groups == 1
