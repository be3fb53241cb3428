"""Operations of the encoder on packed tensors, one file each.

Each states its mathematics in plain PyTorch, which is the specification: `[num_tokens, ...]` in and
out, `cu_seqlens` for utterance boundaries. With `fast=True` the call goes to `torch.ops.w2vbert.*`,
where `dispatch` chooses an implementation. Operations know tensors, never modules or configs.

They can be used alone, for another Conformer with Shaw's relative positions (Shaw et al. 2018) and
a causal convolution; importing them imports no model. All take `[num_tokens, ...]`: the frames of
all utterances end to end, so that there is no padding and no mask. `cu_seqlens`, int32
`[batch + 1]`, says where utterances begin. A layer::

    import torch
    from torch import nn

    from w2vbert_fast import ops


    class ConformerLayer(nn.Module):
        fast = True

        def __init__(self, width, heads, hidden, taps=31, left=64, right=8):
            super().__init__()
            self.heads, self.left, self.right = heads, left, right
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
            self.ffn = nn.ModuleList(
                nn.ModuleList((nn.Linear(width, hidden), nn.Linear(hidden, width)))
                for _ in range(2)
            )
            self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
            self.distances = nn.Embedding(left + right + 1, width // heads)
            self.out = nn.Linear(width, width)
            self.glu = nn.Linear(width, 2 * width, bias=False)
            self.depthwise = nn.Conv1d(width, width, taps, groups=width, bias=False)
            self.conv_norm = nn.LayerNorm(width)
            self.pointwise = nn.Linear(width, width, bias=False)

        def feed_forward(self, x, index):
            first, second = self.ffn[index]
            weights = (first.weight, first.bias, "silu", second.weight, second.bias)
            return ops.feed_forward(x, *weights, fast=self.fast)

        def close_block(self, residual, x, scale, index):
            # the next block's normalised input comes along
            norm = self.norms[index]
            weights = (norm.weight, norm.bias, norm.eps)
            return ops.residual_layer_norm(residual, x, scale, *weights, fast=self.fast)

        def forward(self, x, cu_seqlens, max_seqlen):
            # [num_tokens, width] -> [num_tokens, width]
            norm = self.norms[0]
            normed = ops.layer_norm(x, norm.weight, norm.bias, norm.eps, fast=self.fast)
            x, normed = self.close_block(x, self.feed_forward(normed, 0), 0.5, 1)
            q, k, v = (
                ops.linear(normed, layer.weight, layer.bias, fast=self.fast)
                .unflatten(1, (self.heads, -1))  # [num_tokens, heads, channels]
                for layer in self.qkv
            )
            attended, _ = ops.shaw_attention(
                q,
                k,
                v,
                cu_seqlens,
                max_seqlen,
                distance_embedding=self.distances.weight,
                left_max_position=self.left,
                right_max_position=self.right,
                fast=self.fast,
            )
            out = self.out
            attended = ops.linear(attended.flatten(1), out.weight, out.bias, fast=self.fast)
            x, normed = self.close_block(x, attended, 1.0, 2)
            gated = ops.linear_glu(normed, self.glu.weight, fast=self.fast)
            taps, norm = self.depthwise.weight.squeeze(1), self.conv_norm
            convolved = ops.conv_norm_act(
                gated, taps, norm.weight, norm.bias, norm.eps, "silu", cu_seqlens, fast=self.fast
            )
            convolved = ops.linear(convolved, self.pointwise.weight, fast=self.fast)
            x, normed = self.close_block(x, convolved, 1.0, 3)
            return self.close_block(x, self.feed_forward(normed, 1), 0.5, 4)[1]
"""

from w2vbert_fast.ops.activations import ACTIVATIONS, get_activation
from w2vbert_fast.ops.attention import (
    attention_tile_map,
    relative_attention,
    rotate,
    shaw_attention,
)
from w2vbert_fast.ops.conv import causal_depthwise_conv, conv_norm_act, tap_major
from w2vbert_fast.ops.ctc import ctc_greedy, ctc_loss, greedy_decode
from w2vbert_fast.ops.fbank import log_mel_filterbank, normalize_and_stack, normalize_utterances
from w2vbert_fast.ops.gemm import feed_forward, linear, linear_glu, linear_stacked
from w2vbert_fast.ops.norm import layer_norm, residual_double_layer_norm, residual_layer_norm

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
