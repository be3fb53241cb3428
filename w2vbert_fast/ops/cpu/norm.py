"""LayerNorm and the residual connection before it, forward and backward.

In bf16 PyTorch's own LayerNorm is as fast as memory allows. In fp32 it is not: its running moments
take 2 ns an element on one core. There, five vectorised passes over rows that stay in cache take a
fifth of that, with the variance of the centred values, as a two-pass algorithm has it. For a few
rows the five calls themselves are what takes time, and PyTorch's one call is faster.

The sum of a residual connection is normalised as it is stored, as the plain form does.

The gradients are PyTorch's native backward, a share of rows at a time, on any device, in any
floating dtype. Statistics are computed again from the rows. In dtypes below float32 the share is
float32, so that only the gradients of the rows are rounded.

The functions take and return what the operations of `ops.norm` do; results are contiguous.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.cpu import threads

_BLOCK_ELEMENTS = 1 << 18
"""Elements that a thread normalises at a time: 1 MB in float32, which five passes find in its
cache. The gradients make several copies, no larger than what the allocator keeps."""
_SHARE_ELEMENTS = 3 << 18
"""Elements that are worth a share; see `gemm`."""
_FEW_ELEMENTS = 1 << 16
"""So few elements are normalised in one call: the others take 20 microseconds more."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `ops.layer_norm`."""
    shares = _shares(x, x.dtype)
    if len(shares) == 1 and not takes_passes(x, weight, bias):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps).contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    divided = threads.divides(x)
    threads.run(
        lambda rows: norm_rows(out[rows], x[rows], weight, bias, eps), shares, divided=divided
    )
    return out


def _shares(x: Tensor, dtype: torch.dtype) -> list[slice]:
    """Shares of rows of `[rows, hidden]`, no larger than is well for a cache in `dtype`."""
    number = threads.number(x, x.numel() / _SHARE_ELEMENTS)
    if dtype.itemsize >= 4 or threads.count() == 1:
        number = max(number, x.numel() // _BLOCK_ELEMENTS)
    return threads.slices(x.shape[0], number)


def takes_passes(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `layer_norm_into` is the faster way for these tensors, and takes them."""
    return x.dtype == weight.dtype == bias.dtype == torch.float32 and x.numel() > _FEW_ELEMENTS


def norm_rows(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """`LN(x)` into `out`, which may be `x`; both `[rows, hidden]`."""
    if takes_passes(x, weight, bias):
        layer_norm_into(out, x, weight, bias, eps)
    else:
        out.copy_(F.layer_norm(x, (x.shape[-1],), weight, bias, eps))


def layer_norm_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """`norm_rows` in fp32."""
    torch.sub(x, x.mean(-1, keepdim=True), out=out)
    length = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
    scale = length.square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
    torch.addcmul(bias, out.mul_(scale), weight, out=out)


def residual_layer_norm(
    residual: Tensor, x: Tensor, scale: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `ops.residual_layer_norm`."""
    y, z = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))

    def rows_of(rows: slice) -> None:
        torch.add(residual[rows], x[rows], alpha=scale, out=y[rows])
        norm_rows(z[rows], y[rows], weight, bias, eps)

    threads.run(rows_of, _shares(x, x.dtype), divided=threads.divides(x))
    return y, z


def residual_double_layer_norm(
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `ops.residual_double_layer_norm`."""
    y, z = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))

    def rows_of(rows: slice) -> None:
        torch.add(residual[rows], x[rows], alpha=scale, out=y[rows])
        norm_rows(y[rows], y[rows], weight1, bias1, eps)
        norm_rows(z[rows], y[rows], weight2, bias2, eps)

    threads.run(rows_of, _shares(x, x.dtype), divided=threads.divides(x))
    return y, z


def norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `LN(x)`: of x `[rows, hidden]`, of weight and of bias `[hidden]`; one dtype."""
    shape, bias, x = [x.shape[-1]], weight, x.contiguous()
    # The forward pass has the statistics in a tenth of the time of torch.var_mean.
    _, mean, scale = torch.ops.aten.native_layer_norm(x, shape, None, None, eps)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, shape, mean, scale, weight, bias, [True, True, True]
    )
    return grads


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, and of weight and bias in float32 at least."""
    grad_x, _, *of_norm = residual_layer_norm_backward(None, grad, x, 1.0, weight, eps)
    return grad_x, of_norm[0], of_norm[1]


def residual_layer_norm_backward(
    grad_y: Tensor | None, grad_z: Tensor, y: Tensor, scale: float, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual and x in the dtype of `y`, and of weight and bias in float32 at least;
    the first two are one tensor where `scale` is 1."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    grad_residual = torch.empty_like(y, memory_format=torch.contiguous_format)
    wide = weight.to(dtype)

    def rows_of(rows: slice) -> list[Tensor]:
        grad, *of_norm = norm_gradient(grad_z[rows].to(dtype), y[rows].to(dtype), wide, eps)
        grad_residual[rows] = grad if grad_y is None else grad.add_(grad_y[rows])
        return of_norm

    of_shares = threads.run(rows_of, _shares(y, dtype), divided=threads.divides(y))
    sums = _sums(of_shares, weight, weight)
    return grad_residual, _scaled(grad_residual, scale), sums[0], sums[1]


def residual_double_layer_norm_backward(
    grad_z1: Tensor | None,
    grad_z2: Tensor,
    residual: Tensor,
    x: Tensor,
    scale: float,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """As of `residual_layer_norm_backward`, of weight1, bias1, weight2 and bias2."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    wide1, wide2 = weight1.to(dtype), weight2.to(dtype)

    def rows_of(rows: slice) -> list[Tensor]:
        # Both rounded as the forward pass stored them.
        stored = torch.add(residual[rows], x[rows], alpha=scale)
        z = layer_norm(stored, weight1, bias1, eps).to(dtype)
        grad, *second = norm_gradient(grad_z2[rows].to(dtype), z, wide2, eps)
        if grad_z1 is not None:
            grad.add_(grad_z1[rows])
        grad, *first = norm_gradient(grad, stored.to(dtype), wide1, eps)
        grad_residual[rows] = grad
        return [*first, *second]

    of_shares = threads.run(rows_of, _shares(x, dtype), divided=threads.divides(x))
    sums = _sums(of_shares, weight1, weight1, weight2, weight2)
    return grad_residual, _scaled(grad_residual, scale), *sums


def _sums(of_shares: list[list[Tensor]], *likes: Tensor) -> list[Tensor]:
    """Gradients of parameters like these, in float32 at least: the sums of those of the shares."""
    zeros = [
        torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        for like in likes
    ]
    return [sum(parts, zero) for zero, *parts in zip(zeros, *of_shares, strict=True)]


def _scaled(grad: Tensor, scale: float) -> Tensor:
    return grad if scale == 1.0 else grad * scale
