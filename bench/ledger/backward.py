"""What the backward operations cost on a GPU: launches, bytes moved, FLOPs.

As `costs`, and counted the same way, from the arguments as the launchers of `csrc_triton`
act. What a launcher leaves to PyTorch (products, sums of shares) is counted by running it on
tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from csrc_triton.attention import tile_bound
from csrc_triton.attention.config import attention_backward_config, attention_config, scores_layout
from csrc_triton.conv.config import conv_backward_config
from csrc_triton.gemm.backward import _products
from csrc_triton.gemm.config import epilogue_backward_config
from csrc_triton.launch import num_blocks
from csrc_triton.norm.config import norm_backward_config

from .costs import (
    ACTIVATION_FLOPS,
    COSTS,
    NORM_FLOPS,
    SOFTMAX_FLOPS,
    Context,
    Cost,
    _build_tile_map,
    size_of,
    total_size,
)

Arguments = Mapping[str, Any]
_FLOAT32 = torch.float32


def _shares(like: Tensor, count: int, *shape: int, context: Context) -> Cost:
    """Shares of a sum, one from each program: written, read and added up."""
    shares = like.new_empty((count, *shape), dtype=_FLOAT32)
    return Cost(0, 0, size_of(shares), temporary=size_of(shares)) + context.count(
        lambda: shares.sum(0)
    )


def _norm(
    a: Arguments, results: Sequence[Tensor], context: Context, rows: Sequence[str], norms: int
) -> Cost:
    """Of the kernel that all norms share.

    Args:
        a: the arguments.
        results: of the operation.
        context: as in `costs`.
        rows: names of the arguments that have a row for each token; the last is there in any case.
        norms: one or two in a row.
    """
    x = a[rows[-1]]
    config = norm_backward_config(x.shape[1], x.dtype, context.arch)
    programs = min(config.programs, -(-x.shape[0] // config.rows))
    vectors = [value for name, value in a.items() if name.startswith(("weight", "bias"))]
    operands = [a.get(name) for name in rows] + vectors
    gradients = [result for result in results if result.dim() == 2]
    flops = 2 * NORM_FLOPS * norms * x.numel()
    cost = Cost(1, total_size(operands), total_size(gradients), vector_flops=flops)
    return cost + _shares(x, programs, 2 * norms, x.shape[1], context=context)


def _layer_norm(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    return _norm(a, results, context, ("grad", "x"), 1)


def _residual_layer_norm(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    return _norm(a, results, context, ("grad_y", "grad_z", "y"), 1)


def _residual_double_layer_norm(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    return _norm(a, results, context, ("grad_z1", "grad_z2", "residual", "x"), 2)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    """Of `x @ weight.T + bias` in the kernel of the forward pass, computed again."""
    y_size = x.shape[0] * weight.shape[0] * x.itemsize
    flops = 2 * x.shape[0] * weight.numel()
    return Cost(1, total_size([x, weight, bias]), y_size, matrix_flops=flops, temporary=y_size)


def _epilogue(grad: Tensor, gated: bool, activated: bool, has_bias: bool, context: Context) -> Cost:
    """Of the elementwise kernel behind a product, whose result takes the place of an operand."""
    rows, columns = grad.shape
    width = 2 * columns if gated else columns
    config = epilogue_backward_config(columns, grad.dtype, context.arch)
    programs = min(config.programs, -(-rows // config.rows))
    y_size = rows * width * grad.itemsize
    written = y_size + (size_of(grad) if activated else 0)
    flops = (2 * ACTIVATION_FLOPS + 1) * rows * width
    cost = Cost(1, size_of(grad) + y_size, written, vector_flops=flops)
    return cost + _shares(grad, programs, width, context=context) if has_bias else cost


def _vendor(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], context: Context
) -> Cost:
    """The two products of a linear layer's gradient, of the vendor's library."""
    wanted = (needs[0], needs[1], False)
    return context.count(lambda: _products(grad, x, weight, 1.0, wanted))


def _linear(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    grad, x, weight, bias, needs = (a[n] for n in ("grad", "x", "weight", "bias", "needs"))
    has_bias = needs[2] and bias is not None
    cost = Cost()
    if a.get("activation") is not None:
        cost = _product(x, weight, bias) + _epilogue(grad, False, False, has_bias, context)
    elif has_bias:
        cost = context.count(lambda: grad.sum(0, dtype=_FLOAT32))
    return cost + _vendor(grad, x, weight, needs, context)


def _linear_glu(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    grad, x, weight, bias, needs = (a[n] for n in ("grad", "x", "weight", "bias", "needs"))
    has_bias = needs[2] and bias is not None
    cost = _product(x, weight, bias) + _epilogue(grad, True, False, has_bias, context)
    dy = x.new_empty(x.shape[0], weight.shape[0])
    return cost + _vendor(dy, x, weight, needs, context)


def _feed_forward(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    grad, x, needs = a["grad"], a["x"], a["needs"]
    weight1, bias1, weight2, bias2 = (a[n] for n in ("weight1", "bias1", "weight2", "bias2"))
    inner = x.new_empty(x.shape[0], weight1.shape[0])
    cost = Cost()
    if needs[4] and bias2 is not None:
        cost += context.count(lambda: grad.sum(0, dtype=_FLOAT32))
    if any(needs[:4]):
        cost += _product(x, weight1, bias1)
        cost += _vendor(grad, inner, weight2, (True, needs[3]), context)
        cost += _epilogue(inner, False, True, needs[2] and bias1 is not None, context)
        cost += _vendor(inner, x, weight1, needs, context)
        cost += Cost(temporary=2 * size_of(inner))
    return cost


def _conv_norm_act(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    grad, x, weight = a["grad"], a["x"], a["conv_weight"]
    (tokens, channels), taps = x.shape, a["conv_weight"].shape[1]
    config = conv_backward_config(channels, taps, x.dtype, context.arch)
    batch = a["cu_seqlens"].numel() - 1
    chunks = num_blocks(tokens, batch, config.chunk)
    programs = min(config.norm.programs, -(-tokens // config.norm.rows))
    rows, small = size_of(x), size_of(weight) + size_of(a["cu_seqlens"])
    norms = total_size([a["norm_weight"], a["norm_bias"]])
    products = 2 * taps * x.numel()
    pointwise = (2 * NORM_FLOPS + 2 * ACTIVATION_FLOPS) * x.numel()
    # The convolution again; norm and activation backwards, in place; dx; dweight.
    cost = Cost(1, rows + small, rows, vector_flops=products)
    cost += Cost(1, size_of(grad) + rows + norms, rows, vector_flops=pointwise)
    cost += Cost(1, rows + small, rows, vector_flops=products)
    cost += Cost(1, 2 * rows + size_of(a["cu_seqlens"]), 0, vector_flops=products)
    cost += _shares(x, programs, 2, channels, context=context)
    cost += _shares(x, chunks, taps, channels, context=context)
    if weight.t().stride(1) != 1:  # the launcher first lays it out tap by tap
        cost += Cost(1, size_of(weight), size_of(weight))
    gradient = results[1]  # from tap by tap to the parameter's layout
    cost += Cost(1, size_of(gradient), size_of(gradient))
    return cost + Cost(temporary=rows + 4 * chunks * taps * channels)


def _shaw_attention(a: Arguments, results: Sequence[Tensor], context: Context) -> Cost:
    query, cu_seqlens, max_seqlen = a["query"], a["cu_seqlens"], a["max_seqlen"]
    vectors, dropout = a.get("distance_embedding"), (a.get("dropout_p") or 0.0) > 0.0
    tokens, num_heads, head_dim = query.shape
    kind = (head_dim, query.dtype, context.arch)
    config = attention_backward_config(*kind, has_dropout=dropout)
    batch = cu_seqlens.numel() - 1
    tiles = tile_bound(batch, tokens, max_seqlen, config.tile)
    cost = Cost()
    if a["log_sum_exp"].numel() == 0:  # the forward pass kept none
        forward = {**a, "tile_map": a.get("tile_map")}
        row = query.new_empty(num_heads, tokens, dtype=_FLOAT32)
        cost += COSTS["shaw_attention"](forward, [query, row], context)
    same_tiles = config.tile == attention_config(*kind).block_m
    if a.get("tile_map") is None or not same_tiles:
        cost += _build_tile_map(cu_seqlens, config.tile, tokens, max_seqlen, context)
    heads, scratch, positions, distances = num_heads, 0, 0, 0
    if vectors is not None:
        left, right = a["left_max_position"], a["right_max_position"]
        layout = scores_layout(config, batch, tokens, left, right)
        heads = min(max(config.scratch_limit // (4 * layout.head_size), 1), num_heads)
        scratch = 4 * (layout.front + heads * layout.head_size + layout.back)
        distances = vectors.shape[0]
        positions = 4 * num_heads * tokens * distances  # fp32
        # The gradient of the distance embedding begins as zeros.
        cost += Cost(1, 0, 4 * vectors.numel())
    groups = -(-num_heads // heads)
    rows = size_of(query)  # as large as key, value, output and their gradients
    one = 4 * num_heads * tokens  # a number of each row of scores
    shifts = (2 if vectors is not None else 1) * one
    embedding = 0 if vectors is None else size_of(vectors)
    offsets = size_of(cu_seqlens) + 8 * tiles
    # Of every query with all keys of the longest utterance, as in the forward pass.
    scores = num_heads * tokens * max_seqlen
    products = 2 * head_dim * num_heads * tokens * distances
    # Prepare: o . g, and the position scores P.
    prepare = Cost(
        groups,
        3 * rows + one + embedding + offsets,
        positions + shifts + one,
        matrix_flops=products,
        vector_flops=2 * query.numel(),
    )
    # Keys: P is read where an interior distance has a key; the others are in `shifts`.
    keys = Cost(
        groups,
        4 * rows + positions + shifts + one + offsets,
        2 * rows,
        matrix_flops=8 * head_dim * scores,
        vector_flops=SOFTMAX_FLOPS * scores,
    )
    # Queries: P is overwritten by its gradient, which is read back.
    queries = Cost(
        groups,
        4 * rows + 2 * positions + shifts + one + embedding + offsets,
        rows + positions,
        matrix_flops=6 * head_dim * scores + 2 * products,
        vector_flops=SOFTMAX_FLOPS * scores,
    )
    cost += prepare + keys + queries
    temporary = scratch + (2 if vectors is not None else 1) * 4 * heads * tokens
    if vectors is not None:
        gradient = vectors.new_empty(vectors.shape, dtype=_FLOAT32)
        for group in range(groups):
            count = min(heads, num_heads - group * heads) * tiles
            shares = vectors.new_empty((count, *vectors.shape), dtype=_FLOAT32)
            cost += Cost(0, 0, size_of(shares))
            cost += context.count(lambda shares=shares: gradient.add_(shares.sum(0)))  # type: ignore[misc]
        temporary += 4 * tiles * heads * vectors.numel()
    return cost + Cost(temporary=temporary + 4 * heads * tokens)


BACKWARD_COSTS: dict[str, Callable[[Arguments, Sequence[Tensor], Context], Cost]] = {
    "layer_norm_backward": _layer_norm,
    "residual_layer_norm_backward": _residual_layer_norm,
    "residual_double_layer_norm_backward": _residual_double_layer_norm,
    "linear_backward": _linear,
    "linear_glu_backward": _linear_glu,
    "feed_forward_backward": _feed_forward,
    "conv_norm_act_backward": _conv_norm_act,
    "shaw_attention_backward": _shaw_attention,
}
