"""The attention kernel against its plain twin in float64, and the conditions of its launcher."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.attention import build_tile_map, shaw_attention
from csrc_triton.attention.config import AttentionConfig, attention_config
from w2vbert_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

LENGTHS = [0, 1, 2, 31, 63, 64, 65, 217, 300]
SENTINEL = -123.0


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def fused(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value as views of one wider buffer, whose other elements are NaN."""
    width = heads * head_dim
    buffer = torch.full((num_tokens + 2, 3 * width + 40), math.nan, dtype=dtype)
    values = torch.randn(num_tokens, 3, heads, head_dim, dtype=torch.float64) * 1.3
    view = buffer[1:-1, 16 : 16 + 3 * width].unflatten(1, (3, heads, head_dim))
    view.copy_(values)
    query, key, value = view.unbind(1)
    return query, key, value


def embedding(left: int, right: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Position vectors with strided rows."""
    buffer = torch.full((left + right + 1, head_dim + 8), math.nan, dtype=dtype)
    return buffer[:, :head_dim].copy_(torch.randn(left + right + 1, head_dim, dtype=torch.float64))


def twin(
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    max_seqlen: int,
    positions: Tensor | None,
    left: int,
    right: int,
    dtype: torch.dtype = torch.float64,
    seqused_k: Tensor | None = None,
) -> Tensor:
    query, key, value = (tensor.to(dtype) for tensor in tensors)
    output, _ = ops.shaw_attention(
        query,
        key,
        value,
        cu_seqlens,
        max_seqlen,
        distance_embedding=None if positions is None else positions.to(dtype),
        left_max_position=left,
        right_max_position=right,
        seqused_k=seqused_k,
    )
    return output


def log_sum_exp(
    query: Tensor,
    key: Tensor,
    lengths: list[int],
    positions: Tensor | None,
    left: int,
    right: int,
    used: list[int] | None = None,
) -> Tensor:
    """`[heads, num_tokens]` in float64, one pair of frames and one position vector at a time."""
    rows = []
    start = 0
    for length, keys in zip(lengths, used or lengths, strict=True):
        q = query[start : start + length].double().transpose(0, 1)  # [heads, T, D]
        k = key[start : start + length].double().transpose(0, 1)
        scores = q @ k.transpose(-1, -2)
        if positions is not None:
            frames = torch.arange(length)
            clipped = (frames[None, :] - frames[:, None]).clamp(-left, right)
            vectors = positions.double()[clipped + left]  # [T, T, D]
            scores += torch.einsum("htd,tsd->hts", q, vectors)
        scores = scores[..., :keys]
        rows.append(torch.logsumexp(scores / math.sqrt(query.shape[-1]), dim=-1))
        start += length
    return torch.cat(rows, dim=-1)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max())


def run(
    lengths: list[int],
    *,
    heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    positions: bool = True,
    left: int = 64,
    right: int = 8,
    used: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Launches the kernel on random input and compares with the twin; returns what came out.

    What is no key, and its value, is NaN for the kernel.
    """
    cu_seqlens, num_tokens, longest = cumulative(lengths), sum(lengths), max(lengths, default=0)
    tensors = fused(num_tokens, heads, head_dim, dtype)
    vectors = embedding(left, right, head_dim, dtype) if positions else None
    place = (cu_seqlens, longest, vectors, left, right)
    seqused_k = None if used is None else torch.tensor(used, dtype=torch.int32)
    exact = twin(tensors, *place, seqused_k=seqused_k)
    exact_lse = log_sum_exp(tensors[0], tensors[1], lengths, vectors, left, right, used)
    plain = twin(tensors, *place, dtype=dtype, seqused_k=seqused_k)
    for start, keys, end in zip(cu_seqlens[:-1], used or lengths, cu_seqlens[1:], strict=True):
        for tensor in tensors[1:]:
            tensor[start + keys : end] = math.nan
    output, lse = shaw_attention(
        *tensors,
        cu_seqlens,
        longest,
        distance_embedding=vectors,
        left_max_position=left,
        right_max_position=right,
        seqused_k=seqused_k,
        **options,
    )
    assert output.dtype == dtype and output.shape == tensors[0].shape
    assert lse.dtype == torch.float32 and lse.shape == (heads, num_tokens)
    if dtype == torch.float32:
        assert relative_error(output, exact) <= 1e-5
    else:
        assert relative_error(output, exact) <= 1.1 * relative_error(plain, exact)
        rms, plain_rms = ((x.double() - exact).norm() for x in (output, plain))
        assert rms <= 1.1 * plain_rms
    assert relative_error(lse, exact_lse) <= 1e-5
    return output, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("positions", [True, False])
def test_equals_the_twin(dtype: torch.dtype, positions: bool) -> None:
    run(LENGTHS, heads=2, dtype=dtype, positions=positions)


@pytest.mark.parametrize(
    ("left", "right", "block_m", "block_n"),
    [
        (0, 0, 16, 16),
        (3, 5, 32, 16),
        (0, 40, 16, 32),
        (33, 0, 16, 16),
        (100, 60, 16, 64),  # more distances than a tile of 128, and a block wider than the tile
        (64, 8, 64, 16),
        (150, 160, 32, 32),  # no pair is out of the band
    ],
)
def test_band_wherever_it_lies(left: int, right: int, block_m: int, block_n: int) -> None:
    config = AttentionConfig(block_m, block_n, 16, 1, 1)
    run([50, 130, 17], left=left, right=right, config=config)


@pytest.mark.parametrize("positions", [True, False])
def test_tokens_that_are_no_keys(positions: bool) -> None:
    lengths = [0, 2, 32, 33, 65, 130]
    run(lengths, heads=2, positions=positions, used=[0, 1, 31, 32, 64, 129])
    run(lengths, dtype=torch.float16, positions=positions, used=[0, 2, 31, 33, 64, 129])
    # Tiles of queries behind all keys, and beyond the band of the last one.
    run([40, 130], left=5, right=3, positions=positions, used=[1, 20])
    config = AttentionConfig(16, 32, 16, 1, 1)
    run([40, 150], left=20, right=30, positions=positions, used=[33, 45], config=config)


def test_work_over_the_scratch_limit_is_split_into_launches() -> None:
    small = AttentionConfig(16, 16, 16, 1, 1, scratch_limit=3 * 4 * 2_000)  # three programs
    whole = AttentionConfig(16, 16, 16, 1, 1)
    results = []
    for config in (small, whole):
        torch.manual_seed(1)
        results.append(run([20, 40], heads=2, config=config))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("head_dim", [1, 20, 40, 64, 80, 128])
def test_head_sizes(head_dim: int) -> None:
    run([37, 5], head_dim=head_dim, left=6, right=3)
    run([37, 5], head_dim=head_dim, positions=False)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("positions", [True, False])
def test_nothing_to_do(lengths: list[int], positions: bool) -> None:
    query, key, value = fused(0, 2, 16, torch.float32)
    vectors = embedding(4, 2, 16, torch.float32) if positions else None
    output, lse = shaw_attention(
        query,
        key,
        value,
        cumulative(lengths),
        0,
        distance_embedding=vectors,
        left_max_position=4,
        right_max_position=2,
    )
    assert output.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_writes_its_output_and_nothing_else() -> None:
    buffer = torch.full((72, 2, 24), SENTINEL)
    out = buffer[1:-1, :, 4:20].fill_(math.nan)  # strided rows and heads
    output, _ = run([65, 5], heads=2, out=out)
    assert output is out
    outside = buffer.clone()
    outside[1:-1, :, 4:20] = SENTINEL
    assert torch.all(outside == SENTINEL)


def test_key_and_value_strides_may_differ() -> None:
    query, key, value = fused(45, 2, 16, torch.float32)
    value = value.transpose(0, 1).contiguous().transpose(0, 1)
    query = query.contiguous()
    cu_seqlens = cumulative([45])
    output, _ = shaw_attention(query, key, value, cu_seqlens, 45)
    exact = twin((query, key, value), cu_seqlens, 45, None, 0, 0)
    assert relative_error(output, exact) <= 1e-5


def test_an_utterance_does_not_depend_on_its_batch() -> None:
    tensors = fused(33 + 70 + 20, 1, 16, torch.float32)
    vectors = embedding(10, 4, 16, torch.float32)
    options = {"distance_embedding": vectors, "left_max_position": 10, "right_max_position": 4}
    together, lse = shaw_attention(*tensors, cumulative([33, 70, 20]), 70, **options)
    alone, alone_lse = shaw_attention(
        *(tensor[33:103] for tensor in tensors), cumulative([70]), 70, **options
    )
    assert torch.equal(together[33:103], alone)
    assert torch.equal(lse[:, 33:103], alone_lse)


def test_a_prepared_tile_map_changes_nothing() -> None:
    tensors, cu_seqlens = fused(103, 1, 16, torch.float32), cumulative([33, 70])
    block_m = attention_config(16, torch.float32, "interpreter").block_m
    tile_map = build_tile_map(cu_seqlens, block_m, num_tokens=103, max_seqlen=70)
    prepared = shaw_attention(*tensors, cu_seqlens, 70, tile_map=tile_map)
    own = shaw_attention(*tensors, cu_seqlens, 70)
    assert torch.equal(prepared[0], own[0]) and torch.equal(prepared[1], own[1])


def test_max_seqlen_may_be_more_than_the_longest() -> None:
    tensors, cu_seqlens = fused(103, 1, 16, torch.float32), cumulative([33, 70])
    output, _ = shaw_attention(*tensors, cu_seqlens, 2_000)
    assert relative_error(output, twin(tensors, cu_seqlens, 70, None, 0, 0)) <= 1e-5


def test_large_scores_do_not_overflow() -> None:
    query, key, value = (tensor.contiguous() for tensor in fused(70, 1, 16, torch.float32))
    query *= 300
    vectors = embedding(10, 4, 16, torch.float32) * 50
    cu_seqlens = cumulative([70])
    output, lse = shaw_attention(
        query,
        key,
        value,
        cu_seqlens,
        70,
        distance_embedding=vectors,
        left_max_position=10,
        right_max_position=4,
    )
    exact_lse = log_sum_exp(query, key, [70], vectors, 10, 4)
    assert exact_lse.abs().max() > 5_000
    assert relative_error(lse, exact_lse) <= 1e-5
    assert torch.isfinite(output).all()


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
    cu_seqlens = cumulative([length])
    far_output, _ = shaw_attention(*views[:3], cu_seqlens, length, out=views[3])
    near_output, _ = shaw_attention(*near, cu_seqlens, length)
    assert torch.equal(far_output, near_output)


def arguments() -> dict[str, Any]:
    query, key, value = fused(20, 2, 16, torch.float32)
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens": cumulative([20]),
        "max_seqlen": 20,
        "distance_embedding": embedding(4, 2, 16, torch.float32),
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
        shaw_attention(**{**arguments(), name: value})


def test_heads_wider_than_128_are_refused() -> None:
    query, key, value = fused(4, 1, 136, torch.float32)
    with pytest.raises(ValueError, match="head_dim is 136"):
        shaw_attention(query, key, value, cumulative([4]), 4)
