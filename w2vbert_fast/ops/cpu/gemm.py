"""Linear layers on oneDNN, forward and backward, with the activation in its epilogue.

`F.linear` in fp32 goes to MKL, which on AMD processors reaches less than half of what oneDNN does;
but a call of it takes 10 microseconds less, which decides for small products.
oneDNN takes the weight as it is stored and lays it out anew at every call. A weight that is packed
once (`pack_weight`) saves that: 5 to 20 % in bf16, 2 to 5 % in fp32, far more for few tokens. It
has to be kept in step with the parameter, so nothing packs it unasked.

The gradients are `dy @ weight` and `dy.T @ x`. oneDNN takes either operand transposed, as the
linear layer of a transposed input or weight; in fp32 that is twice as fast on AMD processors as the
product that autograd would call. On other devices the products are PyTorch's.

The functions take and return what the operations of `ops.gemm` do; weights may be packed in the
forward pass, in the dtype of `x` and of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.activations import get_activation
from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.cpu.capability import onednn_linear

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

_SHARE = 1 << 29
"""Multiplications that are worth a share: some milliseconds in float32. Half of them are not worth
that a thread is woken: products of the demo's size, and of one or two seconds."""

_PART = 24
"""A product is cut into so small parts of a share where there are threads for them: 0.2 ms each."""

_LEAST_ROWS = {torch.float32: 192, torch.bfloat16: 512}
"""Rows of a share, where there are enough, for which a packed weight is read once."""

_FEW_PRODUCTS = 1 << 20
"""Multiplications of an fp32 product that is not worth oneDNN's longer call."""

_SMALL_WEIGHT = 3 << 16
"""Elements of a weight that MKL multiplies as fast as oneDNN."""

_SMALL_PRODUCTS = 1 << 25
"""`_FEW_PRODUCTS` for such weights."""

_SMALL_ACTIVATION = 1 << 17
"""Elements up to which a pass of its own beside MKL's product takes less time than oneDNN's longer
call, of such weights."""

IN_PLACE = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "selu": F.selu}
"""Name of an activation -> a function that takes `inplace`."""

_SELU = (1.6732632423543772, 1.0507009873554805)  # alpha, scale


class PackedWeight(NamedTuple):
    """A weight in oneDNN's own layout.

    Attributes:
        packed: the weight, opaque; no view of what it was made of.
        shape: `[out_features, in_features]`.
        dtype: of the weight.
    """

    packed: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype


def pack_weight(weight: Tensor) -> PackedWeight:
    """A linear layer's weight, laid out once for all calls of the functions below.

    Args:
        weight: `[out_features, in_features]`, fp32 or bf16, on the CPU.

    Raises:
        ValueError: `weight` has another shape or device, or oneDNN's linear layer does not run here
            in its dtype.
    """
    if weight.dim() != 2 or weight.numel() == 0 or weight.device.type != "cpu":
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} on {weight.device}; it must be a matrix "
            "[out_features, in_features] with elements, on the CPU"
        )
    if not onednn_linear(weight.dtype):
        raise ValueError(f"weight is {weight.dtype}, which oneDNN does not multiply on this CPU")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return PackedWeight(packed, (weight.shape[0], weight.shape[1]), weight.dtype)


def matmul_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` on oneDNN for `x` `[num_rows, K]` and `weight` `[M, K]`.

    The rows or the columns of `weight` are contiguous and fill its memory: at other strides oneDNN
    falls into a reference loop a thousand times slower.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, activation: str | None = None
) -> Tensor:
    """As `ops.linear`. silu (swish), gelu, gelu_new and relu are part of the product, the other
    activations are a pass over its result.

    Raises:
        ValueError: no activation has this name, or a packed weight does not fit `x`.
    """
    if isinstance(weight, PackedWeight):
        _check_packed(x, weight)
        if x.shape[0] == 0:
            return x.new_empty(0, weight.shape[0])
    elif not _takes_onednn(x, weight, bias, activation):
        return _activated(F.linear(x, weight, bias), activation)
    shares = _shares(x, weight)
    if len(shares) == 1:
        return _linear(x, weight, bias, activation)
    y = x.new_empty(x.shape[0], weight.shape[0])

    def rows_of(rows: slice) -> None:
        y[rows] = _linear(x[rows], weight, bias, activation)

    def columns_of(columns: slice) -> None:
        assert isinstance(weight, Tensor)
        y[:, columns] = _linear(x, weight[columns], _part(bias, columns), activation)

    threads.run(columns_of if isinstance(weight, Tensor) else rows_of, shares)
    return y


def _linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """`linear` of tensors that oneDNN takes, in one call."""
    name, variant = _EPILOGUES.get(activation, ("none", ""))
    # See matmul_transposed about strides.
    operand = weight.packed if isinstance(weight, PackedWeight) else weight.contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, operand, bias, name, [], variant)
    return y if activation in _EPILOGUES else _activated(y, activation)


def _activated(y: Tensor, activation: str | None) -> Tensor:
    """An activation of values that are used up."""
    if activation in IN_PLACE:
        return IN_PLACE[activation](y, inplace=True)
    return y if activation is None else get_activation(activation)(y)


def _shares(x: Tensor, weight: Tensor | PackedWeight, parts: int = 1) -> list[slice]:
    """What is divided among threads: rows, or columns of the result where the weight has still to
    be laid out, which every share does for its own columns only.

    Args:
        x: `[num_tokens, in_features]`.
        weight: of the product.
        parts: into which the columns fall, of each of which a share takes the same.
    """
    if isinstance(weight, PackedWeight):
        return _row_shares(x, weight)
    worth = x.shape[0] * weight.numel() / _SHARE
    number = threads.number(_narrow(x, weight), worth, part=_PART)
    return threads.slices(weight.shape[0] // parts, number)


def _row_shares(x: Tensor, weight: PackedWeight) -> list[slice]:
    worth = x.shape[0] * weight.shape[0] * weight.shape[1] / _SHARE
    most = x.shape[0] // _LEAST_ROWS[weight.dtype]
    number = threads.number(_narrow(x, weight), worth, most, _PART)
    return threads.slices(x.shape[0], number)


def _narrow(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Rows as wide as the narrower end of a product: an inner width decides about nothing, or parts
    of a feed-forward block would be divided and parts not."""
    return x[:, : weight.shape[0]]


def _part(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[columns]


def linear_glu(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    """As `ops.linear_glu`.

    The gate is a pass of its own: two products with a sigmoid and a product in their epilogues take
    longer.
    """
    num_rows, width = x.shape[0], weight.shape[0] // 2
    if isinstance(weight, PackedWeight):
        _check_packed(x, weight)
    elif not _takes_onednn(x, weight, bias, None):
        return F.glu(linear(x, weight, bias, None), dim=-1)
    shares = _shares(x, weight, 2)
    if len(shares) == 1:
        return F.glu(linear(x, weight, bias, None), dim=-1)
    out = x.new_empty(num_rows, width)

    def rows_of(rows: slice) -> None:
        torch.ops.aten.glu.out(_linear(x[rows], weight, bias, None), -1, out=out[rows])

    def columns_of(columns: slice) -> None:
        assert isinstance(weight, Tensor)
        gates = slice(columns.start + width, columns.stop + width)
        both = torch.cat([weight[columns], weight[gates]])
        biases = None if bias is None else torch.cat([bias[columns], bias[gates]])
        out[:, columns] = F.glu(_linear(x, both, biases, None), dim=-1)

    threads.run(columns_of if isinstance(weight, Tensor) else rows_of, shares)
    return out


def feed_forward(
    x: Tensor,
    weight1: Tensor | PackedWeight,
    bias1: Tensor | None,
    activation: str,
    weight2: Tensor | PackedWeight,
    bias2: Tensor | None,
) -> Tensor:
    """As `ops.feed_forward`, a share of tokens at a time.

    The intermediate values of a long batch take hundreds of megabytes, which the allocator fetches
    from the system anew at every call; those of a share stay in cache and in the heap. Weights
    of a long batch are packed first, and those of a short one laid out by each thread.
    """
    blocks = row_blocks(x.shape[0], weight1.shape[0] * x.element_size())
    if len(blocks) > 1:
        weight1, weight2 = _packed(x, (weight1, bias1), (weight2, bias2))
    if isinstance(weight1, PackedWeight) and isinstance(weight2, PackedWeight):
        blocks = max(blocks, _row_shares(x, weight1), key=len)
    elif len(blocks) == 1 and threads.divides(x):
        # Every thread lays out both weights, in less time than columns take to be put together.
        most = x.shape[0] // _LEAST_ROWS[x.dtype]
        if most >= threads.count():
            blocks = threads.slices(x.shape[0], threads.count())
    if len(blocks) == 1:
        return linear(linear(x, weight1, bias1, activation), weight2, bias2, None)
    out = x.new_empty(x.shape[0], weight2.shape[0])

    def rows_of(rows: slice) -> None:
        out[rows] = linear(linear(x[rows], weight1, bias1, activation), weight2, bias2, None)

    threads.run(rows_of, blocks, divided=threads.divides(x))
    return out


def _packed(
    x: Tensor, *layers: tuple[Tensor | PackedWeight, Tensor | None]
) -> list[Tensor | PackedWeight]:
    """Weights of layers, packed where oneDNN multiplies `x` by them all."""
    weights = [weight for weight, _ in layers]
    if all(isinstance(w, Tensor) and _takes_onednn(x, w, bias, None) for w, bias in layers):
        tensors = [weight for weight in weights if isinstance(weight, Tensor)]
        return [*threads.run(pack_weight, tensors, divided=threads.divides(x))]
    return weights


def row_blocks(num_rows: int, row_bytes: int) -> list[slice]:
    """Blocks of rows, about equal, whose intermediate values take at most `_BLOCK_BYTES`.

    At least one block, which may be empty.
    """
    return threads.slices(num_rows, max(1, -(-num_rows * row_bytes // _BLOCK_BYTES)))


def _check_packed(x: Tensor, weight: PackedWeight) -> None:
    if x.dtype != weight.dtype or x.shape[-1] != weight.shape[1] or x.device.type != "cpu":
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}; the packed weight needs "
            f"{weight.dtype} [tokens, {weight.shape[1]}] on the CPU"
        )


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    if weight.dtype != x.dtype or not (bias is None or bias.dtype == x.dtype):
        return False
    if not onednn_linear(x.dtype):
        return False
    rows, size = x.shape[0], weight.numel()
    if x.dtype != torch.float32:
        return rows * size > 0
    # An activation beside MKL's product is a pass of its own.
    one_pass = activation is None or rows * weight.shape[0] <= _SMALL_ACTIVATION
    is_small = size <= _SMALL_WEIGHT and one_pass
    return rows * size > (_SMALL_PRODUCTS if is_small else _FEW_PRODUCTS)


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """`grad` times the derivative of an activation at `x`; both of one shape and dtype.

    Raises:
        ValueError: no derivative is known for this name.
    """
    aten = torch.ops.aten
    result: Tensor
    if activation in ("silu", "swish"):
        result = aten.silu_backward(grad, x)
    elif activation in ("gelu", "gelu_new"):
        variant = "none" if activation == "gelu" else "tanh"
        result = aten.gelu_backward(grad, x, approximate=variant)
    elif activation == "relu":
        result = aten.threshold_backward(grad, x, 0)
    elif activation == "selu":
        result = aten.elu_backward(grad, *_SELU, 1.0, False, x)
    elif activation == "linear":
        result = grad
    else:
        names = ("gelu", "gelu_new", "linear", "relu", "selu", "silu", "swish")
        raise ValueError(
            f"activation is {activation!r}; the fused operation has gradients for {names}"
        )
    return result


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    needs: Sequence[bool],
) -> _Gradients:
    """Gradients of x and of weight in their dtype, and of bias in float32 at least; `None` where
    `needs` does not ask for one, or there is no bias.

    Raises:
        ValueError: no derivative is known for the activation.
    """
    if activation is not None:
        grad = activation_gradient(grad, _on_any_device(x, weight, bias), activation)
    return _gradients(grad, x, weight, bias, needs)


def linear_glu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> _Gradients:
    """As `linear_backward`."""
    grad = torch.ops.aten.glu_backward(grad, _on_any_device(x, weight, bias), 1)
    return _gradients(grad, x, weight, bias, needs)


def feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    activation: str,
    weight2: Tensor,
    bias2: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As `linear_backward`, of x, weight1, bias1, weight2 and bias2."""
    inner = get_activation(activation)(F.linear(x, weight1, bias1))
    grad_inner, *of_second = _gradients(grad, inner, weight2, bias2, (True, *needs[3:]))
    assert grad_inner is not None
    # The first layer once more: on this path nothing is gained by the fusion.
    return *linear_backward(grad_inner, x, weight1, bias1, activation, needs[:3]), *of_second


def _on_any_device(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (linear if x.device.type == "cpu" else F.linear)(x, weight, bias)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> _Gradients:
    grad_x = product(grad, weight) if needs[0] else None
    grad_weight = product(grad.t(), x) if needs[1] else None
    grad_bias = None
    if needs[2] and bias is not None:
        grad_bias = grad.sum(0, dtype=torch.promote_types(bias.dtype, torch.float32))
    return grad_x, grad_weight, grad_bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices of one dtype, at any strides; contiguous."""
    on_cpu = a.device.type == "cpu" and b.device.type == "cpu"
    # In bf16 PyTorch's product is oneDNN's too, and takes a transposed operand as it lies.
    fp32 = a.dtype == torch.float32
    if fp32 and on_cpu and a.numel() > 0 and b.numel() > 0 and onednn_linear(a.dtype):
        # See matmul_transposed about strides.
        fills = b.is_contiguous() or b.t().is_contiguous()
        return matmul_transposed(a, (b if fills else b.contiguous()).t())
    return a @ b
