"""Gradients of the causal depthwise convolution with its LayerNorm and activation.

The gradient of the input is the same convolution run backwards in time. The gradient of the weight
is K sums of products of shifted rows, over blocks of rows that stay in cache: 20 times as fast as
oneDNN's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import convolve, utterances_of
from .gemm import activation_gradient
from .norm import norm_gradient

_BLOCK_ELEMENTS = 1 << 17
"""Products of one block, in float32 half a megabyte."""


def conv_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `conv.conv_norm_act`.

    Args:
        grad: of the output, `[num_tokens, channels]` in the dtype of `x`.
        x: `[num_tokens, channels]`, packed.
        conv_weight: `[channels, K]`.
        norm_weight: `[channels]`.
        norm_bias: `[channels]`.
        eps: added to the variance.
        activation: of the forward pass, one of those that are fused, or "linear".
        cu_seqlens: int32 `[batch + 1]`.
        seqused_k: int32 `[batch]` or `None`, of the forward pass.

    Returns:
        The gradients of `x` in its dtype, and of conv_weight `[channels, K]`, norm_weight and
        norm_bias `[channels]` in float32 at least.

    Raises:
        ValueError: no derivative is known for the activation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, taps = conv_weight.shape
    grad_conv = torch.zeros(taps, channels, dtype=dtype, device=x.device)
    grad_norm = torch.zeros(2, channels, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return torch.empty_like(x), grad_conv.t().contiguous(), grad_norm[0], grad_norm[1].clone()
    utterances = utterances_of(cu_seqlens, seqused_k)
    pad = taps - 1
    y = convolve(x, conv_weight, utterances)
    weight, bias = norm_weight.to(dtype), norm_bias.to(dtype)
    grad_y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index, (start, _, end) in enumerate(utterances):
        rows = y[start + index * pad : end + index * pad].to(dtype)
        normed = F.layer_norm(rows, (channels,), weight, bias, eps)
        inner = activation_gradient(grad[start:end].to(dtype), normed, activation)
        block, grad_weight, grad_bias = norm_gradient(inner, rows, weight, eps)
        grad_norm[0] += grad_weight
        grad_norm[1] += grad_bias
        grad_y[start:end] = block
    _add_weight_gradient(grad_conv, grad_y, x, utterances)
    backwards = [
        (len(x) - end, len(x) - start, len(x) - start) for start, _, end in reversed(utterances)
    ]
    spaced = convolve(grad_y.flip(0), conv_weight, backwards)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index, (start, _, end) in enumerate(backwards):
        rows = spaced[start + index * pad : end + index * pad]
        grad_x[len(x) - end : len(x) - start] = rows.flip(0)
    for _, used_end, end in utterances:
        grad_x[used_end:end].zero_()
    return grad_x, grad_conv.t().contiguous(), grad_norm[0], grad_norm[1].clone()


def _add_weight_gradient(
    total: Tensor, grad: Tensor, x: Tensor, utterances: list[tuple[int, int, int]]
) -> None:
    """`total[k, c] += sum_t grad[t, c] * x[t - (K - 1) + k, c]`, within each utterance."""
    taps, channels = total.shape
    pad = taps - 1
    step = max(1, _BLOCK_ELEMENTS // channels)
    products = total.new_empty(step, channels)
    for start, used_end, end in utterances:
        for first in range(start, end, step):
            last = min(first + step, end)
            rows = grad[first:last].to(total.dtype)
            before = min(pad, first - start)
            window = x[first - before : min(last, used_end)].to(total.dtype)
            for tap in range(taps):
                # Rows that this tap finds before the utterance are zero, and so are those that the
                # convolution does not read.
                skip = max(pad - tap - before, 0)
                offset = before - pad + tap + skip
                count = min(last - first - skip, len(window) - offset)
                if count <= 0:
                    continue
                out = products[:count]
                torch.mul(rows[skip : skip + count], window[offset : offset + count], out=out)
                total[tap] += out.sum(0)
