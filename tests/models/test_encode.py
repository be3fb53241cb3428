"""`encode`: one hidden state, no layer behind it, statistics and pooling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.reference import CLASSES, padded_batch, pair, relative_error

LENGTHS = (23, 9, 1)
LAYERS = 3


def _pair(class_name: str = "Wav2Vec2BertModel", **config: object):
    return pair(class_name, num_hidden_layers=LAYERS, **config)


def _reference_states(reference, features: Tensor, mask: Tensor) -> list[list[Tensor]]:
    """hidden_states of each utterance alone: `[layer][row]` of `[T_row, C]`."""
    states: list[list[Tensor]] = []
    for row, length in enumerate(mask.sum(1).tolist()):
        with torch.no_grad():
            output = reference(features[row : row + 1, :length], output_hidden_states=True)
        states.append([state[0] for state in output.hidden_states])
    return [list(layer) for layer in zip(*states, strict=True)]


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -3])
def test_a_layer_is_that_hidden_state(layer: int) -> None:
    _, ours = _pair()
    features, mask = padded_batch(LENGTHS, 20)
    with torch.no_grad():
        states = ours(features, mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        ours.encode(features, mask, layer=layer), states[layer], rtol=0, atol=0
    )


def test_the_default_is_the_last_layer() -> None:
    _, ours = _pair(add_adapter=True)
    features, mask = padded_batch(LENGTHS, 20)
    assert torch.equal(ours.encode(features, mask), ours.encode(features, mask, layer=LAYERS))


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_encodes_as_the_reference(class_name: str) -> None:
    reference, ours = _pair(class_name)
    base = reference.base_model
    features, mask = padded_batch(LENGTHS, 20)
    expected = _reference_states(base, features, mask)[2]
    encoded = ours.encode(features, mask, layer=2)
    for row, state in enumerate(expected):
        assert relative_error(encoded[row, : len(state)], state) <= 1e-5
        assert not encoded[row, len(state) :].any()


def test_no_layer_behind_runs() -> None:
    _, ours = _pair()
    ran: list[int] = []
    for index, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    features, mask = padded_batch(LENGTHS, 20)
    ours.encode(features, mask, layer=2)
    assert ran == [0, 1]
    ran.clear()
    ours.encode(features, mask, layer=0)
    assert ran == []


def test_the_adapter_does_not_run() -> None:
    _, ours = _pair(add_adapter=True)
    ours.adapter.register_forward_hook(lambda *_: pytest.fail("the adapter ran"))
    features, mask = padded_batch(LENGTHS, 20)
    assert ours.encode(features, mask).shape == (3, 23, 48)


def test_no_gradient_is_recorded() -> None:
    _, ours = _pair()
    features, mask = padded_batch(LENGTHS, 20)
    encoded = ours.encode(features, mask, layer=1)
    assert not encoded.requires_grad
    # Not an inference tensor: a model trained on these features may save it for its backward pass.
    weight = torch.ones(48, requires_grad=True)
    (encoded * weight).sum().backward()


@pytest.mark.parametrize("form", ["pair", "mapping", "column"])
def test_statistics_normalise_valid_frames(form: str) -> None:
    reference, ours = _pair()
    features, mask = padded_batch(LENGTHS, 20)
    mean, variance = torch.randn(48), torch.rand(48) + 0.1
    stats = {
        "pair": (mean, variance),
        "mapping": {"mean": mean, "var": variance},
        "column": [mean[None], variance[None]],
    }[form]
    encoded = ours.encode(features, mask, layer=2, stats=stats)
    for row, state in enumerate(_reference_states(reference, features, mask)[2]):
        expected = (state - mean) / torch.sqrt(variance)
        assert relative_error(encoded[row, : len(state)], expected) <= 1e-5
        assert not encoded[row, len(state) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_pooling_is_over_valid_frames(dtype: torch.dtype) -> None:
    _, ours = _pair()
    ours.to(dtype)
    features, mask = padded_batch((23, 9, 0, 1), 20)
    features = features.to(dtype)
    states = ours.encode(features, mask, layer=2)
    pooled = ours.encode(features, mask, layer=2, pool="mean")
    assert pooled.dtype == dtype
    assert pooled.shape == (4, 48)
    assert not pooled[2].any()
    for row, length in enumerate((23, 9, 0, 1)):
        if length:
            expected = states[row, :length].double().mean(0)
            # One rounding to the dtype, and fp32 sums before it.
            bound = 1e-6 if dtype == torch.float32 else 2.0**-8
            assert relative_error(pooled[row].double(), expected) <= bound


def test_pooling_comes_after_statistics() -> None:
    _, ours = _pair()
    features, mask = padded_batch(LENGTHS, 20)
    stats = (torch.randn(48), torch.rand(48) + 0.1)
    frames = ours.encode(features, mask, layer=1, stats=stats)
    pooled = ours.encode(features, mask, layer=1, stats=stats, pool="mean")
    expected = torch.stack([frames[i, :n].mean(0) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, "layer is 4; a model of 3 layers has hidden states 0 to 3"),
        ({"layer": -5}, "layer is -5"),
        ({"layer": True}, "layer is True"),
        ({"layer": 1.0}, r"layer is 1\.0"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"stats": (torch.zeros(48),)}, "stats is tuple"),
        ({"stats": {"mean": torch.zeros(48)}}, "stats has no var"),
        ({"stats": (torch.zeros(48), torch.zeros(47))}, r"stats: var is \(47,\)"),
        ({"stats": (torch.zeros(48), torch.zeros(48))}, "stats: var has values that are not above"),
        ({"stats": (torch.zeros(48), [1.0] * 48)}, "stats: var is list"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    _, ours = _pair()
    features, mask = padded_batch(LENGTHS, 20)
    with pytest.raises((ValueError, TypeError), match=message):
        ours.encode(features, mask, **arguments)


def test_training_mode_is_refused() -> None:
    _, ours = _pair()
    features, mask = padded_batch(LENGTHS, 20)
    with pytest.raises(RuntimeError, match="eval"):
        ours.train().encode(features, mask)
