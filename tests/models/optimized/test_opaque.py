"""Linear layers with an opaque weight, packed and int8: copied by sharing, not saved or pickled."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from w2vbert_fast.models.optimized.int8 import Int8Linear
from w2vbert_fast.models.optimized.opaque import OpaqueLinear
from w2vbert_fast.models.optimized.packed import PackedLinear
from w2vbert_fast.ops.cpu import capability, int8

KINDS = [
    pytest.param(
        PackedLinear,
        marks=pytest.mark.skipif(
            not capability.onednn_linear(torch.float32), reason="this CPU packs no weights"
        ),
    ),
    pytest.param(
        Int8Linear,
        marks=pytest.mark.skipif(bool(int8.reasons()), reason="this CPU has no 8-bit linear layer"),
    ),
]


def opaque(kind: type[PackedLinear] | type[Int8Linear]) -> OpaqueLinear:
    torch.manual_seed(0)
    return kind(nn.Linear(32, 16)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shares_the_weight_alone(kind: type[PackedLinear] | type[Int8Linear]) -> None:
    layer, x = opaque(kind), torch.randn(5, 32)
    layer.group = [layer]  # type: ignore[assignment]
    model = nn.Sequential(layer, nn.Tanh(), layer)
    copied = copy.deepcopy(model)
    assert type(copied[0]) is kind
    assert copied[0] is copied[2] is copied[0].group[0] is not layer
    assert copied[0].matrix is layer.matrix
    assert (copied[0].in_features, copied[0].out_features, copied[0].training) == (32, 16, False)
    assert torch.equal(copied[0](x), layer(x))
    before = layer(x)
    with torch.no_grad():
        copied[0].bias.add_(1.0)
    assert torch.equal(layer(x), before)
    torch.testing.assert_close(copied[0](x), before + 1.0)
    copied[0].register_forward_hook(lambda *_: pytest.fail("a hook of the copy"))
    layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_neither_saved_nor_pickled(kind: type[PackedLinear] | type[Int8Linear]) -> None:
    model = nn.Sequential(opaque(kind))
    message = f"a model that is {kind.STATE} cannot be pickled; load it again"
    for write in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError) as caught:
            write(model)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match="has no weight that a checkpoint could hold") as refused:
        model.state_dict()
    assert str(refused.value).startswith(f"0 is {kind.STATE} and ")
