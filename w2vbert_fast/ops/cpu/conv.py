"""Causal depthwise convolution over packed utterances, with its LayerNorm and activation.

Packed `[num_tokens, channels]` is what a convolution over a picture one row high calls
channels-last, so nothing is transposed: the utterances are copied once, K - 1 zero rows before
each, and one convolution runs over all of them. So few elements that its call takes longer than
its work are multiplied tap by tap instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import get_activation
from .norm import layer_norm, layer_norm_into, takes_passes

_LOW_PRECISION_CHANNELS = 256
"""Fewer channels than this are convolved in float32: for 32 or fewer oneDNN 3.12 does not come to
an end at some lengths, when it makes its bfloat16 kernel."""
_FEW_ELEMENTS = 8192
"""Up to so many elements the products of all taps, summed up, take less time than a convolution."""
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
    """`act(LN(y))` with `y[t, c] = sum_k conv_weight[c, k] * x[t - (K - 1) + k, c]`.

    Args:
        x: `[num_tokens, channels]`, packed.
        conv_weight: `[channels, K]`.
        norm_weight: `[channels]`.
        norm_bias: `[channels]`.
        eps: added to the variance.
        activation: a name of `ops.activations.ACTIVATIONS`.
        cu_seqlens: int32 `[batch + 1]`.
        seqused_k: int32 `[batch]`, rows of an utterance that are read; the others count as zero.
            `None`: all are.

    Returns:
        `[num_tokens, channels]` in the dtype of `x`, contiguous.

    Raises:
        ValueError: no activation has this name.
    """
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
