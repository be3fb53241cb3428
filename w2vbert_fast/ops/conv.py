"""Causal depthwise convolution over packed utterances, with its LayerNorm and activation.

The gradient keeps `x`; the convolution, its norm and the activation are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.layout import positions_in_sequence, sequence_ids
from w2vbert_fast.ops.activations import get_activation
from w2vbert_fast.ops.cpu import conv as cpu
from w2vbert_fast.ops.gemm import is_fused
from w2vbert_fast.ops.norm import layer_norm
from w2vbert_fast.ops.operation import gradient, operation

MAX_TRITON_CHANNELS = 2048
TRITON_KERNEL_SIZES = range(3, 64)
"""What the Triton kernel covers; other sizes run in plain PyTorch."""


def causal_depthwise_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor, seqused_k: Tensor | None = None
) -> Tensor:
    """`y[t, c] = sum_k weight[c, k] * x[t - (K - 1) + k, c]`, zero before an utterance's start.

    Args:
        x: `[num_tokens, channels]`, packed.
        weight: `[channels, K]`.
        cu_seqlens: int32 `[batch + 1]`.
        seqused_k: int32 `[batch]`, rows of an utterance that are read; the others count as zero.
            `None`: all are.

    Returns:
        `[num_tokens, channels]`.
    """
    num_tokens, channels = x.shape
    pad = weight.shape[1] - 1
    # K - 1 zero rows before every utterance turn the ragged batch into one valid convolution.
    ids = sequence_ids(cu_seqlens, num_tokens)
    if seqused_k is not None:
        is_read = positions_in_sequence(cu_seqlens, num_tokens) < seqused_k[ids]
        x = x.masked_fill(~is_read[:, None], 0.0)
    rows = torch.arange(num_tokens, device=x.device) + ids * pad
    spaced = x.new_zeros(num_tokens + (cu_seqlens.numel() - 1) * pad, channels)
    spaced = spaced.index_copy(0, rows + pad, x)
    if num_tokens == 0:
        return x * weight.sum(1)
    y = F.conv1d(spaced.t().unsqueeze(0), weight.unsqueeze(1), groups=channels)
    return y.squeeze(0).t().index_select(0, rows)


def conv_norm_act(
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str | Callable[[Tensor], Tensor],
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
    *,
    fast: bool = False,
) -> Tensor:
    """`act(LN(causal_depthwise_conv(x)))`, the middle of the Conformer's convolution module.

    Args:
        x: `[num_tokens, channels]`, packed, after the gated linear unit.
        conv_weight: `[channels, K]`, at any strides. The Triton kernel reads it tap by tap, and
            copies it at each call unless it is laid out so (`tap_major`).
        norm_weight: `[channels]`.
        norm_bias: `[channels]`.
        eps: added to the variance.
        activation: a name of `ops.activations.ACTIVATIONS` or a function.
        cu_seqlens: int32 `[batch + 1]`.
        seqused_k: int32 `[batch]`, rows of an utterance that are read; the others count as zero.
            `None`: all are.
        fast: use the device's fast implementation, `torch.ops.w2vbert.conv_norm_act`.

    Returns:
        `[num_tokens, channels]`.
    """
    if fast:
        inside = is_fused(activation)
        parameters = (conv_weight, norm_weight, norm_bias, eps)
        name = activation if inside else "linear"
        y = _conv_norm_act_op(x, *parameters, name, cu_seqlens, seqused_k)
        return y if inside else get_activation(activation)(y)
    y = causal_depthwise_conv(x, conv_weight, cu_seqlens, seqused_k)
    return get_activation(activation)(layer_norm(y, norm_weight, norm_bias, eps))


def tap_major(weights: list[Tensor]) -> list[Tensor]:
    """Copies of depthwise weights in the layout that the Triton kernel reads, tap by tap.

    One copy for all layers of an encoder, made anew for each batch: 63 KB a layer, and a copy that
    outlived the batch could be out of date.

    Args:
        weights: `[channels, K]` each, all of one shape.

    Returns:
        Views `[channels, K]` of one tensor `[len(weights), K, channels]`.
    """
    stacked = torch.stack(weights).transpose(1, 2)
    return list(stacked.clone(memory_format=torch.contiguous_format).transpose(1, 2).unbind(0))


def _contiguous(x: Tensor, *others: Any) -> Tensor:
    return conv_norm_act(x, *others).contiguous()


def _fits(x: Tensor, conv_weight: Tensor, *_: Any) -> bool:
    channels, kernel_size = conv_weight.shape
    return channels <= MAX_TRITON_CHANNELS and kernel_size in TRITON_KERNEL_SIZES


_conv_norm_act_op = operation(
    "conv_norm_act(Tensor x, Tensor conv_weight, Tensor norm_weight, Tensor norm_bias, float eps, "
    "str activation, Tensor cu_seqlens, Tensor? seqused_k=None) -> Tensor",
    _contiguous,
    fake=lambda x, *_: x.new_empty(x.shape),
    triton="csrc_triton.conv:conv_norm_act",
    takes=_fits,
    cpu=cpu.conv_norm_act,
    autocast="lower",
)


def _backward_fake(_: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), *(p.new_empty(p.shape, dtype=dtype) for p in others[:3])


gradient(
    "conv_norm_act_backward(Tensor grad, Tensor x, Tensor conv_weight, Tensor norm_weight, "
    "Tensor norm_bias, float eps, str activation, Tensor cu_seqlens, Tensor? seqused_k=None) "
    "-> (Tensor grad_x, Tensor grad_conv_weight, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    cpu.conv_norm_act_backward,
    fake=_backward_fake,
    triton="csrc_triton.conv:conv_norm_act_backward",
)
