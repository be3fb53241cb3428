"""The gradients of linear layers and their epilogues against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csrc_triton.functions import ACTIVATIONS
from csrc_triton.gemm import (
    epilogue_backward,
    feed_forward_backward,
    linear_backward,
    linear_glu_backward,
)
from tests.kernels.conftest import POISON_INTEGER
from w2vbert_fast.ops.activations import get_activation

LENGTHS = (1, 2, 31, 63, 64, 65, 130)


def tensors(
    num_tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    return (
        torch.randn(num_tokens, inputs).to(dtype),
        weight.to(dtype),
        torch.randn(outputs).to(dtype),
    )


def twin(
    function: Callable[..., Tensor], given: tuple[Tensor, ...], grad: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:  # fmt: skip
    leaves = [tensor.to(dtype).detach().clone().requires_grad_() for tensor in given]
    return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))


def assert_close(ours: tuple[Tensor | None, ...], exact: tuple[Tensor, ...]) -> None:
    """fp32: within 1e-5 of the largest element."""
    for our, wanted in zip(ours, exact, strict=True):
        assert our is not None and our.dtype == torch.float32
        bound = 1e-5 * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(our.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_linear(num_tokens: int) -> None:
    given = tensors(num_tokens, 24, 40)
    grad = torch.randn(num_tokens, 40)
    exact = twin(lambda *given: F.silu(F.linear(*given)), given, grad)
    assert_close(linear_backward(grad, *given, activation="silu"), exact)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_feed_forward(activation: str | None) -> None:
    function = get_activation(activation or "linear")
    for num_tokens in (1, 65):
        x, weight1, bias1 = tensors(num_tokens, 24, 40)
        _, weight2, bias2 = tensors(num_tokens, 40, 32)
        given = (x, weight1, bias1, weight2, bias2)
        grad = torch.randn(num_tokens, 32)

        def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            return F.linear(function(F.linear(x, w1, b1)), w2, b2)

        exact = twin(plain, given, grad)
        arguments = (grad, x, weight1, bias1, activation, weight2, bias2)
        ours = feed_forward_backward(*arguments)
        assert_close(ours, exact)
        for index in range(5):
            needs = [position == index for position in range(5)]
            only = feed_forward_backward(*arguments, needs=(*needs,))  # type: ignore[arg-type]
            for needed, one, both in zip(needs, only, ours, strict=True):
                assert (one is not None) == needed
                assert one is None or both is None or torch.equal(one, both)


def test_feed_forward_arguments() -> None:
    x, weight1, bias1 = tensors(5, 24, 40)
    _, weight2, bias2 = tensors(5, 40, 32)
    grad = torch.randn(5, 32)
    for name, wrong in (
        ("grad_output", (grad[:, 1:], x, weight1, bias1, "silu", weight2, bias2)),
        ("x", (grad, x[:, 1:], weight1, bias1, "silu", weight2, bias2)),
        ("bias1", (grad, x, weight1, bias1[1:], "silu", weight2, bias2)),
        ("weight2", (grad, x, weight1, bias1, "silu", weight2[:, 1:], bias2)),
        ("activation", (grad, x, weight1, bias1, "tanh", weight2, bias2)),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            feed_forward_backward(*wrong)
    without = feed_forward_backward(grad, x, weight1, None, "silu", weight2, None)
    assert without[2] is None and without[4] is None


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation: str | None) -> None:
    function = get_activation(activation or "linear")
    y = torch.cat(
        (torch.randn(31, 70) * 3, torch.full((1, 70), 100.0), torch.full((1, 70), -100.0))
    )
    grad = torch.randn(33, 70)
    activated = torch.empty_like(y)
    ours, bias = epilogue_backward(grad, y, activation, activated=activated)
    (exact,) = twin(lambda y: function(y) * 1.0, (y,), grad)
    assert bias is not None
    assert_close((ours, bias), (exact, exact.sum(0)))
    torch.testing.assert_close(activated.double(), function(y.double()), rtol=1e-6, atol=1e-6)


def test_not_a_number_stays() -> None:
    for activation in ACTIVATIONS:
        if ACTIVATIONS[activation] != "identity":
            y = torch.full((1, 4), float("nan"))
            assert epilogue_backward(torch.ones(1, 4), y, activation)[0].isnan().all()


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_glu(num_tokens: int) -> None:
    given = tensors(num_tokens, 24, 80)
    grad = torch.randn(num_tokens, 40)
    exact = twin(lambda *given: F.glu(F.linear(*given)), given, grad)
    assert_close(linear_glu_backward(grad, *given), exact)
    kept = F.linear(*given)
    activated = torch.empty_like(grad)
    epilogue_backward(grad, kept, None, gated=True, needs_bias=False, activated=activated)
    torch.testing.assert_close(activated, F.glu(kept), rtol=1e-5, atol=1e-6)


def test_half_precision_is_as_accurate_as_autograd() -> None:
    half = torch.float16
    given, grad = tensors(65, 32, 48, half), torch.randn(65, 48).to(half)
    gated, gated_grad = tensors(65, 32, 96, half), grad

    def silu(*given: Tensor) -> Tensor:
        return F.silu(F.linear(*given))

    def glu(*given: Tensor) -> Tensor:
        return F.glu(F.linear(*given))

    for ours, function, inputs, upstream in (
        (linear_backward(grad, *given, activation="silu"), silu, given, grad),
        (linear_glu_backward(gated_grad, *gated), glu, gated, gated_grad),
    ):
        exact = twin(function, inputs, upstream)
        theirs = twin(function, inputs, upstream, half)
        for our, their, wanted in zip(ours, theirs, exact, strict=True):
            assert our is not None
            error, plain_error = our.double() - wanted, their.double() - wanted
            assert error.norm() <= 1.1 * plain_error.norm()
            assert error.abs().max() <= 1.1 * plain_error.abs().max()


@pytest.mark.parametrize("index", range(3))
def test_only_what_is_needed(index: int) -> None:
    given, grad = tensors(9, 24, 40), torch.randn(9, 40)
    needs = (index == 0, index == 1, index == 2)
    for ours, all_of_them in (
        (
            linear_backward(grad, *given, activation="gelu", needs=needs),
            linear_backward(grad, *given, activation="gelu"),
        ),
        (linear_backward(grad, *given, needs=needs), linear_backward(grad, *given)),
        (
            linear_glu_backward(grad[:, :20], *given, needs=needs),
            linear_glu_backward(grad[:, :20], *given),
        ),
    ):
        for position, (our, wanted) in enumerate(zip(ours, all_of_them, strict=True)):
            assert (our is not None) == (position == index)
            assert our is None or torch.equal(our, wanted)
    assert linear_backward(grad, *given[:2], activation="silu")[2] is None


def test_two_runs_give_the_same_bits() -> None:
    y, grad = torch.randn(2, 70, 40)
    runs = [epilogue_backward(grad, y, "silu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_strided_rows_and_untouched_surroundings(gated: bool) -> None:
    # Rows and columns around the inputs are NaN; those around the outputs must stay as they are.
    width = 80 if gated else 40
    frame = torch.full((2, 35, width + 16), float("nan"))
    y = frame[0, 1:-1, 8:-8].copy_(torch.randn(33, width))
    grad = frame[1, 1:-1, 8:48].copy_(torch.randn(33, 40))
    buffers = torch.full((2, 35, width + 16), float(POISON_INTEGER))
    out, activated = buffers[0, 1:-1, 8:-8], buffers[1, 1:-1, 8:48]

    def backward(**options: Tensor) -> tuple[Tensor, Tensor | None]:
        return epilogue_backward(grad, y, "silu", gated=gated, **options)

    expected, ours = backward(), backward(out=out, activated=activated)
    assert ours[0] is out
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    wanted = F.glu(y) if gated else F.silu(y)
    torch.testing.assert_close(activated, wanted, rtol=1e-5, atol=1e-6)
    for got in (out, activated):
        got.fill_(POISON_INTEGER)
    assert torch.equal(buffers, torch.full_like(buffers, POISON_INTEGER))


@pytest.mark.parametrize("gated", [False, True])
def test_the_preactivation_may_be_overwritten(gated: bool) -> None:
    y, grad = torch.randn(33, 80), torch.randn(33, 40 if gated else 80)
    expected = epilogue_backward(grad, y, "gelu", gated=gated)
    ours = epilogue_backward(grad, y, "gelu", gated=gated, out=y)
    assert ours[0] is y
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_tokens() -> None:
    x, weight, bias = tensors(0, 24, 40)
    grad = torch.empty(0, 40)
    for ours in (
        linear_backward(grad, x, weight, bias, activation="silu"),
        linear_backward(grad, x, weight, bias),
        linear_glu_backward(grad[:, :20], x, weight, bias),
    ):
        assert all(gradient is not None for gradient in ours)
        assert [gradient.shape for gradient in ours] == [(0, 24), (40, 24), (40,)]
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in ours)


def test_arguments_that_do_not_fit() -> None:
    x, weight, bias = tensors(9, 24, 40)
    grad = torch.randn(9, 40)
    with pytest.raises(ValueError, match=r"x has shape \(24,\)"):
        linear_backward(grad, x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight has shape"):
        linear_backward(grad, x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"grad_output has shape \(9, 39\)"):
        linear_backward(grad[:, :39], x, weight, bias)
    with pytest.raises(ValueError, match=r"grad_output is torch\.float16"):
        linear_glu_backward(grad[:, :20].half(), x, weight, bias)
    with pytest.raises(ValueError, match=r"bias has shape"):
        linear_backward(grad, x, weight, bias[:3])
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        linear_backward(grad, x, weight, bias, activation="tanh")
    with pytest.raises(ValueError, match="weight has 39 rows"):
        linear_glu_backward(grad, x, weight[:39], bias)
    with pytest.raises(ValueError, match="preactivation has 39 columns"):
        epilogue_backward(grad, torch.randn(9, 39), None, gated=True)
    with pytest.raises(ValueError, match="out has shape"):
        epilogue_backward(grad, grad, "silu", out=grad[:3])
    with pytest.raises(ValueError, match="activated has shape"):
        epilogue_backward(grad, grad, "silu", activated=grad[:3])
