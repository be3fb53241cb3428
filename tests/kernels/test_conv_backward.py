"""The gradients of the convolution, its norm and its activation against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.conv import conv_norm_act_backward
from csrc_triton.functions import ACTIVATIONS
from tests.kernels.conftest import POISON_INTEGER
from w2vbert_fast.ops import conv as plain

EPS = 1e-5


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def tensors(
    num_tokens: int, channels: int, kernel_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """x, convolution weight, norm weight and bias, and the gradient of the output."""
    x, grad = torch.randn(2, num_tokens, channels)
    weight = torch.randn(channels, kernel_size) * kernel_size**-0.5
    given = (x, weight, torch.randn(channels), torch.randn(channels), grad)
    return tuple(tensor.to(dtype) for tensor in given)


def twin(
    given: tuple[Tensor, ...],
    activation: str | None,
    cu_seqlens: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    *leaves, grad = (tensor.to(dtype).detach().clone() for tensor in given)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = plain.conv_norm_act(*leaves, EPS, activation or "linear", cu_seqlens)
    return torch.autograd.grad(output, leaves, grad)


def assert_close(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """fp32: within 1e-5 of the largest element."""
    for our, wanted in zip(ours, exact, strict=True):
        assert our.dtype == torch.float32
        bound = 1e-5 * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(our.double(), wanted, rtol=0, atol=bound)


def run(
    lengths: list[int], channels: int, kernel_size: int, activation: str | None = "silu"
) -> None:
    cu_seqlens = cumulative(lengths)
    given = tensors(sum(lengths), channels, kernel_size)
    ours = conv_norm_act_backward(given[4], *given[:4], EPS, activation, cu_seqlens)
    assert_close(ours, twin(given, activation, cu_seqlens))


def test_utterances() -> None:
    run([0, 1, 2, 31, 63, 64, 65, 0], 16, 3)


def test_one_long_utterance() -> None:
    run([130], 16, 4)


def test_rows_that_are_not_read() -> None:
    cu_seqlens = cumulative([0, 2, 17, 40])
    given = tensors(59, 16, 5)
    unread = [1, 18, *range(39, 59)]
    read = torch.ones(59, 1).index_fill(0, torch.tensor(unread), 0.0)
    exact = twin((given[0] * read, *given[1:]), "silu", cu_seqlens)
    given[0][unread] = float("nan")
    seqused_k = torch.tensor([0, 1, 16, 20], dtype=torch.int32)
    ours = conv_norm_act_backward(
        given[4], *given[:4], EPS, "silu", cu_seqlens, seqused_k=seqused_k
    )
    assert_close(ours, (exact[0] * read, *exact[1:]))


@pytest.mark.parametrize("kernel_size", [3, 8, 9, 31, 63])
def test_kernel_sizes(kernel_size: int) -> None:
    run([2, 17], 16, kernel_size)


@pytest.mark.parametrize("channels", [1, 33, 70])
def test_channels(channels: int) -> None:
    run([3, 9], channels, 3)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation: str | None) -> None:
    run([5, 2], 16, 3, activation)


def test_half_precision_is_as_accurate_as_autograd() -> None:
    cu_seqlens = cumulative([3, 40])
    given = tensors(43, 32, 5, torch.float16)
    ours = conv_norm_act_backward(given[4], *given[:4], EPS, "silu", cu_seqlens)
    theirs = twin(given, "silu", cu_seqlens, torch.float16)
    assert ours[0].dtype == torch.float16
    for our, their, wanted in zip(ours, theirs, twin(given, "silu", cu_seqlens), strict=True):
        error, plain_error = our.double() - wanted, their.double() - wanted
        assert error.norm() <= 1.1 * plain_error.norm()
        # The maximum of so few errors is a matter of luck, within a unit in the last place.
        unit = torch.finfo(torch.float16).eps * wanted.abs().max()
        assert error.abs().max() <= max(1.1 * plain_error.abs().max(), unit)


def test_two_runs_give_the_same_bits() -> None:
    given, cu_seqlens = tensors(40, 16, 3), cumulative([33, 7])
    runs = [conv_norm_act_backward(given[4], *given[:4], EPS, "silu", cu_seqlens) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_utterance_does_not_depend_on_its_batch() -> None:
    x, weight, *norm, grad = tensors(40, 16, 4)
    together = conv_norm_act_backward(grad, x, weight, *norm, EPS, "silu", cumulative([7, 20, 13]))[
        0
    ]
    alone = conv_norm_act_backward(
        grad[7:27], x[7:27], weight, *norm, EPS, "silu", cumulative([20])
    )[0]
    assert torch.equal(together[7:27], alone)


def test_strided_rows_and_untouched_surroundings() -> None:
    # Rows and columns around the inputs are NaN; those around the output must stay as they are.
    x, weight, *norm, grad = tensors(23, 16, 5)
    cu_seqlens = cumulative([3, 20])
    expected = conv_norm_act_backward(grad, x, weight, *norm, EPS, "silu", cu_seqlens)
    frame = torch.full((2, 25, 32), float("nan"))
    frame[0, 1:-1, 8:-8], frame[1, 1:-1, 8:-8] = x, grad
    x, grad = frame[:, 1:-1, 8:-8]
    buffer = torch.full((25, 48), float(POISON_INTEGER))
    out = buffer[1:-1, 16:-16]
    taps = weight.t().contiguous().t()  # laid out tap by tap
    ours = conv_norm_act_backward(grad, x, taps, *norm, EPS, "silu", cu_seqlens, out=out)
    assert ours[0] is out
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted)
    out.fill_(POISON_INTEGER)
    assert torch.equal(buffer, torch.full_like(buffer, POISON_INTEGER))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int]) -> None:
    x, weight, *norm, grad = tensors(0, 16, 5)
    ours = conv_norm_act_backward(grad, x, weight, *norm, EPS, "silu", cumulative(lengths))
    assert [gradient.shape for gradient in ours] == [(0, 16), (16, 5), (16,), (16,)]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in ours)


def test_arguments_that_do_not_fit() -> None:
    x, weight, norm_weight, norm_bias, grad = tensors(20, 16, 5)
    cu_seqlens = cumulative([20])
    norm = (norm_weight, norm_bias, EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match=r"x has shape"):
        conv_norm_act_backward(grad, x[0], weight, *norm)
    with pytest.raises(ValueError, match=r"grad_output has shape \(19, 16\)"):
        conv_norm_act_backward(grad[:19], x, weight, *norm)
    with pytest.raises(ValueError, match=r"grad_output is torch\.float16"):
        conv_norm_act_backward(grad.half(), x, weight, *norm)
    with pytest.raises(ValueError, match=r"conv_weight has shape"):
        conv_norm_act_backward(grad, x, weight[:3], *norm)
    with pytest.raises(ValueError, match=r"norm_bias has shape"):
        conv_norm_act_backward(grad, x, weight, norm_weight, norm_bias[:3], EPS, "silu", cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch\.int64"):
        conv_norm_act_backward(grad, x, weight, *norm[:4], cu_seqlens.long())
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        conv_norm_act_backward(grad, x, weight, *norm[:3], "tanh", cu_seqlens)
    with pytest.raises(ValueError, match="out has shape"):
        conv_norm_act_backward(grad, x, weight, *norm, out=grad[:3])
    with pytest.raises(ValueError, match="kernel_size is 64"):
        conv_norm_act_backward(grad, x, torch.zeros(16, 64), *norm)
