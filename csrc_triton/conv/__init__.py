"""Causal depthwise convolution with its LayerNorm and activation, and its gradients."""

from csrc_triton.conv.backward import conv_norm_act_backward
from csrc_triton.conv.forward import conv_norm_act

__all__ = ["conv_norm_act", "conv_norm_act_backward"]
