"""The fast CPU path against the plain operations in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from w2vbert_fast import ops
from w2vbert_fast.ops import cpu
from w2vbert_fast.ops.cpu import attention, capability, conv, gemm, int8, norm

FOR_SMALL_INPUTS = (
    (attention, "_FEW_SCORES"),
    (conv, "_FEW_ELEMENTS"),
    (gemm, "_FEW_PRODUCTS"),
    (gemm, "_SMALL_PRODUCTS"),
    (norm, "_FEW_ELEMENTS"),
)

RAGGED = (1, 2, 31, 0, 63, 64, 65, 217, 300)
DTYPES = (torch.float32, torch.bfloat16)
FP32 = 2e-6


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _as_for_large_inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for large inputs runs for the small ones of these tests."""
    if not {"_as_for_small_inputs", "_as_shipped"} & set(request.fixturenames):
        for module, threshold in FOR_SMALL_INPUTS:
            monkeypatch.setattr(module, threshold, 0)


@pytest.fixture
def _as_for_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for small inputs runs for all."""
    for module, threshold in FOR_SMALL_INPUTS:
        monkeypatch.setattr(module, threshold, 1 << 40)


@pytest.fixture
def _as_shipped() -> None:
    """The limits as they are."""


@pytest.mark.usefixtures("_as_shipped")
@pytest.mark.parametrize(
    ("rows", "weight", "activation", "dtype", "taken"),
    [
        (15, (1024, 1024), None, torch.float32, True),
        (1, (1024, 1024), None, torch.float32, False),
        (15, (512, 512), "silu", torch.float32, True),
        (50, (192, 768), None, torch.float32, False),
        (42, (768, 192), "silu", torch.float32, False),
        (170, (768, 192), "silu", torch.float32, False),
        (171, (768, 192), "silu", torch.float32, True),
        (250, (192, 768), None, torch.float32, True),
        (1, (192, 192), None, torch.bfloat16, True),
        (0, (192, 192), None, torch.bfloat16, False),
    ],
)
def test_which_library_multiplies(
    rows: int,
    weight: tuple[int, int],
    activation: str | None,
    dtype: torch.dtype,
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gemm, "onednn_linear", lambda dtype: True)
    x, matrix = torch.empty(rows, weight[1], dtype=dtype), torch.empty(weight, dtype=dtype)
    assert gemm._takes_onednn(x, matrix, None, activation) == taken


@pytest.mark.usefixtures("_as_shipped")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_device_decides_nothing(dtype: torch.dtype) -> None:
    """Not what this CPU has, which is asked once, nor what is kept of positions."""
    heads, embedding = random(dtype, 3, 400, 2, 16), random(dtype, 9, 16)

    def found() -> list[Any]:
        results: list[Any] = [capability._runs(dtype), int8.reasons.__wrapped__()]
        for length in (30, 400):
            ends = torch.tensor([0, length], dtype=torch.int32, device="cpu")
            arguments = (*heads[:, :length], ends, length, embedding, 5, 3, None, False)
            results.append(attention.shaw_attention(*arguments)[0].tolist())
        return results

    expected = found()
    for kept in (attention._columns, attention._beyond_band):
        kept.cache_clear()
    with torch.device("meta"):
        assert found() == expected
    assert found() == expected


@pytest.fixture(params=[True, False], ids=["onednn", "without"])
def _onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whatever the machine has, and as on a machine without oneDNN."""
    if not request.param:
        monkeypatch.setattr(gemm, "onednn_linear", lambda dtype: False)
        monkeypatch.setattr(attention, "onednn_linear", lambda dtype: False)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(got: Tensor, expected: Tensor, plain: Tensor) -> None:
    """fp32 to rounding; bf16 at most 1.1 times as far from float64 as the plain form in bf16."""
    assert got.dtype == plain.dtype
    assert got.is_contiguous()
    limit = FP32 if got.dtype == torch.float32 else 1.1 * relative_error(plain, expected)
    assert relative_error(got, expected) <= limit


def random(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values as some columns of a wider tensor of NaN."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan, dtype=x.dtype)
    view = wide[..., 2 : 2 + x.shape[-1]]
    return view.copy_(x)


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "activation", [None, "silu", "swish", "gelu", "gelu_new", "relu", "selu", "mish"]
)
def test_linear(dtype: torch.dtype, activation: str | None) -> None:
    weight, bias = random(dtype, 48, 40, scale=0.2), random(dtype, 48)
    for tokens in (0, 1, 63, 217):
        x = random(dtype, tokens, 40)
        expected = ops.linear(x.double(), weight.double(), bias.double(), activation)
        plain = ops.linear(x, weight, bias, activation)
        check(cpu.linear(x, weight, bias, activation), expected, plain)
        check(cpu.linear(strided(x), strided(weight), bias, activation), expected, plain)
        expected = ops.linear(x.double(), weight.double(), None, activation)
        plain = ops.linear(x, weight, None, activation)
        check(cpu.linear(x, weight, None, activation), expected, plain)


def test_linear_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation is 'swash'"):
        cpu.linear(torch.ones(2, 4), torch.ones(3, 4), None, "swash")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_bytes", [1 << 30, 7000])
def test_linear_glu_and_feed_forward_in_blocks(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "_BLOCK_BYTES", block_bytes)
    first, second = random(dtype, 96, 40, scale=0.2), random(dtype, 24, 96, scale=0.2)
    bias1, bias2 = random(dtype, 96), random(dtype, 24)
    for tokens in (0, 1, 63, 217):
        x = random(dtype, tokens, 40)
        expected = ops.linear_glu(x.double(), first.double(), bias1.double())
        check(cpu.linear_glu(x, first, bias1), expected, ops.linear_glu(x, first, bias1))
        hidden = ops.linear(x.double(), first.double(), bias1.double(), "silu")
        expected = ops.linear(hidden, second.double(), bias2.double())
        plain = ops.linear(ops.linear(x, first, bias1, "silu"), second, bias2)
        check(cpu.feed_forward(x, first, bias1, "silu", second, bias2), expected, plain)


def test_blocks_of_rows_bound_the_intermediate_values() -> None:
    for num_rows in (0, 1, 1500, 15_000):
        blocks = gemm.row_blocks(num_rows, 16_384)
        covered = [i for rows in blocks for i in range(num_rows)[rows]]
        assert covered == list(range(num_rows))
        longest = max(len(range(num_rows)[rows]) for rows in blocks)
        assert longest * 16_384 <= gemm._BLOCK_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 160, 1024])
def test_norms(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2vbert_fast.ops.cpu.norm._BLOCK_ELEMENTS", 10_000)
    first, second = ((random(dtype, width), random(dtype, width)) for _ in range(2))
    wide = [tuple(w.double() for w in pair) for pair in (first, second)]
    for tokens in (0, 1, 63, 217):
        # Far from zero, where a variance of raw moments would cancel.
        x, residual = random(dtype, tokens, width) + 100, random(dtype, tokens, width)
        for a, b in ((x, residual), (strided(x), strided(residual))):
            expected = ops.layer_norm(x.double(), *wide[0], 1e-5)
            got = cpu.layer_norm(a, *first, 1e-5)
            # 100 + noise carries 2e-6 of the noise's size in the mean alone.
            assert relative_error(got, expected) <= (1e-5 if dtype == torch.float32 else 1e-2)

            y, z = cpu.residual_layer_norm(b, a - 100, 0.5, *first, 1e-5)
            plain = ops.residual_layer_norm(residual, x - 100, 0.5, *first, 1e-5)
            exact = ops.residual_layer_norm(
                residual.double(), (x - 100).double(), 0.5, *wide[0], 1e-5
            )
            for index, tensor in enumerate((y, z)):
                check(tensor, exact[index], plain[index])

            z1, z2 = cpu.residual_double_layer_norm(b, a - 100, 0.5, *first, *second, 1e-5)
            check(z1, exact[1], plain[1])
            plain_double = ops.layer_norm(plain[1], *second, 1e-5)
            exact_double = ops.layer_norm(exact[1], *wide[1], 1e-5)
            check(z2, exact_double, plain_double)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 3, 31, 63])
@pytest.mark.parametrize("lengths", [RAGGED, (217,), (0, 5, 0), (0,), ()])
def test_conv_norm_act(dtype: torch.dtype, taps: int, lengths: tuple[int, ...]) -> None:
    width = 40
    x = random(dtype, sum(lengths), width)
    conv, weight, bias = (random(dtype, *shape) for shape in ((width, taps), (width,), (width,)))
    wide = [t.double() for t in (x, conv, weight, bias)]
    for activation in ("silu", "relu", "gelu"):
        arguments = (1e-5, activation, cumulative(lengths))
        expected = ops.conv_norm_act(*wide, *arguments)
        plain = ops.conv_norm_act(x, conv, weight, bias, *arguments)
        check(cpu.conv_norm_act(x, conv, weight, bias, *arguments), expected, plain)
        check(
            cpu.conv_norm_act(strided(x), strided(conv), weight, bias, *arguments), expected, plain
        )


@pytest.mark.usefixtures("_as_for_small_inputs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_inputs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("what is made for large inputs was called")

    monkeypatch.setattr(attention, "Attend", refuse)
    monkeypatch.setattr(norm, "layer_norm_into", refuse)
    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    test_norms(dtype, 160, monkeypatch)
    test_conv_norm_act(dtype, 31, RAGGED)
    test_conv_norm_act(dtype, 1, (0,))
    if dtype == torch.float32:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", refuse)
    test_linear(dtype, "silu")
    for lengths in (RAGGED, (1,), (0, 3, 0)):
        for reach in ((64, 8), (5, 3), (0, 8), (0, 0), (1000, 900)):
            tensors = tuple(random(dtype, sum(lengths), 3, 64) for _ in range(3))
            embedding = random(dtype, sum(reach) + 1, 64)
            for positions, clip in ((embedding, reach), (None, (0, 0))):
                expected, plain = (
                    attend_plainly(
                        tuple(t.to(wide) for t in tensors),
                        lengths,
                        None if positions is None else positions.to(wide),
                        *clip,
                    )
                    for wide in (torch.float64, dtype)
                )
                arguments = (cumulative(lengths), max(lengths), positions, *clip)
                check(attend(*tensors, *arguments), expected, plain.contiguous())


def attend(*arguments: Any) -> Tensor:
    """The CPU's attention where nobody asks for the log-sum-exp."""
    output, log_sum_exp = cpu.shaw_attention(*arguments, return_log_sum_exp=False)
    assert log_sum_exp.shape == (0,)
    return output


def attend_plainly(
    tensors: tuple[Tensor, ...], lengths: tuple[int, ...], embedding: Tensor | None, *reach: int
) -> Tensor:
    output, _ = ops.shaw_attention(
        *tensors,
        cumulative(lengths),
        max(lengths, default=0),
        distance_embedding=embedding,
        left_max_position=reach[0],
        right_max_position=reach[1],
    )
    return output


def check_attention(
    tensors: tuple[Tensor, ...], lengths: tuple[int, ...], embedding: Tensor | None, *reach: int
) -> None:
    arguments = (cumulative(lengths), max(lengths, default=0), embedding, *reach)
    wide = tuple(t.double() for t in tensors)
    wide_embedding = None if embedding is None else embedding.double()
    expected = attend_plainly(wide, lengths, wide_embedding, *reach)
    plain = attend_plainly(tensors, lengths, embedding, *reach).contiguous()
    check(attend(*tensors, *arguments), expected, plain)
    output, log_sum_exp = cpu.shaw_attention(*tensors, *arguments)
    check(output, expected, plain)
    assert log_sum_exp.dtype == torch.float32
    _, exact = torch.ops.w2vbert.shaw_attention(
        *wide, arguments[0], arguments[1], wide_embedding, *reach
    )[:2]
    tolerance = 1e-5 if tensors[0].dtype == torch.float32 else 3e-2
    torch.testing.assert_close(log_sum_exp, exact.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reach", [(64, 8), (5, 3), (0, 8), (8, 0), (2, 40), (0, 0), (1000, 900)])
@pytest.mark.parametrize("lengths", [RAGGED, (700,), (3,), (600, 0, 500, 3, 700, 0)])
def test_shaw_attention(
    dtype: torch.dtype, reach: tuple[int, int], lengths: tuple[int, ...]
) -> None:
    tensors = tuple(random(dtype, sum(lengths), 3, 64) for _ in range(3))
    check_attention(tensors, lengths, random(dtype, sum(reach) + 1, 64), *reach)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 48, 64, 80, 128])
def test_attention_head_sizes_without_positions(dtype: torch.dtype, head_size: int) -> None:
    tensors = tuple(random(dtype, sum(RAGGED), 2, head_size) for _ in range(3))
    check_attention(tensors, RAGGED, None, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_a_long_utterance(dtype: torch.dtype) -> None:
    tensors = tuple(random(dtype, 3000, 2, 64) for _ in range(3))
    check_attention(tensors, (3000,), random(dtype, 73, 64), 64, 8)


@pytest.mark.parametrize("length", [511, 512, 1499])
def test_row_sums_of_bf16_powers(length: int) -> None:
    powers = torch.rand(2, 16, length, generator=torch.Generator().manual_seed(length)).bfloat16()
    powers[:, 1] *= torch.logspace(-20, 0, length, dtype=torch.bfloat16)
    expected = powers.double().sum(-1, keepdim=True)
    sums = attention.row_sums(powers, torch.float32)
    assert sums.dtype == torch.float32 and sums.shape == (2, 16, 1)
    # All terms are positive: each stretch is off by half a unit in its last place at most.
    assert ((sums - expected).abs() <= 2**-9 * expected).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bf16_attention_of_thirty_seconds(seed: int) -> None:
    torch.manual_seed(seed)
    tensors = tuple(random(torch.bfloat16, 1500, 2, 64) for _ in range(3))
    check_attention(tensors, (1500,), random(torch.bfloat16, 73, 64), 64, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_strided_projections(dtype: torch.dtype) -> None:
    projections = random(dtype, sum(RAGGED), 3 * 2 * 64)  # one product of all three weights
    tensors = tuple(t.view(-1, 2, 64) for t in projections.chunk(3, dim=1))
    assert not tensors[0].is_contiguous()
    check_attention(tensors, RAGGED, random(dtype, 73, 64), 64, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_attention_without_tokens(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    empty = torch.empty(0, 2, 64, dtype=dtype)
    arguments = (cumulative(lengths), 0, random(dtype, 73, 64), 64, 8)
    output, log_sum_exp = cpu.shaw_attention(empty, empty, empty, *arguments)
    assert output.shape == (0, 2, 64)
    assert log_sum_exp.shape == (2, 0)


@pytest.mark.parametrize("lengths", [RAGGED, (700,)])
@pytest.mark.parametrize("scale", [8.0, 100.0])
def test_scores_beyond_the_range_of_powers(lengths: tuple[int, ...], scale: float) -> None:
    """One head needs its rows' maxima, the others do not."""
    query, key, value = (random(torch.float32, sum(lengths), 3, 64) for _ in range(3))
    query[:, 1] *= scale
    embedding = random(torch.float32, 73, 64)
    wide = tuple(t.double() for t in (query, key, value))
    expected = attend_plainly(wide, lengths, embedding.double(), 64, 8)
    arguments = (cumulative(lengths), max(lengths), embedding, 64, 8)
    got = attend(query, key, value, *arguments)
    # A score of several hundred is itself rounded to 1e-5.
    assert relative_error(got, expected) <= 1e-7 * scale * 64
    ordinary = got[:, ::2], expected[:, ::2]
    assert relative_error(*ordinary) <= FP32


def test_half_precision_and_float64_are_right_too() -> None:
    tensors = tuple(random(torch.float64, 300, 2, 64) for _ in range(3))
    embedding = random(torch.float64, 73, 64)
    expected = attend_plainly(tensors, (300,), embedding, 64, 8)
    arguments = (cumulative((300,)), 300)
    got = attend(*tensors, *arguments, embedding, 64, 8)
    assert relative_error(got, expected) <= 1e-14
    halves = tuple(4 * t.half() for t in tensors)
    expected = attend_plainly(tuple(t.double() for t in halves), (300,), None, 0, 0)
    assert relative_error(attend(*halves, *arguments, None, 0, 0), expected) <= 2e-2


def test_not_a_number_stays_in_its_utterance() -> None:
    lengths = (65, 217)
    tensors = tuple(random(torch.float32, sum(lengths), 2, 64) for _ in range(3))
    embedding = random(torch.float32, 73, 64)
    expected = attend_plainly(
        tuple(t.double() for t in tensors), lengths, embedding.double(), 64, 8
    )
    tensors[1][3] = math.nan
    got = attend(*tensors, cumulative(lengths), 217, embedding, 64, 8)
    assert got[:65].isnan().all()
    assert relative_error(got[65:], expected[65:]) <= FP32


@pytest.mark.usefixtures("_onednn")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_behind_an_utterance_gets_no_weight(dtype: torch.dtype) -> None:
    lengths = (450, 301)
    tensors = tuple(random(dtype, sum(lengths), 2, 64) for _ in range(3))
    arguments = (cumulative(lengths), max(lengths), random(dtype, 73, 64), 64, 8)
    expected = attend(*tensors, *arguments)
    for tensor in tensors:
        tensor[450:] = math.nan
    got = attend(*tensors, *arguments)
    assert relative_error(got[:450], expected[:450]) <= (FP32 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_multiplies_in_few_shapes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[Any, ...]] = set()

    def note(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noting(*operands: Any, **options: Any) -> Tensor:
            seen.add(tuple(operand.shape for operand in operands))
            result: Tensor = function(*operands, **options)
            return result

        monkeypatch.setattr(module, name, noting)

    if dtype == torch.float32:
        note(attention, "matmul_transposed")
    else:
        note(torch, "bmm")
        note(torch, "baddbmm")
    embedding = random(dtype, 73, 64)
    lengths = range(400, 800, 5)
    for length in lengths:
        tensors = tuple(random(dtype, length, 2, 64) for _ in range(3))
        attend(*tensors, cumulative((length,)), length, embedding, 64, 8)
    # Sixteen numbers of keys, each with as many numbers of queries as it has blocks, if need be.
    assert len(lengths) == 80
    assert len(seen) <= 90
    assert seen or not capability.onednn_linear(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_laid_out_once_an_utterance(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, since oneDNN copies parts of a larger tensor for every block; one length is a size of
    products, the other is not."""
    lengths = (450, 512)
    key, value = (random(dtype, sum(lengths), 2, 64) for _ in range(2))
    monkeypatch.setattr(attention.threads, "count", lambda: 1)
    (share,) = attention.shares_of(key, cumulative(lengths), None, False)
    attend = attention.Attend(key, key, value, 512, None, 0, 0, few_sizes=True)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = 0
    for block, _, _ in attend.blocks(share):
        blocks += 1
        laid_out = seen.setdefault(block.offset, (attend.keys, attend.values))
        for ours, now, of_batch in zip(
            laid_out, (attend.keys, attend.values), (key, value), strict=True
        ):
            assert ours is now and ours.is_contiguous()
            own, behind = ours.split([block.length, ours.shape[1] - block.length], 1)
            assert torch.equal(own, of_batch[block.columns()].transpose(0, 1))
            assert not behind.any()
    assert len(seen) == 2 < blocks


PEAK = """
import resource, torch
from w2vbert_fast.ops import cpu
from w2vbert_fast.ops.cpu import attention, capability, conv, gemm, norm
torch.set_grad_enabled(False)
T, H = 8000, 4
def attend(q, k, v):
    n = q.shape[0]
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
    return cpu.shaw_attention(q, k, v, cu_seqlens, n, torch.randn(73, 64).to(q), 64, 8, None, False)
for dtype in (torch.float32, torch.bfloat16):
    tensors = torch.randn(3, T, H, 64).to(dtype)
    attend(*tensors[:, :300])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend(*tensors)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_memory_of_attention_is_linear_in_the_length() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    for kib in map(int, done.stdout.split()):
        # Scores of one head alone are 256 MB in fp32, those of all heads 1 GB.
        assert kib <= 100 * 1024


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.is_available() == (cpu.reasons() == ())
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert capability.reasons.__wrapped__() == ("this build of PyTorch has no oneDNN",)


@pytest.mark.skipif(not capability.onednn_linear(torch.float32), reason="no oneDNN for float32")
def test_products_of_gradients_that_onednn_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in fp32 alone, of matrices that fill their memory: others it multiplies slowly."""
    seen: list[Tensor] = []
    multiply = gemm.matmul_transposed

    def record(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(weight)
        return multiply(x, weight)

    monkeypatch.setattr(gemm, "matmul_transposed", record)
    a, wide = torch.randn(30, 96), torch.randn(96, 320)
    for b in (
        wide,
        torch.randn(160, 96).t(),
        wide[:, :160],
        wide[:, ::2],
        wide[:, :1].expand(96, 7),
    ):
        assert relative_error(gemm.product(a, b), a.double() @ b.double()) <= FP32
        weight = seen.pop()
        assert weight.is_contiguous() or weight.t().is_contiguous()
    for dtype in (torch.bfloat16, torch.float64):
        gemm.product(a.to(dtype), wide.to(dtype))
    assert not seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 8, 16, 32, 64])
def test_few_channels(dtype: torch.dtype, channels: int) -> None:
    # In a process of its own: where oneDNN cannot make a kernel, it does not come back.
    code = f"""
import torch
from w2vbert_fast.ops import conv, cpu
cpu.conv._FEW_ELEMENTS = 0
torch.manual_seed(0)
x, weight = torch.randn(86, {channels}).to({dtype}), torch.randn({channels}, 31).to({dtype})
gain, offset = torch.ones({channels}).to({dtype}), torch.zeros({channels}).to({dtype})
cu_seqlens = torch.tensor([0, 7, 86], dtype=torch.int32)
arguments = (x, weight, gain, offset, 1e-5, "silu", cu_seqlens)
exact = conv.conv_norm_act(*(a.double() if torch.is_tensor(a) and a.is_floating_point() else a
                             for a in arguments))
error = (cpu.conv_norm_act(*arguments).double() - exact).norm()
plain = (conv.conv_norm_act(*arguments).double() - exact).norm()
assert error <= 1.1 * plain + 1e-5 * exact.norm(), (error, plain)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
