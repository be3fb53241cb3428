"""Linear layers with 8-bit weights and activations, for inference.

    W[m, :] = scale[m] * Wq[m, :]              symmetric, a scale per output channel, once
    x[n, :] = scale[n] * (xq[n, :] - 128)      symmetric, a scale per token, at every call
    y[n, m] = scale[n] * scale[m] * sum_k (xq[n, k] - 128) * Wq[m, k] + bias[m]

The sum is exact in int32. oneDNN applies the channel's scale, a pass over the result the token's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.activations import get_activation
from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.cpu.gemm import row_blocks

_SHARE = 1 << 29
"""Multiplications that are worth a share of several threads."""
_ZERO_POINT = 128
_LEAST = {"silu": -0.2785, "swish": -0.2785, "gelu": -0.17, "gelu_new": -0.1701, "relu": 0.0}
"""Name of an activation -> a number below which it never falls."""


class QuantizedWeight(NamedTuple):
    """An 8-bit weight in oneDNN's own layout.

    Attributes:
        packed: the weight, opaque; no view of the parameter it was made of.
        scale: fp32 `[out_features]`.
        zero_point: int32 `[out_features]`, zeros: what oneDNN asks for.
        out_features: rows of the weight.
        in_features: columns of the weight.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    out_features: int
    in_features: int


class QuantizedTokens(NamedTuple):
    """8-bit activations.

    Attributes:
        values: uint8 `[num_tokens, features]`, 128 for zero.
        scale: fp32 `[num_tokens, 1]`.
    """

    values: Tensor
    scale: Tensor


@functools.cache
def reasons() -> tuple[str, ...]:
    """Why 8-bit linear layers cannot run here, one sentence each; empty when they can."""
    operations = torch.ops.onednn
    if not torch._C._has_mkldnn:
        return ("this build of PyTorch has no oneDNN",)
    if not (hasattr(operations, "qlinear_pointwise") and hasattr(operations, "qlinear_prepack")):
        return ("this build of PyTorch has no 8-bit linear layer for this architecture",)
    try:
        like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        weight = _pack(torch.eye(4, **like), torch.ones(4, **like))
        values = torch.full((2, 4), _ZERO_POINT + 3, dtype=torch.uint8, device="cpu")
        tokens = QuantizedTokens(values, torch.ones(2, 1, **like))
        works = bool((_product(tokens, weight) == 3.0).all())
    except (RuntimeError, NotImplementedError):
        works = False
    return () if works else ("oneDNN's 8-bit linear layer does not run on this CPU",)


def is_available() -> bool:
    """Whether 8-bit linear layers run here."""
    return not reasons()


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """The 8-bit form of a linear layer's weight.

    Args:
        weight: `[out_features, in_features]`, any floating dtype, on the CPU, finite.

    Raises:
        ValueError: `weight` has another shape, dtype or device, or is not finite.
        RuntimeError: 8-bit linear layers do not run on this machine.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.device.type != "cpu":
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)} on {weight.device}; it must be a "
            "floating-point matrix [out_features, in_features] on the CPU"
        )
    if missing := reasons():
        raise RuntimeError(f"8-bit linear layers do not run here: {missing[0]}")
    values = weight.detach().float()
    largest = values.abs().amax(1) if values.numel() else values.new_zeros(values.shape[0])
    if not bool(largest.isfinite().all()):
        raise ValueError("weight has NaN or infinite elements; it must be finite")
    limit = _weight_limit()
    scale = (largest / limit).clamp_(min=torch.finfo(torch.float32).tiny)
    return _pack((values / scale[:, None]).round_().clamp_(-limit, limit), scale)


def _pack(values: Tensor, scale: Tensor) -> QuantizedWeight:
    """Whole numbers `[out_features, in_features]` and their scale, packed."""
    out_features, in_features = values.shape
    packed = torch.ops.onednn.qlinear_prepack(values.to(torch.int8), None)
    zero_point = torch.zeros(out_features, dtype=torch.int32, device=values.device)
    return QuantizedWeight(packed, scale, zero_point, out_features, in_features)


@functools.cache
def _weight_limit() -> int:
    """Without dot-product instructions pairs of products are summed in int16, which must hold
    2 * 255 * limit."""
    return 127 if torch.cpu._is_vnni_supported() else 63


def quantize_tokens(x: Tensor) -> QuantizedTokens:
    """The 8-bit form of activations, each token with a scale of its own.

    Args:
        x: `[num_tokens, features]`, any floating dtype.
    """
    return _quantize(x.float() if x.dtype != torch.float32 else x.clone())


def _quantize(values: Tensor, least: float = -math.inf) -> QuantizedTokens:
    """As `quantize_tokens`, of fp32 `values`, none below `least`, which are used up."""
    if values.numel() == 0:
        scale = values.new_ones(values.shape[0], 1)
        return QuantizedTokens(values.to(torch.uint8), scale)
    largest = values.amax(1, keepdim=True)
    if not bool((largest >= -least).all()):
        largest = torch.maximum(largest, values.amin(1, keepdim=True).neg_())
    scale = largest.div_(127.0).clamp_(min=torch.finfo(torch.float32).tiny)
    # Adding a half before the cast, which cuts off, rounds; all values are positive by then.
    shift = values.new_full((values.shape[1],), _ZERO_POINT + 0.5)
    torch.addcmul(shift, values, scale.reciprocal(), out=values)
    return QuantizedTokens(values.to(torch.uint8), scale)


def linear_int8(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """`act(x @ W.T + bias)` with 8-bit `x` and `W`.

    Args:
        x: `[num_tokens, in_features]`.
        weight: what `quantize_weight` made of `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS` or `None`.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.

    Raises:
        ValueError: `x` has another number of features than `weight`; no activation has this name.
    """
    return linears_int8(x, [(weight, bias)], activation)[0]


def linears_int8(
    x: Tensor,
    layers: Sequence[tuple[QuantizedWeight, Tensor | None]],
    activation: str | None = None,
) -> list[Tensor]:
    """Several layers of one input, which is quantised once.

    Args:
        x: as of `linear_int8`.
        layers: weight and bias of each.
        activation: as of `linear_int8`.

    Returns:
        What `linear_int8` returns for each.

    Raises:
        ValueError: as `linear_int8`.
    """
    outputs = [x.new_empty(x.shape[0], weight.out_features) for weight, _ in layers]

    def rows_of(rows: slice) -> None:
        tokens = quantize_tokens(x[rows])
        for out, (weight, bias) in zip(outputs, layers, strict=True):
            out[rows] = _linear(tokens, weight, bias, activation)

    shares = _shares(x, *[weight for weight, _ in layers])
    threads.run(rows_of, shares, divided=threads.divides(x))
    return outputs


def _shares(x: Tensor, *weights: QuantizedWeight) -> list[slice]:
    products = x.shape[0] * sum(weight.out_features * weight.in_features for weight in weights)
    return threads.slices(x.shape[0], threads.number(x, products / _SHARE))


def feed_forward_int8(
    x: Tensor,
    weight1: QuantizedWeight,
    bias1: Tensor | None,
    activation: str | None,
    weight2: QuantizedWeight,
    bias2: Tensor | None,
) -> Tensor:
    """Two layers, a share of tokens at a time; the values between them are fp32 before rounding.

    Args:
        x: `[num_tokens, hidden]`.
        weight1: of `[intermediate, hidden]`.
        bias1: `[intermediate]` or `None`.
        activation: a name of `ops.activations.ACTIVATIONS` or `None`.
        weight2: of `[hidden_out, intermediate]`.
        bias2: `[hidden_out]` or `None`.

    Returns:
        `[num_tokens, hidden_out]` in the dtype of `x`.

    Raises:
        ValueError: as `linear_int8`.
    """
    out = x.new_empty(x.shape[0], weight2.out_features)
    least = _LEAST.get(activation or "", -math.inf)

    def rows_of(rows: slice) -> None:
        hidden = _linear(quantize_tokens(x[rows]), weight1, bias1, activation)
        out[rows] = _linear(_quantize(hidden, least), weight2, bias2, None)

    shares = _shares(x, weight1, weight2)
    shares = max(shares, row_blocks(x.shape[0], weight1.out_features * 4), key=len)
    threads.run(rows_of, shares, divided=threads.divides(x))
    return out


def _linear(
    tokens: QuantizedTokens, weight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """As `linear_int8`; fp32."""
    features = tokens.values.shape[-1]
    if features != weight.in_features:
        raise ValueError(f"x has {features} features; weight needs {weight.in_features}")
    if tokens.values.numel() == 0 or weight.out_features == 0:
        y = tokens.scale.new_zeros(tokens.values.shape[0], weight.out_features)
    else:
        y = _product(tokens, weight)
    if bias is not None:
        torch.addcmul(bias.float(), y, tokens.scale, out=y)
    else:
        y.mul_(tokens.scale)
    if activation in ("silu", "swish"):
        return F.silu(y, inplace=True)
    return y if activation is None else get_activation(activation)(y)


def _product(tokens: QuantizedTokens, weight: QuantizedWeight) -> Tensor:
    """The product without the tokens' scales, fp32."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        tokens.values,
        1.0,
        _ZERO_POINT,
        weight.packed,
        weight.scale,
        weight.zero_point,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return y
