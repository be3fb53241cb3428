"""The gradients of attention against float64 autograd of the plain twin."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_triton.architectures import architecture
from csrc_triton.attention import build_tile_map, shaw_attention, shaw_attention_backward
from csrc_triton.attention.config import (
    AttentionBackwardConfig,
    attention_backward_config,
    scores_layout,
)
from tests.kernels.judge import Judge
from tests.kernels.lane import (
    DEVICE,
    DTYPES,
    HALF,
    INTERPRETED,
    in_memory_of_its_own,
    packed,
    random,
)
from tests.kernels.test_attention import vectors as position_vectors
from w2vbert_fast import ops
from w2vbert_fast.ops.operation import OPERATIONS

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

SENTINEL = -123.0
SEED = torch.tensor([2**40 + 7, 3])
WARPS_AND_STAGES = (1, 1, 1, 1) if INTERPRETED else (4, 4, 1, 1)
KINDS = "query", "key", "value", "positions"


def config_of_this_lane() -> AttentionBackwardConfig:
    return attention_backward_config(16, torch.float32, architecture(DEVICE))


def fused(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key, value and gradient as views of one wider buffer, whose other elements are NaN."""
    width = heads * head_dim
    buffer = torch.full((num_tokens + 2, 4 * width + 40), math.nan, dtype=dtype, device=DEVICE)
    view = buffer[1:-1, 16 : 16 + 4 * width].unflatten(1, (4, heads, head_dim))
    view.copy_(random(num_tokens, 4, heads, head_dim, dtype=dtype))
    query, key, value, grad = view.unbind(1)
    return query, key, value, grad


def twin_gradients(
    tensors: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    positions: Tensor | None,
    left: int,
    right: int,
    dtype: torch.dtype = torch.float64,
    seqused_k: Tensor | None = None,
) -> list[Tensor]:
    """Autograd's gradients of query, key, value and position vectors."""
    query, key, value, grad = (tensor.to(dtype) for tensor in tensors)
    leaves = [query, key, value] if positions is None else [query, key, value, positions.to(dtype)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output, _ = ops.shaw_attention(
        *leaves[:3],
        cu_seqlens,
        int(cu_seqlens.diff().max()),
        distance_embedding=leaves[3] if positions is not None else None,
        left_max_position=left,
        right_max_position=right,
        seqused_k=seqused_k,
    )
    return list(torch.autograd.grad(output, leaves, grad))


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


def compare(
    judge: Judge,
    name: str,
    ours: Tensor,
    exact: Tensor,
    plain: Tensor,
    scale: float,
    inputs: torch.dtype,
) -> None:
    """Errors are relative to at least `scale`."""
    judge(
        f"shaw_attention_backward/{name}",
        ours,
        exact,
        plain,
        inputs=inputs,
        at_least=max(scale, 1e-300),
        or_a_unit=True,
    )


def run(
    judge: Judge,
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
) -> tuple[Tensor | None, ...]:
    """The launcher's gradients of random input, compared with the twin's.

    What is no key, and its value, is NaN for the kernels.
    """
    cu_seqlens, longest = packed(lengths), max(lengths)
    tensors = fused(sum(lengths), heads, head_dim, dtype)
    vectors = position_vectors(left, right, head_dim, dtype) if positions else None
    place = {
        "distance_embedding": vectors,
        "left_max_position": left,
        "right_max_position": right,
        "seqused_k": None if used is None else torch.tensor(used, dtype=torch.int32, device=DEVICE),
    }
    twins = {
        kind: twin_gradients(
            tensors, cu_seqlens, vectors, left, right, kind, seqused_k=place["seqused_k"]
        )
        for kind in {torch.float64, dtype}
    }
    for start, keys, end in zip(cu_seqlens[:-1], used or lengths, cu_seqlens[1:], strict=True):
        for tensor in tensors[1:3]:
            tensor[start + keys : end] = math.nan
    output, lse = shaw_attention(*tensors[:3], cu_seqlens, longest, **place)
    gradients = shaw_attention_backward(
        tensors[3], *tensors[:3], output, lse, cu_seqlens, longest, **place, **options
    )
    assert all(gradient.dtype == dtype for gradient in gradients[:3] if gradient is not None)
    assert (gradients[3] is None) == (vectors is None)
    if gradients[3] is not None:
        assert gradients[3].dtype == torch.float32
    exact, plain = twins[torch.float64], twins[dtype]
    # With one distance only, softmax takes the embedding's gradient away.
    scale = largest(exact[0])
    for name, ours, wanted, theirs in zip(KINDS, gradients, exact, plain, strict=False):
        assert ours is not None
        compare(judge, name, ours, wanted, theirs, scale, dtype)
    return gradients


@pytest.mark.parametrize("positions", [True, False])
def test_equals_autograd_of_the_twin(positions: bool, judge: Judge) -> None:
    run(judge, [0, 1, 2, 31, 63, 64, 65, 130], positions=positions)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("positions", [True, False])
def test_half_precision_is_as_accurate_as_autograd(
    positions: bool, dtype: torch.dtype, judge: Judge
) -> None:
    run(judge, [3, 64, 90], heads=2, dtype=dtype, positions=positions, left=20)


@pytest.mark.parametrize(
    ("left", "right", "tile", "key_step", "query_step"),
    [
        (0, 0, 16, 16, 16),
        (3, 5, 32, 16, 32),
        (0, 40, 16, 32, 16),
        (33, 0, 16, 16, 32),
        (50, 30, 16, 64, 64),  # more distances than a tile, and steps longer than it
        (64, 8, 64, 16, 16),
        (80, 90, 32, 32, 32),  # no pair is out of the band
    ],
)
def test_band_wherever_it_lies(
    left: int, right: int, tile: int, key_step: int, query_step: int, judge: Judge
) -> None:
    if not INTERPRETED:  # its smallest tile, warps and stages
        tile, key_step, query_step = (max(32, size) for size in (tile, key_step, query_step))
    config = AttentionBackwardConfig(tile, key_step, query_step, 16, *WARPS_AND_STAGES)
    run(judge, [20, 70, 17], left=left, right=right, config=config)


@pytest.mark.parametrize("positions", [True, False])
def test_tokens_that_are_no_keys(positions: bool, judge: Judge) -> None:
    gradients = run(judge, [0, 2, 32, 65], heads=2, positions=positions, used=[0, 1, 31, 64])
    for gradient in gradients[1:3]:
        assert gradient is not None and not gradient[[1, 33, 98]].any()
    run(judge, [17, 64], dtype=HALF[-1], left=20, positions=positions, used=[17, 63])
    # Tiles of queries behind all keys, and beyond the band of the last one.
    tiles = (16, 32, 16) if INTERPRETED else (32, 32, 32)
    config = AttentionBackwardConfig(*tiles, 16, *WARPS_AND_STAGES)
    run(judge, [40, 90], left=5, right=9, positions=positions, used=[1, 33], config=config)


@pytest.mark.parametrize("head_dim", [1, 20, 64, 80, 128])
def test_head_sizes(head_dim: int, judge: Judge) -> None:
    run(judge, [37, 5], head_dim=head_dim, left=6, right=3)


@pytest.mark.usefixtures("in_parts")
def test_heads_over_the_scratch_limit_are_split_into_launches(judge: Judge) -> None:
    config = config_of_this_lane()
    two_heads = 2 * 4 * scores_layout(config, 2, 34, 6, 8).head_size
    whole, split = [], []
    for results, limit in ((whole, config.scratch_limit), (split, two_heads)):
        torch.manual_seed(1)
        results += run(
            judge, [20, 14], heads=3, left=6, config=replace(config, scratch_limit=limit)
        )
    for ours, wanted in zip(split[:3], whole[:3], strict=True):
        assert torch.equal(ours, wanted)
    torch.testing.assert_close(split[3], whole[3], rtol=0, atol=1e-5 * largest(whole[3]))


def test_a_share_holds_many_tiles(judge: Judge) -> None:
    # Of one head and of several, some of them beyond the last utterance.
    config = replace(config_of_this_lane(), shares=2)
    run(judge, [20, 0, 34, 70], heads=3, left=6, config=config)


def test_two_runs_give_the_same_bits(judge: Judge) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(run(judge, [33, 7], left=6))
    for first, second in zip(*runs, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_writes_its_gradients_and_nothing_else(judge: Judge) -> None:
    buffer = torch.full((72, 3, 2, 24), SENTINEL, device=DEVICE)
    out = buffer[1:-1, :, :, 4:20].fill_(math.nan).unbind(1)
    gradients = run(judge, [65, 5], heads=2, left=20, out=out)
    assert all(ours is wanted for ours, wanted in zip(gradients[:3], out, strict=True))
    buffer[1:-1, :, :, 4:20] = SENTINEL
    assert torch.all(buffer == SENTINEL)


def test_an_utterance_does_not_depend_on_its_batch() -> None:
    query, key, value, grad = fused(33 + 70 + 20, 1, 16, torch.float32)
    place = {
        "distance_embedding": position_vectors(10, 4, 16, torch.float32),
        "left_max_position": 10,
        "right_max_position": 4,
    }
    results = []
    for rows, lengths in ((slice(None), [33, 70, 20]), (slice(33, 103), [70])):
        tensors = [tensor[rows] for tensor in (query, key, value)]
        cu_seqlens = packed(lengths)
        output, lse = shaw_attention(*tensors, cu_seqlens, 70, **place)
        results.append(
            shaw_attention_backward(
                grad[rows], *tensors, output, lse, cu_seqlens, 70, **place
            )[:3]
        )  # fmt: skip
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together[33:103], alone)


def test_a_prepared_tile_map_changes_nothing(judge: Judge) -> None:
    tile = config_of_this_lane().tile
    runs = []
    for prepared in (False, True):
        torch.manual_seed(1)
        maps = build_tile_map(packed([9, 40]), tile, num_tokens=49, max_seqlen=40)
        runs.append(run(judge, [9, 40], left=6, tile_map=maps if prepared else None))
    for first, second in zip(*runs, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_a_log_sum_exp_among_other_numbers() -> None:
    cu_seqlens, left, right = packed([9, 40]), 6, 8
    query, key, value, grad = fused(49, 2, 16, torch.float32)
    vectors = position_vectors(left, right, 16, torch.float32)
    place = {
        "distance_embedding": vectors,
        "left_max_position": left,
        "right_max_position": right,
    }
    output, lse = shaw_attention(query, key, value, cu_seqlens, 40, **place)
    strided = torch.full((2, 98), math.nan, device=DEVICE)[:, ::2].copy_(lse)
    of, rest = (grad, query, key, value, output), (cu_seqlens, 40, vectors, left, right)
    backward = OPERATIONS["shaw_attention_backward"].triton
    runs = [backward(*of, each, *rest, None, 0.0, None) for each in (lse, strided)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("positions", [True, False])
def test_nothing_to_do(lengths: list[int], positions: bool) -> None:
    query, key, value, grad = fused(0, 2, 16, torch.float32)
    vectors = position_vectors(4, 2, 16, torch.float32) if positions else None
    gradients = shaw_attention_backward(
        grad, query, key, value, grad, torch.zeros(2, 0, device=DEVICE), packed(lengths), 0,
        distance_embedding=vectors, left_max_position=4, right_max_position=2,
    )  # fmt: skip
    assert all(gradient.shape == (0, 2, 16) for gradient in gradients[:3])
    if positions:
        assert torch.equal(gradients[3], torch.zeros(7, 16, device=DEVICE))


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox 4x32-10 as its authors define it (Salmon et al. 2011), on int64 tensors."""
    mask = 0xFFFFFFFF
    key = [seed & mask, seed >> 32 & mask]
    x0, x1, x2, x3 = counter
    for _ in range(10):
        # 64-bit products do not fit int64; their halves are put together from 16-bit pieces.
        halves = []
        for multiplier, x in ((0xD2511F53, x0), (0xCD9E8D57, x2)):
            low = multiplier * (x & 0xFFFF)
            high = multiplier * (x >> 16) + (low >> 16)
            halves.append((high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF))
        (high0, low0), (high2, low2) = halves
        x0, x1, x2, x3 = high2 ^ x1 ^ key[0], low2, high0 ^ x3 ^ key[1], low0
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return [x0, x1, x2, x3]


def test_philox_gives_its_authors_numbers() -> None:
    words = philox([torch.tensor([word]) for word in (0, 0, 0, 0)], 0)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def kept_weights(lengths: list[int], heads: int, dropout_p: float) -> list[Tensor]:
    """Which weights dropout keeps: for each utterance `[heads, T, T]`."""
    seed, offset = SEED.tolist()
    kept, start = [], 0
    for length in lengths:
        shape = (heads, length, -(-length // 4))
        counter = [
            torch.arange(shape[2]).expand(shape),
            torch.arange(start, start + length)[None, :, None].expand(shape),
            torch.arange(heads)[:, None, None].expand(shape),
            torch.full(shape, offset),
        ]
        words = torch.stack(philox(counter, seed), dim=-1).flatten(2)[..., :length]
        kept.append(((words >> 8) * 2.0**-24 >= dropout_p).to(DEVICE))
        start += length
    return kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [True, False])
def test_dropout(dtype: torch.dtype, positions: bool, judge: Judge) -> None:
    lengths, heads, dropout_p, left, right = [37, 3], 2, 0.3, 6, 3
    cu_seqlens = packed(lengths)
    query, key, value, grad = fused(sum(lengths), heads, 16, dtype)
    vectors = position_vectors(left, right, 16, dtype) if positions else None
    options: dict[str, Any] = {
        "distance_embedding": vectors,
        "left_max_position": left,
        "right_max_position": right,
        "dropout_p": dropout_p,
        "dropout_seed": SEED.to(DEVICE),
    }
    output, lse = shaw_attention(query, key, value, cu_seqlens, 37, **options)
    ours = shaw_attention_backward(grad, query, key, value, output, lse, cu_seqlens, 37, **options)

    def twin(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = (query, key, value) if vectors is None else (query, key, value, vectors)
        leaves = [leaf.to(dtype).detach().clone().requires_grad_() for leaf in given]
        outputs, start = [], 0
        for length, kept in zip(lengths, kept_weights(lengths, heads, dropout_p), strict=True):
            q, k, v = (leaf[start : start + length].transpose(0, 1) for leaf in leaves[:3])
            scores = q @ k.transpose(-1, -2)
            if vectors is not None:
                frames = torch.arange(length, device=DEVICE)
                distance = (frames[None, :] - frames[:, None]).clamp(-left, right) + left
                scores = scores + torch.einsum("htd,tsd->hts", q, leaves[3][distance])
            weights = torch.softmax(scores * 16**-0.5, -1)
            weights = torch.where(kept, weights / (1 - dropout_p), 0.0)
            outputs.append((weights.to(dtype) @ v).transpose(0, 1))
            start += length
        result = torch.cat(outputs)
        return result, torch.autograd.grad(result, leaves, grad.to(dtype))

    exact_output, exact = twin(torch.float64)
    plain_output, plain = twin(dtype)
    compare(judge, "output", output, exact_output, plain_output, 1.0, dtype)
    for name, gradient, wanted, theirs in zip(KINDS, ours, exact, plain, strict=False):
        assert gradient is not None
        compare(judge, name, gradient, wanted, theirs, 1.0, dtype)


def test_dropout_does_not_depend_on_tiles_and_drops_its_share() -> None:
    tensors, cu_seqlens = fused(70, 1, 16, torch.float32), packed([70])
    value = torch.ones_like(tensors[2])
    query = torch.zeros_like(value)  # all weights equal: the output is the share that is kept
    options: dict[str, Any] = {"dropout_p": 0.25, "dropout_seed": SEED.to(DEVICE)}
    output, _ = shaw_attention(query, query, value, cu_seqlens, 70, **options)
    share = float(output.mean()) * 0.75
    assert abs(share - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 70**2)
    assert torch.equal(output[:, 0, 0] == 0, torch.zeros(70, dtype=torch.bool, device=DEVICE))
    other, _ = shaw_attention(
        query, query, value, cu_seqlens, 70, dropout_p=0.25, dropout_seed=SEED.to(DEVICE) + 1
    )
    assert not torch.equal(other, output)
    _, lse = shaw_attention(query, query, value, cu_seqlens, 70)
    config = config_of_this_lane()
    results = [
        shaw_attention_backward(
            tensors[3], query, query, value, output, lse, cu_seqlens, 70, **options, config=config
        )
        for config in (config, replace(config, tile=64, key_step=16, query_step=16))
    ]
    for first, second in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@in_memory_of_its_own
def test_offsets_beyond_32_bits() -> None:
    """Rows 2^28 elements apart: the twelfth begins past 2^31. Untouched pages take no memory."""
    length, row = 12, 2**28
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has no name before Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2 * length * row, flags=flags)
    buffer = torch.frombuffer(memory, dtype=torch.float16)
    far = [
        buffer[offset:].as_strided((length, 1, 16), (row, 16, 1)) for offset in range(0, 128, 16)
    ]
    for view in far[:4]:
        view.copy_(torch.randn(length, 1, 16))
    near = [view.clone() for view in far[:4]]
    cu_seqlens = packed([length])
    _, lse = shaw_attention(*far[:3], cu_seqlens, length, out=far[4])
    output = far[4].clone()
    ours = shaw_attention_backward(
        far[3], *far[:3], far[4], lse, cu_seqlens, length, out=(far[5], far[6], far[7])
    )
    wanted = shaw_attention_backward(near[3], *near[:3], output, lse, cu_seqlens, length)
    for first, second in zip(ours[:3], wanted[:3], strict=True):
        assert torch.equal(first, second)


def arguments() -> dict[str, Any]:
    query, key, value, grad = fused(20, 2, 16, torch.float32)
    return {
        "grad_output": grad,
        "query": query,
        "key": key,
        "value": value,
        "output": grad,
        "log_sum_exp": torch.zeros(2, 20, device=DEVICE),
        "cu_seqlens": packed([20]),
        "max_seqlen": 20,
        "distance_embedding": position_vectors(4, 2, 16, torch.float32),
        "left_max_position": 4,
        "right_max_position": 2,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_output", torch.zeros(20, 2, 8)),
        ("grad_output", torch.zeros(20, 2, 16, dtype=torch.float16)),
        ("query", torch.zeros(20, 2, 16, dtype=torch.float64)),
        ("key", torch.zeros(20, 2, 8)),
        ("value", torch.zeros(20, 2, 32)[..., ::2]),
        ("output", torch.zeros(19, 2, 16)),
        ("log_sum_exp", torch.zeros(20, 2)),
        ("log_sum_exp", torch.zeros(2, 20, dtype=torch.float16)),
        ("cu_seqlens", torch.tensor([0, 20])),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int32)),
        ("max_seqlen", -1),
        ("distance_embedding", torch.zeros(8, 16)),
        ("left_max_position", -1),
        ("right_max_position", -1),
        ("dropout_p", 1.0),
        ("dropout_p", -0.1),
        ("dropout_seed", torch.zeros(2)),
        ("tile_map", torch.zeros(7, 2, dtype=torch.int32)),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        given = value.to(DEVICE) if isinstance(value, Tensor) else value
        shaw_attention_backward(**{**arguments(), name: given})


def test_other_arguments_that_do_not_fit() -> None:
    given = arguments()
    with pytest.raises(ValueError, match="dropout_seed is None"):
        shaw_attention_backward(**given, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        grad = given["query"]
        shaw_attention_backward(**given, out=(grad, grad[:3], grad))
    with pytest.raises(ValueError, match="head_dim is 136"):
        attention_backward_config(136, torch.float32, "sm_90")


@pytest.mark.parametrize("name", ["dropout_p", "dropout_seed"])
def test_the_forward_launcher_checks_its_dropout(name: str) -> None:
    query, key, value, _ = fused(20, 2, 16, torch.float32)
    wrong = {"dropout_p": 1.5} if name == "dropout_p" else {"dropout_p": 0.5}
    with pytest.raises(ValueError, match=name):
        shaw_attention(query, key, value, packed([20]), 20, **wrong)
