"""Functions that several kernels inline.

`activate` is every pointwise activation that follows a product or a norm. The name is a constant
of compilation, so a kernel carries the code of one. The logistic function in it is made of what a
GPU of NVIDIA has for the dtype of the result (`logistic_form`):

    bfloat16  the special-function unit's tanh, of a relative error of at most 2^-11 (PTX ISA,
              `tanh.approx`): one special function and one multiply-add
    others    its powers of two and its reciprocal, of a few units in the last place of float32: two
              special functions. The division's care for its range is not needed of 1 + 2^x.

One reciprocal for two elements, 1/a = b / (a b), would take 1.5 special functions an element, but
let an element depend on its neighbour, which may be another token: bits, and NaN.

`locate_block` finds where a block of a packed batch lies. A grid over blocks of `BLOCK` rows, none
of which holds rows of two utterances, needs no table: give utterance s the blocks from
`cu_seqlens[s] // BLOCK + s` up to where utterance s + 1 begins. That is at least
`ceil(length / BLOCK)` blocks, and `num_rows // BLOCK + batch` of them in all (`launch.num_blocks`),
which the host knows without reading a length. At most one block an utterance is empty.

`kept_weights` says which attention weights dropout keeps: a pure function of seed, head, query and
key. Random numbers come from Philox 4x32 with 10 rounds (Salmon et al. 2011), a function of a
counter and a key, so that forward and backward find the same weights dropped whatever their tiles,
and no mask is kept. For query token t of the batch and key j of its utterance:

    key      the two halves of `seed`
    counter  (j // 4, t, head, offset)
    number   word j % 4 of the four that come out; kept where (number >> 8) * 2^-24 >= p
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "linear": "identity",
    "relu": "relu",
    "selu": "selu",
    "silu": "silu",
    "swish": "silu",
}
"""The names that checkpoints use, and what `activate` calls them."""


def activation_constant(activation: str | None) -> str:
    """The `ACTIVATION` constant of a kernel, for a name that checkpoints use.

    Raises:
        ValueError: the kernels do not have this activation.
    """
    if activation is None:
        return "identity"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be None or {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def logistic_form(dtype: torch.dtype, arch: str) -> str:
    """The `LOGISTIC` constant of a kernel: what the logistic function is made of, for results of a
    dtype: "tanh", "reciprocal" or, on other GPUs and in the interpreter, "division"."""
    if not arch.startswith("sm_"):
        return "division"
    return "tanh" if dtype == torch.bfloat16 else "reciprocal"


@triton.jit
def _special_function(x, INSTRUCTION: tl.constexpr):
    """The special-function unit's, of an fp32 tile of any shape."""
    return tl.inline_asm_elementwise(
        INSTRUCTION + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def logistic(x, LOGISTIC: tl.constexpr):
    """`1 / (1 + exp(-x))` of an fp32 tile of any shape."""
    if LOGISTIC == "tanh":
        return 0.5 + 0.5 * _special_function(0.5 * x, "tanh.approx.f32")
    elif LOGISTIC == "reciprocal":
        power = tl.exp2(-1.4426950408889634 * x)  # log2(e)
        return _special_function(1.0 + power, "rcp.approx.ftz.f32")
    else:
        tl.static_assert(LOGISTIC == "division", "unknown LOGISTIC")
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, LOGISTIC: tl.constexpr):
    """`ACTIVATION(x)` of an fp32 tile of any shape."""
    if ACTIVATION == "silu":
        if LOGISTIC == "tanh":  # one multiplication less than x times the logistic function
            half = 0.5 * x
            x = half + half * _special_function(half, "tanh.approx.f32")
        else:
            x = x * logistic(x, LOGISTIC)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_new":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u; u = sqrt(2 / pi) (x + 0.044715 x^3).
        x = x * logistic(1.5957691216057308 * x * (1.0 + 0.044715 * x * x), LOGISTIC)
    elif ACTIVATION == "relu":
        # A comparison and not a maximum: NaN must stay NaN.
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "selu":
        # exp(x) - 1 cancels near 0. Its Taylor series takes over there: the first term left out is
        # below 5e-8 of the sum where |x| < 0.125.
        series = 1.0 + x * (1.0 / 5)
        series = 1.0 + x * (1.0 / 4) * series
        series = 1.0 + x * (1.0 / 3) * series
        series = x * (1.0 + x * 0.5 * series)
        negative = tl.where(x > -0.125, series, tl.exp(x) - 1.0)
        x = 1.0507009873554805 * tl.where(x > 0.0, x, 1.6732632423543772 * negative)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown ACTIVATION")
    return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at an fp32 tile of any shape."""
    if ACTIVATION == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # of the normal distribution
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_new":
        # x times the logistic function of u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
        # Where the gate is 0 the slope may be infinite.
        product = gate * (1.0 - gate)
        return gate + tl.where(product > 0.0, x * product * slope, 0.0 * x)
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, tl.where(x == x, 0.0, x))  # NaN stays NaN
    elif ACTIVATION == "selu":
        negative = 1.6732632423543772 * tl.exp(tl.minimum(x, 0.0))
        return 1.0507009873554805 * tl.where(x > 0.0, 1.0, tl.where(x == x, negative, x))
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown ACTIVATION")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def last_not_after(position, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    """The last utterance that begins at `position`, a scalar or a tensor, or before it.

    Utterances are halved until one is left, so that `position` reads about log2 of their offsets.
    Positions are rows where BLOCK is 0, else the numbers of blocks of BLOCK rows (`locate_block`).
    """
    sequence = position * 0
    left = num_sequences
    while left > 1:
        half = left // 2
        begin = tl.load(cu_seqlens_ptr + sequence + half)
        if BLOCK > 0:
            begin = begin // BLOCK + sequence + half
        sequence += tl.where(begin <= position, half, 0)
        left -= half
    return sequence


@triton.jit
def locate_block(block, cu_seqlens_ptr, num_sequences, num_rows, BLOCK: tl.constexpr):
    """The utterance of a block: its number, first row, end, and the block's first row.

    The block is empty when its first row is not before the utterance's end. `num_rows` bounds the
    end, so that offsets beyond the data cannot lead outside of it.
    """
    sequence = last_not_after(block, cu_seqlens_ptr, num_sequences, BLOCK)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), num_rows)
    row = start + (block - (start // BLOCK + sequence)) * BLOCK
    return sequence, start, end, row


@triton.jit
def used_end(sequence, start, end, seqused_k_ptr, HAS_SEQUSED: tl.constexpr):
    """Where the rows of an utterance end that others may read: `start + seqused_k[sequence]`."""
    if HAS_SEQUSED:
        end = tl.minimum(start + tl.load(seqused_k_ptr + sequence), end)
    return end


@triton.jit
def kept_weights(
    seed_ptr,  # int64 [2]: seed and offset
    head,
    first_token,  # of the tile's first query, in the batch
    first_key,  # of the tile's first key, in the utterance; a multiple of 4
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether each attention weight of a tile is kept, `[BLOCK_M, BLOCK_N]`."""
    tokens = first_token.to(tl.uint32) + tl.arange(0, BLOCK_M).to(tl.uint32)
    groups = (first_key // 4).to(tl.uint32) + tl.arange(0, BLOCK_N // 4).to(tl.uint32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr),
        zero + groups[None, :],
        zero + tokens[:, None],
        zero + head.to(tl.uint32),
        zero + tl.load(seed_ptr + 1).to(tl.uint32),
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # [BLOCK_M, BLOCK_N / 4, 2, 2]
    words = tl.reshape(words, [BLOCK_M, BLOCK_N])
    return (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08 >= dropout_p


@triton.jit
def standardize(y, is_row, columns, eps, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Rows less their mean, by their deviation; and what they were multiplied with."""
    mean = tl.sum(y, 1) / WIDTH  # [ROWS]
    centered = y - mean[:, None]  # [ROWS, BLOCK_WIDTH]
    if not EVEN:
        centered = tl.where((columns < WIDTH)[None, :], centered, 0.0)
    variance = tl.sum(centered * centered, 1) / WIDTH
    # Rows that do not exist must not divide by zero: they are part of the sums over rows.
    scale = tl.rsqrt(tl.where(is_row, variance + eps, 1.0))
    return centered * scale[:, None], scale


@triton.jit
def norm_gradient(grad, weight, standard, scale, WIDTH: tl.constexpr):
    """The gradient of a norm's input. After the last column `weight` and `standard` are zero, so
    that `grad` may hold anything finite there, and so does what comes out."""
    weighted = grad * weight[None, :]  # [ROWS, BLOCK_WIDTH]
    mean = tl.sum(weighted, 1) / WIDTH  # [ROWS]
    along = tl.sum(weighted * standard, 1) / WIDTH
    return (weighted - mean[:, None] - standard * along[:, None]) * scale[:, None]
