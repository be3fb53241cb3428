"""Operations of the encoder on packed tensors, one file each.

Each states its mathematics in plain PyTorch, which is the specification: `[num_tokens, ...]` in and
out, `cu_seqlens` for utterance boundaries. Operations know tensors, never modules or configs.
"""

from .activations import ACTIVATIONS, get_activation
from .attention import relative_attention, rotate, shaw_attention
from .conv import causal_depthwise_conv, conv_norm_act
from .ctc import ctc_greedy, ctc_loss, greedy_decode
from .fbank import log_mel_filterbank, normalize_utterances
from .linear import linear, linear_glu
from .norm import layer_norm, residual_layer_norm

__all__ = [
    "ACTIVATIONS",
    "causal_depthwise_conv",
    "conv_norm_act",
    "ctc_greedy",
    "ctc_loss",
    "get_activation",
    "greedy_decode",
    "layer_norm",
    "linear",
    "linear_glu",
    "log_mel_filterbank",
    "normalize_utterances",
    "relative_attention",
    "residual_layer_norm",
    "rotate",
    "shaw_attention",
]
