"""Linear layers in int8 on a CPU: weights quantised by output channel, activations by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast.models.layers import (
    Wav2Vec2BertFeedForward,
    Wav2Vec2BertSelfAttention,
    is_untouched,
)
from w2vbert_fast.models.optimized.opaque import OpaqueFeedForward, OpaqueLinear, swap
from w2vbert_fast.models.optimized.stacked import StackedSelfAttention
from w2vbert_fast.ops import dispatch
from w2vbert_fast.ops.cpu import int8


def check_int8(device: torch.device) -> None:
    """Whether a model can be quantised to int8 on a device.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if device.type != "cpu":
        raise ValueError(
            f"dtype is 'int8' and device is {str(device)!r}; int8 needs the CPU. On other devices "
            "use 'bfloat16' or 'float16'"
        )
    if missing := int8.reasons():
        raise ValueError(f"dtype is 'int8', which cannot run here: {'; '.join(missing)}")


def dtype_beside_int8(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the rest of an int8 model computes: bfloat16 where the CPU multiplies it.

    float32 there would take longer than what is quantised.

    Args:
        dtype: of the checkpoint, kept on other CPUs.
    """
    return torch.bfloat16 if dispatch.cpu_multiplies_bfloat16() else dtype


class Int8Linear(OpaqueLinear):
    """A linear layer whose weight is int8, one scale an output channel, for inference on a CPU.

    The activations are quantised at each call, one scale a token; the result is in their dtype. The
    original weight is not kept, so there is none for a state dict to hold.

    Args:
        linear: the layer to quantise; its bias is taken over.
    """

    STATE = "quantised to int8"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.matrix = int8.quantize_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`: `[num_tokens, in_features]` -> `[num_tokens, out_features]`."""
        with torch.no_grad():
            return int8.linear_int8(x, self.matrix, self.bias, None)


class Int8FeedForward(OpaqueFeedForward):
    """A feed-forward block of two `Int8Linear`, a block of tokens at a time."""

    LINEAR = Int8Linear
    compute = staticmethod(int8.feed_forward_int8)


class Int8SelfAttention(Wav2Vec2BertSelfAttention):
    """Self-attention whose projections are `Int8Linear`: their input is quantised once."""

    def _project(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        quantised = [layer for layer in layers if is_untouched(layer, Int8Linear)]
        if len(quantised) < len(layers):
            return super()._project(x, *layers)
        with torch.no_grad():
            return int8.linears_int8(x, [(layer.matrix, layer.bias) for layer in quantised])


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    Wav2Vec2BertFeedForward: Int8FeedForward,
    Wav2Vec2BertSelfAttention: Int8SelfAttention,
    StackedSelfAttention: Int8SelfAttention,
}


class WideLinear(nn.Linear):
    """A linear layer that is in float32 in a model that is not, and computes there.

    For the logits of CTC: rounded to bfloat16 they tie, and which of two tokens wins is chance.
    """

    def __init__(self, linear: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.float()
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]`, any floating dtype -> `[..., out_features]` in the weight's."""
        return super().forward(x.to(self.weight.dtype))


@contextmanager
def keep_ctc_head(model: nn.Module) -> Iterator[None]:
    """Whatever happens to a CTC model inside, its head ends as a `WideLinear` of what it was."""
    head = model._modules.pop("lm_head", None)
    yield
    if head is not None:
        model.add_module("lm_head", WideLinear(head) if type(head) is nn.Linear else head)


def quantize_encoder(model: nn.Module) -> None:
    """Replace the linear layers of a model's encoder by `Int8Linear`, one after the other.

    Those of its Conformer layers only: the feature projection, the convolutions, the adapter and
    the head stay as they are.

    Args:
        model: what has the encoder, on the CPU.
    """
    encoder: Any = model.base_model.encoder  # type: ignore[union-attr]
    for block in list(encoder.modules()):
        for name, layer in list(block.named_children()):
            if type(layer) is nn.Linear:
                setattr(block, name, Int8Linear(layer))
        if type(block) in _BLOCKS:
            swap(block, _BLOCKS[type(block)])
