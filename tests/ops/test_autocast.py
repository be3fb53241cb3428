"""Under autocast a weight is cast once in a region, as PyTorch does it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import w2vbert_fast
from tests.helpers.reference import TINY
from w2vbert_fast import ops
from w2vbert_fast.ops import autocast

MODES = {
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Casts(TorchDispatchMode):
    """Counts casts by the memory that is cast."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = {weight.untyped_storage().data_ptr(): n for n, weight in weights.items()}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
            name = self.names.get(args[0].untyped_storage().data_ptr())
            if name is not None and result.dtype == torch.bfloat16:
                self.counts[name] += 1
        return result


def in_a_region() -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)


def casts_of(fast: bool, mode: str, checkpoints: bool = False) -> Counter[str]:
    """In two forward passes, and backward passes where a gradient is recorded, in one region."""
    torch.manual_seed(0)
    config = w2vbert_fast.Wav2Vec2BertConfig(**{**TINY, "layerdrop": 0.0})
    model = w2vbert_fast.Wav2Vec2BertModel(config)
    model.use_fast_kernels = fast
    model.train(mode == "enable_grad")
    if checkpoints:
        model.gradient_checkpointing_enable()
    x = torch.randn(2, 9, config.feature_projection_input_dim)
    with Casts(dict(model.named_parameters())) as casts, MODES[mode](), in_a_region():
        for _ in range(2):
            output = model(x).last_hidden_state
            if mode == "enable_grad":
                output.float().square().sum().backward()
    return casts.counts


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_is_cast_once_in_a_region(mode: str) -> None:
    ours, theirs = casts_of(True, mode), casts_of(False, mode)
    matrices = {name for name in theirs if ".layers.0." in name}
    assert len(matrices) > 10 and matrices <= ours.keys()
    assert {count for name, count in ours.items() if ".layers." in name} == {1}, ours
    assert all(ours[name] <= count for name, count in theirs.items()), (ours, theirs)


def test_with_checkpoints_no_weight_is_cast_more_often_than_in_pytorch() -> None:
    ours = casts_of(True, "enable_grad", checkpoints=True)
    theirs = casts_of(False, "enable_grad", checkpoints=True)
    name = "encoder.layers.0.ffn1.intermediate_dense.weight"
    assert 0 < ours[name] <= theirs[name]
    assert all(ours[name] <= count for name, count in theirs.items()), (ours, theirs)


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 8))


@pytest.mark.parametrize("mode", MODES)
def test_a_cast_is_kept_until_the_outermost_region_ends(mode: str, weight: nn.Parameter) -> None:
    with MODES[mode]():
        with in_a_region():
            kept = autocast.cast(weight, torch.bfloat16)
            assert torch.equal(kept, weight.to(torch.bfloat16))
            with in_a_region():
                assert autocast.cast(weight, torch.bfloat16) is kept
            assert autocast.cast(weight, torch.bfloat16) is kept
            assert autocast.cast(weight, torch.float16).dtype == torch.float16
            row = autocast.cast(weight[1], torch.bfloat16)
            assert torch.equal(row, kept[1]) and row.shape == (8,)
            freed = weakref.ref(kept)
            del kept
        gc.collect()
        assert freed() is None and not autocast._casts
        with in_a_region():
            weight.data.zero_()
            assert autocast.cast(weight, torch.bfloat16).abs().sum() == 0


def test_what_is_not_kept(weight: nn.Parameter) -> None:
    def is_kept(value: Tensor) -> bool:
        return autocast.cast(value, torch.bfloat16) is autocast.cast(value, torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert not is_kept(weight)
    with in_a_region():
        assert is_kept(weight)
        assert not is_kept(weight.detach())  # an activation
        assert not is_kept(weight * 2)
        assert not is_kept(weight.as_subclass(Special))
        first = autocast.cast(weight, torch.bfloat16)
        with torch.no_grad():
            assert not autocast.cast(weight, torch.bfloat16).requires_grad
            weight.add_(1.0)  # an optimiser's step
        assert first.requires_grad
        assert torch.equal(autocast.cast(weight, torch.bfloat16), weight.to(torch.bfloat16))
        weight.data = torch.ones(8, 8)
        assert torch.equal(autocast.cast(weight, torch.bfloat16), torch.ones(8, 8).bfloat16())
        kept = autocast.cast(weight, torch.bfloat16)
        torch.clear_autocast_cache()
        assert autocast.cast(weight, torch.bfloat16) is not kept


class Special(Tensor):
    pass


def test_gradients_of_two_calls_add_up(weight: nn.Parameter) -> None:
    x = torch.randn(4, 8)
    with in_a_region():
        once = ops.linear(x, weight, fast=True)
        twice = ops.linear(2 * x, weight, fast=True)
    (once.float().sum() + twice.float().sum()).backward()
    expected = (3 * x).sum(0).expand(8, 8)
    torch.testing.assert_close(weight.grad, expected, rtol=0.02, atol=0.05)
