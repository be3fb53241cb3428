"""The gradients of the norms against float64 autograd of the plain operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from csrc_triton.norm import (
    layer_norm_backward,
    residual_double_layer_norm_backward,
    residual_layer_norm,
    residual_layer_norm_backward,
)
from tests.kernels.conftest import POISON_INTEGER
from w2vbert_fast.ops import norm as plain

EPS = 1e-5
LENGTHS = (1, 2, 31, 63, 64, 65, 130)


def leaves(*tensors: Tensor, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [tensor.to(dtype).detach().clone().requires_grad_() for tensor in tensors]


def parameters(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(width).to(dtype), torch.randn(width).to(dtype)


def layer_norm_twin(grads, x, weight, bias, dtype=torch.float64):
    given = leaves(x, weight, bias, dtype=dtype)
    return torch.autograd.grad(plain.layer_norm(*given, EPS), given, grads.to(dtype))


def residual_twin(grads, residual, x, scale, weight, bias, dtype=torch.float64):
    """Of y and z, or of z alone where the gradient of y is `None`."""
    residual, x, weight, bias = given = leaves(residual, x, weight, bias, dtype=dtype)
    results = plain.residual_layer_norm(residual, x, scale, weight, bias, EPS)
    wanted = [(r, g.to(dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
    return torch.autograd.grad(*_split(wanted, given))


def _split(wanted, given):
    return [result for result, _ in wanted], given, [grad for _, grad in wanted]


def double_twin(grads, residual, x, scale, first, second, dtype=torch.float64):
    residual, x, w1, b1, w2, b2 = given = leaves(residual, x, *first, *second, dtype=dtype)
    z1 = plain.residual_layer_norm(residual, x, scale, w1, b1, EPS)[1]
    z2 = plain.layer_norm(z1, w2, b2, EPS)
    wanted = [(r, g.to(dtype)) for r, g in zip((z1, z2), grads, strict=True) if g is not None]
    return torch.autograd.grad(*_split(wanted, given))


def assert_close(ours, exact) -> None:
    """fp32: within 1e-5 of the largest element."""
    for our, wanted in zip(ours, exact, strict=True):
        assert our.dtype == torch.float32
        bound = 1e-5 * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(our.double(), wanted, rtol=0, atol=bound)


def assert_as_accurate(ours, theirs, exact) -> None:
    """fp16: an error at most 1.1 times that of autograd in fp16."""
    for our, their, wanted in zip(ours, theirs, exact, strict=True):
        error, plain_error = our.double() - wanted, their.double() - wanted
        assert error.norm() <= 1.1 * plain_error.norm()
        assert error.abs().max() <= 1.1 * plain_error.abs().max()


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("width", [16, 65])
def test_layer_norm(num_tokens: int, width: int) -> None:
    x, grad = 3.0 * torch.randn(num_tokens, width) + 5.0, torch.randn(num_tokens, width)
    weight, bias = parameters(width)
    assert_close(layer_norm_backward(grad, x, weight, EPS), layer_norm_twin(grad, x, weight, bias))


@pytest.mark.parametrize("width", [1, 1000, 8192])
def test_widths(width: int) -> None:
    x, grad = torch.randn(2, 3, width)
    weight, bias = parameters(width)
    assert_close(layer_norm_backward(grad, x, weight, EPS), layer_norm_twin(grad, x, weight, bias))


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_layer_norm(num_tokens: int, scale: float) -> None:
    residual, x, *grads = torch.randn(4, num_tokens, 48)
    weight, bias = parameters(48)
    y, _ = residual_layer_norm(residual, x, scale, weight, bias, EPS)
    ours = residual_layer_norm_backward(*grads, y, scale, weight, EPS)
    assert_close(ours, residual_twin(grads, residual, x, scale, weight, bias))
    assert (ours[0] is ours[1]) == (scale == 1)
    ours = residual_layer_norm_backward(None, grads[1], y, scale, weight, EPS)
    assert_close(ours, residual_twin((None, grads[1]), residual, x, scale, weight, bias))


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_double_layer_norm(num_tokens: int, scale: float) -> None:
    residual, x, *grads = torch.randn(4, num_tokens, 33)
    first, second = parameters(33), parameters(33)
    for given in (grads, (None, grads[1])):
        ours = residual_double_layer_norm_backward(
            *given, residual, x, scale, *first, second[0], EPS
        )
        assert_close(ours, double_twin(given, residual, x, scale, first, second))


@pytest.mark.parametrize("num_tokens", [63, 130])
def test_half_precision(num_tokens: int) -> None:
    half = torch.float16
    residual, x, *grads = torch.randn(4, num_tokens, 80).to(half)
    first, second = parameters(80, half), parameters(80, half)
    assert_as_accurate(
        layer_norm_backward(grads[0], x, first[0], EPS),
        layer_norm_twin(grads[0], x, *first, dtype=half),
        layer_norm_twin(grads[0], x, *first),
    )
    y, _ = residual_layer_norm(residual, x, 0.5, *first, EPS)
    given = (grads, residual, x, 0.5)
    assert_as_accurate(
        residual_layer_norm_backward(*grads, y, 0.5, first[0], EPS),
        residual_twin(*given, *first, dtype=half),
        residual_twin(*given, *first),
    )
    assert_as_accurate(
        residual_double_layer_norm_backward(*grads, residual, x, 0.5, *first, second[0], EPS),
        double_twin(*given, first, second, dtype=half),
        double_twin(*given, first, second),
    )


def test_two_runs_give_the_same_bits() -> None:
    residual, x, *grads = torch.randn(4, 37, 48)
    first, second = parameters(48), parameters(48)
    arguments = (*grads, residual, x, 0.5, *first, second[0], EPS)
    runs = [residual_double_layer_norm_backward(*arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strided_rows_and_untouched_surroundings() -> None:
    # Rows and columns around the inputs are NaN; those around the outputs must stay as they are.
    frame = torch.full((4, 9, 80), float("nan"))
    frame[:, 1:-1, 8:-8] = torch.randn(4, 7, 64)
    residual, x, *grads = frame[:, 1:-1, 8:-8]
    first, second = parameters(64), parameters(64)
    buffers = torch.full((2, 9, 96), float(POISON_INTEGER))
    out = (buffers[0, 1:-1, 16:-16], buffers[1, 1:-1, 16:-16])
    arguments = (*grads, residual, x, 1.0, *first, second[0], EPS)
    expected = residual_double_layer_norm_backward(*arguments)
    ours = residual_double_layer_norm_backward(*arguments, out=out)
    assert ours[0] is out[0] and ours[1] is out[1]
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted)
    for got in out:
        got.fill_(POISON_INTEGER)
    assert torch.equal(buffers, torch.full_like(buffers, POISON_INTEGER))


def test_the_gradient_may_be_overwritten() -> None:
    x, grad = torch.randn(2, 7, 64)
    weight, _ = parameters(64)
    expected = layer_norm_backward(grad, x, weight, EPS)
    ours = layer_norm_backward(grad, x, weight, EPS, out=grad)
    assert ours[0] is grad
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_no_tokens() -> None:
    empty, weight = torch.empty(0, 64), torch.ones(64)
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


def test_rows_that_do_not_exist_add_nothing_without_eps() -> None:
    x, grad = torch.randn(2, 3, 20)
    weight, bias = parameters(20)
    given = leaves(x, weight, bias)
    exact = torch.autograd.grad(plain.layer_norm(*given, 0.0), given, grad.double())
    assert_close(layer_norm_backward(grad, x, weight, 0.0), exact)


def test_arguments_that_do_not_fit() -> None:
    x, weight = torch.randn(4, 32), torch.ones(32)
    with pytest.raises(ValueError, match=r"x has shape \(32,\)"):
        layer_norm_backward(x, x[0], weight, EPS)
    with pytest.raises(ValueError, match=r"grad_z has shape \(3, 32\)"):
        layer_norm_backward(x[:3], x, weight, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(31,\); it must be \(32,\)"):
        layer_norm_backward(x, x, weight[:31], EPS)
    with pytest.raises(ValueError, match=r"grad_y is torch\.float16; it must be float32"):
        residual_layer_norm_backward(x.half(), x, x, 1.0, weight, EPS)
    with pytest.raises(ValueError, match=r"y has strides"):
        residual_layer_norm_backward(None, x, torch.randn(32, 4).t(), 1.0, weight, EPS)
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        residual_layer_norm_backward(x, x, x, 1.0, weight, EPS, out=(x, x[:3]))
    with pytest.raises(ValueError, match="bias1 has shape"):
        residual_double_layer_norm_backward(x, x, x, x, 1.0, weight, weight[:3], weight, EPS)
    wide = torch.zeros(1, 8193)
    with pytest.raises(ValueError, match="width is 8193"):
        layer_norm_backward(wide, wide, wide[0], EPS)
