"""What PyTorch's own operations cost.

An operation that computes is one launch; some launch more than one kernel on a GPU (a convolution
or a norm first copies an input that is not contiguous), which is not charged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.ledger.cost import ACTIVATION_FLOPS, NORM_FLOPS, SOFTMAX_FLOPS, Cost, size_of, total_size

# They return memory as it comes, or another view of a tensor that `is_view` does not know of.
_NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "set_"),
}
# They read as many elements as they return, of the tensor named, and all of the others.
_GATHERS = {"embedding": "weight", "index_select": "self", "gather": "self", "index": "self"}
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
