"""Self-attention over packed utterances: Shaw relative keys, Transformer-XL positions, or none.

Notation: N packed tokens, H heads of D channels, utterances of at most T frames. The plain form
below pads queries, keys and values to `[batch, H, T, D]` and computes the score matrix in full.

The gradient of Shaw attention keeps query, key, value, the output, the log-sum-exp where the Triton
kernels read it, and the seed of dropout; scores and the dropout mask are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.layout import positions_in_sequence, sequence_ids
from w2vbert_fast.ops.cpu import attention as cpu
from w2vbert_fast.ops.dispatch import on_triton_device, records_gradient, runs_triton
from w2vbert_fast.ops.operation import gradient, operation

MAX_TRITON_HEAD_SIZE = 128
"""Attention with larger heads runs in plain PyTorch."""


class _PaddedHeads:
    """Maps `[N, H, D]` to `[batch, H, T, D]` and back for one layout."""

    def __init__(
        self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int, seqused_k: Tensor | None
    ) -> None:
        self.batch_size = cu_seqlens.numel() - 1
        self.max_seqlen = max_seqlen
        self.full = self.batch_size * max_seqlen == num_tokens
        self.invalid_query: Tensor | None = None  # [batch, T], and so is the next
        self.invalid_key: Tensor | None = None
        frames = torch.arange(max_seqlen, device=cu_seqlens.device)
        if not self.full:
            ids = sequence_ids(cu_seqlens, num_tokens)
            self.rows = ids * max_seqlen + positions_in_sequence(cu_seqlens, num_tokens)
            self.invalid_query = frames[None, :] >= cu_seqlens.diff()[:, None]
            self.invalid_key = self.invalid_query
        if seqused_k is not None:
            self.invalid_key = frames[None, :] >= seqused_k[:, None]

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
        if self.invalid_key is None:
            return scores
        # The lowest finite number, not -inf: an utterance without frames must not give NaN.
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(self.invalid_key[:, None, None, :], lowest)

    def without_padding(self, probabilities: Tensor) -> Tensor:
        """Attention maps with zeros in the rows and columns of padding."""
        if self.invalid_query is not None:
            probabilities = probabilities.masked_fill(self.invalid_query[:, None, :, None], 0.0)
        if self.invalid_key is not None:
            probabilities = probabilities.masked_fill(self.invalid_key[:, None, None, :], 0.0)
        return probabilities


def _attend(
    scores: Tensor,
    value: Tensor,
    heads: _PaddedHeads,
    dropout_p: float,
    return_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    probabilities = F.dropout(torch.softmax(heads.masked(scores), dim=-1), dropout_p)
    if return_probabilities:
        # In front of the product, so that the output's gradient reaches the maps.
        probabilities = heads.without_padding(probabilities)
    output = heads.unpad(probabilities @ value)
    return output, probabilities if return_probabilities else None


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
    tile_map: Tensor | None = None,
    seqused_k: Tensor | None = None,
    fast: bool = False,
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
        tile_map: of `attention_tile_map` for these utterances; made anew when `None`.
        seqused_k: int32 `[batch]`, the first so many tokens of an utterance are its keys, at least
            one where there are tokens; the others only ask. `None`: all are keys.
        fast: use the device's fast implementation, `torch.ops.w2vbert.shaw_attention`, which has
            no attention maps; a call that asks for them runs the plain form. Which weights
            dropout drops differs between the forms.

    Returns:
        The output `[N, H, D]`, and the maps `[batch, H, T, T]` (zero in padding) or `None`.
    """
    recorded = records_gradient(query, key, value, distance_embedding)
    if (
        fast
        and not return_probabilities
        and (_has_gradient_and_dropout(query) or (not recorded and dropout_p == 0.0))
    ):
        output, _ = _shaw_attention_op(
            query,
            key,
            value,
            cu_seqlens,
            max_seqlen,
            distance_embedding,
            left_max_position,
            right_max_position,
            tile_map,
            recorded and on_triton_device(query),
            dropout_p,
            _dropout_seed(query) if dropout_p > 0.0 else None,
            seqused_k,
        )
        return output, None
    heads = _PaddedHeads(cu_seqlens, max_seqlen, query.shape[0], seqused_k)
    q, k, v = heads.pad(query), heads.pad(key), heads.pad(value)
    scores = _shaw_scores(q, k, distance_embedding, left_max_position, right_max_position)
    return _attend(scores, v, heads, dropout_p, return_probabilities)


def _has_gradient_and_dropout(query: Tensor) -> bool:
    """Whether `torch.ops.w2vbert.shaw_attention` has them for such queries.

    Asked by compiled code, so no more is looked at than what it may guard on.
    """
    if on_triton_device(query):
        return query.shape[2] <= MAX_TRITON_HEAD_SIZE
    return query.device.type == "cpu"


def _dropout_seed(x: Tensor) -> Tensor:
    """Seed and offset of one call, drawn on the device, so that nothing waits for it."""
    return torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=x.device)


def _shaw_scores(
    q: Tensor, k: Tensor, distance_embedding: Tensor | None, left: int, right: int
) -> Tensor:
    """Scores of padded queries and keys `[batch, H, T, D]`: `[batch, H, T, T]`, unmasked."""
    scores = q @ k.transpose(-1, -2)
    if distance_embedding is not None:
        frames = torch.arange(q.shape[2], device=q.device)
        distance = (frames[None, :] - frames[:, None]).clamp(-left, right)
        by_distance = q @ distance_embedding.to(q.dtype).t()  # [batch, H, T, L + R + 1]
        scores = scores + by_distance.gather(-1, (distance + left).expand(scores.shape))
    scale: float = q.shape[-1] ** -0.5
    return scores * scale


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
    seqused_k: Tensor | None = None,
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
        seqused_k: as of `shaw_attention`.

    Returns:
        The output `[N, H, D]`, and the maps `[batch, H, T, T]` (zero in padding) or `None`.
    """
    heads = _PaddedHeads(cu_seqlens, max_seqlen, query.shape[0], seqused_k)
    q, k, v = heads.pad(query), heads.pad(key), heads.pad(value)
    scores = (q + content_bias[:, None]) @ k.transpose(-1, -2)
    by_distance = (q + position_bias[:, None]) @ position_keys.permute(1, 2, 0)
    frames = torch.arange(max_seqlen, device=query.device)
    columns = (frames[None, :] - frames[:, None] + max_seqlen - 1).expand(scores.shape)
    scores = scores + by_distance.gather(-1, columns)
    return _attend(scores * q.shape[-1] ** -0.5, v, heads, dropout_p, return_probabilities)


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


def attention_tile_map(
    x: Tensor, head_size: int, cu_seqlens: Tensor, max_seqlen: int, *, fast: bool = False
) -> Tensor | None:
    """The work list of the Triton attention kernel, which serves every layer of an encoder.

    Args:
        x: `[num_tokens, ...]`, a tensor of the device and dtype that attention will have.
        head_size: channels D of a head.
        cu_seqlens: int32 `[batch + 1]`.
        max_seqlen: frames of the longest utterance.
        fast: whether the fast implementation will run.

    Returns:
        int32 `[num_tiles, 2]` for the argument `tile_map` of `shaw_attention`; `None` where no such
        kernel is to run.
    """
    if not fast or head_size > MAX_TRITON_HEAD_SIZE or not on_triton_device(x):
        return None
    return _attention_tile_map_op(x, head_size, cu_seqlens, max_seqlen)


def _block_m(x: Tensor, head_size: int) -> int:
    """Query rows of a tile of the kernel that runs for tensors like `x`."""
    from csrc_triton.architectures import architecture
    from csrc_triton.attention.config import attention_config

    # Fake tensors may be on a device that this machine does not have.
    absent = x.device.type == "cuda" and not torch.cuda.is_available()
    arch = "sm_90" if absent else architecture(x.device)
    return attention_config(head_size, x.dtype, arch).block_m


def _tile_map_fake(x: Tensor, head_size: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    if not runs_triton(x):
        return _no_tile_map(x, head_size, cu_seqlens)
    from csrc_triton.attention import tile_bound

    batch_size = cu_seqlens.shape[0] - 1
    bound = tile_bound(batch_size, x.shape[0], max_seqlen, _block_m(x, head_size))
    return cu_seqlens.new_empty(bound, 2)


def _no_tile_map(x: Tensor, head_size: int, cu_seqlens: Tensor, *_: Any) -> Tensor:
    return cu_seqlens.new_empty(0, 2)


def _tile_map_on_triton(x: Tensor, head_size: int, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from csrc_triton.attention import build_tile_map

    block_m = _block_m(x, head_size)
    return build_tile_map(cu_seqlens, block_m, num_tokens=x.shape[0], max_seqlen=max_seqlen)


_attention_tile_map_op = operation(
    "attention_tile_map(Tensor x, int head_size, Tensor cu_seqlens, SymInt max_seqlen) -> Tensor",
    _no_tile_map,
    fake=_tile_map_fake,
    triton=_tile_map_on_triton,
    autocast="lower",
)


def _fits(query: Tensor, *_: Any) -> bool:
    return query.shape[2] <= MAX_TRITON_HEAD_SIZE


def _in_dtype_of(query: Tensor, distance_embedding: Tensor | None) -> Tensor | None:
    return None if distance_embedding is None else distance_embedding.to(query.dtype)


def _padded_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    tile_map: Tensor | None = None,
    return_log_sum_exp: bool = True,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output `[N, H, D]` and the log-sum-exp of every row of scores, fp32 `[H, N]`.

    Without `return_log_sum_exp` the second result is empty. `dropout_seed`, int64 `[2]`, decides
    which weights are dropped.
    """
    if dropout_p > 0.0:
        # The plain form's dropout could not be repeated in the backward pass.
        if query.device.type != "cpu":
            raise ValueError(
                f"dropout_p is {dropout_p}; for queries {tuple(query.shape)} on {query.device} "
                "this operation has no dropout"
            )
        layout = (cu_seqlens, max_seqlen, distance_embedding, left, right, tile_map)
        dropout = (dropout_p, dropout_seed)
        return cpu.shaw_attention(
            query, key, value, *layout, return_log_sum_exp, *dropout, seqused_k
        )
    distance_embedding = _in_dtype_of(query, distance_embedding)
    heads = _PaddedHeads(cu_seqlens, max_seqlen, query.shape[0], seqused_k)
    scores = _shaw_scores(heads.pad(query), heads.pad(key), distance_embedding, left, right)
    output, _ = _attend(scores, heads.pad(value), heads, 0.0)
    output = output.contiguous()
    if not return_log_sum_exp:
        return output, output.new_empty(0, dtype=torch.float32)
    log_sum_exp = heads.masked(scores).float().logsumexp(-1, keepdim=True)
    return output, heads.unpad(log_sum_exp).squeeze(-1).t().contiguous()


def _on_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    tile_map: Tensor | None = None,
    return_log_sum_exp: bool = True,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from csrc_triton.attention import shaw_attention as kernel

    output, log_sum_exp = kernel(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        distance_embedding=_in_dtype_of(query, distance_embedding),
        left_max_position=left,
        right_max_position=right,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        tile_map=tile_map,
        seqused_k=seqused_k,
    )
    return output, log_sum_exp if return_log_sum_exp else log_sum_exp.new_empty(0)


def _fake(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    returns_log_sum_exp = others[8] if len(others) > 8 else True
    rows = (query.shape[1], query.shape[0]) if returns_log_sum_exp else (0,)
    return query.new_empty(query.shape), query.new_empty(rows, dtype=torch.float32)


_shaw_attention_op = operation(
    "shaw_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, SymInt max_seqlen, "
    "Tensor? distance_embedding, int left_max_position, int right_max_position, "
    "Tensor? tile_map=None, bool return_log_sum_exp=True, float dropout_p=0.0, "
    "Tensor? dropout_seed=None, Tensor? seqused_k=None) -> (Tensor output, Tensor log_sum_exp)",
    _padded_form,
    fake=_fake,
    triton=_on_triton,
    takes=_fits,
    cpu=cpu.shaw_attention,
    autocast="lower",
)


def _backward_fake(grad: Tensor, query: Tensor, *others: Any) -> tuple[Tensor, ...]:
    embedding = others[6]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        *(query.new_empty(query.shape) for _ in range(3)),
        query.new_empty((0,) if embedding is None else embedding.shape, dtype=dtype),
    )


def _backward_on_triton(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    tile_map: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from csrc_triton.attention import shaw_attention_backward as kernel

    layout = (cu_seqlens, max_seqlen)
    if log_sum_exp.numel() == 0 and query.numel() > 0:
        _, log_sum_exp = _on_triton(
            *(query, key, value, *layout, distance_embedding, left, right, tile_map),
            seqused_k=seqused_k,
        )
    *inputs, grad_embedding = kernel(
        grad,
        query,
        key,
        value,
        output,
        log_sum_exp.contiguous(),
        *layout,
        distance_embedding=_in_dtype_of(query, distance_embedding),
        left_max_position=left,
        right_max_position=right,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        tile_map=tile_map if _same_tiles(query, dropout_p) else None,
        out=(
            query.new_empty(query.shape),
            query.new_empty(query.shape),
            query.new_empty(query.shape),
        ),
        seqused_k=seqused_k,
    )
    if grad_embedding is None:
        grad_embedding = query.new_empty(0, dtype=torch.float32)
    return *inputs, grad_embedding


def _same_tiles(query: Tensor, dropout_p: float) -> bool:
    """Whether the work list of the forward pass is that of the backward pass."""
    from csrc_triton.architectures import architecture
    from csrc_triton.attention.config import attention_backward_config, attention_config

    kind = (query.shape[2], query.dtype, architecture(query.device))
    tile = attention_backward_config(*kind, has_dropout=dropout_p > 0.0).tile
    return tile == attention_config(*kind).block_m


gradient(
    "shaw_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor log_sum_exp, Tensor cu_seqlens, SymInt max_seqlen, Tensor? distance_embedding, "
    "int left_max_position, int right_max_position, Tensor? tile_map, float dropout_p, "
    "Tensor? dropout_seed, Tensor? seqused_k=None) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_distance_embedding)",
    cpu.shaw_attention_backward,
    fake=_backward_fake,
    triton=_backward_on_triton,
)
