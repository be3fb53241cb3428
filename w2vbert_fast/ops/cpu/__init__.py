"""The fast CPU path: the operations of `w2vbert_fast.ops` on oneDNN and cache-sized blocks.

Pure functions of tensors, without gradients, in fp32 and bf16 (other dtypes are right, not fast).
They need nothing but PyTorch; what a machine lacks makes them slower, not wrong (`reasons`).
"""

from w2vbert_fast.ops.cpu.attention import shaw_attention
from w2vbert_fast.ops.cpu.capability import is_available, reasons
from w2vbert_fast.ops.cpu.conv import conv_norm_act
from w2vbert_fast.ops.cpu.gemm import feed_forward, linear, linear_glu
from w2vbert_fast.ops.cpu.norm import layer_norm, residual_double_layer_norm, residual_layer_norm

__all__ = [
    "conv_norm_act",
    "feed_forward",
    "is_available",
    "layer_norm",
    "linear",
    "linear_glu",
    "reasons",
    "residual_double_layer_norm",
    "residual_layer_norm",
    "shaw_attention",
]
