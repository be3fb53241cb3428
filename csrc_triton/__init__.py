"""Triton kernels of w2vbert_fast and their launchers.

This package imports torch and triton only, knows tensors and never models, and touches no device
when imported. A launcher takes and returns packed tensors, checks its arguments and allocates its
outputs; docs/inside/kernels.md says what each kernel computes and how it is laid out.
"""

from .attention import build_tile_map, shaw_attention
from .conv import conv_norm_act
from .ctc import ctc_greedy
from .fbank import log_mel_filterbank, normalize_and_stack
from .linear import linear, linear_glu, linear_residual
from .norm import layer_norm, residual_double_layer_norm, residual_layer_norm

__all__ = [
    "build_tile_map",
    "conv_norm_act",
    "ctc_greedy",
    "layer_norm",
    "linear",
    "linear_glu",
    "linear_residual",
    "log_mel_filterbank",
    "normalize_and_stack",
    "residual_double_layer_norm",
    "residual_layer_norm",
    "shaw_attention",
]
