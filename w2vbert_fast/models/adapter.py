"""The convolutional adapter that shortens the encoder's output in time.

Reference: `Wav2Vec2BertAdapter` in transformers. There the strided convolutions read whatever lies
behind the end of a padded utterance; here they read what they do for the utterance alone: its half
frame, if it ends in one (`layout`), and zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.layers import (
    Wav2Vec2BertFeedForward,
    Wav2Vec2BertSelfAttention,
    apply_linear,
    apply_norm,
)
from w2vbert_fast.models.optimized.sizes import are_watched, in_few_sizes


def conv_output_length(length: int, kernel_size: int, stride: int) -> int:
    """Frames that an adapter convolution (padding `stride // 2` on both sides) makes of `length`.

    0 frames when the kernel does not fit or there is no input.
    """
    if length == 0:
        return 0
    return max(0, (length + 2 * (stride // 2) - kernel_size) // stride + 1)


class Wav2Vec2BertAdapterLayer(nn.Module):
    """Strided GLU convolutions into attention without positions, then a feed-forward block."""

    use_fast_kernels = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        width = config.output_hidden_size
        assert width is not None
        self.kernel_size = config.adapter_kernel_size
        self.stride = config.adapter_stride
        self.residual_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.residual_conv = self._strided_conv(width)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn_conv = self._strided_conv(width)
        self.self_attn = Wav2Vec2BertSelfAttention(config, is_adapter_attention=True)
        self.self_attn_dropout = nn.Dropout(config.conformer_conv_dropout)
        self.ffn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn = Wav2Vec2BertFeedForward(config, act_fn=config.adapter_act, hidden_size=width)

    def _strided_conv(self, width: int) -> nn.Conv1d:
        return nn.Conv1d(
            width, 2 * width, self.kernel_size, stride=self.stride, padding=self.stride // 2
        )

    def shortened(self, layout: PackedBatch) -> PackedBatch:
        """The layout of this layer's output."""

        def shortened(lengths: tuple[int, ...]) -> list[int]:
            return [conv_output_length(n, self.kernel_size, self.stride) for n in lengths]

        valid = shortened(layout.valid_lengths)
        # The frames behind the valid ones read a half frame. They attend to the valid ones.
        lengths = [n if v > 0 else 0 for n, v in zip(shortened(layout.lengths), valid, strict=True)]
        padded = conv_output_length(layout.padded_length, self.kernel_size, self.stride)
        return layout.with_lengths(lengths, max(padded, *lengths, 0), valid)

    def _conv_glu(
        self, x: Tensor, conv: nn.Conv1d, layout: PackedBatch, out: PackedBatch
    ) -> Tensor:
        padded = layout.unpack(x).transpose(1, 2)  # [batch, C, T]
        # A batch too short for one window still goes through: what is too much is cut by `pack`.
        padded = F.pad(padded, (0, max(0, self.kernel_size - padded.shape[-1])))
        y = F.glu(conv(padded), dim=1).transpose(1, 2)  # [batch, T', C]
        return out.pack(y[:, : out.padded_length])

    def is_watched(self) -> bool:
        """Whether somebody sees what goes into this layer or a part of it."""
        return are_watched([self])

    def forward(self, hidden_states: Tensor, layout: PackedBatch) -> tuple[Tensor, PackedBatch]:
        """`[N, C']` right-padded layout -> `[N', C']` and its layout."""
        fast = self.use_fast_kernels
        out = self.shortened(layout)
        filled = in_few_sizes(out, hidden_states, self.is_watched, fast=fast and not self.training)
        residual = apply_norm(self.residual_layer_norm, hidden_states, fast=fast)
        residual = self._conv_glu(residual, self.residual_conv, layout, filled)
        x = apply_norm(self.self_attn_layer_norm, hidden_states, fast=fast)
        x = self._conv_glu(x, self.self_attn_conv, layout, filled)
        x, _ = self.self_attn(x, filled)
        x = self.self_attn_dropout(x)
        norm = self.ffn_layer_norm
        residual, x = ops.residual_layer_norm(
            residual, x, 1.0, norm.weight, norm.bias, norm.eps, fast=fast
        )
        return residual + self.ffn(x), out


class Wav2Vec2BertAdapter(nn.Module):
    """Projection to `output_hidden_size` where it differs, then the adapter layers."""

    use_fast_kernels = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        width = config.output_hidden_size
        assert width is not None
        self.proj: nn.Linear | None = None
        self.proj_layer_norm: nn.LayerNorm | None = None
        if width != config.hidden_size:
            self.proj = nn.Linear(config.hidden_size, width)
            self.proj_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Wav2Vec2BertAdapterLayer(config) for _ in range(config.num_adapter_layers)
        )
        self.layerdrop = config.layerdrop

    def forward(self, hidden_states: Tensor, layout: PackedBatch) -> tuple[Tensor, PackedBatch]:
        """`[N, C]` -> `[N', C']` and its layout.

        A layer that LayerDrop skips shortens nothing; the layout says so.
        """
        if self.proj is not None and self.proj_layer_norm is not None:
            fast = self.use_fast_kernels
            hidden_states = apply_linear(self.proj, hidden_states, fast=fast)
            hidden_states = apply_norm(self.proj_layer_norm, hidden_states, fast=fast)
        # A stride counts from an utterance's first frame, whichever side the batch was padded on.
        layout = layout.with_lengths(layout.lengths, layout.padded_length, layout.valid_lengths)
        for layer in self.layers:
            if self.training and self.layerdrop > 0.0 and torch.rand(()).item() <= self.layerdrop:
                continue
            hidden_states, layout = layer(hidden_states, layout)
        return hidden_states, layout
