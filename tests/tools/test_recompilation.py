"""A new sequence length does not recompile a Triton kernel.

Triton compiles a kernel again when the types of its arguments change, or the value of a
`constexpr`, or what it specialises on: an integer's being 1 or a multiple of 16, a pointer's
alignment. Here the launchers run on tensors without memory, and what they ask Triton for is listed
(`tools.virtual_gpu.requests`). So this needs neither a GPU nor a compiler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

import csrc_triton
import w2vbert_fast
from csrc_triton.conv.config import conv_config
from csrc_triton.gemm.config import linear_config
from csrc_triton.launch import interpreting
from tools.virtual_gpu.requests import Uncompiled, requests
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops.dispatch import force

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing")

ARCHITECTURES = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
DTYPES = (torch.bfloat16, torch.float32)
# 1 and multiples of 16 are what Triton specialises integers on. The last makes tensors whose
# elements no 32-bit number counts.
TOKENS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 217, 300, 1500, 1504, 24_000, 100_000, 3_000_001)
WIDTH, INNER, HEADS = 1024, 4096, 16


@pytest.fixture(params=ARCHITECTURES)
def asked(request: pytest.FixtureRequest) -> Iterator[list[Uncompiled]]:
    with requests(ARCHITECTURES[request.param]) as found:
        yield found


def by_kernel(asked: list[Uncompiled]) -> Counter[str]:
    """How often each kernel would have been compiled."""
    return Counter(kernel for kernel, _ in {(a.source.fn.__name__, a.key) for a in asked})


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def offsets(num_tokens: int, batch: int) -> Tensor:
    """`cu_seqlens` of a batch; nothing here reads a length from it."""
    return empty(batch + 1, dtype=torch.int32)


def attention(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    fused = empty(num_tokens, 3, HEADS, WIDTH // HEADS, dtype=dtype)
    csrc_triton.attention.shaw_attention(
        *fused.unbind(1),
        offsets(num_tokens, batch),
        num_tokens,
        distance_embedding=empty(73, WIDTH // HEADS, dtype=dtype),
        left_max_position=64,
        right_max_position=8,
    )


def attention_without_positions(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    query, key, value = (empty(num_tokens, HEADS, 64, dtype=dtype) for _ in range(3))
    csrc_triton.attention.shaw_attention(query, key, value, offsets(num_tokens, batch), num_tokens)


def linear(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    x, weight = empty(num_tokens, WIDTH, dtype=dtype), empty(INNER, WIDTH, dtype=dtype)
    csrc_triton.gemm.linear(x, weight, empty(INNER, dtype=dtype), activation="silu")


def linear_glu(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    x = empty(num_tokens, WIDTH, dtype=dtype)
    csrc_triton.gemm.linear_glu(x, empty(2 * WIDTH, WIDTH, dtype=dtype))


def norm(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    x = empty(num_tokens, WIDTH, dtype=dtype)
    csrc_triton.norm.layer_norm(x, *norm_weights(dtype), 1e-5)


def residual_norm(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    x = empty(num_tokens, WIDTH, dtype=dtype)
    scale = 0.5 if num_tokens % 2 else 1.0
    csrc_triton.norm.residual_layer_norm(x, x, scale, *norm_weights(dtype), 1e-5)


def double_norm(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    x, weights = empty(num_tokens, WIDTH, dtype=dtype), norm_weights(dtype)
    csrc_triton.norm.residual_double_layer_norm(x, x, 0.5, *weights, *weights, 1e-5)


def norm_weights(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return empty(WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)


def conv(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    x, taps = empty(num_tokens, WIDTH, dtype=dtype), empty(WIDTH, 31, dtype=dtype)
    cu_seqlens = offsets(num_tokens, batch)
    csrc_triton.conv.conv_norm_act(x, taps, *norm_weights(dtype), 1e-5, "silu", cu_seqlens)


def ctc(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    logits = empty(num_tokens, 32, dtype=dtype)
    csrc_triton.ctc.ctc_greedy(logits, offsets(num_tokens, batch), batch)  # nor is the blank known


def fbank(num_tokens: int, batch: int, dtype: torch.dtype) -> None:
    # Some samples more than fill frames: a multiple of 16 is what 400 + 160 n always is.
    samples = torch.empty(400 + 160 * num_tokens + num_tokens % 160, device="meta")
    cu_seqlens = offsets(num_tokens, batch)
    features, frames = csrc_triton.fbank.log_mel_filterbank(
        samples, cu_seqlens, num_frames=num_tokens
    )
    csrc_triton.fbank.normalize_and_stack(features, frames, num_stacked=max(num_tokens // 2, 1))


Launch = Callable[[int, int, torch.dtype], None]
LAUNCHES: dict[str, tuple[Launch, dict[str, int]]] = {
    "attention": (attention, {"shaw_attention_fwd_kernel": 1}),
    "attention_without_positions": (
        attention_without_positions,
        {"shaw_attention_fwd_kernel": 1},
    ),
    "linear": (linear, {}),
    "linear_glu": (linear_glu, {}),
    "layer_norm": (norm, {"_norm_fwd_kernel": 1}),
    "residual_layer_norm": (residual_norm, {"_norm_fwd_kernel": 1}),
    "residual_double_layer_norm": (double_norm, {"_norm_fwd_kernel": 1}),
    "conv_norm_act": (conv, {}),
    "ctc_greedy": (ctc, {"_ctc_argmax_kernel": 1, "_ctc_collapse_kernel": 1}),
    "fbank": (
        fbank,
        {"_log_mel_fwd_kernel": 1, "_sum_blocks_kernel": 1, "_normalize_stack_kernel": 1},
    ),
}
"""Launchers, and how often each of their kernels is compiled: where nothing is said, once for each
tile."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAUNCHES)
def test_lengths_share_their_kernels(
    name: str, dtype: torch.dtype, asked: list[Uncompiled], request: pytest.FixtureRequest
) -> None:
    launch, expected = LAUNCHES[name]
    arch = request.node.callspec.params["asked"]
    if name == "conv_norm_act":
        rows = {conv_config(tokens, WIDTH, 31, dtype, arch) for tokens in TOKENS}
        assert 1 < len(rows) <= 4
        expected = {"_conv_norm_act_fwd_kernel": len(rows)}
    elif not expected:
        columns = INNER if name == "linear" else 2 * WIDTH
        tiles = {linear_config(tokens, columns, WIDTH, dtype, arch) for tokens in TOKENS}
        assert 1 < len(tiles) <= 4
        expected = {"_linear_kernel": len(tiles)}
    for num_tokens in TOKENS:
        for batch in (1, 2, 16, 19):
            launch(num_tokens, batch, dtype)
    assert by_kernel(asked) == expected


def test_every_launcher_is_here() -> None:
    covered = {
        "shaw_attention",
        "log_mel_filterbank",
        "normalize_and_stack",
        *LAUNCHES,
    } - {"attention", "attention_without_positions", "fbank"}
    packages = (getattr(csrc_triton, name) for name in csrc_triton.__all__)
    launchers = {name for package in packages for name in getattr(package, "__all__", ())}
    forward = {name for name in launchers if "backward" not in name}
    assert forward - {"build_tile_map", "tile_bound"} == covered - {"ctc_greedy"}


def test_no_tokens_compile_nothing(asked: list[Uncompiled]) -> None:
    for name in ("linear", "linear_glu", "layer_norm", "conv_norm_act"):
        LAUNCHES[name][0](0, 0, torch.bfloat16)
    attention(0, 1, torch.bfloat16)
    assert not asked


@pytest.mark.parametrize("whole_model", [False, True])
def test_a_layer_is_compiled_once(whole_model: bool, asked: list[Uncompiled]) -> None:
    """What the operations and the modules hand to the launchers, and not the launchers alone."""
    config = w2vbert_fast.Wav2Vec2BertConfig(
        hidden_size=128, num_attention_heads=2, intermediate_size=256, num_hidden_layers=1
    )
    model = w2vbert_fast.Wav2Vec2BertModel(config).to(torch.bfloat16).eval()
    model.use_fast_kernels = True
    layer = model.encoder.layers[0]

    def run(*lengths: int) -> None:
        layout = PackedBatch.from_lengths(lengths, max(lengths), "cpu")
        x = torch.zeros(sum(lengths), 128, dtype=torch.bfloat16)
        with torch.no_grad(), force("triton"):
            if whole_model:
                model(torch.zeros(1, sum(lengths), 160, dtype=torch.bfloat16))
            else:
                layer(x, layout)

    run(37)
    once = by_kernel(asked)
    # Lengths choose among at most four tiles of these, and change nothing else.
    of_tiles = {"_linear_kernel", "_conv_norm_act_fwd_kernel"}
    of_one = {"shaw_attention_fwd_kernel", "_norm_fwd_kernel"}
    assert once.keys() == of_tiles | of_one
    lengths = ((1,), (2,), (16,), (17, 1), (64, 0, 65), (300,), (1500,), (1504,), (1, 1, 1, 1))
    for some in (*lengths, (20_000, 3), (40_000,)):
        run(*some)
        for name, number in by_kernel(asked).items():
            assert number <= once[name] * (4 if name in of_tiles else 1), f"{some}: {name}"


@triton.jit
def _length_specialises_kernel(x_ptr, num_rows, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(x_ptr + rows, 0.0, mask=rows < num_rows)


def test_a_recompilation_is_seen(asked: list[Uncompiled]) -> None:
    for num_rows in (3, 5, 7):
        _length_specialises_kernel[(1,)](empty(16, dtype=torch.float32), num_rows, BLOCK=16)
    assert by_kernel(asked) == {"_length_specialises_kernel": 1}
    for num_rows in (1, 16, 2**31):
        _length_specialises_kernel[(1,)](empty(16, dtype=torch.float32), num_rows, BLOCK=16)
    assert by_kernel(asked) == {"_length_specialises_kernel": 4}
    attention(5, 1, torch.float32)
    csrc_triton.attention.shaw_attention(
        *(empty(5, 2, 32, dtype=torch.float32),) * 3, offsets(5, 1), 5
    )
    assert by_kernel(asked)["shaw_attention_fwd_kernel"] == 2
