"""The arithmetic of our kernels, by operation: FLOPs of the mathematics.

`FLOPS` has a function for each operation; that of a gradient follows its operation's. What a
launcher leaves to PyTorch (products, sums of shares, tables of offsets), and operations that call
others, are counted as they run.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.ledger.cost import ACTIVATION_FLOPS, NORM_FLOPS, SOFTMAX_FLOPS, Call, Cost

FLOPS: dict[str, Callable[[Call], Cost]] = {}
"""By name of the operation."""


def _operation(function: Callable[[Call], Cost]) -> Callable[[Call], Cost]:
    FLOPS[function.__name__] = function
    return function


# --- norms ---------------------------------------------------------------------------------------


@_operation
def layer_norm(call: Call) -> Cost:
    return Cost(vector_flops=NORM_FLOPS * call["x"].numel())


@_operation
def residual_layer_norm(call: Call) -> Cost:
    return Cost(vector_flops=(NORM_FLOPS + 2) * call["x"].numel())


@_operation
def residual_double_layer_norm(call: Call) -> Cost:
    return Cost(vector_flops=(2 * NORM_FLOPS + 2) * call["x"].numel())


@_operation
def layer_norm_backward(call: Call) -> Cost:
    return Cost(vector_flops=2 * NORM_FLOPS * call["x"].numel())


@_operation
def residual_layer_norm_backward(call: Call) -> Cost:
    return Cost(vector_flops=2 * NORM_FLOPS * call["y"].numel())


@_operation
def residual_double_layer_norm_backward(call: Call) -> Cost:
    return Cost(vector_flops=4 * NORM_FLOPS * call["x"].numel())


# --- linear layers -------------------------------------------------------------------------------


def _product(x: Tensor, weight: Tensor, activation: str | None = None) -> Cost:
    """Of `act(x @ weight.T)`."""
    vector = ACTIVATION_FLOPS * x.shape[0] * weight.shape[0] if activation else 0
    return Cost(matrix_flops=2 * x.shape[0] * weight.numel(), vector_flops=vector)


def _again(x: Tensor, weight: Tensor) -> Cost:
    """Of a product that the backward pass computes again, and of the kernel behind it, which
    activates and differentiates each element."""
    elements = x.shape[0] * weight.shape[0]
    return _product(x, weight) + Cost(vector_flops=(2 * ACTIVATION_FLOPS + 1) * elements)


@_operation
def linear(call: Call) -> Cost:
    return _product(call["x"], call["weight"], call["activation"])


@_operation
def linear_backward(call: Call) -> Cost:
    return Cost() if call["activation"] is None else _again(call["x"], call["weight"])


@_operation
def linear_glu(call: Call) -> Cost:
    gates = (ACTIVATION_FLOPS + 1) * call.results[0].numel()
    return _product(call["x"], call["weight"]) + Cost(vector_flops=gates)


@_operation
def linear_glu_backward(call: Call) -> Cost:
    return _again(call["x"], call["weight"])


@_operation
def linear_stacked(call: Call) -> Cost:
    return sum((_product(call["x"], weight) for weight in call["weights"]), Cost())


@_operation
def feed_forward(call: Call) -> Cost:
    return Cost()  # it calls `linear`


@_operation
def feed_forward_backward(call: Call) -> Cost:
    return _again(call["x"], call["weight1"]) if any(call["needs"][:4]) else Cost()


# --- convolution ---------------------------------------------------------------------------------


@_operation
def conv_norm_act(call: Call) -> Cost:
    x = call["x"]
    taps = call["conv_weight"].numel() // x.shape[1]
    return Cost(vector_flops=(2 * taps + NORM_FLOPS + ACTIVATION_FLOPS) * x.numel())


@_operation
def conv_norm_act_backward(call: Call) -> Cost:
    x, taps = call["x"], call["conv_weight"].shape[1]
    # The convolution again; norm and activation backwards; dx; dweight.
    of_element = 3 * 2 * taps + 2 * NORM_FLOPS + 2 * ACTIVATION_FLOPS
    return Cost(vector_flops=of_element * x.numel())


# --- attention -----------------------------------------------------------------------------------


@_operation
def attention_tile_map(call: Call) -> Cost:
    return Cost()


def _scores(call: Call) -> int:
    """How many there are: lengths are data, so every query meets `max_seqlen` keys."""
    tokens, heads, _ = call["query"].shape
    return int(tokens * heads * call["max_seqlen"])


def _position_products(call: Call) -> int:
    """FLOPs of one product of all queries with the position vectors."""
    tokens, heads, _ = call["query"].shape
    vectors = call["distance_embedding"]
    return 0 if vectors is None else 2 * tokens * heads * int(vectors.numel())


@_operation
def shaw_attention(call: Call) -> Cost:
    scores = _scores(call)
    matrix = 4 * scores * call["query"].shape[2] + _position_products(call)
    return Cost(matrix_flops=matrix, vector_flops=SOFTMAX_FLOPS * scores)


@_operation
def shaw_attention_backward(call: Call) -> Cost:
    query, scores = call["query"], _scores(call)
    cost = Cost() if call["log_sum_exp"].numel() else shaw_attention(call)  # which kept none
    # Of keys four products, of queries three; of positions the forward pass's and two more.
    matrix = 14 * scores * query.shape[2] + 3 * _position_products(call)
    return cost + Cost(
        matrix_flops=matrix, vector_flops=2 * SOFTMAX_FLOPS * scores + 2 * query.numel()
    )


# --- features and CTC ----------------------------------------------------------------------------


@_operation
def log_mel_filterbank(call: Call) -> Cost:
    num_frames, num_bins = call.results[0].shape
    return Cost(
        double_flops=2 * num_frames * 100 * 512, vector_flops=2 * num_frames * 256 * num_bins
    )


@_operation
def normalize_and_stack(call: Call) -> Cost:
    return Cost(double_flops=7 * call["features"].numel())


@_operation
def ctc_greedy(call: Call) -> Cost:
    return Cost(vector_flops=3 * call["logits"].numel())
