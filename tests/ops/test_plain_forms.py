"""Each operation's plain form against its formula, written out independently in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast import ops
from w2vbert_fast.models.spec_augment import sample_mask_spans

LENGTHS = (1, 2, 0, 13, 7)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def shaw_by_definition(q: Tensor, k: Tensor, v: Tensor, e: Tensor, left: int, right: int) -> Tensor:
    """One utterance, one head, pair by pair: `[T, D]` each."""
    frames, dim = q.shape
    out = torch.zeros_like(q)
    for i in range(frames):
        scores = []
        for j in range(frames):
            distance = min(max(j - i, -left), right) + left
            scores.append(float(q[i] @ k[j] + q[i] @ e[distance]) / math.sqrt(dim))
        weights = torch.tensor(scores, dtype=q.dtype).softmax(0)
        out[i] = weights @ v
    return out


@pytest.mark.parametrize(("left", "right"), [(5, 3), (0, 0), (2, 40), (64, 8)])
def test_shaw_attention_by_definition(left: int, right: int) -> None:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = torch.randn(3, total, 2, 4, dtype=torch.float64)
    e = torch.randn(left + right + 1, 4, dtype=torch.float64)
    got, maps = ops.shaw_attention(
        q,
        k,
        v,
        cumulative(LENGTHS),
        max(LENGTHS),
        distance_embedding=e,
        left_max_position=left,
        right_max_position=right,
    )
    assert maps is None
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        for head in range(2):
            expected = shaw_by_definition(
                q[rows, head], k[rows, head], v[rows, head], e, left, right
            )
            torch.testing.assert_close(got[rows, head], expected)
        start += length


def test_attention_without_positions_is_scaled_dot_product_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 13, 2, 4, dtype=torch.float64)
    got, _ = ops.shaw_attention(q, k, v, cumulative((13,)), 13)
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    torch.testing.assert_close(got, expected[0].transpose(0, 1))


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 200, 1, 4, dtype=torch.float64)
    v = torch.ones(200, 1, 4, dtype=torch.float64)
    got, _ = ops.shaw_attention(q, k, v, cumulative((200,)), 200, dropout_p=0.5)
    assert float(got.std()) > 0.01
    assert float(got.mean()) == pytest.approx(1.0, abs=0.03)


def test_causal_convolution_by_definition() -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(LENGTHS), 3, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64)
    got = ops.causal_depthwise_conv(x, weight, cumulative(LENGTHS))
    start = 0
    for length in LENGTHS:
        for t in range(length):
            expected = sum(
                weight[:, tap] * x[start + t - 4 + tap] for tap in range(5) if t - 4 + tap >= 0
            )
            torch.testing.assert_close(got[start + t], expected)
        start += length


def test_conv_norm_act() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64)
    conv, weight, bias = (torch.randn(n, dtype=torch.float64) for n in ((3, 5), (3,), (3,)))
    y = ops.causal_depthwise_conv(x, conv, cumulative((7,)))
    mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, correction=0)
    normed = (y - mean) / (var + 1e-5).sqrt() * weight + bias
    got = ops.conv_norm_act(x, conv, weight, bias, 1e-5, "silu", cumulative((7,)))
    torch.testing.assert_close(got, normed * torch.sigmoid(normed))


def test_residual_layer_norm() -> None:
    torch.manual_seed(0)
    residual, x = torch.randn(2, 5, 6, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    y, z = ops.residual_layer_norm(residual, x, 0.5, weight, bias, 1e-5)
    torch.testing.assert_close(y, residual + x / 2)
    centred = y - y.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(z, expected)


def test_linear_and_gated_linear_unit() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    y = x @ weight.T + bias
    torch.testing.assert_close(ops.linear(x, weight, bias), y)
    torch.testing.assert_close(ops.linear(x, weight, bias, "relu"), y.clamp(min=0))
    expected = y[:, :3] / (1 + torch.exp(-y[:, 3:]))
    torch.testing.assert_close(ops.linear_glu(x, weight, bias), expected)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    angles = torch.randn(3, 2, dtype=torch.float64)
    both = torch.cat((angles, angles), -1)
    got = ops.rotate(x, both.cos(), both.sin())
    as_complex = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    torch.testing.assert_close(got, torch.cat((as_complex.real, as_complex.imag), -1))


def test_every_named_activation_against_torch() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    expected = {
        "gelu": F.gelu(x),
        "gelu_10": F.gelu(x).clamp(-10, 10),
        "gelu_accurate": F.gelu(x, approximate="tanh"),
        "gelu_python": F.gelu(x),
        "gelu_python_tanh": F.gelu(x, approximate="tanh"),
        "laplace": torch.distributions.Normal(0.707107, 0.282095).cdf(x),
        "sqrtsoftplus": torch.log1p(x.exp()).sqrt(),
        "gelu_fast": F.gelu(x, approximate="tanh"),
        "gelu_new": F.gelu(x, approximate="tanh"),
        "gelu_pytorch_tanh": F.gelu(x, approximate="tanh"),
        "hardswish": x * (x + 3).clamp(0, 6) / 6,
        "leaky_relu": torch.where(x > 0, x, 0.01 * x),
        "linear": x,
        "mish": x * torch.log1p(x.exp()).tanh(),
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
        "relu": x.clamp(min=0),
        "relu2": x.clamp(min=0) ** 2,
        "relu6": x.clamp(0, 6),
        "selu": torch.nn.SELU()(x),
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "silu": x / (1 + torch.exp(-x)),
        "swish": x / (1 + torch.exp(-x)),
        "tanh": torch.tanh(x),
    }
    assert expected.keys() == ops.ACTIVATIONS.keys()
    for name, values in expected.items():
        torch.testing.assert_close(ops.get_activation(name)(x), values)
    with pytest.raises(ValueError, match="activation is 'swisch'"):
        ops.get_activation("swisch")


def test_greedy_decoding_collapses_within_the_valid_frames() -> None:
    paths = [[0, 3, 3, 0, 3, 5], [4, 4, 4, 2, 2, 2], [0, 0, 1, 1, 1, 1]]
    logits = F.one_hot(torch.tensor(paths), 6).float()
    got = ops.greedy_decode(logits, torch.tensor([6, 4, 2]), blank=0)
    assert got == [[3, 3, 5], [4, 2], []]
    assert ops.greedy_decode(logits, torch.tensor([0, 0, 0]), blank=0) == [[], [], []]


def test_mask_spans_stay_inside_and_have_the_right_share() -> None:
    torch.manual_seed(0)
    lengths = [400, 100, 9, 10]
    rates = []
    for _ in range(300):
        mask = sample_mask_spans(lengths, 400, mask_prob=0.2, mask_length=10, min_masks=1)
        assert mask.shape == (4, 400) and mask.dtype == torch.bool
        for row, length in enumerate(lengths):
            assert not mask[row, length:].any()
        assert not mask[2].any()
        assert bool(mask[3, :10].all())
        rates.append(mask[0].float().mean())
    # 8 spans of 10 (9 in none of the draws: 8.0 + u < 9) in 400, less their overlaps.
    assert 0.16 < float(torch.stack(rates).mean()) < 0.2


def test_mask_span_count_rounds_at_random() -> None:
    torch.manual_seed(0)
    counts = [
        int(sample_mask_spans([45], 45, mask_prob=0.1, mask_length=1).sum()) for _ in range(400)
    ]
    assert set(counts) == {4, 5}
    assert sum(counts) / 400 == pytest.approx(4.5, abs=0.1)
