"""Gradients of linear layers on oneDNN: `dy @ weight` and `dy.T @ x`.

oneDNN takes either operand transposed, as the linear layer of a transposed input or weight; in fp32
that is twice as fast on AMD processors as the product that autograd would call. On other devices
the products are PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .capability import onednn_linear
from .linear import linear as linear_on_cpu
from .linear import matmul_transposed

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

_SELU = (1.6732632423543772, 1.0507009873554805)  # alpha, scale


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
    needs: tuple[bool, bool, bool],
) -> _Gradients:
    """Gradients of `linear.linear`.

    Args:
        grad: of the output, `[num_tokens, out_features]` in the dtype of `x`.
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: of the forward pass; its argument is computed again.
        needs: which of the gradients of x, weight and bias are wanted.

    Returns:
        The gradients of x and of weight in their dtype, and of bias in float32 at least; `None`
        where one is not wanted, or there is no bias.

    Raises:
        ValueError: no derivative is known for the activation.
    """
    if activation is not None:
        grad = activation_gradient(grad, _linear(x, weight, bias), activation)
    return _gradients(grad, x, weight, bias, needs)


def linear_glu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> _Gradients:
    """Gradients of `linear.linear_glu`, as `linear_backward` gives them."""
    grad = torch.ops.aten.glu_backward(grad, _linear(x, weight, bias), 1)
    return _gradients(grad, x, weight, bias, needs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type == "cpu":
        return linear_on_cpu(x, weight, bias, None)
    return F.linear(x, weight, bias)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> _Gradients:
    grad_x = product(grad, weight) if needs[0] else None
    grad_weight = product(grad.t(), x) if needs[1] else None
    grad_bias = None
    if needs[2] and bias is not None:
        dtype = torch.promote_types(bias.dtype, torch.float32)
        grad_bias = grad.sum(0, dtype=dtype)
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
