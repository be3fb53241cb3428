"""LayerNorm, alone and fused with the residual connection before it, and its gradients."""

from csrc_triton.norm.backward import (
    layer_norm_backward,
    residual_double_layer_norm_backward,
    residual_layer_norm_backward,
)
from csrc_triton.norm.forward import layer_norm, residual_double_layer_norm, residual_layer_norm

__all__ = [
    "layer_norm",
    "layer_norm_backward",
    "residual_double_layer_norm",
    "residual_double_layer_norm_backward",
    "residual_layer_norm",
    "residual_layer_norm_backward",
]
