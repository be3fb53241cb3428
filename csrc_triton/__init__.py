"""Triton kernels of w2vbert_fast and their launchers.

This package imports torch and triton only, knows tensors and never models, and touches no device
when imported. A kernel is a folder: tiles and warps in `config`, kernels with their launchers in
`forward` and `backward`. A launcher takes and returns packed tensors, checks its arguments and
allocates its outputs; docs/inside/kernels.md says what each kernel computes and how it is laid out.
"""

from .attention import build_tile_map, shaw_attention, shaw_attention_backward
from .conv import conv_norm_act, conv_norm_act_backward
from .ctc import ctc_greedy
from .fbank import log_mel_filterbank, normalize_and_stack
from .gemm import (
    feed_forward_backward,
    linear,
    linear_backward,
    linear_glu,
    linear_glu_backward,
)
from .norm import (
    layer_norm,
    layer_norm_backward,
    residual_double_layer_norm,
    residual_double_layer_norm_backward,
    residual_layer_norm,
    residual_layer_norm_backward,
)

__all__ = [
    "build_tile_map",
    "conv_norm_act",
    "conv_norm_act_backward",
    "ctc_greedy",
    "feed_forward_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "linear_glu",
    "linear_glu_backward",
    "log_mel_filterbank",
    "normalize_and_stack",
    "residual_double_layer_norm",
    "residual_double_layer_norm_backward",
    "residual_layer_norm",
    "residual_layer_norm_backward",
    "shaw_attention",
    "shaw_attention_backward",
]
