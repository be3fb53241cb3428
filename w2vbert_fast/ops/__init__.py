"""Operations of the encoder on packed tensors, one file each.

Each states its mathematics in plain PyTorch, which is the specification: `[num_tokens, ...]` in and
out, `cu_seqlens` for utterance boundaries. With `fast=True` the call goes to `torch.ops.w2vbert.*`,
where `dispatch` chooses an implementation. Operations know tensors, never modules or configs.
"""

from . import autograd_attention, autograd_conv, autograd_linear, autograd_norm  # noqa: F401
from .activations import ACTIVATIONS, get_activation
from .attention import attention_tile_map, relative_attention, rotate, shaw_attention
from .conv import causal_depthwise_conv, conv_norm_act, tap_major
from .ctc import ctc_greedy, ctc_loss, greedy_decode
from .fbank import log_mel_filterbank, normalize_and_stack, normalize_utterances
from .linear import feed_forward, linear, linear_glu, linear_residual, linear_stacked
from .norm import layer_norm, residual_double_layer_norm, residual_layer_norm

__all__ = [
    "ACTIVATIONS",
    "attention_tile_map",
    "causal_depthwise_conv",
    "conv_norm_act",
    "ctc_greedy",
    "ctc_loss",
    "feed_forward",
    "get_activation",
    "greedy_decode",
    "layer_norm",
    "linear",
    "linear_glu",
    "linear_residual",
    "linear_stacked",
    "log_mel_filterbank",
    "normalize_and_stack",
    "normalize_utterances",
    "relative_attention",
    "residual_double_layer_norm",
    "residual_layer_norm",
    "rotate",
    "shaw_attention",
    "tap_major",
]
