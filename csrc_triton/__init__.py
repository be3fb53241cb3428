"""Triton kernels of w2vbert_fast and their launchers.

This package imports torch and triton only, knows tensors and never models, and touches no device
when imported. A kernel is a folder: tiles and warps in `config`, kernels with their launchers in
`forward` and `backward`; docs/inside/kernels.md says what each computes and how it is laid out.

A launcher takes packed tensors of fp32, fp16 or bf16. Its arguments, where its own docstring does
not name them, are those of the operation of its name in `w2vbert_fast.ops`; rows may have any
stride, the last dimension is contiguous. Results go to new tensors, or to `out`. It checks what it
is given:

* `ValueError`: an argument does not fit; the message names it, what came and what is needed;
* `RuntimeError`: the tensors are on a CPU and Triton's interpreter is off.
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
