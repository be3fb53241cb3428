"""`compile_for_inference`: what makes a captured graph invalid, and what a graph keeps alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.graph_models import FEATURES, RAGGED, encoder_of, graphed, same
from tests.helpers.graphs import Rerun
from tests.helpers.reference import padded_batch, relative_error
from w2vbert_fast.models.optimized import graphs as graphs_module


def move(ours: Any) -> None:
    weight = encoder_of(ours).layers[1].ffn2.output_dense.weight
    weight.data = weight.detach().clone() * 1.5


def transpose(ours: Any) -> None:
    linear = encoder_of(ours).layers[0].self_attn.linear_out
    linear.weight.data = linear.weight.detach().t()


def assign(ours: Any) -> None:
    state = {name: value * 1.1 for name, value in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)


def replace(ours: Any) -> None:
    linear = encoder_of(ours).layers[0].self_attn.linear_q
    width = linear.in_features
    torch.manual_seed(5)
    encoder_of(ours).layers[0].self_attn.linear_q = nn.Linear(width, width).eval()


def switch_a_part(ours: Any) -> None:
    encoder_of(ours).layers[1].self_attn.use_fast_kernels = False


def another_activation(ours: Any) -> None:
    layer = encoder_of(ours).layers[0]
    layer.ffn1 = copy.copy(layer.ffn1)  # of the same class and with the same parameters
    layer.ffn1.activation = "relu"


def drop_a_layer(ours: Any) -> None:
    encoder_of(ours).layers.append(copy.deepcopy(encoder_of(ours).layers[0]))
    del encoder_of(ours).layers[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        move,
        transpose,
        assign,
        replace,
        switch_a_part,
        another_activation,
        drop_a_layer,
    ],
    ids=["dtype", "move", "transpose", "assign", "replace", "switch", "activation", "layers"],
)
def test_what_is_moved_or_replaced_is_captured_anew(change: Callable[[Any], Any]) -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    graphs = encoder_of(ours).layer_graphs
    with torch.no_grad():
        before = ours(features, mask)[0]
        ours(features, mask, output_hidden_states=True)
        assert (device.captures, len(graphs)) == (2, 2)
        for model in (plain, ours):
            change(model)
        features = features.to(ours.dtype)
        for _ in range(2):
            got = ours(features, mask)[0]
            same(got, plain(features, mask)[0])
        assert not torch.equal(got.float(), before) or change is switch_a_part
    assert (device.captures, len(graphs)) == (3, 1)


def test_parameters_may_change_in_place() -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    with torch.no_grad():
        before = ours(features, mask)[0]
        ours.load_state_dict({name: 1.1 * value for name, value in plain.state_dict().items()})
        plain.load_state_dict(ours.state_dict())
        got = ours(features, mask)[0]
        same(got, plain(features, mask)[0])
    assert relative_error(got, before) > 1e-2
    assert device.captures == 1


def test_switches_of_the_model_free_the_graphs() -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    graphs = encoder_of(ours).layer_graphs
    with torch.no_grad():
        for captures, (off, on) in enumerate(
            [
                (lambda m: m.train(), lambda m: m.eval()),
                (lambda m: setattr(m, "use_fast_kernels", False),) * 2,
                (lambda m: m.compile_for_inference(enabled=False), lambda m: m),
            ],
            start=1,
        ):
            ours.use_fast_kernels = True
            ours(features, mask)
            assert (device.captures, len(graphs)) == (captures, 1)
            off(ours)
            ours(features, mask)
            assert (device.captures, len(graphs)) == (captures, 0)
            on(ours)
        assert encoder_of(ours).layer_graphs is None
        same(ours(features, mask)[0], plain(features, mask)[0])


class WithState(nn.Module):
    """As LoRA puts around a linear layer: a switch that no parameter shows."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.base(x)


def test_parts_with_a_state_of_their_own_run_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    with torch.no_grad(), caplog.at_level("INFO", logger=graphs_module.__name__):
        ours(features, mask)
        for model in (plain, ours):
            attention = encoder_of(model).layers[0].self_attn
            attention.linear_q = WithState(attention.linear_q).eval()
        for scale in (1.0, 0.5):
            for model in (plain, ours):
                encoder_of(model).layers[0].self_attn.linear_q.scale = scale
            same(ours(features, mask)[0], plain(features, mask)[0])
    assert (device.captures, len(encoder_of(ours).layer_graphs)) == (1, 0)
    _, *said = [record.getMessage() for record in caplog.records]  # the first is of the capture
    assert said == [
        "the encoder's layers run without CUDA graphs: the encoder has parts with a state of their "
        "own (WithState)"
    ]


def test_a_class_that_changes_under_a_module_is_seen() -> None:
    plain, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with torch.no_grad():
        ours(features, mask)
        for model in (plain, ours):
            encoder_of(model).layers[0].self_attn.linear_v.__class__ = Doubled
        same(ours(features, mask)[0], plain(features, mask)[0])
    assert (device.captures, device.replays) == (1, 1)


def test_hooks_are_called() -> None:
    _, ours, device = graphed()
    features, mask = padded_batch(RAGGED, FEATURES)
    seen: list[Any] = []
    parts = encoder_of(ours).layers[0].ffn1, encoder_of(ours).dropout
    with torch.no_grad():
        expected = ours(features, mask)[0]
        for number, part in enumerate(parts, start=1):
            handle = part.register_forward_hook(lambda *_: seen.append(1))
            same(ours(features, mask)[0], expected)
            assert (device.replays, len(seen)) == (number, number)
            handle.remove()
            ours(features, mask)
            assert (device.replays, len(seen)) == (number + 1, number)
        # The encoder's own are called around a graph.
        handle = encoder_of(ours).register_forward_hook(lambda *_: seen.append(1))
        ours(features, mask)
        assert (device.replays, len(seen)) == (len(parts) + 2, len(parts) + 1)
        handle.remove()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        try:
            ours(features, mask)
        finally:
            handle.remove()
        assert device.replays == len(parts) + 2


def test_weights_laid_end_to_end_during_a_capture_drop_the_other_graphs() -> None:
    _, ours, device = graphed()
    graphs = encoder_of(ours).layer_graphs
    captured = device.capture

    def packing(*arguments: Any) -> Any:
        if device.captures == 1:
            weight = encoder_of(ours).layers[1].self_attn.linear_q.weight
            weight.data = weight.detach().clone()
        return captured(*arguments)

    device.capture = packing  # type: ignore[method-assign]
    with torch.no_grad():
        ours(*padded_batch((50,), FEATURES))
        ours(*padded_batch((100,), FEATURES))
        assert (device.captures, len(graphs)) == (2, 1)
        ours(*padded_batch((100,), FEATURES))
        assert device.captures == 2
        ours(*padded_batch((50,), FEATURES))
        assert (device.captures, len(graphs)) == (3, 2)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_settings_and_graphs_of_its_own(how: Callable[[Any], Any]) -> None:
    settings = {"max_tokens": 99, "buckets": [80, 120], "max_graphs": 3, "max_bytes": 10**6}
    plain, ours, _ = graphed(options=settings)
    features, mask = padded_batch(RAGGED, FEATURES)
    with torch.no_grad():
        ours(features, mask)
        twin = how(ours)
        graphs = encoder_of(twin).layer_graphs
        assert graphs is not encoder_of(ours).layer_graphs and len(graphs) == 0
        assert (graphs.max_tokens, graphs.buckets) == (99, (80, 120))
        assert (graphs.max_graphs, graphs.max_bytes) == (3, 10**6)
        graphs.device = Rerun()
        same(twin(features, mask)[0], plain(features, mask)[0])
        assert len(graphs) == 1
    assert twin.state_dict().keys() == plain.state_dict().keys()


def test_a_model_is_freed_when_it_is_let_go() -> None:
    _, ours, device = graphed()
    captured = device.capture

    def forgetful(place: torch.device, run: Callable[[], list[Tensor]]) -> Any:
        return captured(place, run)[0], lambda: None  # a real graph does not hold `run`

    device.capture = forgetful  # type: ignore[method-assign]
    with torch.no_grad():
        ours(*padded_batch(RAGGED, FEATURES))
    assert len(encoder_of(ours).layer_graphs) == 1
    weight = weakref.ref(encoder_of(ours).layers[0].ffn1.output_dense.weight)
    gc.collect()
    gc.disable()
    try:
        del ours
        assert weight() is None
    finally:
        gc.enable()
