"""Linear layers whose weight lies in memory as the CPU multiplies it: for inference only."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.layers import (
    Wav2Vec2BertConvolutionModule,
    Wav2Vec2BertFeedForward,
    Wav2Vec2BertSelfAttention,
    apply_dropout,
    depthwise,
    is_untouched,
)
from w2vbert_fast.models.optimized.opaque import OpaqueFeedForward, OpaqueLinear, swap
from w2vbert_fast.models.optimized.stacked import StackedSelfAttention, parameters_of
from w2vbert_fast.ops.cpu import gemm


class PackedLinear(OpaqueLinear):
    """A linear layer, or a pointwise convolution on `[num_tokens, channels]`, with a packed weight.

    The original weight is not kept, so there is none for a state dict to hold.

    Args:
        layer: what to pack, in fp32 or bf16 on a CPU; its bias is taken over.
    """

    STATE = "packed by pack_weights()"

    def __init__(self, layer: nn.Linear | nn.Conv1d) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        self.out_features, self.in_features = weight.shape
        self.matrix = gemm.pack_weight(weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`: `[num_tokens, in_features]` -> `[num_tokens, out_features]`.

        Args:
            x: in the weight's dtype.

        Raises:
            ValueError: `x` has another dtype, width or device than the weight.
        """
        return _linear(x, self)

    def glu(self, x: Tensor) -> Tensor:
        """`a * sigmoid(g)` with `[a, g] = x @ weight.T + bias`; as `forward`."""
        with torch.no_grad():
            return gemm.linear_glu(x, self.matrix, self.bias)


class StackedLinear(OpaqueLinear):
    """One of several linear layers of one input, whose weights are packed as one matrix.

    By itself it computes them all; `PackedSelfAttention` computes them once for all.

    Args:
        matrix: the packed weights, one above the other.
        bias: `[out_features of all]` or `None`.
        rows: which of them are this layer's.
    """

    STATE = "packed by pack_weights()"

    def __init__(self, matrix: Any, bias: nn.Parameter | None, rows: slice) -> None:
        super().__init__()
        self.in_features, self.out_features = matrix.shape[1], rows.stop - rows.start
        self.matrix, self.bias, self.rows = matrix, bias, rows

    def all_outputs(self, x: Tensor) -> Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features of all]`."""
        return _linear(x, self)

    def forward(self, x: Tensor) -> Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features]`, as `PackedLinear`."""
        return self.all_outputs(x)[:, self.rows]


def _linear(x: Tensor, layer: OpaqueLinear) -> Tensor:
    with torch.no_grad():
        return gemm.linear(x, layer.matrix, layer.bias)


class PackedFeedForward(OpaqueFeedForward):
    """A feed-forward block of two `PackedLinear`, a block of tokens at a time."""

    LINEAR = PackedLinear
    compute = staticmethod(gemm.feed_forward)


class PackedConvolutionModule(Wav2Vec2BertConvolutionModule):
    """A convolution module whose pointwise convolutions are `PackedLinear`."""

    pointwise_conv1: PackedLinear  # type: ignore[assignment]
    pointwise_conv2: PackedLinear  # type: ignore[assignment]

    def forward(self, x: Tensor, layout: PackedBatch, taps: Tensor | None = None) -> Tensor:
        """As the class that it was."""
        x = depthwise(self, self.pointwise_conv1.glu(x), layout, taps)
        return apply_dropout(self.dropout, self.pointwise_conv2(x))


class PackedSelfAttention(Wav2Vec2BertSelfAttention):
    """Self-attention whose projections of one input are `StackedLinear` of one matrix."""

    def _project(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        stacked = [layer for layer in layers if is_untouched(layer, StackedLinear)]
        if len(stacked) < len(layers) or any(s.matrix is not stacked[0].matrix for s in stacked):
            return super()._project(x, *layers)
        outputs = stacked[0].all_outputs(x)
        return [outputs[:, layer.rows] for layer in stacked]


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    Wav2Vec2BertFeedForward: PackedFeedForward,
    Wav2Vec2BertConvolutionModule: PackedConvolutionModule,
    Wav2Vec2BertSelfAttention: PackedSelfAttention,
    StackedSelfAttention: PackedSelfAttention,
}


def pack_encoder(encoder: nn.Module) -> None:
    """Replace an encoder's plain linear layers and pointwise convolutions by `PackedLinear`.

    What has hooks or is of another class (LoRA, int8) stays as it is. The projections of one input
    become one `StackedLinear` each.
    """
    for block in list(encoder.modules()):
        faster = _BLOCKS.get(type(block))
        if faster is PackedSelfAttention:
            _stack(block)
        names = [name for name, layer in block.named_children() if is_untouched(layer, nn.Linear)]
        if faster is PackedConvolutionModule:
            pointwise = [name for name, layer in block.named_children() if _is_pointwise(layer)]
            if len(pointwise) < 2:
                continue
            names += pointwise
        for name in names:
            setattr(block, name, PackedLinear(getattr(block, name)))
        if faster is not None:
            swap(block, faster)


def _stack(attention: Any) -> None:
    """Pack the projections of one input as one matrix, where they are alike."""
    rotary = attention.position_embeddings_type == "rotary"  # which rotates the input of two
    names = ("linear_q", "linear_k") if rotary else ("linear_q", "linear_k", "linear_v")
    parameters = parameters_of([getattr(attention, name) for name in names])
    if parameters is None:
        return
    weights, biases = parameters
    matrix = gemm.pack_weight(torch.cat([w.detach() for w in weights]))
    bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    start = 0
    for name, weight in zip(names, weights, strict=True):
        setattr(attention, name, StackedLinear(matrix, bias, slice(start, start + len(weight))))
        start += len(weight)


def _is_pointwise(layer: nn.Module) -> TypeGuard[nn.Conv1d]:
    return (
        is_untouched(layer, nn.Conv1d)
        and layer.kernel_size == layer.stride == (1,)
        and layer.groups == 1
    )
