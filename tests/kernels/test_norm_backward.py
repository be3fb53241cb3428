"""The gradients of the norms against float64 autograd of the plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from csrc_triton.norm import (
    layer_norm_backward,
    residual_double_layer_norm_backward,
    residual_layer_norm,
    residual_layer_norm_backward,
)
from tests.kernels.judge import ENOUGH_FOR_A_LARGEST, Judge
from tests.kernels.lane import DEVICE, DTYPES, Sentinels, choose, random, strided
from w2vbert_fast.ops import norm as plain

pytestmark = pytest.mark.usefixtures("poisoned_buffers")

EPS = 1e-5
LENGTHS = choose((1, 65, 1500), (1, 2, 31, 63, 64, 65, 130))
WIDTHS = choose((1024, 65), (16, 65))


def rows(count: int, num_tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs and gradients, strided."""
    return [strided(random(num_tokens, width, dtype=dtype)) for _ in range(count)]


def parameters(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random(width, dtype=dtype), random(width, dtype=dtype)


def lengths(dtype: torch.dtype) -> list[int]:
    """For rounded results those of which the errors are not a matter of luck."""
    return list(LENGTHS) if dtype == torch.float32 else choose([65, 1500], [63, 130])


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [tensor.to(dtype).detach().clone().requires_grad_() for tensor in tensors]


Gradients = Sequence[Tensor]
Twin = Callable[[torch.dtype], Gradients]


def check(judge: Judge, name: str, ours: Gradients, dtype: torch.dtype, twin: Twin) -> None:
    """Judges gradients of inputs of `dtype`; `twin` gives them in the dtype that it is given."""
    exact, theirs = twin(torch.float64), twin(dtype)
    for index, (our, wanted, their) in enumerate(zip(ours, exact, theirs, strict=True)):
        few = our.numel() < ENOUGH_FOR_A_LARGEST
        judge(
            f"{name}/{index}",
            our,
            wanted,
            their,
            inputs=dtype,
            largest_limit=float("inf") if few else None,
            at_least=1.0,
        )


def layer_norm_twin(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Twin:
    def twin(dtype: torch.dtype) -> Gradients:
        given = leaves(x, weight, bias, dtype=dtype)
        return torch.autograd.grad(plain.layer_norm(*given, eps), given, grad.to(dtype))

    return twin


def of_both(results: Gradients, grads: Sequence[Tensor | None], given: Gradients) -> Gradients:
    """The gradients, of one result alone where the other's is `None`."""
    wanted = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
    return torch.autograd.grad([r for r, _ in wanted], given, [g for _, g in wanted])


def residual_twin(
    grads: Sequence[Tensor | None], residual: Tensor, x: Tensor, scale: float, *norm: Tensor
) -> Twin:
    def twin(dtype: torch.dtype) -> Gradients:
        given = leaves(residual, x, *norm, dtype=dtype)
        first, second, *weights = given
        return of_both(plain.residual_layer_norm(first, second, scale, *weights, EPS), grads, given)

    return twin


def double_twin(
    grads: Sequence[Tensor | None], residual: Tensor, x: Tensor, scale: float, *norms: Tensor
) -> Twin:
    def twin(dtype: torch.dtype) -> Gradients:
        given = leaves(residual, x, *norms, dtype=dtype)
        first, second, w1, b1, w2, b2 = given
        z1 = plain.residual_layer_norm(first, second, scale, w1, b1, EPS)[1]
        return of_both((z1, plain.layer_norm(z1, w2, b2, EPS)), grads, given)

    return twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, dtype: torch.dtype, judge: Judge) -> None:
    for num_tokens in lengths(dtype):
        x, grad = rows(2, num_tokens, width, dtype)
        x.mul_(3.0).add_(5.0)
        weight, bias = parameters(width, dtype)
        ours = layer_norm_backward(grad, x, weight, EPS)
        twin = layer_norm_twin(grad, x, weight, bias, EPS)
        check(judge, "layer_norm_backward", ours, dtype, twin)


@pytest.mark.parametrize("width", [1, 1000, 8192])
def test_widths(width: int, judge: Judge) -> None:
    x, grad = rows(2, 3, width, torch.float32)
    weight, bias = parameters(width)
    ours = layer_norm_backward(grad, x, weight, EPS)
    twin = layer_norm_twin(grad, x, weight, bias, EPS)
    check(judge, "layer_norm_backward", ours, torch.float32, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_layer_norm(scale: float, dtype: torch.dtype, judge: Judge) -> None:
    for num_tokens in lengths(dtype):
        residual, x, *grads = rows(4, num_tokens, 48, dtype)
        weight, bias = parameters(48, dtype)
        y, _ = residual_layer_norm(residual, x, scale, weight, bias, EPS)
        for given in (grads, (None, grads[1])):
            ours = residual_layer_norm_backward(*given, y, scale, weight, EPS)
            twin = residual_twin(given, residual, x, scale, weight, bias)
            check(judge, "residual_layer_norm_backward", ours, dtype, twin)
            assert (ours[0] is ours[1]) == (scale == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_double_layer_norm(scale: float, dtype: torch.dtype, judge: Judge) -> None:
    for num_tokens in lengths(dtype):
        residual, x, *grads = rows(4, num_tokens, 33, dtype)
        norms = (*parameters(33, dtype), *parameters(33, dtype))
        for given in (grads, (None, grads[1])):
            ours = residual_double_layer_norm_backward(*given, residual, x, scale, *norms[:3], EPS)
            twin = double_twin(given, residual, x, scale, *norms)
            check(judge, "double_layer_norm_backward", ours, dtype, twin)


def test_two_runs_give_the_same_bits() -> None:
    residual, x, *grads = rows(4, 37, 48, torch.float32)
    first, second = parameters(48), parameters(48)
    arguments = (*grads, residual, x, 0.5, *first, second[0], EPS)
    runs = [residual_double_layer_norm_backward(*arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_writes_its_gradients_and_nothing_else() -> None:
    residual, x, *grads = rows(4, 7, 64, torch.float32)
    first, second = parameters(64), parameters(64)
    arguments = (*grads, residual, x, 1.0, *first, second[0], EPS)
    expected = residual_double_layer_norm_backward(*arguments)
    sentinels = [Sentinels(7, 64, torch.float32) for _ in range(2)]
    out = (sentinels[0].out, sentinels[1].out)
    ours = residual_double_layer_norm_backward(*arguments, out=out)
    assert ours[0] is out[0] and ours[1] is out[1]
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted)
    assert all(sentinel.untouched() for sentinel in sentinels)


def test_the_gradient_may_be_overwritten() -> None:
    x, grad = rows(2, 7, 64, torch.float32)
    weight, _ = parameters(64)
    # Of the same strides, for which the same kernel is compiled.
    other, _ = rows(2, 7, 64, torch.float32)
    expected = layer_norm_backward(grad, x, weight, EPS, out=other)
    ours = layer_norm_backward(grad, x, weight, EPS, out=grad)
    assert ours[0] is grad
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_tokens() -> None:
    empty, weight = torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    for gradients in (
        layer_norm_backward(empty, empty, weight, EPS),
        residual_layer_norm_backward(None, empty, empty, 0.5, weight, EPS),
        residual_double_layer_norm_backward(
            None, empty, empty, empty, 1.0, weight, weight, weight, EPS
        ),
    ):
        for gradient in gradients:
            assert gradient.shape in ((0, 64), (64,))
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_rows_that_do_not_exist_add_nothing_without_eps(judge: Judge) -> None:
    x, grad = rows(2, 3, 20, torch.float32)
    weight, bias = parameters(20)
    ours = layer_norm_backward(grad, x, weight, 0.0)
    twin = layer_norm_twin(grad, x, weight, bias, 0.0)
    check(judge, "layer_norm_backward", ours, torch.float32, twin)


def test_arguments_that_do_not_fit() -> None:
    x, weight = random(4, 32, dtype=torch.float32), torch.ones(32, device=DEVICE)
    with pytest.raises(ValueError, match=r"x has shape \(32,\)"):
        layer_norm_backward(x, x[0], weight, EPS)
    with pytest.raises(ValueError, match=r"grad_z has shape \(3, 32\)"):
        layer_norm_backward(x[:3], x, weight, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(31,\); it must be \(32,\)"):
        layer_norm_backward(x, x, weight[:31], EPS)
    with pytest.raises(ValueError, match=r"grad_y is torch\.float16; it must be float32"):
        residual_layer_norm_backward(x.half(), x, x, 1.0, weight, EPS)
    with pytest.raises(ValueError, match=r"y has strides"):
        residual_layer_norm_backward(None, x, x.t().contiguous().t(), 1.0, weight, EPS)
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        residual_layer_norm_backward(x, x, x, 1.0, weight, EPS, out=(x, x[:3]))
    with pytest.raises(ValueError, match="bias1 has shape"):
        residual_double_layer_norm_backward(x, x, x, x, 1.0, weight, weight[:3], weight, EPS)
    wide = torch.zeros(1, 8193, device=DEVICE)
    with pytest.raises(ValueError, match="width is 8193"):
        layer_norm_backward(wide, wide, wide[0], EPS)
