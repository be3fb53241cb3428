"""The gradient of `attention.shaw_attention`, as an operation of its own.

The forward pass keeps query, key, value, the output, the log-sum-exp where the Triton kernels read
it, and the seed of dropout; scores and the dropout mask are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import has_kernel, shaw_attention_op
from .registry import backward_operation, dense_rows, differentiable


def _empty_like_inputs(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the gradients of query, key and value go."""
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _empty_like_embedding(query: Tensor, embedding: Tensor | None) -> Tensor:
    """The distance embedding's gradient, without values; without elements where there is none."""
    shape = (0,) if embedding is None else embedding.shape
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty_like_inputs(query), _empty_like_embedding(query, distance_embedding)


@backward_operation(
    "shaw_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor log_sum_exp, Tensor cu_seqlens, SymInt max_seqlen, Tensor? distance_embedding, "
    "int left_max_position, int right_max_position, Tensor? tile_map, float dropout_p, "
    "Tensor? dropout_seed, Tensor? seqused_k=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def shaw_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left_max_position: int,
    right_max_position: int,
    tile_map: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value `[N, H, D]` and, float32 at least, of the distance
    embedding, which has no elements where there is none."""
    left, right = left_max_position, right_max_position
    if distance_embedding is not None:
        distance_embedding = distance_embedding.to(query.dtype)
    if has_kernel(query):
        from csrc_triton.attention import shaw_attention_backward as kernel

        if log_sum_exp.numel() == 0 and query.numel() > 0:
            _, log_sum_exp = shaw_attention_op(
                query,
                key,
                value,
                cu_seqlens,
                max_seqlen,
                distance_embedding,
                left,
                right,
                tile_map,
                seqused_k=seqused_k,
            )
        *inputs, grad_embedding = kernel(
            dense_rows(grad),
            query,
            key,
            value,
            output,
            log_sum_exp,
            cu_seqlens,
            max_seqlen,
            distance_embedding=distance_embedding,
            left_max_position=left,
            right_max_position=right,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            tile_map=tile_map if _same_tiles(query, dropout_p) else None,
            out=_empty_like_inputs(query),
            seqused_k=seqused_k,
        )
    else:
        from .cpu.attention_backward import shaw_attention_backward

        *inputs, grad_embedding = shaw_attention_backward(
            grad,
            query,
            key,
            value,
            output,
            cu_seqlens,
            distance_embedding,
            left,
            right,
            dropout_p,
            dropout_seed,
            seqused_k,
        )
    if grad_embedding is None:
        grad_embedding = _empty_like_embedding(query, None)
    return inputs[0], inputs[1], inputs[2], grad_embedding


def _same_tiles(query: Tensor, dropout_p: float) -> bool:
    """Whether the work list of the forward pass is that of the backward pass."""
    from csrc_triton.architectures import architecture
    from csrc_triton.attention.config import attention_backward_config, attention_config

    kind = (query.shape[2], query.dtype, architecture(query.device))
    tile = attention_backward_config(*kind, has_dropout=dropout_p > 0.0).tile
    return tile == attention_config(*kind).block_m


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.max_seqlen, embedding, ctx.left, ctx.right = inputs[:8]
    tile_map, _, ctx.dropout_p, seed, seqused_k = inputs[8:]
    attended, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        query, key, value, attended, log_sum_exp, cu_seqlens, embedding, tile_map, seed, seqused_k
    )


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    *tensors, embedding, tile_map, seed, seqused_k = ctx.saved_tensors
    layout = (embedding, ctx.left, ctx.right, tile_map)
    *grads, grad_embedding = shaw_attention_backward_op(
        grad, *tensors, ctx.max_seqlen, *layout, ctx.dropout_p, seed, seqused_k
    )
    grad_embedding = None if embedding is None else grad_embedding.to(embedding.dtype)
    return *grads, None, None, grad_embedding, *(None,) * 7


differentiable("shaw_attention", _setup, _gradient)
