"""What the operations of `w2vbert_fast.ops` cost, counted as their launchers in `csrc_triton` act.

`COSTS` has a function for each operation; that of a gradient follows its operation's. What a
launcher leaves to PyTorch (products, sums of shares, tables of offsets) is counted by running it on
tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.ledger.cost import (
    ACTIVATION_FLOPS,
    NORM_FLOPS,
    SOFTMAX_FLOPS,
    Call,
    Cost,
    size_of,
    total_size,
)
from csrc_triton.architectures import multiprocessors
from csrc_triton.attention import build_tile_map, tile_bound
from csrc_triton.attention.config import (
    attention_backward_config,
    attention_config,
    num_programs,
    scores_layout,
    scratch_layout,
)
from csrc_triton.conv.config import conv_backward_config
from csrc_triton.fbank.config import fbank_config, normalize_config
from csrc_triton.fbank.tables import FOLDED, dft_basis, mel_filters, povey_window
from csrc_triton.gemm.backward import products
from csrc_triton.gemm.config import epilogue_backward_config
from csrc_triton.launch import num_blocks
from csrc_triton.norm.config import norm_backward_config

COSTS: dict[str, Callable[[Call], Cost]] = {}
"""By name of the operation."""

_FLOAT32 = torch.float32


def _operation(function: Callable[[Call], Cost]) -> Callable[[Call], Cost]:
    COSTS[function.__name__] = function
    return function


def _shares(call: Call, like: Tensor, count: int, *shape: int) -> Cost:
    """Shares of a sum, one from each program: written, read and added up."""
    shares = like.new_empty((count, *shape), dtype=_FLOAT32)
    size = size_of(shares)
    return Cost(0, 0, size, temporary=size) + call.count(lambda: shares.sum(0))


# --- norms ---------------------------------------------------------------------------------------


@_operation
def layer_norm(call: Call) -> Cost:
    return call.once(vector_flops=NORM_FLOPS * call["x"].numel())


@_operation
def residual_layer_norm(call: Call) -> Cost:
    return call.once(vector_flops=(NORM_FLOPS + 2) * call["x"].numel())


@_operation
def residual_double_layer_norm(call: Call) -> Cost:
    return call.once(vector_flops=(2 * NORM_FLOPS + 2) * call["x"].numel())


def _norm_backward(call: Call, x: Tensor, norms: int) -> Cost:
    """Of the kernel that all norms share, for one or two in a row."""
    config = norm_backward_config(x.shape[1], x.dtype, call.arch)
    programs = min(config.programs, -(-x.shape[0] // config.rows))
    gradients = [result for result in call.results if result.dim() == 2]
    flops = 2 * NORM_FLOPS * norms * x.numel()
    cost = Cost(1, call.read, total_size(gradients), vector_flops=flops)
    return cost + _shares(call, x, programs, 2 * norms, x.shape[1])


@_operation
def layer_norm_backward(call: Call) -> Cost:
    return _norm_backward(call, call["x"], 1)


@_operation
def residual_layer_norm_backward(call: Call) -> Cost:
    return _norm_backward(call, call["y"], 1)


@_operation
def residual_double_layer_norm_backward(call: Call) -> Cost:
    return _norm_backward(call, call["x"], 2)


# --- linear layers -------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    """Of `x @ weight.T + bias`."""
    y_size = x.shape[0] * weight.shape[0] * x.itemsize
    flops = 2 * x.shape[0] * weight.numel()
    return Cost(1, total_size([x, weight, bias]), y_size, matrix_flops=flops)


def _activation(call: Call, elements: int) -> Cost:
    return Cost(vector_flops=ACTIVATION_FLOPS * elements if call["activation"] else 0)


def _epilogue(call: Call, grad: Tensor, gated: bool, activated: bool, has_bias: bool) -> Cost:
    """Of the elementwise kernel behind a product, whose result takes the place of an operand."""
    rows, columns = grad.shape
    width = 2 * columns if gated else columns
    config = epilogue_backward_config(columns, grad.dtype, call.arch)
    programs = min(config.programs, -(-rows // config.rows))
    y_size = rows * width * grad.itemsize
    written = y_size + (size_of(grad) if activated else 0)
    flops = (2 * ACTIVATION_FLOPS + 1) * rows * width
    cost = Cost(1, size_of(grad) + y_size, written, vector_flops=flops)
    return cost + _shares(call, grad, programs, width) if has_bias else cost


def _again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    """Of a product that the backward pass computes again and drops."""
    cost = _product(x, weight, bias)
    return cost + Cost(temporary=cost.written)


def _vendor(call: Call, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Cost:
    """The two products of a linear layer's gradient, of the vendor's library."""
    return call.count(lambda: products(grad, x, weight, needs))


@_operation
def linear(call: Call) -> Cost:
    (y,) = call.results
    return _product(call["x"], call["weight"], call["bias"]) + _activation(call, y.numel())


@_operation
def linear_backward(call: Call) -> Cost:
    grad, x, weight, bias, needs = (call[n] for n in ("grad", "x", "weight", "bias", "needs"))
    has_bias = needs[2] and bias is not None
    cost = Cost()
    if call["activation"] is not None:
        cost = _again(x, weight, bias) + _epilogue(call, grad, False, False, has_bias)
    elif has_bias:
        cost = call.count(lambda: grad.sum(0, dtype=_FLOAT32))
    return cost + _vendor(call, grad, x, weight, needs)


@_operation
def linear_glu(call: Call) -> Cost:
    flops = 2 * call["x"].shape[0] * call["weight"].numel()
    gates = (ACTIVATION_FLOPS + 1) * call.results[0].numel()
    return call.once(matrix_flops=flops, vector_flops=gates)


@_operation
def linear_glu_backward(call: Call) -> Cost:
    grad, x, weight, bias, needs = (call[n] for n in ("grad", "x", "weight", "bias", "needs"))
    has_bias = needs[2] and bias is not None
    cost = _again(x, weight, bias) + _epilogue(call, grad, True, False, has_bias)
    dy = x.new_empty(x.shape[0], weight.shape[0])
    return cost + _vendor(call, dy, x, weight, needs)


def _lie_end_to_end(tensors: Sequence[Tensor]) -> bool:
    """As `ops.gemm.lie_end_to_end`, for tensors without data, which have no address."""
    first = tensors[0]
    return all(
        tensor.untyped_storage()._cdata == first.untyped_storage()._cdata
        and tensor.storage_offset() == first.storage_offset() + i * first.numel()
        for i, tensor in enumerate(tensors)
    )


@_operation
def linear_stacked(call: Call) -> Cost:
    x, weights, biases = call["x"], call["weights"], call["biases"]
    joined = _lie_end_to_end(weights) and (not biases or _lie_end_to_end(biases))
    launches = 1 if joined else len(weights)
    return Cost(
        launches,
        launches * size_of(x) + total_size([*weights, *biases]),
        total_size(call.results),
        matrix_flops=2 * x.shape[0] * sum(weight.numel() for weight in weights),
    )


@_operation
def feed_forward(call: Call) -> Cost:
    x, weight1 = call["x"], call["weight1"]
    inner = x.new_empty(x.shape[0], weight1.shape[0])
    cost = _product(x, weight1, call["bias1"]) + _activation(call, inner.numel())
    cost += _product(inner, call["weight2"], call["bias2"])
    return cost + Cost(temporary=size_of(inner))


@_operation
def feed_forward_backward(call: Call) -> Cost:
    grad, x, needs = call["grad"], call["x"], call["needs"]
    weight1, bias1, weight2, bias2 = (call[n] for n in ("weight1", "bias1", "weight2", "bias2"))
    inner = x.new_empty(x.shape[0], weight1.shape[0])
    cost = Cost()
    if needs[4] and bias2 is not None:
        cost += call.count(lambda: grad.sum(0, dtype=_FLOAT32))
    if any(needs[:4]):
        cost += _again(x, weight1, bias1)
        cost += _vendor(call, grad, inner, weight2, (True, needs[3]))
        cost += _epilogue(call, inner, False, True, needs[2] and bias1 is not None)
        cost += _vendor(call, inner, x, weight1, needs)
        cost += Cost(temporary=2 * size_of(inner))
    return cost


# --- convolution ---------------------------------------------------------------------------------


def _tap_by_tap(weight: Tensor) -> Cost:
    """Of the launcher's copy of a weight that is not laid out tap by tap."""
    size = size_of(weight) if weight.t().stride(1) != 1 else 0
    return Cost(int(size > 0), size, size)


@_operation
def conv_norm_act(call: Call) -> Cost:
    x, weight = call["x"], call["conv_weight"]
    taps = weight.numel() // x.shape[1]
    copy = _tap_by_tap(weight)
    cost = call.once(vector_flops=(2 * taps + NORM_FLOPS + ACTIVATION_FLOPS) * x.numel())
    return cost + copy + Cost(temporary=copy.written)


@_operation
def conv_norm_act_backward(call: Call) -> Cost:
    grad, x, weight = call["grad"], call["x"], call["conv_weight"]
    (tokens, channels), taps = x.shape, weight.shape[1]
    config = conv_backward_config(channels, taps, x.dtype, call.arch)
    chunks = num_blocks(tokens, call["cu_seqlens"].numel() - 1, config.chunk)
    programs = min(config.norm.programs, -(-tokens // config.norm.rows))
    rows, offsets = size_of(x), size_of(call["cu_seqlens"])
    small = size_of(weight) + offsets
    norms = total_size([call["norm_weight"], call["norm_bias"]])
    products = 2 * taps * x.numel()
    pointwise = (2 * NORM_FLOPS + 2 * ACTIVATION_FLOPS) * x.numel()
    # The convolution again; norm and activation backwards, in place; dx; dweight.
    cost = Cost(1, rows + small, rows, vector_flops=products)
    cost += Cost(1, size_of(grad) + rows + norms, rows, vector_flops=pointwise)
    cost += Cost(1, rows + small, rows, vector_flops=products)
    cost += Cost(1, 2 * rows + offsets, 0, vector_flops=products)
    cost += _shares(call, x, programs, 2, channels)
    cost += _shares(call, x, chunks, taps, channels)
    cost += _tap_by_tap(weight)
    gradient = x.new_empty(taps, channels, dtype=_FLOAT32)  # to the parameter's layout
    cost += call.count(lambda: gradient.t().contiguous())
    return cost + Cost(temporary=rows + 4 * chunks * taps * channels)


# --- attention -----------------------------------------------------------------------------------


def _tile_map(call: Call, block_m: int, num_tokens: int) -> Cost:
    """Of `csrc_triton.attention.build_tile_map`, which is operations of PyTorch."""
    cu_seqlens, longest = call["cu_seqlens"], call["max_seqlen"]
    offsets = torch.empty(cu_seqlens.shape, dtype=cu_seqlens.dtype, device="meta")
    return call.count(
        lambda: build_tile_map(offsets, block_m, num_tokens=num_tokens, max_seqlen=longest)
    )


@_operation
def attention_tile_map(call: Call) -> Cost:
    x = call["x"]
    block_m = attention_config(call["head_size"], x.dtype, call.arch).block_m
    return _tile_map(call, block_m, x.shape[0])


def _scores_row(vectors: Tensor) -> int:
    """Bytes of the position scores of one query: they begin anywhere in a sector of 32 bytes."""
    return 4 * vectors.shape[0] + 28


def _attention(call: Call, output: Tensor, keeps_log_sum_exp: bool) -> Cost:
    query, vectors, max_seqlen = call["query"], call["distance_embedding"], call["max_seqlen"]
    num_tokens, num_heads, head_dim = query.shape
    config = attention_config(head_dim, query.dtype, call.arch)
    batch_size = call["cu_seqlens"].numel() - 1
    work = tile_bound(batch_size, num_tokens, max_seqlen, config.block_m) * num_heads
    # Lengths are data, which a ledger has not: every query meets `max_seqlen` keys.
    scores = num_heads * num_tokens * max_seqlen
    matrix_flops = 4 * scores * head_dim
    launches, scratch, position_bytes = int(work > 0), 0, 0
    if vectors is not None and work > 0:
        layout = scratch_layout(
            config.block_m, config.block_n, call["left_max_position"], call["right_max_position"]
        )
        programs = num_programs(config, layout, work, multiprocessors(call.arch))
        scratch = 4 * programs * layout.size
        # Of whole tiles, rows behind an utterance's end too.
        position_bytes = work * config.block_m * _scores_row(vectors)
        matrix_flops += 2 * num_heads * num_tokens * vectors.numel()
    cost = Cost()
    if call["tile_map"] is None:  # the launcher makes its own
        cost = _tile_map(call, config.block_m, num_tokens)
    log_sum_exp = 4 * num_heads * num_tokens  # written whether or not it is returned
    operands = ("query", "key", "value", "cu_seqlens", "distance_embedding", "tile_map")
    return cost + Cost(
        launches,
        # Position scores go through scratch memory: written once, read once.
        total_size(call[name] for name in operands) + position_bytes,
        size_of(output) + log_sum_exp + position_bytes,
        matrix_flops=matrix_flops,
        vector_flops=SOFTMAX_FLOPS * scores,
        temporary=scratch + (0 if keeps_log_sum_exp else log_sum_exp),
    )


@_operation
def shaw_attention(call: Call) -> Cost:
    output, log_sum_exp = call.results
    return _attention(call, output, log_sum_exp.numel() > 0)


@_operation
def shaw_attention_backward(call: Call) -> Cost:
    query, cu_seqlens, max_seqlen = call["query"], call["cu_seqlens"], call["max_seqlen"]
    vectors, dropout = call["distance_embedding"], (call["dropout_p"] or 0.0) > 0.0
    tokens, num_heads, head_dim = query.shape
    kind = (head_dim, query.dtype, call.arch)
    config = attention_backward_config(*kind, has_dropout=dropout)
    batch = cu_seqlens.numel() - 1
    tiles = tile_bound(batch, tokens, max_seqlen, config.tile)
    cost = Cost()
    if call["log_sum_exp"].numel() == 0:  # the forward pass kept none
        cost += _attention(call, query, True)
    same_tiles = config.tile == attention_config(*kind).block_m
    if call["tile_map"] is None or not same_tiles:
        cost += _tile_map(call, config.tile, tokens)
    heads, scratch, positions, distances = num_heads, 0, 0, 0
    if vectors is not None:
        left, right = call["left_max_position"], call["right_max_position"]
        layout = scores_layout(config, batch, tokens, left, right)
        heads = min(max(config.scratch_limit // (4 * layout.head_size), 1), num_heads)
        scratch = 4 * (layout.front + heads * layout.head_size + layout.back)
        distances = vectors.shape[0]
        positions = num_heads * tokens * _scores_row(vectors)
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
    # Queries: P is overwritten by its gradient, which is read back while it is near.
    queries = Cost(
        groups,
        4 * rows + positions + shifts + one + embedding + offsets,
        rows + 4 * num_heads * tokens * distances,
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
            cost += call.count(lambda shares=shares: shares.sum(0))  # type: ignore[misc]
            if group > 0:
                cost += call.count(lambda: gradient + gradient)
        temporary += 4 * tiles * heads * vectors.numel()
    return cost + Cost(temporary=temporary + 4 * heads * tokens)


# --- features and CTC ----------------------------------------------------------------------------


@_operation
def log_mel_filterbank(call: Call) -> Cost:
    features = call.results[0]
    num_frames, num_bins = features.shape
    offsets = 3 * size_of(call["cu_seqlens"])
    # What is kept for a device: window, the whole steps of the basis, triangles.
    double = torch.float64
    step = fbank_config(double, call.arch).block_k
    basis = dft_basis(features.device, double)[:, : -(-FOLDED // step) * step]
    filters = mel_filters(features.device, num_bins, call["sampling_rate"])
    kept = size_of(povey_window(features.device, double)) + size_of(basis) + size_of(filters)
    # Kernel, and the frame offsets: difference, subtraction, clamp, division, sum, pad, conversion.
    return Cost(
        8,
        size_of(call["waveforms"]) + offsets + kept,
        size_of(features) + offsets,
        double_flops=2 * num_frames * 100 * 512,
        vector_flops=2 * num_frames * 256 * num_bins,
    )


@_operation
def normalize_and_stack(call: Call) -> Cost:
    features, cu_seqlens = call["features"], call["cu_seqlens"]
    num_frames, num_features = features.shape
    blocks = num_blocks(num_frames, cu_seqlens.numel() - 1, normalize_config(call.arch).frames)
    sums = 8 * blocks * 2 * num_features  # fp64, of every block and of the squares
    offsets = 3 * size_of(cu_seqlens)
    # Two kernels, and the offsets: difference, division, sum, pad, conversion.
    return Cost(
        7,
        2 * size_of(features) + sums + offsets,
        size_of(call.results[0]) + sums + offsets,
        double_flops=7 * features.numel(),
        temporary=sums,
    )


@_operation
def ctc_greedy(call: Call) -> Cost:
    logits = call["logits"]
    best = 4 * logits.shape[0]  # int32 argmax of every frame, read with its predecessor
    extra = Cost(1, best, best, temporary=best)
    return call.once(vector_flops=3 * logits.numel()) + extra
