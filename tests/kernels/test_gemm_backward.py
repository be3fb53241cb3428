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
from tests.kernels.judge import Judge
from tests.kernels.lane import DEVICE, DTYPES, Sentinels, choose, random, strided
from w2vbert_fast.ops.activations import get_activation

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

LENGTHS = choose((1, 65, 1500), (1, 2, 31, 63, 64, 65, 130))


def tensors(
    num_tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    return (
        strided(random(num_tokens, inputs, dtype=dtype)),
        random(outputs, inputs, dtype=dtype, scale=inputs**-0.5),
        random(outputs, dtype=dtype),
    )


def rows(num_tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return strided(random(num_tokens, width, dtype=dtype))


def twin(
    function: Callable[..., Tensor],
    given: tuple[Tensor, ...],
    grad: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    leaves = [tensor.to(dtype).detach().clone().requires_grad_() for tensor in given]
    return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))


def check(
    judge: Judge,
    name: str,
    ours: tuple[Tensor | None, ...],
    function: Callable[..., Tensor],
    given: tuple[Tensor, ...],
    grad: Tensor,
) -> None:
    """Judges the gradients of `function(*given)`."""
    dtype = grad.dtype
    exact, theirs = (twin(function, given, grad, d) for d in (torch.float64, dtype))
    for index, (our, wanted, their) in enumerate(zip(ours, exact, theirs, strict=True)):
        assert our is not None
        judge(f"{name}/{index}", our, wanted, their, inputs=dtype, at_least=1.0, or_a_unit=True)


def silu(*given: Tensor) -> Tensor:
    return F.silu(F.linear(*given))


def glu(*given: Tensor) -> Tensor:
    return F.glu(F.linear(*given))


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_linear(num_tokens: int, judge: Judge) -> None:
    given, grad = tensors(num_tokens, 24, 40), rows(num_tokens, 40)
    ours = linear_backward(grad, *given, activation="silu")
    check(judge, "linear_backward", ours, silu, given, grad)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_feed_forward(activation: str | None, judge: Judge) -> None:
    function = get_activation(activation or "linear")
    for num_tokens in (1, 65):
        x, weight1, bias1 = tensors(num_tokens, 24, 40)
        _, weight2, bias2 = tensors(num_tokens, 40, 32)
        given = (x, weight1, bias1, weight2, bias2)
        grad = rows(num_tokens, 32)

        def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
            return F.linear(function(F.linear(x, w1, b1)), w2, b2)

        arguments = (grad, x, weight1, bias1, activation, weight2, bias2)
        ours = feed_forward_backward(*arguments)
        check(judge, "feed_forward_backward", ours, plain, given, grad)
        for index in range(5):
            needs = [position == index for position in range(5)]
            only = feed_forward_backward(*arguments, needs=(*needs,))  # type: ignore[arg-type]
            for needed, one, both in zip(needs, only, ours, strict=True):
                assert (one is not None) == needed
                assert one is None or both is None or torch.equal(one, both)


def test_feed_forward_arguments() -> None:
    x, weight1, bias1 = tensors(5, 24, 40)
    _, weight2, bias2 = tensors(5, 40, 32)
    grad = rows(5, 32)
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
def test_activations(activation: str | None, judge: Judge) -> None:
    function = get_activation(activation or "linear")
    y = torch.cat(
        (torch.randn(31, 70) * 3, torch.full((1, 70), 100.0), torch.full((1, 70), -100.0))
    ).to(DEVICE)
    grad = rows(33, 70)
    activated = torch.empty_like(y)
    ours, bias = epilogue_backward(grad, y, activation, activated=activated)
    (exact,) = twin(lambda y: function(y) * 1.0, (y,), grad)
    assert bias is not None
    for our, wanted in ((ours, exact), (bias, exact.sum(0))):
        judge("epilogue_backward", our, wanted, at_least=1.0)
    torch.testing.assert_close(activated.double(), function(y.double()), rtol=1e-6, atol=1e-6)


def test_not_a_number_stays() -> None:
    for activation in ACTIVATIONS:
        if ACTIVATIONS[activation] != "identity":
            y = torch.full((1, 4), float("nan"), device=DEVICE)
            assert epilogue_backward(torch.ones_like(y), y, activation)[0].isnan().all()


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_glu(num_tokens: int, judge: Judge) -> None:
    given, grad = tensors(num_tokens, 24, 80), rows(num_tokens, 40)
    check(judge, "linear_glu_backward", linear_glu_backward(grad, *given), glu, given, grad)
    kept = F.linear(*given)
    activated = torch.empty(num_tokens, 40, device=DEVICE)
    epilogue_backward(grad, kept, None, gated=True, needs_bias=False, activated=activated)
    torch.testing.assert_close(activated, F.glu(kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_as_accurate_as_autograd(dtype: torch.dtype, judge: Judge) -> None:
    given, gated = tensors(65, 32, 48, dtype), tensors(65, 32, 96, dtype)
    grad = rows(65, 48, dtype)
    ours = linear_backward(grad, *given, activation="silu")
    check(judge, "linear_backward", ours, silu, given, grad)
    check(judge, "linear_glu_backward", linear_glu_backward(grad, *gated), glu, gated, grad)


@pytest.mark.parametrize("index", range(3))
def test_only_what_is_needed(index: int) -> None:
    given, grad = tensors(9, 24, 40), rows(9, 40)
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
    y, grad = rows(70, 40), rows(70, 40)
    runs = [epilogue_backward(grad, y, "silu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_writes_its_outputs_and_nothing_else(gated: bool) -> None:
    width = 80 if gated else 40
    y, grad = rows(33, width), rows(33, 40)
    out, activated = Sentinels(33, width, torch.float32), Sentinels(33, 40, torch.float32)

    def backward(**options: Tensor) -> tuple[Tensor, Tensor | None]:
        return epilogue_backward(grad, y, "silu", gated=gated, **options)

    expected, ours = backward(), backward(out=out.out, activated=activated.out)
    assert ours[0] is out.out
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    wanted = F.glu(y) if gated else F.silu(y)
    torch.testing.assert_close(activated.out, wanted, rtol=1e-5, atol=1e-6)
    assert out.untouched() and activated.untouched()


@pytest.mark.parametrize("gated", [False, True])
def test_the_preactivation_may_be_overwritten(gated: bool) -> None:
    y, grad = rows(33, 80), rows(33, 40 if gated else 80)
    # Of the same strides, for which the same kernel is compiled.
    expected = epilogue_backward(grad, y, "gelu", gated=gated, out=rows(33, 80))
    ours = epilogue_backward(grad, y, "gelu", gated=gated, out=y)
    assert ours[0] is y
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_tokens() -> None:
    x, weight, bias = tensors(0, 24, 40)
    grad = torch.empty(0, 40, device=DEVICE)
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
    grad = rows(9, 40)
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
        epilogue_backward(grad, rows(9, 39), None, gated=True)
    with pytest.raises(ValueError, match="out has shape"):
        epilogue_backward(grad, grad, "silu", out=grad[:3])
    with pytest.raises(ValueError, match="activated has shape"):
        epilogue_backward(grad, grad, "silu", activated=grad[:3])
