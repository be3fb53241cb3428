"""Causal depthwise convolution with its LayerNorm and activation, and its gradients."""

from .backward import conv_norm_act_backward
from .forward import conv_norm_act

__all__ = ["conv_norm_act", "conv_norm_act_backward"]
