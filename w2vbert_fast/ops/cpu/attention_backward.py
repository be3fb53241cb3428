"""Gradients of Shaw attention, block by block of queries, in memory O(T x block).

With the numerators w_ij of a row's softmax, their sum z_i, the kept weights m_ij and g' = g /
(z (1 - p)), which puts both divisions on rows of D numbers instead of T:

    ds_ij = w_ij (m_ij g'_i . v_j - delta_i / z_i)      delta_i = g_i . o_i
    dv_j  = sum_i w_ij m_ij g'_i
    dk_j  = sum_i ds_ij q_i / sqrt(D)
    dq_i  = (sum_j ds_ij k_j + dP[i] E) / sqrt(D)
    dE    = sum_i dP[i]^T q_i / sqrt(D)

dP[i, r] is the sum of ds_ij over the keys at clipped distance r: within the band one key a
distance, so a diagonal of the band's buffer (`attention`); its first and last column also get the
keys beyond the band. Numerators are computed again as in the forward pass.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import (
    Attend,
    Block,
    Dropout,
    band_keys,
    base_two,
    groups_of_utterances,
    longest_of,
    reached,
    row_sums,
)
from .gemm import matmul_transposed


def shaw_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    cu_seqlens: Tensor,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention.shaw_attention`.

    Args:
        grad: of the output, `[N, H, D]` in the dtype of `query`, any strides.
        query: `[N, H, D]`, any strides.
        key: `[N, H, D]`, any strides.
        value: `[N, H, D]`, any strides.
        output: `[N, H, D]`, of the forward pass.
        cu_seqlens: int32 `[batch + 1]`.
        distance_embedding: E, `[left + right + 1, D]`, or `None`.
        left: L.
        right: R.
        dropout_p: of the forward pass.
        dropout_seed: of the forward pass.
        seqused_k: of the forward pass.

    Returns:
        The gradients of query, key and value, `[N, H, D]` in the dtype of `query`, and of the
        distance embedding in float32 at least, or `None`.
    """
    statistics = torch.promote_types(query.dtype, torch.float32)
    grads = [query.new_empty(query.shape) for _ in range(3)]
    grad_embedding = None
    if distance_embedding is not None:
        grad_embedding = torch.zeros_like(distance_embedding, dtype=statistics)
    if query.numel() == 0:
        return grads[0], grads[1], grads[2], grad_embedding
    dropout = Dropout(dropout_p, dropout_seed)
    # A softmax does not see what is equal for all keys: one position vector has no gradient.
    embedding = distance_embedding if left + right > 0 else None
    for rows, utterances in groups_of_utterances(cu_seqlens, seqused_k):
        tensors = (query[rows], key[rows], value[rows])
        longest = longest_of(utterances)
        attend = _AttendBackward(
            Attend(*tensors, longest, embedding, left, right), grad[rows], output[rows]
        )
        if embedding is not None:
            attend.embedding = reached(embedding, left, right, longest).to(statistics)
            assert grad_embedding is not None
            attend.grad_embedding = reached(grad_embedding, left, right, longest)
        for utterance in utterances:
            for block, heads, by_head in attend.shared.blocks(utterance):
                attend.block(block, heads, by_head, dropout)
        for target, part in zip(grads, attend.results(), strict=True):
            target[rows] = part.transpose(0, 1)
    if grad_embedding is not None and base_two(query.dtype):
        grad_embedding.mul_(math.log(2.0))
    return grads[0], grads[1], grads[2], grad_embedding


class _AttendBackward:
    """Gradients of one group of utterances: what all its blocks share."""

    embedding: Tensor | None = None  # [P, D] of the distances that occur
    grad_embedding: Tensor | None = None  # [P, D], a view; log2(e) too large in base 2

    def __init__(self, shared: Attend, grad: Tensor, output: Tensor) -> None:
        self.shared = shared
        self.grad = grad.transpose(0, 1).contiguous()  # [H, N, D]
        wide = self.grad.to(shared.statistics)
        self.delta = (wide * output.transpose(0, 1)).sum(-1, keepdim=True)  # [H, N, 1]
        self.rounds = grad.dtype != shared.statistics
        self.value = shared.value
        if self.rounds:  # [H, N, D + 1]: ones for what is subtracted from a product with values
            self.value = F.pad(self.value, (0, 1), value=1.0)
        self.grad_query = torch.empty_like(shared.query, dtype=shared.statistics)
        self.grad_key = torch.zeros_like(self.grad_query)
        self.grad_value = torch.zeros_like(self.grad_query)

    def block(self, block: Block, heads: slice, by_head: bool, dropout: Dropout) -> None:
        """Add what a block of queries gives."""
        shared, rows, columns = self.shared, block.rows(), block.columns()
        powers, total, _ = shared.powers(block, heads, by_head)  # [G, b, T], [G, b, 1]
        query = shared.query[heads, rows]
        key, value = shared.key[heads, columns], self.value[heads, columns]
        kept = dropout.kept(powers)
        divided = self.grad[heads, rows].to(total.dtype) / (total * dropout.keep)
        shift = self.delta[heads, rows] / total  # [G, b, 1]
        # The difference is small beside what it is of, so it is taken before that is rounded.
        if self.rounds and kept is None:
            left = torch.cat([divided, -shift], dim=-1).to(query.dtype)  # [G, b, D + 1]
            divided = left[..., :-1]  # [G, b, D]
            ds = _product(left, value.transpose(1, 2), by_head).mul_(powers)  # [G, b, T]
        else:
            divided = divided.to(query.dtype)
            value = value[..., : query.shape[-1]]
            ds = _product(divided, value.transpose(1, 2), by_head)
            if kept is not None:
                ds.mul_(kept)
            ds = ds.to(shared.statistics).sub_(shift).mul_(powers).to(query.dtype)
        if self.rounds:
            # A row's sum is zero but for what rounded weights and a rounded output left.
            excess = row_sums(ds, shared.statistics) / total
            ds.addcmul_(powers, excess.to(ds.dtype), value=-1)
        weights = powers if kept is None else powers.mul_(kept)
        self.grad_value[heads, columns] += _product_over_queries(weights, divided, by_head)
        self.grad_key[heads, columns] += _product_over_queries(ds, query, by_head)
        grad_query = _product(ds, key, by_head).to(shared.statistics)
        if self.embedding is not None and self.grad_embedding is not None:
            assert shared.positions is not None
            reach = shared.positions.left, shared.positions.right
            by_distance = _sums_by_distance(ds, block, *reach)
            grad_query += by_distance @ self.embedding
            flat = query.flatten(0, 1).to(by_distance.dtype)
            self.grad_embedding += by_distance.flatten(0, 1).t() @ flat
        self.grad_query[heads, rows] = grad_query

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, `[H, N, D]`."""
        shared = self.shared
        # The queries hold 1 / sqrt(D), and log2(e) in base 2.
        unit = math.log(2.0) if shared.base_two else 1.0
        self.grad_query.mul_(shared.query.shape[2] ** -0.5)
        return self.grad_query, self.grad_key.mul_(unit), self.grad_value


def _product(a: Tensor, b: Tensor, by_head: bool) -> Tensor:
    """`a @ b`, `[G, m, k]` and `[G, k, n]`; one of the last dimensions of `b` is contiguous."""
    return matmul_transposed(a[0], b[0].t())[None] if by_head else torch.bmm(a, b)


def _product_over_queries(weights: Tensor, rows: Tensor, by_head: bool) -> Tensor:
    """`weights^T @ rows`, `[G, b, T]` and `[G, b, D]` -> `[G, T, D]`."""
    if by_head:
        return matmul_transposed(rows[0].t(), weights[0].t()).t()[None]
    return torch.bmm(weights.transpose(1, 2), rows)


def _sums_by_distance(ds: Tensor, block: Block, left: int, right: int) -> Tensor:
    """dP: sums of `[G, b, T]` over the keys of each clipped distance, `[G, b, L + R + 1]`."""
    group, num_queries, _ = ds.shape
    span = left + right
    width = num_queries + span
    origin = block.start - left  # key of the buffer's first column
    start, stop = band_keys(block, left, right)
    dtype = torch.promote_types(ds.dtype, torch.float32)
    band = ds.new_zeros(group, num_queries, width, dtype=dtype)
    band[..., start - origin : stop - origin] = ds[..., start:stop]
    shape, strides = (group, num_queries, span + 1), (num_queries * width, width + 1, 1)
    sums = band.as_strided(shape, strides).clone()
    sums[..., 0] += band.tril(-1).sum(-1) + ds[..., :start].sum(-1, dtype=dtype)
    sums[..., -1] += band.triu(span + 1).sum(-1) + ds[..., stop:].sum(-1, dtype=dtype)
    return sums
