"""Causal depthwise convolution with its LayerNorm and activation, forward and backward.

Packed `[num_tokens, channels]` is what a convolution over a picture one row high calls
channels-last, so nothing is transposed: the utterances are copied once, K - 1 zero rows before
each, and one convolution runs over all of them. So few elements that its call takes longer than
its work are multiplied tap by tap instead.

The gradient of the input is the same convolution run backwards in time. The gradient of the weight
is K sums of products of shifted rows, over blocks of rows that stay in cache: 20 times as fast as
oneDNN's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.activations import get_activation
from w2vbert_fast.ops.cpu.gemm import activation_gradient
from w2vbert_fast.ops.cpu.norm import layer_norm, layer_norm_into, norm_gradient, takes_passes

_LOW_PRECISION_CHANNELS = 256
"""Fewer channels than this are convolved in float32: for 32 or fewer oneDNN 3.12 does not come to
an end at some lengths, when it makes its bfloat16 kernel."""
_FEW_ELEMENTS = 8192
"""Up to so many elements the products of all taps, summed up, take less time than a convolution."""
_BLOCK_ELEMENTS_BACKWARD = 1 << 17
"""Products of one block, in float32 half a megabyte."""
_IN_PLACE = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "selu": F.selu}


def conv_norm_act(
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """As `ops.conv_norm_act`, contiguous."""
    function = get_activation(activation)
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    utterances = utterances_of(cu_seqlens, seqused_k)
    y = convolve(x, conv_weight, utterances)
    pad = conv_weight.shape[1] - 1
    if len(utterances) == 1:
        return _norm_act(y, norm_weight, norm_bias, eps, activation)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index, (start, _, end) in enumerate(utterances):
        rows = y[start + index * pad : end + index * pad]
        if takes_passes(rows, norm_weight, norm_bias):
            layer_norm_into(out[start:end], rows, norm_weight, norm_bias, eps)
        else:
            out[start:end] = F.layer_norm(rows, (x.shape[1],), norm_weight, norm_bias, eps)
    in_place = _IN_PLACE.get(activation)
    return function(out) if in_place is None else in_place(out, inplace=True)


def utterances_of(cu_seqlens: Tensor, seqused_k: Tensor | None) -> list[tuple[int, int, int]]:
    """First row, end of the rows that are read, and end of each utterance that has rows."""
    starts = cu_seqlens.tolist()
    ends = starts[1:]
    if seqused_k is not None:
        used = seqused_k.tolist()
        ends = [start + count for start, count in zip(starts[:-1], used, strict=True)]
    bounds = zip(starts[:-1], ends, starts[1:], strict=True)
    return [(start, used_end, end) for start, used_end, end in bounds if end > start]


def convolve(x: Tensor, weight: Tensor, utterances: list[tuple[int, int, int]]) -> Tensor:
    """The convolution of `utterances_of`, each K - 1 rows after the end of the one before it.

    Returns `[num_tokens + (len(utterances) - 1) * (K - 1), channels]`; the rows in between are of
    no use.
    """
    channels, taps = weight.shape
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    pad = taps - 1
    num_rows = x.shape[0] + len(utterances) * pad
    if channels < _LOW_PRECISION_CHANNELS:
        x, weight = x.to(wide), weight.to(wide)
    spaced = x.new_empty(num_rows, channels)
    for index, (start, used_end, end) in enumerate(utterances):
        shift = (index + 1) * pad
        spaced[start + shift - pad : start + shift].zero_()
        spaced[start + shift : used_end + shift] = x[start:used_end]
        if used_end < end:
            spaced[used_end + shift : end + shift].zero_()
    if num_rows * channels <= _FEW_ELEMENTS + pad * channels:
        windows = spaced.as_strided((num_rows - pad, taps, channels), (channels, channels, 1))
        return (windows * weight.t()).sum(1).to(dtype)
    strides = (num_rows * channels, 1, num_rows * channels, channels)
    picture = spaced.as_strided((1, channels, 1, num_rows), strides)
    y = F.conv2d(picture, weight.reshape(channels, 1, 1, taps), groups=channels)
    return y[0, :, 0].t().to(dtype)  # [rows, channels]


def _norm_act(y: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str) -> Tensor:
    z = layer_norm(y, weight, bias, eps)
    in_place = _IN_PLACE.get(activation)
    return get_activation(activation)(z) if in_place is None else in_place(z, inplace=True)


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
    """Gradients of x in its dtype and, in float32 at least, of the three parameters.

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
    step = max(1, _BLOCK_ELEMENTS_BACKWARD // channels)
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
