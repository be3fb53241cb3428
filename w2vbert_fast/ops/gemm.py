"""Linear layers and what follows them in the same breath: activation, gated unit, second layer.

The gradients keep `x` alone: what is inside is computed again where the gradient of an activation
or of the gated unit needs it. The inside of a feed-forward layer is four times as wide as `x`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast.ops import tuned
from w2vbert_fast.ops.activations import get_activation
from w2vbert_fast.ops.cpu import gemm as cpu
from w2vbert_fast.ops.dispatch import on_triton_device, records_gradient
from w2vbert_fast.ops.operation import gradient, operation

FUSED_ACTIVATIONS = ("gelu", "gelu_new", "relu", "selu", "silu", "swish")
"""Activations that the fast implementations have; others run after the matrix product."""


def is_fused(activation: object) -> TypeGuard[str]:
    """Whether the fast implementations have an activation, and its gradient."""
    return isinstance(activation, str) and activation in FUSED_ACTIVATIONS


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] | None = None,
    *,
    fast: bool = False,
) -> Tensor:
    """`act(x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS`, a function, or `None`.
        fast: use the device's fast implementation, `torch.ops.w2vbert.linear`.

    Returns:
        `[num_tokens, out_features]`.
    """
    if fast:
        inside = is_fused(activation)
        if inside and records_gradient(x, weight, bias) and not on_triton_device(x):
            # The fused form would compute the activation's argument again in the backward pass.
            inside = False
        y = _linear_op(x, weight, bias, activation if inside else None)
        activation = None if inside else activation
    else:
        y = F.linear(x, weight, bias)
    return y if activation is None else get_activation(activation)(y)


def linear_glu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """Gated linear unit `a * sigmoid(b)` with `[a, b] = x @ weight.T + bias` (Dauphin et al. 2017).

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[2 * out_features, in_features]`; the first half gives `a`, the second the gate.
        bias: `[2 * out_features]` or `None`.
        fast: use the device's fast implementation, `torch.ops.w2vbert.linear_glu`.

    Returns:
        `[num_tokens, out_features]`.
    """
    if fast and (on_triton_device(x) or not records_gradient(x, weight, bias)):
        return _linear_glu_op(x, weight, bias)
    return F.glu(linear(x, weight, bias, fast=fast), dim=-1)


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    fast: bool = False,
) -> Tensor:
    """`linear(linear(x, weight1, bias1, activation), weight2, bias2)`.

    Args:
        x: `[num_tokens, hidden]`.
        weight1: `[intermediate, hidden]`.
        bias1: `[intermediate]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS`.
        weight2: `[hidden_out, intermediate]`.
        bias2: `[hidden_out]` or `None`.
        fast: use the device's fast implementation. On a CPU, without a gradient, that is
            `torch.ops.w2vbert.feed_forward`, which works on a block of tokens at a time. Where
            Triton kernels run it is two products, and with a gradient that operation, which keeps
            `x` alone for the backward pass.

    Returns:
        `[num_tokens, hidden_out]`.
    """
    recorded = records_gradient(x, weight1, bias1, weight2, bias2)
    if fast and recorded == on_triton_device(x) and (not recorded or is_fused(activation)):
        return _feed_forward_op(x, weight1, bias1, activation, weight2, bias2)
    return linear(linear(x, weight1, bias1, activation, fast=fast), weight2, bias2, fast=fast)


def linear_stacked(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, fast: bool = False
) -> Tensor:
    """Several linear layers of one input, their outputs side by side.

    Where the weights lie end to end in one buffer, and the biases too, the Triton implementation is
    one matrix product. That is looked up in each call, so that nothing here can be out of date.

    Args:
        x: `[num_tokens, in_features]`.
        weights: `[out_features, in_features]` each, all of one shape and dtype.
        biases: `[out_features]` each; none for layers without bias.
        fast: use the device's fast implementation, `torch.ops.w2vbert.linear_stacked`.

    Returns:
        `[num_tokens, len(weights) * out_features]`.

    Raises:
        ValueError: there is neither a bias for each weight nor none at all, or shapes differ.
    """
    if not weights or (biases and len(biases) != len(weights)):
        raise ValueError(
            f"weights has {len(weights)} entries and biases {len(biases)}; there must be at least "
            "one weight, and a bias for each or for none"
        )
    if any(weight.shape != weights[0].shape for weight in weights):
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise ValueError(f"weights have shapes {shapes}; they must be equal")
    if fast and not records_gradient(x, *weights, *biases):
        return _linear_stacked_op(x, list(weights), list(biases))
    return _linear_stacked(x, weights, biases, fast)


def _linear_stacked(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], fast: bool = False
) -> Tensor:
    pairs = itertools.zip_longest(weights, biases)
    return torch.cat([linear(x, weight, bias, fast=fast) for weight, bias in pairs], dim=1)


def lie_end_to_end(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are contiguous and follow each other in one storage, without gaps."""
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    address = first.data_ptr()
    for tensor in tensors:
        if (
            tensor.data_ptr() != address
            or tensor.dtype != first.dtype
            or not tensor.is_contiguous()
            # Two allocations may happen to be neighbours.
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return False
        address += tensor.nbytes
    return True


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape that lie end to end, as one with their rows in turn."""
    first = tensors[0]
    return first.as_strided((len(tensors) * first.shape[0], *first.shape[1:]), first.stride())


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Parameters of one shape as one, with their rows in turn; their gradients are parts of one.

    `None` where they do not lie end to end, one is not trained, or a compiler or a function
    transform looks.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or any(type(tensor) is not nn.Parameter or not tensor.requires_grad for tensor in tensors)
        or not lie_end_to_end(tensors)
    ):
        return None
    together: Tensor = _Joined.apply(*tensors)  # type: ignore[no-untyped-call]
    return together


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return _joined(tensors).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Who has written to one of them gets autograd's error.
        return grads[0].chunk(len(ctx.saved_tensors))


@functools.cache
def _kernels() -> ModuleType:
    """The launchers, which take measured tiles where there are some."""
    from csrc_triton import gemm
    from csrc_triton.gemm import measured

    measured.use(tuned.tile)
    return gemm


def _linear_on_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    if activation is None and tuned.product_by_pytorch(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _kernels().linear(x, weight, bias, activation)
    return y


def _linear_glu_on_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _kernels().linear_glu(x, weight, bias)
    return y


_linear_op = operation(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation=None) -> Tensor",
    linear,
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    triton=_linear_on_triton,
    cpu=cpu.linear,
    autocast="lower",
)
_linear_glu_op = operation(
    "linear_glu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    linear_glu,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0] // 2),
    triton=_linear_glu_on_triton,
    cpu=cpu.linear_glu,
    autocast="lower",
)


def _feed_forward_on_triton(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str,
    weight2: Tensor,
    bias2: Tensor | None,
) -> Tensor:
    with torch.no_grad():
        hidden = linear(x, weight1, bias1, activation, fast=True)
        return linear(hidden, weight2, bias2, fast=True)


_feed_forward_op = operation(
    "feed_forward(Tensor x, Tensor weight1, Tensor? bias1, str activation, Tensor weight2, "
    "Tensor? bias2) -> Tensor",
    feed_forward,
    fake=lambda x, weight1, bias1, activation, weight2, *_: x.new_empty(
        x.shape[0], weight2.shape[0]
    ),
    triton=_feed_forward_on_triton,
    cpu=cpu.feed_forward,
    autocast="lower",
)


def _linear_stacked_on_triton(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    kernel = _kernels().linear
    if lie_end_to_end(weights) and (not biases or lie_end_to_end(biases)):
        weight, bias = _joined(weights), _joined(biases) if biases else None
        y: Tensor = _linear_on_triton(x, weight, bias, None)
        return y
    width = weights[0].shape[0]
    y = x.new_empty(x.shape[0], len(weights) * width)
    for weight, bias, columns in itertools.zip_longest(
        weights, biases, torch.split(y, width, dim=1)
    ):
        kernel(x, weight, bias, out=columns)
    return y


_linear_stacked_op = operation(
    "linear_stacked(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
    _linear_stacked,
    fake=lambda x, weights, biases: x.new_empty(x.shape[0], len(weights) * weights[0].shape[0]),
    triton=_linear_stacked_on_triton,
    autocast="lower",
)


def _wanted(needs: list[bool], *tensors: Tensor | None) -> list[Tensor]:
    """Empty gradients of the tensors that need one; of biases, sums over tokens, in float32 at
    least."""
    return [
        tensor.new_empty(
            tensor.shape,
            dtype=torch.promote_types(tensor.dtype, torch.float32) if tensor.dim() == 1 else None,
        )
        for tensor, needed in zip(tensors, needs, strict=True)
        if needed and tensor is not None
    ]


gradient(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str? activation, "
    "bool[] needs) -> Tensor[]",
    cpu.linear_backward,
    fake=lambda grad, x, weight, bias, activation, needs: _wanted(needs, x, weight, bias),
    triton="csrc_triton.gemm:linear_backward",
)
gradient(
    "linear_glu_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool[] needs) "
    "-> Tensor[]",
    cpu.linear_glu_backward,
    fake=lambda grad, x, weight, bias, needs: _wanted(needs, x, weight, bias),
    triton="csrc_triton.gemm:linear_glu_backward",
)
gradient(
    "feed_forward_backward(Tensor grad, Tensor x, Tensor weight1, Tensor? bias1, str activation, "
    "Tensor weight2, Tensor? bias2, bool[] needs) -> Tensor[]",
    cpu.feed_forward_backward,
    fake=lambda grad, x, weight1, bias1, activation, weight2, bias2, needs: _wanted(
        needs, x, weight1, bias1, weight2, bias2
    ),
    triton="csrc_triton.gemm:feed_forward_backward",
)
