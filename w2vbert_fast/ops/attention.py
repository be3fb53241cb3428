"""Self-attention over packed utterances: Shaw relative keys, Transformer-XL positions, or none.

Notation: N packed tokens, H heads of D channels, utterances of at most T frames. The plain form
below pads queries, keys and values to `[batch, H, T, D]` and computes the score matrix in full.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import positions_in_sequence, sequence_ids


class _PaddedHeads:
    """Maps `[N, H, D]` to `[batch, H, T, D]` and back for one layout."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> None:
        self.batch_size = cu_seqlens.numel() - 1
        self.max_seqlen = max_seqlen
        self.full = self.batch_size * max_seqlen == num_tokens
        if not self.full:
            ids = sequence_ids(cu_seqlens, num_tokens)
            self.rows = ids * max_seqlen + positions_in_sequence(cu_seqlens, num_tokens)
            lengths = cu_seqlens.diff()
            frames = torch.arange(max_seqlen, device=cu_seqlens.device)
            self.invalid_key = frames[None, :] >= lengths[:, None]  # [batch, T]

    def pad(self, x: Tensor) -> Tensor:
        shape = (self.batch_size, self.max_seqlen, *x.shape[1:])
        if not self.full:
            x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, self.rows, x)
        return x.reshape(shape).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """`[batch, H, T, D]` -> `[N, H, D]`."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows if self.full else rows.index_select(0, self.rows)

    def masked(self, scores: Tensor) -> Tensor:
        if self.full:
            return scores
        # The lowest finite number, not -inf: an utterance without frames must not give NaN.
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(self.invalid_key[:, None, None, :], lowest)

    def without_padding(self, probabilities: Tensor) -> Tensor:
        """Attention maps with zeros in the rows and columns of padding."""
        if self.full:
            return probabilities
        invalid = self.invalid_key[:, None, :, None] | self.invalid_key[:, None, None, :]
        return probabilities.masked_fill(invalid, 0.0)


def _attend(
    scores: Tensor, value: Tensor, heads: _PaddedHeads, dropout_p: float
) -> tuple[Tensor, Tensor]:
    probabilities = F.dropout(torch.softmax(heads.masked(scores), dim=-1), dropout_p)
    return heads.unpad(probabilities @ value), probabilities


def shaw_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    distance_embedding: Tensor | None = None,
    left_max_position: int = 0,
    right_max_position: int = 0,
    dropout_p: float = 0.0,
    return_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention with relative keys (Shaw et al. 2018), within each utterance.

    `score(i, j) = (q_i . k_j + q_i . E[clip(j - i, -L, R) + L]) / sqrt(D)`. Only L + R + 1 distinct
    position vectors exist, so `q . E` is one `[T, L + R + 1]` product whose columns are then picked
    per pair; the `[T, T, D]` tensor of position vectors is never formed.

    Args:
        query: `[N, H, D]`.
        key: `[N, H, D]`.
        value: `[N, H, D]`.
        cu_seqlens: int32 `[batch + 1]`.
        max_seqlen: frames of the longest utterance.
        distance_embedding: E, `[L + R + 1, D]`; `None` for attention without positions.
        left_max_position: L, frames to the left beyond which distances are equal.
        right_max_position: R.
        dropout_p: probability with which an attention weight is dropped.
        return_probabilities: also return the attention maps.

    Returns:
        The output `[N, H, D]`, and the maps `[batch, H, T, T]` (zero in padding) or `None`.
    """
    heads = _PaddedHeads(cu_seqlens, max_seqlen, query.shape[0])
    q, k, v = heads.pad(query), heads.pad(key), heads.pad(value)
    scores = q @ k.transpose(-1, -2)  # [batch, H, T, T]
    if distance_embedding is not None:
        frames = torch.arange(max_seqlen, device=query.device)
        distance = (frames[None, :] - frames[:, None]).clamp(-left_max_position, right_max_position)
        by_distance = q @ distance_embedding.to(q.dtype).t()  # [batch, H, T, L + R + 1]
        columns = (distance + left_max_position).expand(scores.shape)
        scores = scores + by_distance.gather(-1, columns)
    output, probabilities = _attend(scores * q.shape[-1] ** -0.5, v, heads, dropout_p)
    return output, heads.without_padding(probabilities) if return_probabilities else None


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    position_keys: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    dropout_p: float = 0.0,
    return_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention with Transformer-XL relative positions (Dai et al. 2019), within each utterance.

    `score(i, j) = ((q_i + u) . k_j + (q_i + v) . r[i - j]) / sqrt(D)`.

    Args:
        query: `[N, H, D]`.
        key: `[N, H, D]`.
        value: `[N, H, D]`.
        cu_seqlens: int32 `[batch + 1]`.
        max_seqlen: frames T of the longest utterance.
        position_keys: r, `[2 T - 1, H, D]`, for the distances i - j = T - 1 down to -(T - 1).
        content_bias: u, `[H, D]`.
        position_bias: v, `[H, D]`.
        dropout_p: probability with which an attention weight is dropped.
        return_probabilities: also return the attention maps.

    Returns:
        The output `[N, H, D]`, and the maps `[batch, H, T, T]` (zero in padding) or `None`.
    """
    heads = _PaddedHeads(cu_seqlens, max_seqlen, query.shape[0])
    q, k, v = heads.pad(query), heads.pad(key), heads.pad(value)
    scores = (q + content_bias[:, None]) @ k.transpose(-1, -2)
    by_distance = (q + position_bias[:, None]) @ position_keys.permute(1, 2, 0)
    frames = torch.arange(max_seqlen, device=query.device)
    columns = (frames[None, :] - frames[:, None] + max_seqlen - 1).expand(scores.shape)
    scores = scores + by_distance.gather(-1, columns)
    output, probabilities = _attend(scores * q.shape[-1] ** -0.5, v, heads, dropout_p)
    return output, heads.without_padding(probabilities) if return_probabilities else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves of a head rotated against each other.

    Args:
        x: `[N, H, D]`.
        cos: `[N, D]`.
        sin: `[N, D]`.

    Returns:
        `[N, H, D]`.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
