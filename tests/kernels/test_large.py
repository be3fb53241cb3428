"""Tensors of more than 2^31 elements: no offset may be computed in 32 bits.

Compared are the last rows, where an offset that wrapped around would show. Where small
tensors must do, the same bodies run on those.
"""

from __future__ import annotations

import pytest
import torch

from csrc_triton.attention import shaw_attention
from csrc_triton.conv import conv_norm_act
from csrc_triton.ctc import ctc_greedy
from csrc_triton.fbank import normalize_and_stack
from csrc_triton.gemm import linear
from csrc_triton.norm import layer_norm, residual_layer_norm
from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, SMALL, WIDTH, choose, packed, random, wide
from tests.kernels.test_attention import sampled_attention
from w2vbert_fast import ops

DTYPE = torch.float16
LIMIT = choose(2**31, 2**13)
"""Elements that a tensor here has at least."""
NEEDED = 40 * 10**9
TAIL = choose(300, 20)


@pytest.fixture(autouse=True)
def enough_memory() -> None:
    if SMALL:
        return
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    if total < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of device memory; there are {total / 1e9:.0f}")


def rows_for(width: int) -> int:
    return LIMIT // width + TAIL


def large(rows: int, width: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Zeros but for the last rows, which are random."""
    tensor = torch.zeros(rows, width, dtype=dtype, device=DEVICE)
    tensor[-2 * TAIL :] = random(2 * TAIL, width, dtype=dtype)
    return tensor


def test_linear(judge: Judge) -> None:
    width = choose(4096, 80)
    rows = rows_for(width)
    x, weight = large(rows, 64), random(width, 64, dtype=DTYPE, scale=0.125)
    out = linear(x, weight, activation="silu")
    assert out.numel() > LIMIT
    exact = ops.linear(*wide(x[-TAIL:], weight), None, "silu")
    judge("large/linear", out[-TAIL:], exact, ops.linear(x[-TAIL:], weight, None, "silu"))
    assert not out[: 2 * TAIL].any()

    # Read as the input.
    back = random(64, width, dtype=DTYPE, scale=width**-0.5)
    exact = ops.linear(*wide(out[-TAIL:], back))
    plain = ops.linear(out[-TAIL:], back)
    judge("large/linear", linear(out, back)[-TAIL:], exact, plain)


def test_norm(judge: Judge) -> None:
    x = large(rows_for(WIDTH), WIDTH)
    weight, bias = random(WIDTH, dtype=DTYPE), random(WIDTH, dtype=DTYPE)
    tail = x[-TAIL:].clone()
    exact = ops.layer_norm(*wide(tail, weight, bias), 1e-5)
    plain = ops.layer_norm(tail, weight, bias, 1e-5)
    z = layer_norm(x, weight, bias, 1e-5)
    judge("large/layer_norm", z[-TAIL:], exact, plain)
    residual = ops.residual_layer_norm(*wide(tail, tail), 0.5, *wide(weight, bias), 1e-5)
    plain_pair = ops.residual_layer_norm(tail, tail, 0.5, weight, bias, 1e-5)
    y, z = residual_layer_norm(x, x, 0.5, weight, bias, 1e-5, out=(x, z))
    judge("large/residual_layer_norm", y[-TAIL:], residual[0], plain_pair[0])
    judge("large/residual_layer_norm", z[-TAIL:], residual[1], plain_pair[1])


def test_conv(judge: Judge) -> None:
    rows = rows_for(WIDTH)
    x = large(rows, WIDTH)
    weights = [
        random(WIDTH, 31, dtype=DTYPE, scale=31**-0.5),
        random(WIDTH, dtype=DTYPE),
        random(WIDTH, dtype=DTYPE),
    ]
    lengths = [rows // 2 - TAIL, rows - rows // 2, TAIL]
    out = conv_norm_act(x, *weights, 1e-5, "silu", packed(lengths))
    tail = x[-TAIL:]
    exact = ops.conv_norm_act(*wide(tail, *weights), 1e-5, "silu", packed([TAIL]))
    plain = ops.conv_norm_act(tail, *weights, 1e-5, "silu", packed([TAIL]))
    judge("large/conv_norm_act", out[-TAIL:], exact, plain)


def test_attention(judge: Judge) -> None:
    heads, head_dim = choose((16, 64), (2, 16))
    rows = rows_for(3 * heads * head_dim)
    buffer = large(rows, 3 * heads * head_dim)
    assert buffer.numel() > LIMIT
    query, key, value = buffer.unflatten(1, (3, heads, head_dim)).unbind(1)
    whole, rest = divmod(rows - TAIL, 2 * TAIL)
    lengths = [2 * TAIL] * whole + [rest, TAIL]
    embedding = random(73, head_dim, dtype=DTYPE)
    output, lse = shaw_attention(
        query,
        key,
        value,
        packed(lengths),
        2 * TAIL,
        distance_embedding=embedding,
        left_max_position=64,
        right_max_position=8,
    )
    utterance = [tensor[-TAIL:] for tensor in (query, key, value)]
    arguments = (*utterance, torch.arange(TAIL, device=DEVICE), embedding, 64, 8)
    exact, exact_lse = sampled_attention(*arguments, torch.float64)
    plain, _ = sampled_attention(*arguments, DTYPE)
    judge("large/shaw_attention", output[-TAIL:], exact, plain)
    judge("large/shaw_attention", lse[:, -TAIL:], exact_lse)


def test_ctc(judge: Judge) -> None:
    vocabulary = choose(32_000, 40)
    rows = rows_for(vocabulary)
    logits = large(rows, vocabulary)
    token_ids, counts = ctc_greedy(logits, packed([rows - TAIL, TAIL]), 0)
    (expected,) = ops.greedy_decode(logits[None, -TAIL:], torch.tensor([TAIL]), blank=0)
    assert token_ids[rows - TAIL : rows - TAIL + int(counts[1])].tolist() == expected
    judge.counted("large/ctc_greedy", DTYPE)


def test_normalization(judge: Judge) -> None:
    """Rows so far apart that the last begins past 2^31."""
    frames = 130
    stride = choose(2**24 + 8, 128)
    buffer = torch.zeros(frames * stride, device=DEVICE)
    features = buffer.as_strided((frames, 80), (stride, 1))
    features.copy_(random(frames, 80, dtype=torch.float32))
    stacked, _ = normalize_and_stack(features, packed([frames]))
    exact = ops.normalize_utterances(features.double(), packed([frames])).reshape(-1, 160)
    judge("large/normalize_and_stack", stacked, exact)
