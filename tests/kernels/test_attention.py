"""The attention kernel against float64, on very long utterances too, and what its launcher asks."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.attention import build_tile_map, shaw_attention
from csrc_triton.attention.config import AttentionConfig, attention_config, scratch_layout
from tests.kernels.judge import Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    HALF,
    HEAD_DIM,
    HEADS,
    INTERPRETED,
    LEFT,
    LENGTHS,
    LONG,
    RIGHT,
    VERY_LONG,
    VIRTUAL,
    choose,
    in_memory_of_its_own,
    packed,
    random,
)
from w2vbert_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

KERNEL = "shaw_attention"


def fused(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value as views of one wider buffer, whose other elements are NaN."""
    width = heads * head_dim
    buffer = torch.full((tokens + 2, 3 * width + 48), math.nan, dtype=dtype, device=DEVICE)
    view = buffer[1:-1, 16 : 16 + 3 * width].unflatten(1, (3, heads, head_dim))
    view.copy_(random(tokens, 3, heads, head_dim, dtype=dtype, scale=1.3))
    query, key, value = view.unbind(1)
    return query, key, value


def vectors(left: int, right: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Position vectors with strided rows."""
    shape = (left + right + 1, head_dim + 16)
    buffer = torch.full(shape, math.nan, dtype=dtype, device=DEVICE)
    return buffer[:, :head_dim].copy_(random(shape[0], head_dim, dtype=dtype))


def sampled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    positions: Tensor | None,
    left: int,
    right: int,
    dtype: torch.dtype,
    keys: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Some rows of one utterance's attention, in `dtype` throughout.

    Args:
        query: `[T, H, D]`, and so are `key` and `value`.
        rows: int64 `[S]`, the queries.
        positions: E, `[L + R + 1, D]`, or `None`.
        left: L.
        right: R.
        dtype: of the arithmetic.
        keys: how many tokens are keys; `None`: all.

    Returns:
        The output `[S, H, D]` and the log-sum-exp `[H, S]`.
    """
    q = query[rows].to(dtype).transpose(0, 1)  # [H, S, D]
    k, v = (x.to(dtype).transpose(0, 1) for x in (key, value))  # [H, T, D]
    scores = q @ k.transpose(1, 2)  # [H, S, T]
    if positions is not None:
        frames = torch.arange(key.shape[0], device=key.device)
        distance = (frames[None, :] - rows[:, None]).clamp(-left, right) + left  # [S, T]
        by_distance = q @ positions.to(dtype).t()  # [H, S, L + R + 1]
        scores = scores + by_distance.gather(2, distance.expand(scores.shape))
    scores = (scores * query.shape[2] ** -0.5)[..., :keys]
    return (scores.softmax(-1) @ v[:, :keys]).transpose(0, 1), scores.logsumexp(-1)


def some_rows(length: int) -> Tensor:
    """All queries of a short utterance; of a long one its ends, edges of blocks and some others."""
    if length <= 512:
        return torch.arange(length, device=DEVICE)
    edges = torch.arange(0, length, 1024)
    picked = [
        torch.arange(80),
        torch.arange(length - 80, length),
        *((edges + shift) for shift in (-1, 0, 1)),
        torch.randint(0, length, (40,)),
    ]
    return torch.cat(picked).clamp(0, length - 1).unique().to(DEVICE)


def check(
    judge: Judge,
    lengths: list[int],
    *,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
    positions: bool = True,
    left: int = LEFT,
    right: int = RIGHT,
    name: str = "",
    tolerance: float | None = None,
    used: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel and compares each utterance with float64; returns what came out.

    What is no key, and its value, is NaN for the kernel.
    """
    tensors = fused(sum(lengths), heads, head_dim, dtype)
    embedding = vectors(left, right, head_dim, dtype) if positions else None
    whole = [tensor.clone() for tensor in tensors]
    if used is not None:
        start = 0
        for length, keys in zip(lengths, used, strict=True):
            for tensor in tensors[1:]:
                tensor[start + keys : start + length] = math.nan
            start += length
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=DEVICE)
    output, lse = shaw_attention(
        *tensors,
        packed(lengths),
        max(lengths, default=0),
        distance_embedding=embedding,
        left_max_position=left,
        right_max_position=right,
        **options,
    )
    assert output.dtype == dtype and output.shape == tensors[0].shape
    assert lse.dtype == torch.float32 and lse.shape == (heads, sum(lengths))
    assert torch.isfinite(output).all() and torch.isfinite(lse).all()
    start = 0
    for length, keys in zip(lengths, used or lengths, strict=True):
        if length == 0:
            continue
        utterance = [tensor[start : start + length] for tensor in whole]
        rows = some_rows(length)
        arguments = (*utterance, rows, embedding, left, right)
        exact, exact_lse = sampled_attention(*arguments, torch.float64, keys)
        plain, _ = sampled_attention(*arguments, dtype, keys)
        limits = {} if tolerance is None else {"tolerance": tolerance}
        judge(KERNEL + name, output[start + rows], exact, plain, **limits)
        judge("shaw_attention_lse" + name, lse[:, start + rows], exact_lse, **limits)
        start += length
    return output, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [True, False])
def test_ragged_batch(positions: bool, dtype: torch.dtype, judge: Judge) -> None:
    name = "" if positions else "/no_positions"
    lengths = [0, 1, 2, 31, 63, 64, 65, 217, 300] if INTERPRETED else LENGTHS
    check(judge, lengths, dtype=dtype, positions=positions, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_utterance(dtype: torch.dtype, judge: Judge) -> None:
    check(judge, [LONG, 3], dtype=dtype, name="/long")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_long_utterance(dtype: torch.dtype, judge: Judge) -> None:
    check(judge, [VERY_LONG], heads=choose(2, 1), dtype=dtype, name="/very_long")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sampled_oracle_is_the_operation(dtype: torch.dtype, judge: Judge) -> None:
    """What the other tests compare with is `ops.shaw_attention`, row by row."""
    lengths = [choose(300, 33), 7]
    tensors, embedding = fused(sum(lengths), 2, 16, dtype), vectors(LEFT, RIGHT, 16, dtype)
    exact, _ = ops.shaw_attention(
        *(tensor.double() for tensor in tensors),
        packed(lengths),
        max(lengths),
        distance_embedding=embedding.double(),
        left_max_position=LEFT,
        right_max_position=RIGHT,
    )
    start = 0
    for length in lengths:
        rows = torch.arange(length, device=DEVICE)
        utterance = [tensor[start : start + length] for tensor in tensors]
        sampled, _ = sampled_attention(*utterance, rows, embedding, LEFT, RIGHT, torch.float64)
        torch.testing.assert_close(sampled, exact[start : start + length], rtol=0, atol=1e-12)
        start += length


BANDS = [
    (0, 0, 64, 32),
    (0, 40, 64, 64),
    (33, 0, 64, 32),
    (100, 60, 32, 64),  # more distances than a tile of 128, and a block wider than the tile
    (400, 350, 64, 64),  # no pair is out of the band
]
SMALL_BANDS = [
    (0, 0, 16, 16),
    (3, 5, 32, 16),
    (0, 40, 16, 32),
    (33, 0, 16, 16),
    (100, 60, 16, 64),
    (64, 8, 64, 16),
    (150, 160, 32, 32),
]
if VIRTUAL is not None:
    SMALL_BANDS = [(left, right, 64, 32) for left, right, _, _ in SMALL_BANDS]


@pytest.mark.parametrize(("left", "right", "block_m", "block_n"), choose(BANDS, SMALL_BANDS))
def test_band_wherever_it_lies(
    left: int, right: int, block_m: int, block_n: int, judge: Judge
) -> None:
    config = AttentionConfig(
        block_m, block_n, 16, *choose((4, 2), (1, 1) if INTERPRETED else (4, 2))
    )
    lengths = choose([217, 300, 17], [50, 130, 17])
    dtype = torch.float32 if INTERPRETED else HALF[-1]
    heads = choose(HEADS, 1)
    check(
        judge,
        lengths,
        heads=heads,
        dtype=dtype,
        left=left,
        right=right,
        config=config,
        name="/band",
    )


@pytest.mark.parametrize("positions", [True, False])
def test_tokens_that_are_no_keys(positions: bool, judge: Judge) -> None:
    def run(lengths: list[int], used: list[int], **options: Any) -> None:
        check(judge, lengths, used=used, positions=positions, name="/unread", **options)

    lengths = [0, 2, 32, 33, 65, 130]
    run(lengths, [0, 1, 31, 32, 64, 129], heads=2)
    run(lengths, [0, 2, 31, 33, 64, 129], heads=1, dtype=HALF[-1])
    # Tiles of queries behind all keys, and beyond the band of the last one.
    run([40, 130], [1, 20], heads=1, left=5, right=3)
    blocks = (16, 32, 16, 1, 1) if INTERPRETED else (32, 32, 16, 4, 2)
    config = AttentionConfig(*blocks)
    run([40, 150], [33, 45], heads=1, left=20, right=30, config=config)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", choose([16, 40, 80, 128], [5]))
def test_head_sizes(head_dim: int, dtype: torch.dtype, judge: Judge) -> None:
    lengths = choose([217, 65, 1], [20, 1])
    check(judge, lengths, heads=2, head_dim=head_dim, dtype=dtype, name="/head_size")


@pytest.mark.parametrize("head_dim", [1, 20, 40, 64, 80, 128])
def test_head_sizes_in_fp32(head_dim: int, judge: Judge) -> None:
    options: dict[str, Any] = {"heads": choose(2, 1), "head_dim": head_dim, "name": "/head_size"}
    lengths = choose([217, 65, 1], [37, 5])
    check(judge, lengths, left=6, right=3, **options)
    check(judge, lengths, positions=False, **options)


def test_bits_do_not_depend_on_the_number_of_programs(judge: Judge) -> None:
    """A program for each tile, then three and one for all, which use their scratch memory again."""
    whole = attention_config(HEAD_DIM, HALF[-1], architecture(DEVICE))
    scratch = 4 * scratch_layout(whole.block_m, whole.block_n, LEFT, RIGHT).size
    lengths = choose([217, 1, 300], [150, 1, 20])
    results = []
    for programs in (sum(lengths), 3, 1):
        config = replace(whole, blocks=sum(lengths), scratch_limit=programs * scratch)
        torch.manual_seed(1)
        results.append(
            check(judge, lengths, heads=2, dtype=HALF[-1], config=config, name="/programs")
        )
    for output, log_sum_exp in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(log_sum_exp, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_equal(dtype: torch.dtype, judge: Judge) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        lengths = choose([217, 1500, 3], [33, 3])
        results.append(check(judge, lengths, dtype=dtype, name="/repeated"))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_utterance_does_not_depend_on_its_batch(dtype: torch.dtype, judge: Judge) -> None:
    lengths = choose([33, 1500, 217], [33, 40, 3])
    tensors = fused(sum(lengths), HEADS, HEAD_DIM, dtype)
    options: dict[str, Any] = {
        "distance_embedding": vectors(LEFT, RIGHT, HEAD_DIM, dtype),
        "left_max_position": LEFT,
        "right_max_position": RIGHT,
    }
    together, lse = shaw_attention(*tensors, packed(lengths), max(lengths), **options)
    start, end = lengths[0], lengths[0] + lengths[1]
    middle = (tensor[start:end] for tensor in tensors)
    alone, alone_lse = shaw_attention(*middle, packed(lengths[1:2]), lengths[1], **options)
    assert torch.equal(together[start:end], alone)
    assert torch.equal(lse[:, start:end], alone_lse)
    judge.counted("shaw_attention/alone", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_its_output_and_nothing_else(dtype: torch.dtype, judge: Judge) -> None:
    shape = (72, HEADS, HEAD_DIM + 16)
    buffer = torch.full(shape, -123.0, dtype=dtype, device=DEVICE)
    out = buffer[1:-1, :, 8:-8].fill_(math.nan)  # strided rows and heads
    output, _ = check(judge, [65, 5], dtype=dtype, out=out, name="/out")
    assert output is out
    out.fill_(-123.0)
    assert (buffer == -123.0).all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("positions", [True, False])
def test_nothing_to_do(lengths: list[int], positions: bool, judge: Judge) -> None:
    output, lse = check(judge, lengths, heads=2, positions=positions)
    assert output.shape == (0, 2, HEAD_DIM) and lse.shape == (2, 0)


def test_large_scores_do_not_overflow(judge: Judge) -> None:
    query, key, value = (x.contiguous() for x in fused(217, 1, HEAD_DIM, torch.float32))
    query *= 300
    embedding = vectors(10, 4, HEAD_DIM, torch.float32) * 50
    output, lse = shaw_attention(
        query,
        key,
        value,
        packed([217]),
        217,
        distance_embedding=embedding,
        left_max_position=10,
        right_max_position=4,
    )
    rows = torch.arange(217, device=DEVICE)
    arguments = (query, key, value, rows, embedding, 10, 4)
    _, exact_lse = sampled_attention(*arguments, torch.float64)
    assert exact_lse.abs().max() > 5_000
    judge("shaw_attention_lse/large_scores", lse, exact_lse)
    assert torch.isfinite(output).all()


def test_key_and_value_strides_may_differ(judge: Judge) -> None:
    query, key, value = fused(45, 2, 16, torch.float32)
    value = value.transpose(0, 1).contiguous().transpose(0, 1)
    query = query.contiguous()
    output, _ = shaw_attention(query, key, value, packed([45]), 45)
    rows = torch.arange(45, device=DEVICE)
    exact, _ = sampled_attention(query, key, value, rows, None, 0, 0, torch.float64)
    judge("shaw_attention/strides", output, exact)


def test_a_prepared_tile_map_changes_nothing() -> None:
    tensors, cu_seqlens = fused(103, 1, 16, torch.float32), packed([33, 70])
    block_m = attention_config(16, torch.float32, architecture(DEVICE)).block_m
    tile_map = build_tile_map(cu_seqlens, block_m, num_tokens=103, max_seqlen=70)
    prepared = shaw_attention(*tensors, cu_seqlens, 70, tile_map=tile_map)
    own = shaw_attention(*tensors, cu_seqlens, 70)
    assert torch.equal(prepared[0], own[0]) and torch.equal(prepared[1], own[1])


def test_max_seqlen_may_be_more_than_the_longest() -> None:
    tensors, cu_seqlens = fused(103, 1, 16, torch.float32), packed([33, 70])
    more, own = (shaw_attention(*tensors, cu_seqlens, longest)[0] for longest in (2_000, 70))
    assert torch.equal(more, own)


def test_1500_frames_of_one_head(judge: Judge) -> None:
    """As long as utterances are, in the published head's size and dtype."""
    check(judge, [1500], heads=1, head_dim=64, dtype=HALF[-1], name="/1500")


@in_memory_of_its_own
def test_offsets_beyond_32_bits() -> None:
    """Rows 2^28 elements apart: the twelfth begins past 2^31. Untouched pages take no memory."""
    length, row = 12, 2**28
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has no name before Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * length * row, flags=flags)
    buffer = torch.frombuffer(memory, dtype=torch.float16)
    views = [
        buffer[offset:].as_strided((length, 1, 16), (row, 16, 1)) for offset in (0, 16, 32, 48)
    ]
    for view in views[:3]:
        view.copy_(torch.randn(length, 1, 16))
    near = [view.clone() for view in views[:3]]
    cu_seqlens = packed([length])
    far_output, _ = shaw_attention(*views[:3], cu_seqlens, length, out=views[3])
    near_output, _ = shaw_attention(*near, cu_seqlens, length)
    assert torch.equal(far_output, near_output)


def arguments() -> dict[str, Any]:
    query, key, value = fused(20, 2, 16, torch.float32)
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens": packed([20]),
        "max_seqlen": 20,
        "distance_embedding": vectors(4, 2, 16, torch.float32),
        "left_max_position": 4,
        "right_max_position": 2,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(20, 2, 16, dtype=torch.float64)),
        ("query", torch.zeros(20, 32)),
        ("key", torch.zeros(20, 2, 8)),
        ("key", torch.zeros(20, 2, 16, dtype=torch.float16)),
        ("value", torch.zeros(19, 2, 16)),
        ("value", torch.zeros(20, 2, 32)[..., ::2]),
        ("cu_seqlens", torch.tensor([0, 20])),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int32)),
        ("max_seqlen", -1),
        ("distance_embedding", torch.zeros(8, 16)),
        ("distance_embedding", torch.zeros(7, 16, dtype=torch.float16)),
        ("left_max_position", -1),
        ("right_max_position", -1),
        ("tile_map", torch.zeros(7, 2, dtype=torch.int32)),
        ("tile_map", torch.zeros(1, 2)),
        ("out", torch.zeros(20, 2, 8)),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        given = value.to(DEVICE) if isinstance(value, Tensor) else value
        shaw_attention(**{**arguments(), name: given})


def test_heads_wider_than_128_are_refused() -> None:
    query, key, value = fused(4, 1, 136, torch.float32)
    with pytest.raises(ValueError, match="head_dim is 136"):
        shaw_attention(query, key, value, packed([4]), 4)
