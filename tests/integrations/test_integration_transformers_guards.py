"""What an accelerated model must notice: whatever somebody does to its parts afterwards.

The answers are compared with an un-accelerated model to which the same was done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.reference import padded_batch, relative_error
from tests.integrations.test_integration_transformers import (
    ADAPTER,
    FEATURES,
    NO_DROPOUT,
    Doubled,
    always_fast,
    assert_equal,
    assert_same_step,
    both,
    encoder_of,
    said,
    training_step,
)
from w2vbert_fast.integrations import transformers as integration
from w2vbert_fast.integrations.transformers import restore

__all__ = ["always_fast", "said"]


def own_forward(module: nn.Module, note: Callable[[], None]) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        note()
        output = inner(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    module.forward = forward  # type: ignore[method-assign]


def compiled(module: nn.Module, note: Callable[[], None]) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            note()
            return graph.forward(*args)

        return run

    module.compile(backend=backend)


def pre_hook(module: nn.Module, note: Callable[[], None]) -> None:
    def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        note()
        if args:
            return (2 * args[0], *args[1:]), kwargs
        return (), {**kwargs, "hidden_states": 2 * kwargs["hidden_states"]}

    module.register_forward_pre_hook(double, with_kwargs=True)


def backward_hook(module: nn.Module, note: Callable[[], None]) -> None:
    module.register_full_backward_hook(lambda *args: note())


def backward_pre_hook(module: nn.Module, note: Callable[[], None]) -> None:
    module.register_full_backward_pre_hook(lambda *args: note())


WAYS = (own_forward, compiled, pre_hook, backward_hook, backward_pre_hook)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["", "ffn2", "conv_module", "self_attn"])
def test_what_is_done_to_blocks_of_a_layer(
    part: str, way: Callable[..., None], said: list[str]
) -> None:
    torch._dynamo.reset()
    reference, fast = both("Wav2Vec2BertModel", **NO_DROPOUT)
    x, _ = padded_batch((20,), FEATURES)
    noted: dict[bool, int] = {True: 0, False: 0}
    for model in (reference, fast):

        def note(mine: bool = model is fast) -> None:
            noted[mine] += 1

        way(encoder_of(model).layers[1].get_submodule(part), note)
    assert_same_step(training_step(fast, x), training_step(reference, x))
    assert noted[True] == noted[False] > 0
    if part:
        assert said == [f"layers.1.{part} was replaced or is hooked"]
    else:  # hooks on whole layers are called, what replaces a layer runs instead of it
        assert said == (["layers.1 was replaced"] if way in (own_forward, compiled) else [])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("part", "called"),
    [
        ("proj", True),
        ("proj_layer_norm", False),
        ("layers.1", False),
        ("layers.1.residual_layer_norm", False),
        ("layers.1.residual_conv", True),
        ("layers.1.self_attn_layer_norm", False),
        ("layers.1.self_attn_conv", True),
        ("layers.1.activation", False),
        ("layers.1.self_attn", False),
        ("layers.1.self_attn.linear_k", True),
        ("layers.1.self_attn_dropout", True),
        ("layers.1.ffn_layer_norm", False),
        ("layers.1.ffn", False),
        ("layers.1.ffn.intermediate_dropout", False),
        ("layers.1.ffn.output_dense", True),
    ],
)
@torch.no_grad()
def test_hooks_inside_adapters_are_never_bypassed(part: str, called: bool, said: list[str]) -> None:
    reference, fast = both("Wav2Vec2BertModel", **ADAPTER)
    x, _ = padded_batch((20,), FEATURES)
    plain = reference(x)[0]
    for model in (reference, fast):
        model.adapter.get_submodule(part).register_forward_hook(
            lambda module, args, output: (
                (output[0].tanh(), *output[1:]) if isinstance(output, tuple) else output.tanh()
            )
        )
    assert_equal(fast(x), reference(x))
    assert relative_error(fast(x)[0], plain) > 1e-3
    assert set(said) == (set() if called else {f"{part} was replaced or is hooked"})


@torch.no_grad()
def test_weights_of_attention_that_are_no_plain_tensors(said: list[str]) -> None:
    reference, fast = both("Wav2Vec2BertModel", position_embeddings_type="relative")
    x, _ = padded_batch((20,), FEATURES)
    plain = fast(x)[0]
    for model in (reference, fast):
        attention = encoder_of(model).layers[0].self_attn
        for name in ("pos_bias_u", "pos_bias_v"):
            attention._parameters[name] = getattr(attention, name).detach().as_subclass(Doubled)
    assert_equal(fast(x), reference(x))
    assert relative_error(fast(x)[0], plain) > 1e-3
    assert said == ["layers.0.self_attn was replaced or is hooked"] * 2


class OnlyLinear(Tensor):
    """A weight that can be used in `F.linear` and nowhere else, as quantised ones."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not F.linear and "__get__" not in func.__name__:
                raise AssertionError(f"{func} on a quantised weight")
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_linear_layers_with_other_weights_are_called(always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel")
    x, _ = padded_batch((20,), FEATURES)
    for layer in encoder_of(fast).layers:
        for name in ("ffn1.output_dense", "ffn2.intermediate_dense", "self_attn.linear_q"):
            linear = layer.get_submodule(name)
            linear._parameters["weight"] = linear.weight.detach().as_subclass(OnlyLinear)
    assert_equal(fast(x), reference(x))


class SiLU(nn.Module):
    """Not PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x.tanh()


@pytest.mark.parametrize(
    "activation",
    ["relu", "silu", "swish", "gelu", "gelu_new", "gelu_python", "quick_gelu", "tanh"],
)
@torch.no_grad()
def test_activations(activation: str, always_fast: None) -> None:
    reference, fast = both(
        "Wav2Vec2BertModel", hidden_act=activation, adapter_act=activation, **ADAPTER
    )
    x, _ = padded_batch((20,), FEATURES)
    assert_equal(fast(x), reference(x))


@torch.no_grad()
def test_activations_put_in_by_hand(always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel")
    x, _ = padded_batch((20,), FEATURES)
    for model in (reference, fast):
        encoder_of(model).layers[0].ffn1.intermediate_act_fn = SiLU()
        encoder_of(model).layers[0].ffn2.intermediate_act_fn = nn.SELU()
        encoder_of(model).layers[1].conv_module.activation = SiLU()
    assert_equal(fast(x), reference(x))


@torch.no_grad()
def test_the_dropout_in_front_of_the_layers_is_called(always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel")
    x, _ = padded_batch((20,), FEATURES)
    plain = fast(x)[0]
    for model in (reference, fast):
        encoder_of(model).dropout.register_forward_hook(lambda module, args, output: 2 * output)
    assert_equal(fast(x), reference(x))
    assert relative_error(fast(x)[0], plain) > 1e-3


def test_layerdrop_in_adapters_and_none_in_evaluation(always_fast: None) -> None:
    options = {**NO_DROPOUT, **ADAPTER, "num_adapter_layers": 4, "num_hidden_layers": 3}
    reference, fast = both("Wav2Vec2BertModel", layerdrop=0.5, **options)
    x, _ = padded_batch((200,), FEATURES)
    assert_equal(fast(x), reference(x))
    # Neither all nor none of the adapter's layers, whose strides the lengths tell.
    frames = []
    for seed in range(6):
        outputs = []
        for model in (reference, fast):
            torch.manual_seed(seed)
            outputs.append(model.train()(x))
        assert_equal(outputs[1], outputs[0])
        frames.append(outputs[0][0].shape[1])
    assert len(set(frames)) > 1


def test_checkpointing_of_some_layers(always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel", num_hidden_layers=3, **NO_DROPOUT)
    x, _ = padded_batch((20,), FEATURES)
    theirs = training_step(reference, x)
    fast.gradient_checkpointing_enable({"use_reentrant": False})
    for index in (0, 2):
        if hasattr(encoder_of(fast).layers[index], "gradient_checkpointing"):  # transformers 5
            encoder_of(fast).layers[index].gradient_checkpointing = False
    assert_same_step(training_step(fast, x), theirs)


@torch.no_grad()
def test_compiled_once_for_all_lengths(always_fast: None) -> None:
    """With a mask, encoder and adapter are left out of the graphs, which any lengths then fit."""
    torch._dynamo.reset()
    _, fast = both("Wav2Vec2BertModel", **ADAPTER)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(fast, backend=backend, dynamic=True)
    for lengths in ((30, 20), (41, 24), (50, 13)):
        x, mask = padded_batch(lengths, FEATURES)
        assert_equal(model(x, attention_mask=mask), fast(x, attention_mask=mask))
        if lengths == (30, 20):
            first = len(graphs)
    assert len(graphs) == first
    nodes = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert nodes and not any("encoder_layers" in name or "w2vbert" in name for name in nodes)
    torch._dynamo.reset()


def test_restore_leaves_classes_that_others_made(always_fast: None) -> None:
    _, fast = both("Wav2Vec2BertModel")
    encoder = encoder_of(fast)
    ours = type(encoder)
    encoder.__class__ = type("FSDP" + ours.__name__, (ours,), {})
    restore(fast)
    assert type(encoder).__bases__ == (ours,)
    assert not any(type(layer).__module__ == integration.__name__ for layer in encoder.layers)
