"""Linear layers in int8 on a CPU: weights quantised by output channel, activations by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast.models.opaque_linear import OpaqueLinear
from w2vbert_fast.ops import dispatch


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
    if missing := dispatch.int8_kernels().reasons():
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

    WEIGHT = "quantized"
    STATE = "quantised to int8"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantized = dispatch.int8_kernels().quantize_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Any, activation: str | None = None) -> Tensor:
        """`act(x @ weight.T + bias)`: `[num_tokens, in_features]` -> `[num_tokens, out_features]`.

        Args:
            x: floating, or what the kernels' `quantize_tokens` made of it.
            activation: a name of `ops.activations.ACTIVATIONS` or `None`.
        """
        with torch.no_grad():
            kernels = dispatch.int8_kernels()
            y: Tensor = kernels.linear_int8(x, self.quantized, self.bias, activation)
        return y


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


def int8_projections(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """The output of each layer for one input, which is quantised once."""
    tokens = dispatch.int8_kernels().quantize_tokens(x)
    return [layer(tokens) for layer in layers]


def int8_feed_forward(
    x: Tensor, first: Int8Linear, second: Int8Linear, activation: str | None
) -> Tensor:
    """`second(first(x, activation))`, a block of tokens at a time."""
    with torch.no_grad():
        y: Tensor = dispatch.int8_kernels().feed_forward_int8(
            x, first.quantized, first.bias, activation, second.quantized, second.bias
        )
    return y


def quantize_encoder(model: nn.Module) -> int:
    """Replace the linear layers of a model's encoder by `Int8Linear`, one after the other.

    Those of its Conformer layers only: the feature projection, the convolutions, the adapter and
    the head stay as they are.

    Args:
        model: what has the encoder, on the CPU.

    Returns:
        How many layers were replaced.
    """
    encoder: Any = model.base_model.encoder  # type: ignore[union-attr]
    linears = [name for name, module in encoder.named_modules() if type(module) is nn.Linear]
    for name in linears:
        path, _, leaf = name.rpartition(".")
        parent = encoder.get_submodule(path)
        setattr(parent, leaf, Int8Linear(getattr(parent, leaf)))
    return len(linears)
