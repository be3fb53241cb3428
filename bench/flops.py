"""FLOPs of the model, counted over real frames.

Per token and Conformer layer, with C channels, F = intermediate size, K taps:

    2 * (4 C F      two feed-forward blocks, two GEMMs each
         + 4 C C    query, key, value, output
         + 3 C C    pointwise convolutions, C -> 2C and C -> C
         + K C)     depthwise convolution

and per utterance of T frames and layer 4 T^2 C for attention (scores and weighted sum); plus the
feature projection, 2 * 160 * C a token, and with an adapter its two strided convolutions and its
transformer layer. Padding, norms, activations, softmax and the relative-position term
(2 C (L + R + 1) a token: 0.3 % of the rest) are not counted, so a share of the GEMM rate is a lower
bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encoder_flops(config: Any, lengths: Sequence[int], layers: int | None = None) -> float:
    """FLOPs of one forward pass.

    Args:
        config: `Wav2Vec2BertConfig`, ours or transformers'.
        lengths: frames of each utterance.
        layers: encoder layers that run; None: all of them.
    """
    c, f = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers if layers is None else layers
    tokens = sum(lengths)
    per_token = 2 * (4 * c * f + 7 * c * c + config.conv_depthwise_kernel_size * c)
    total = 2.0 * config.feature_projection_input_dim * c * tokens
    total += layers * (per_token * tokens + sum(4 * t * t * c for t in lengths))
    if getattr(config, "add_adapter", False):
        total += _adapter_flops(config, lengths)
    return total


def _adapter_flops(config: Any, lengths: Sequence[int]) -> float:
    c, f, out = config.hidden_size, config.intermediate_size, config.output_hidden_size
    kernel, stride = config.adapter_kernel_size, config.adapter_stride
    frames = list(lengths)
    total = 2.0 * c * out * sum(frames) if c != out else 0.0
    for _ in range(config.num_adapter_layers):
        frames = [(t + 2 * (stride // 2) - kernel) // stride + 1 for t in frames]
        convolutions = 2 * kernel * out * 2 * out  # residual and attention branch
        per_token = 2 * (convolutions + 4 * out * out + 2 * out * f)
        total += per_token * sum(frames) + sum(4 * t * t * out for t in frames)
    return total


def reference_bytes(config: Any, lengths: Sequence[int], itemsize: int) -> int:
    """Memory that transformers needs for one attention layer over a padded batch, in bytes.

    The gathered position vectors `[T, T, D]`, and three `[batch, H, T, T]`: the position scores,
    their scaled or masked copy, and the scores.
    """
    longest = max(lengths)
    head = config.hidden_size // config.num_attention_heads
    maps = 3 * len(lengths) * config.num_attention_heads
    return itemsize * longest * longest * (head + maps)
