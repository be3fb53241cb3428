"""What one operation costs: kernel launches, bytes through device memory, FLOPs, scratch memory.

The rule for bytes is the same for every operation of every implementation: each distinct byte of
its tensors is read once and each byte of its results written once. Caches that keep data from one
operation to the next are not credited, and re-reads within an operation (keys and values by every
query tile, operands of a matrix product by every output tile) are not charged. FLOPs are those of
the mathematics, without what tiles waste at their edges.

An `aten` operation that computes is one launch; some launch more than one kernel on a GPU (a
convolution or a norm first copies an input that is not contiguous), which is not charged. The
`w2vbert` operations are counted as their launchers in `csrc_triton` act: `COSTS` has one function
for each, of its arguments by name and its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from csrc_triton.attention import build_tile_map, tile_bound
from csrc_triton.attention.config import attention_config, scratch_layout
from csrc_triton.fbank.config import normalize_config
from csrc_triton.launch import num_blocks

# FLOPs an element, as the docstrings of csrc_triton count them.
NORM_FLOPS = 8
ACTIVATION_FLOPS = 4
SOFTMAX_FLOPS = 5


@dataclass(frozen=True)
class Cost:
    """Of one operation, or of several together.

    Attributes:
        launches: kernels started.
        read: bytes.
        written: bytes.
        matrix_flops: in matrix products, which have their own units.
        vector_flops: everything else, in fp32.
        double_flops: in fp64.
        temporary: bytes of device memory taken and returned within the operation.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    matrix_flops: int = 0
    vector_flops: int = 0
    double_flops: int = 0
    temporary: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.vector_flops + self.double_flops

    def __add__(self, other: Cost) -> Cost:
        """Sums, but for `temporary`: the larger, because one follows the other."""
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        sums["temporary"] = max(self.temporary, other.temporary)
        return Cost(**sums)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True)
class Context:
    """What a cost depends on besides the arguments.

    Attributes:
        arch: the GPU's architecture, such as "sm_90".
        count: runs a function on tensors without data and gives the cost of what it launches.
    """

    arch: str
    count: Callable[[Callable[[], object]], Cost]


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 0:
            return 0
        elements *= size if stride != 0 else 1
    return min(elements * tensor.itemsize, tensor.untyped_storage().nbytes())


def total_size(tensors: Sequence[Tensor | None]) -> int:
    """Bytes of several tensors; one that is given twice counts once."""
    distinct = {}
    for tensor in tensors:
        if tensor is not None:
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
            distinct[(*place, tuple(tensor.shape), tensor.stride())] = tensor
    return sum(size_of(tensor) for tensor in distinct.values())


# --- the operations of w2vbert_fast.ops ----------------------------------------------------------


def _given(arguments: Mapping[str, Any], *names: str) -> list[Tensor | None]:
    return [arguments.get(name) for name in names]


def _layer_norm(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    read = total_size(_given(a, "x", "weight", "bias"))
    return Cost(1, read, total_size(results), vector_flops=NORM_FLOPS * a["x"].numel())


def _residual_layer_norm(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    read = total_size(_given(a, "residual", "x", "weight", "bias"))
    return Cost(1, read, total_size(results), vector_flops=(NORM_FLOPS + 2) * a["x"].numel())


def _residual_double_layer_norm(
    a: Mapping[str, Any], results: Sequence[Tensor], context: Context
) -> Cost:
    read = total_size(_given(a, "residual", "x", "weight1", "bias1", "weight2", "bias2"))
    return Cost(1, read, total_size(results), vector_flops=(2 * NORM_FLOPS + 2) * a["x"].numel())


def _linear(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    read = total_size(_given(a, "x", "weight", "bias"))
    activated = results[0].numel() if a.get("activation") is not None else 0
    return Cost(
        1,
        read,
        total_size(results),
        matrix_flops=2 * a["x"].shape[0] * a["weight"].numel(),
        vector_flops=ACTIVATION_FLOPS * activated,
    )


def _feed_forward(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    x, weight1 = a["x"], a["weight1"]
    inner = x.new_empty(x.shape[0], weight1.shape[0])
    first = {"x": x, "weight": weight1, "bias": a["bias1"], "activation": a["activation"]}
    second = {"x": inner, "weight": a["weight2"], "bias": a["bias2"]}
    cost = _linear(first, [inner], context) + _linear(second, results, context)
    return cost + Cost(temporary=size_of(inner))


def _linear_glu(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    read = total_size(_given(a, "x", "weight", "bias"))
    flops = 2 * a["x"].shape[0] * a["weight"].numel()
    gates = (ACTIVATION_FLOPS + 1) * results[0].numel()
    return Cost(1, read, total_size(results), matrix_flops=flops, vector_flops=gates)


def _lie_end_to_end(tensors: Sequence[Tensor]) -> bool:
    """As `ops.linear.lie_end_to_end`, for tensors without data, which have no address."""
    first = tensors[0]
    return all(
        tensor.untyped_storage()._cdata == first.untyped_storage()._cdata
        and tensor.storage_offset() == first.storage_offset() + i * first.numel()
        for i, tensor in enumerate(tensors)
    )


def _linear_stacked(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    x, weights, biases = a["x"], a["weights"], a["biases"]
    joined = _lie_end_to_end(weights) and (not biases or _lie_end_to_end(biases))
    launches = 1 if joined else len(weights)
    return Cost(
        launches,
        launches * size_of(x) + total_size([*weights, *biases]),
        total_size(results),
        matrix_flops=2 * x.shape[0] * sum(weight.numel() for weight in weights),
    )


def _conv_norm_act(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    x, weight = a["x"], a["conv_weight"]
    taps = weight.numel() // x.shape[1]
    read = total_size(_given(a, "x", "conv_weight", "norm_weight", "norm_bias", "cu_seqlens"))
    cost = Cost(
        1,
        read,
        total_size(results),
        vector_flops=(2 * taps + NORM_FLOPS + ACTIVATION_FLOPS) * x.numel(),
    )
    if weight.t().stride(1) != 1:  # the launcher first lays it out tap by tap
        size = size_of(weight)
        cost += Cost(1, size, size, temporary=size)
    return cost


def _build_tile_map(
    cu_seqlens: Tensor, block_m: int, num_tokens: int, max_seqlen: int, context: Context
) -> Cost:
    """Of `csrc_triton.attention.build_tile_map`, which is operations of PyTorch."""
    offsets = torch.empty(cu_seqlens.shape, dtype=cu_seqlens.dtype, device="meta")
    return context.count(
        lambda: build_tile_map(offsets, block_m, num_tokens=num_tokens, max_seqlen=max_seqlen)
    )


def _attention_tile_map(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    x = a["x"]
    config = attention_config(a["head_size"], x.dtype, context.arch)
    return _build_tile_map(a["cu_seqlens"], config.block_m, x.shape[0], a["max_seqlen"], context)


def _shaw_attention(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    query, cu_seqlens, max_seqlen = a["query"], a["cu_seqlens"], a["max_seqlen"]
    vectors = a.get("distance_embedding")
    num_tokens, num_heads, head_dim = query.shape
    config = attention_config(head_dim, query.dtype, context.arch)
    batch_size = cu_seqlens.numel() - 1
    work = tile_bound(batch_size, num_tokens, max_seqlen, config.block_m) * num_heads
    # Lengths are data, which a ledger has not: every query meets `max_seqlen` keys.
    scores = num_heads * num_tokens * max_seqlen
    matrix_flops = 4 * scores * head_dim
    launches, scratch, position_bytes = int(work > 0), 0, 0
    if vectors is not None and work > 0:
        layout = scratch_layout(
            config.block_m, config.block_n, a["left_max_position"], a["right_max_position"]
        )
        at_once = max(min(work, config.scratch_limit // (4 * layout.size)), 1)
        launches, scratch = -(-work // at_once), 4 * at_once * layout.size
        position_bytes = 4 * num_heads * num_tokens * vectors.shape[0]
        matrix_flops += 2 * num_heads * num_tokens * vectors.numel()
    cost = Cost()
    if a.get("tile_map") is None:  # the launcher makes its own
        cost = _build_tile_map(cu_seqlens, config.block_m, num_tokens, max_seqlen, context)
    log_sum_exp = 4 * num_heads * num_tokens  # written whether or not it is returned
    operands = _given(a, "query", "key", "value", "cu_seqlens", "distance_embedding", "tile_map")
    return cost + Cost(
        launches,
        # Position scores go through scratch memory: written once, read once.
        total_size(operands) + position_bytes,
        size_of(results[0]) + log_sum_exp + position_bytes,
        matrix_flops=matrix_flops,
        vector_flops=SOFTMAX_FLOPS * scores,
        temporary=scratch + (log_sum_exp if results[1].numel() == 0 else 0),
    )


def _log_mel_filterbank(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    features = results[0]
    num_frames, num_bins = features.shape
    offsets = 3 * size_of(a["cu_seqlens"])
    # Kernel, and the frame offsets: difference, subtraction, clamp, division, sum, pad, conversion.
    return Cost(
        8,
        total_size(_given(a, "waveforms")) + offsets,
        size_of(features) + offsets,
        double_flops=2 * num_frames * 100 * 512,
        vector_flops=2 * num_frames * 256 * num_bins,
    )


def _normalize_and_stack(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    features = a["features"]
    num_frames, num_features = features.shape
    blocks = num_blocks(
        num_frames, a["cu_seqlens"].numel() - 1, normalize_config(context.arch).frames
    )
    sums = 8 * blocks * 2 * num_features  # fp64, of every block and of the squares
    offsets = 3 * size_of(a["cu_seqlens"])
    # Two kernels, and the offsets: difference, division, sum, pad, conversion.
    return Cost(
        7,
        2 * size_of(features) + sums + offsets,
        size_of(results[0]) + sums + offsets,
        double_flops=7 * features.numel(),
        temporary=sums,
    )


def _ctc_greedy(a: Mapping[str, Any], results: Sequence[Tensor], context: Context) -> Cost:
    logits = a["logits"]
    best = 4 * logits.shape[0]  # int32 argmax of every frame, read with its predecessor
    return Cost(
        2,
        total_size(_given(a, "logits", "cu_seqlens")) + 2 * best,
        total_size(results) + best,
        vector_flops=3 * logits.numel(),
        temporary=best,
    )


COSTS: dict[str, Callable[[Mapping[str, Any], Sequence[Tensor], Context], Cost]] = {
    "layer_norm": _layer_norm,
    "residual_layer_norm": _residual_layer_norm,
    "residual_double_layer_norm": _residual_double_layer_norm,
    "linear": _linear,
    "linear_glu": _linear_glu,
    "feed_forward": _feed_forward,
    "linear_stacked": _linear_stacked,
    "conv_norm_act": _conv_norm_act,
    "attention_tile_map": _attention_tile_map,
    "shaw_attention": _shaw_attention,
    "log_mel_filterbank": _log_mel_filterbank,
    "normalize_and_stack": _normalize_and_stack,
    "ctc_greedy": _ctc_greedy,
}

# --- PyTorch's operations ------------------------------------------------------------------------

# They return memory as it comes, or another view of a tensor that `is_view` does not know of.
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "set_",
}
# They read as many elements as they return, of the tensor named, and all of the others.
_GATHERS = {
    "embedding": "weight",
    "index_select": "self",
    "gather": "self",
    "index": "self",
}
_OVERWRITE = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_"}
_NO_ARITHMETIC = {
    *("clone", "copy_", "_to_copy", "cat", "stack", "constant_pad_nd", "arange", "zeros", "ones"),
    *("full", "fill_", "zero_", "new_zeros", "new_full", "zeros_like", "repeat_interleave"),
    *("scatter", "index_copy", "index_copy_", "index_put", "index_put_", "slice_scatter", "roll"),
    *_GATHERS,
}
_VECTOR_FLOPS = {
    "native_layer_norm": NORM_FLOPS,
    "_softmax": SOFTMAX_FLOPS,
    "_log_softmax": SOFTMAX_FLOPS,
    "silu": ACTIVATION_FLOPS,
    "sigmoid": ACTIVATION_FLOPS,
    "gelu": ACTIVATION_FLOPS,
    "glu": ACTIVATION_FLOPS + 1,
    "native_layer_norm_backward": 2 * NORM_FLOPS,
    "_softmax_backward_data": SOFTMAX_FLOPS,
    "silu_backward": 2 * ACTIVATION_FLOPS,
    "glu_backward": 2 * ACTIVATION_FLOPS,
    "native_dropout": 2,
}


def launches(func: torch._ops.OpOverload) -> bool:
    """Whether a PyTorch operation does anything on the device."""
    return not func.is_view and func.overloadpacket.__name__ not in _NO_LAUNCH


def aten_cost(
    func: torch._ops.OpOverload,
    arguments: Mapping[str, Any],
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
    flops_of: Callable[[Any], int],
) -> Cost:
    """Cost of an operation of PyTorch that `launches`.

    Args:
        func: the operation.
        arguments: by name.
        tensors: those of `arguments` that lie on the device.
        results: those on the device.
        flops_of: calls a function of `torch.utils.flop_counter` with the operation's arguments.
    """
    name = func.overloadpacket.__name__
    written = total_size(results)
    if name in _GATHERS:
        source = arguments[_GATHERS[name]]
        others = [tensor for tensor in tensors if tensor is not source]
        read = min(size_of(source), written) + total_size(others)
    elif name in _OVERWRITE:
        read = total_size([tensor for tensor in tensors if tensor is not arguments["self"]])
    else:
        read = total_size(tensors)
    matrix, vector = 0, 0
    counter = flop_registry.get(func.overloadpacket)
    if counter is not None:
        matrix = flops_of(counter)
        if name.startswith("convolution") and arguments["groups"] > 1:  # depthwise: no products
            # The counter takes the gradient of the weight for that of a dense one.
            taps = arguments["weight"].numel() // arguments["weight"].shape[0]
            outputs = arguments.get("grad_output", results[0] if results else None)
            wanted = sum(arguments.get("output_mask", [True])[:2])
            matrix, vector = 0, 2 * taps * outputs.numel() * wanted
        elif "attention" in name:
            batch, heads, frames, _ = arguments["query"].shape
            scores = batch * heads * frames * arguments["key"].shape[2]
            vector = SOFTMAX_FLOPS * scores
            vector += scores if arguments.get("attn_bias") is not None else 0
    elif name not in _NO_ARITHMETIC:
        elements = max((result.numel() for result in results), default=0)
        vector = _VECTOR_FLOPS.get(name, 1) * elements
    return Cost(1, read, written, matrix_flops=matrix, vector_flops=vector)
