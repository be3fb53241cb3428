"""Position tables that a whole encoder shares: rotary angles, Transformer-XL sinusoids.

The tables are computed for the batch at hand, in fp32: they are no buffers, so that moving,
converting or meta-constructing a model cannot spoil them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from w2vbert_fast.layout import PackedBatch, positions_in_sequence
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig


class Wav2Vec2BertRotaryPositionalEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021)."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.base = config.rotary_embedding_base

    def forward(self, hidden_states: Tensor, layout: PackedBatch) -> tuple[Tensor, ...]:
        """Cosines and sines, `[N, D]` each, in the dtype of `hidden_states`."""
        device = hidden_states.device
        exponents = torch.arange(0, self.dim, 2, device=device).float() / self.dim
        time = positions_in_sequence(layout.cu_seqlens, hidden_states.shape[0]).float()
        angles = time[:, None] * (1.0 / self.base**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


class Wav2Vec2BertRelPositionalEmbedding(nn.Module):
    """Sinusoids of the signed distance i - j (Dai et al. 2019), of any length."""

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(self, hidden_states: Tensor, layout: PackedBatch) -> tuple[Tensor, ...]:
        """`[2 T - 1, C]` for the distances T - 1 down to -(T - 1), T the longest utterance."""
        device = hidden_states.device
        last = max(layout.max_seqlen, 1) - 1
        distance = torch.arange(last, -last - 1, -1, device=device).float()
        channels = torch.arange(0, self.hidden_size, 2, device=device).float()
        angles = distance[:, None] * torch.exp(channels * -(math.log(10000.0) / self.hidden_size))
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        return (table[:, : self.hidden_size].to(hidden_states.dtype),)
