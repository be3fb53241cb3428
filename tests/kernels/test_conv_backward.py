"""The gradients of the convolution, its norm and its activation against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.conv import conv_norm_act_backward
from csrc_triton.functions import ACTIVATIONS
from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, DTYPES, Sentinels, choose, packed, random, strided
from w2vbert_fast.ops import conv as plain

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

EPS = 1e-5


def tensors(
    num_tokens: int, channels: int, kernel_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """x, convolution weight, norm weight and bias, and the gradient of the output."""
    return (
        strided(random(num_tokens, channels, dtype=dtype)),
        random(channels, kernel_size, dtype=dtype, scale=kernel_size**-0.5),
        random(channels, dtype=dtype),
        random(channels, dtype=dtype),
        strided(random(num_tokens, channels, dtype=dtype)),
    )


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


def compare(
    judge: Judge, ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], theirs: tuple[Tensor, ...]
) -> None:
    for index, (our, wanted, their) in enumerate(zip(ours, exact, theirs, strict=True)):
        judge(
            f"conv_norm_act_backward/{index}",
            our,
            wanted,
            their,
            inputs=ours[0].dtype,
            at_least=1.0,
            or_a_unit=True,
        )


def run(
    judge: Judge,
    lengths: list[int],
    channels: int,
    kernel_size: int,
    activation: str | None = "silu",
    dtype: torch.dtype = torch.float32,
) -> None:
    cu_seqlens = packed(lengths)
    given = tensors(sum(lengths), channels, kernel_size, dtype)
    ours = conv_norm_act_backward(given[4], *given[:4], EPS, activation, cu_seqlens)
    assert ours[0].dtype == dtype
    exact, theirs = (twin(given, activation, cu_seqlens, d) for d in (torch.float64, dtype))
    compare(judge, ours, exact, theirs)


def test_utterances(judge: Judge) -> None:
    run(judge, [0, 1, 2, 31, 63, 64, 65, 0], 16, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_long_utterance(dtype: torch.dtype, judge: Judge) -> None:
    run(judge, [choose(1500, 130)], choose(1024, 16), 4, dtype=dtype)


def test_rows_that_are_not_read(judge: Judge) -> None:
    cu_seqlens = packed([0, 2, 17, 40])
    given = tensors(59, 16, 5)
    unread = torch.tensor([1, 18, *range(39, 59)], device=DEVICE)
    read = torch.ones(59, 1, device=DEVICE).index_fill(0, unread, 0.0)
    exact = twin((given[0].nan_to_num() * read, *given[1:]), "silu", cu_seqlens)
    given[0][unread] = float("nan")
    seqused_k = torch.tensor([0, 1, 16, 20], dtype=torch.int32, device=DEVICE)
    ours = conv_norm_act_backward(
        given[4], *given[:4], EPS, "silu", cu_seqlens, seqused_k=seqused_k
    )
    exact = (exact[0] * read, *exact[1:])
    compare(judge, ours, exact, exact)


@pytest.mark.parametrize("kernel_size", [3, 8, 9, 31, 63])
def test_kernel_sizes(kernel_size: int, judge: Judge) -> None:
    run(judge, [2, 17], 16, kernel_size)


@pytest.mark.parametrize("channels", [1, 33, 70])
def test_channels(channels: int, judge: Judge) -> None:
    run(judge, [3, 9], channels, 3)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation: str | None, judge: Judge) -> None:
    run(judge, [5, 2], 16, 3, activation)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_as_accurate_as_autograd(dtype: torch.dtype, judge: Judge) -> None:
    run(judge, [3, 40], 32, 5, dtype=dtype)


def test_two_runs_give_the_same_bits() -> None:
    given, cu_seqlens = tensors(40, 16, 3), packed([33, 7])
    runs = [conv_norm_act_backward(given[4], *given[:4], EPS, "silu", cu_seqlens) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_utterance_does_not_depend_on_its_batch() -> None:
    x, weight, *norm, grad = tensors(40, 16, 4)
    together = conv_norm_act_backward(
        grad, x, weight, *norm, EPS, "silu", packed([7, 20, 13])
    )[0]  # fmt: skip
    alone = conv_norm_act_backward(
        grad[7:27], x[7:27], weight, *norm, EPS, "silu", packed([20])
    )[0]  # fmt: skip
    assert torch.equal(together[7:27], alone)


def test_writes_its_gradient_and_nothing_else() -> None:
    x, weight, *norm, grad = tensors(23, 16, 5)
    cu_seqlens = packed([3, 20])
    expected = conv_norm_act_backward(grad, x, weight, *norm, EPS, "silu", cu_seqlens)
    sentinels = Sentinels(23, 16, torch.float32)
    taps = weight.t().contiguous().t()  # laid out tap by tap
    ours = conv_norm_act_backward(grad, x, taps, *norm, EPS, "silu", cu_seqlens, out=sentinels.out)
    assert ours[0] is sentinels.out
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted)
    assert sentinels.untouched()


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_do(lengths: list[int]) -> None:
    x, weight, *norm, grad = tensors(0, 16, 5)
    ours = conv_norm_act_backward(grad, x, weight, *norm, EPS, "silu", packed(lengths))
    assert [gradient.shape for gradient in ours] == [(0, 16), (16, 5), (16,), (16,)]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in ours)


def test_arguments_that_do_not_fit() -> None:
    x, weight, norm_weight, norm_bias, grad = tensors(20, 16, 5)
    cu_seqlens = packed([20])
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
        conv_norm_act_backward(grad, x, torch.zeros(16, 64, device=DEVICE), *norm)
