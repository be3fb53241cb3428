"""Gradient checkpointing: the same gradients from every policy, less memory, and "auto"."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.reference import TINY, padded_batch, pair
from tests.helpers.training import make_model
from w2vbert_fast.models import recompute
from w2vbert_fast.models.layers import Wav2Vec2BertEncoderLayer, Wav2Vec2BertSelfAttention
from w2vbert_fast.models.recompute import LayerPlan, Recompute, SavedBytes, layer_policies
from w2vbert_fast.training import FinetuneConfig
from w2vbert_fast.training.model import make_parts

FEATURES = TINY["feature_projection_input_dim"]
LENGTHS = (31, 24, 1, 13)
DROPPING = {
    **{"attention_dropout": 0.1, "hidden_dropout": 0.1, "activation_dropout": 0.1},
    **{"conformer_conv_dropout": 0.1, "feat_proj_dropout": 0.1, "final_dropout": 0.1},
}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "layer": {"policy": "layer"},
    "attention": {"policy": "attention"},
    "auto, plenty": {"policy": "auto", "budget_bytes": 2**40},
    "auto, little": {"policy": "auto", "budget_bytes": 300_000},
    "auto, nothing": {"policy": "auto", "budget_bytes": 1},
    "every second layer": {"policy": "layer", "every_n_layers": 2},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def model(seed: int = 0, **config: Any) -> Any:
    _, ours = pair("Wav2Vec2BertForCTC", seed, num_hidden_layers=4, **config)
    return ours.train()


def step(ours: nn.Module, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor | None]:
    """The gradient of every parameter of one step, seeded."""
    features, mask = padded_batch(lengths, FEATURES)
    ours.zero_grad()
    torch.manual_seed(5)
    logits = ours(features, mask).logits
    generator = torch.Generator().manual_seed(5)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in ours.parameters()]


def same_bits(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return all(
        (one is None and other is None)
        or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(first, second, strict=True)
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[type, int]:
    """How often the forward pass of a layer and of an attention module runs."""
    counts: dict[type, int] = {}

    def count(kind: type) -> None:
        original: Callable[..., Any] = kind.forward  # type: ignore[attr-defined]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts[kind] = counts.get(kind, 0) + 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)

    for kind in (Wav2Vec2BertEncoderLayer, Wav2Vec2BertSelfAttention):
        count(kind)
    return counts


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("config", ["still", "dropout", "layerdrop", "rotary", "relative"])
def test_every_policy_gives_the_same_bits(config: str, fast: bool) -> None:
    ours = model(
        **{
            "still": {"apply_spec_augment": False},
            "dropout": DROPPING,
            "layerdrop": {**DROPPING, "layerdrop": 0.5},
            "rotary": {**DROPPING, "position_embeddings_type": "rotary"},
            "relative": {**DROPPING, "position_embeddings_type": "relative"},
        }[config]
    )
    ours.use_fast_kernels = fast
    expected = step(ours)
    state = torch.get_rng_state()
    for name, options in POLICIES.items():
        ours.gradient_checkpointing_enable(**options)
        assert ours.is_gradient_checkpointing == (name != "none")
        got = step(ours)
        assert torch.equal(torch.get_rng_state(), state), name
        if name == "reentrant":  # its own graph of each layer may add up in another order
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert same_bits(got, expected), name
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing
    assert same_bits(step(ours), expected)


def test_what_each_policy_computes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model(apply_spec_augment=False)
    counts = counted(monkeypatch)
    # Calls of layers count where nothing is taken apart; of attention modules always.
    for name, attention in (
        ("none", 4),
        ("layer", 8),
        ("attention", 8),
        ("auto, plenty", 4),
        ("auto, nothing", 1 + 2 * 3),  # the first layer is the one that is counted
        ("every second layer", 6),
        ("reentrant", 8),
    ):
        counts.clear()
        ours.gradient_checkpointing_enable(**POLICIES[name])
        step(ours)
        assert counts[Wav2Vec2BertSelfAttention] == attention, name
    counts.clear()
    ours.eval()
    with torch.no_grad():
        ours(*padded_batch(LENGTHS, FEATURES))
    assert counts[Wav2Vec2BertSelfAttention] == 4
    counts.clear()
    step(ours)  # with gradients, in evaluation mode
    assert counts[Wav2Vec2BertSelfAttention] == 4


def kept(ours: nn.Module, lengths: tuple[int, ...]) -> int:
    """Bytes of the tensors that autograd and the checkpoints hold between forward and backward."""
    seen: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in ours.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A checkpoint that shows what it begins from, and saves nothing else."""
        for argument in arguments:
            if isinstance(argument, Tensor):
                keep(argument)
        return original(function, *arguments, **options)

    original = recompute.checkpoint
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recompute, "checkpoint", run)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = ours(*padded_batch(lengths, FEATURES))
    del output
    return sum(seen.values())


@pytest.mark.parametrize("fast", [False, True])
def test_less_is_kept(fast: bool) -> None:
    ours = model(apply_spec_augment=False)
    ours.use_fast_kernels = fast
    lengths = (150, 120)
    sizes = {}
    for name in ("none", "attention", "layer"):
        ours.gradient_checkpointing_enable(policy=name)
        sizes[name] = kept(ours, lengths)
    assert sizes["layer"] < sizes["attention"] < sizes["none"]
    # Of a layer, its input alone; besides, the projection in front and the head.
    tokens, width = sum(lengths), TINY["hidden_size"]
    rest = sizes["layer"] - 4 * (4 * tokens * width)
    assert 0 <= rest < 4 * tokens * (4 * width + 3 * FEATURES)
    # The plain path keeps score matrices, the fast one query, key, value and output.
    heads = 4 * 4 * 2 * 150 * 150
    saved = (sizes["none"] - sizes["attention"]) / 4
    assert saved >= (heads if not fast else 4 * 4 * tokens * width)


@pytest.mark.parametrize("fast", [False, True])
def test_auto_keeps_within_its_budget(fast: bool) -> None:
    ours = model(apply_spec_augment=False)
    ours.use_fast_kernels = fast
    lengths = (150, 120)
    sizes = {}
    for name in ("none", "layer"):
        ours.gradient_checkpointing_enable(policy=name)
        sizes[name] = kept(ours, lengths)
    outside = sizes["layer"] - 4 * (4 * sum(lengths) * TINY["hidden_size"])
    first = (sizes["none"] - outside) // 4
    before = 0
    for share in (0.45, 0.6, 0.8, 0.95):
        budget = int(share * 3 * first)
        ours.gradient_checkpointing_enable(policy="auto", budget_bytes=budget)
        size = kept(ours, lengths)
        assert size - outside - first <= budget, share
        assert size >= before
        before = size
    assert before > sizes["layer"] + first  # the budget is also used


@pytest.mark.parametrize("budget", range(0, 1100, 7))
def test_layer_policies_recompute_as_little_as_will_do(budget: int) -> None:
    layers, whole, attention, start = 8, 100, 40, 10
    found = layer_policies(layers, whole, attention, start, budget)
    assert len(found) == layers

    def cost(policies: list[str]) -> tuple[int, int]:
        size = {"none": whole, "attention": whole - attention, "layer": start}
        passing = {"none": 0, "attention": attention, "layer": whole}
        used = sum(size[policy] for policy in policies) + max(passing[p] for p in policies)
        return used, sum({"none": 0, "attention": 1, "layer": 100}[p] for p in policies)

    mixtures = [
        [*["layer"] * a, *["attention"] * b, *["none"] * (layers - a - b)]
        for a in range(layers + 1)
        for b in range(layers + 1 - a)
        # Whole layers only where the attention of all the others is computed again.
        if a == 0 or a + b == layers
    ]
    fitting = [mixture for mixture in mixtures if cost(mixture)[0] <= budget]
    least = min((cost(mixture)[1] for mixture in fitting), default=100 * layers)
    assert cost(found)[1] == least  # type: ignore[arg-type]


def test_the_first_layers_recompute() -> None:
    assert layer_policies(4, 100, 40, 10, 360) == ["attention", "attention", "none", "none"]
    assert layer_policies(4, 100, 40, 10, 200) == ["layer", "layer", "layer", "attention"]


def test_layers_without_an_attention_to_recompute() -> None:
    assert layer_policies(3, 100, 0, 10, 250) == ["layer", "layer", "attention"]
    assert layer_policies(0, 100, 40, 10, 5) == []


def test_budget_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory less gradients and moments that are still to come."""
    parameters = nn.Linear(8, 8, bias=False)
    size = parameters.weight.nbytes
    monkeypatch.setattr(recompute, "free_memory", lambda device: 100 * size)
    settings = Recompute("auto")
    device = torch.device("cpu")
    assert settings.budget(parameters, device) == int(0.9 * 97 * size)
    parameters.weight.grad = torch.zeros_like(parameters.weight)  # a second batch before the step
    assert settings.budget(parameters, device) == int(0.9 * 100 * size)
    parameters.zero_grad()
    assert settings.budget(parameters, device) == int(0.9 * 99 * size)
    parameters.weight.requires_grad_(False)
    assert settings.budget(parameters, device) == int(0.9 * 100 * size)
    monkeypatch.setattr(recompute, "free_memory", lambda device: 0)
    assert settings.budget(parameters, device) == 0
    assert Recompute("auto", 7).budget(parameters, device) == 7


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recompute.free_memory(torch.device("cpu")) > 0
    values = {"mem_get_info": (1000, 5000), "memory_reserved": 300, "memory_allocated": 100}
    cuda = SimpleNamespace(**{name: lambda _, v=v: v for name, v in values.items()})
    monkeypatch.setattr(torch, "cuda", cuda)
    assert recompute.free_memory(torch.device("cuda")) == 1200
    with pytest.raises(ValueError, match="budget_bytes"):
        recompute.free_memory(torch.device("meta"))


def test_as_transformers_and_its_trainer_call_it() -> None:
    ours = model(apply_spec_augment=False)
    expected = step(ours)
    for call in (
        lambda: ours.gradient_checkpointing_enable(),
        lambda: ours.gradient_checkpointing_enable({"use_reentrant": False}),
        lambda: ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None),
        lambda: ours.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"preserve_rng_state": False},
            every_n_layers=1,
            offload=False,
        ),
    ):
        call()
        assert ours.base_model.encoder.recompute.policy == "layer"
        assert same_bits(step(ours), expected)
    ours.activation_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


def test_settings_survive_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model(apply_spec_augment=False)
    ours.gradient_checkpointing_enable(policy="attention")
    expected = step(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.base_model.encoder.recompute.policy == "attention"
        assert same_bits(step(other), expected)
    assert sorted(ours.state_dict()) == sorted(model(apply_spec_augment=False).state_dict())


def test_attention_maps_and_hidden_states_come_along() -> None:
    ours = model(apply_spec_augment=False)
    features, mask = padded_batch(LENGTHS, FEATURES)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    expected = ours(features, mask, **wanted)
    for options in POLICIES.values():
        ours.gradient_checkpointing_enable(**options)
        output = ours(features, mask, **wanted)
        for name in ("attentions", "hidden_states"):
            for one, other in zip(output[name], expected[name], strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("given", "policy"),
    [(False, None), (True, "layer"), ("none", None), ("attention", "attention"), ("auto", "auto")],
)
def test_fine_tuning_takes_a_policy(tmp_path: Path, given: Any, policy: str | None) -> None:
    source = make_model(tmp_path)
    core: Any = make_parts(FinetuneConfig(source, "t", "e", "o", gradient_checkpointing=given)).core
    assert core.is_gradient_checkpointing == (policy is not None)
    if policy is not None:
        assert core.base_model.encoder.recompute.policy == policy


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "some"}, ValueError, "policy is 'some'; it must be one of 'none', 'layer'"),
        ({"policy": True}, ValueError, "policy is True"),
        ({"policy": "auto", "budget_bytes": 0}, ValueError, "budget_bytes is 0"),
        ({"policy": "auto", "budget_bytes": 1.5}, TypeError, "budget_bytes is 1.5"),
        ({"policy": "layer", "budget_bytes": 5}, ValueError, "only 'auto' has a budget"),
        ({"every_n_layers": 0}, ValueError, "every_n_layers is 0"),
        ({"offload": True}, ValueError, "offload is True"),
        (
            {"gradient_checkpointing_kwargs": {"reentrant": False}},
            ValueError,
            "gradient_checkpointing_kwargs has 'reentrant'; it may have",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    ours = model(apply_spec_augment=False)
    with pytest.raises(error, match=message):
        ours.gradient_checkpointing_enable(**options)
    assert not ours.is_gradient_checkpointing


def test_moments_count_until_the_gradients_have_been_taken_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "free_memory", lambda device: 1_000_000)
    model, settings = nn.Linear(100, 50, bias=False), Recompute("auto")
    size, device = model.weight.nbytes, torch.device("cpu")
    model.weight.grad = torch.zeros_like(model.weight)  # accumulated: no step was made yet
    budgets = [settings.budget(model, device) for _ in range(2)]
    model.weight.grad = None
    budgets += [settings.budget(model, device) for _ in range(2)]
    expected = [2 * size, 2 * size, 3 * size, size]
    assert budgets == [int(0.9 * (1_000_000 - missing)) for missing in expected]


def test_the_first_of_every_n_layers_recomputes() -> None:
    plan = LayerPlan(Recompute("layer", every_n_layers=3), nn.Identity(), 7)
    assert [i for i in range(1, 8) if not plan.takes_apart(i)] == [1, 4, 7]
    plan = LayerPlan(Recompute("attention", every_n_layers=3), nn.Identity(), 7)
    assert [i for i in range(1, 8) if plan.run_attention(i) is not None] == [1, 4, 7]


def test_auto_recomputes_each_layer_of_code_that_is_being_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plan = LayerPlan(Recompute("auto", budget_bytes=1 << 40), nn.Identity(), 3)
    assert not any(plan.takes_apart(i) for i in (1, 2, 3))


def test_auto_asks_about_the_layers_that_are_left() -> None:
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8, requires_grad=True)
    saved = SavedBytes(layer)
    with saved.hooks():
        layer(x)
    assert saved.total == 2 * x.nbytes
    # One byte less, and neither fits beside what computing one of them again takes.
    for budget, apart in ((2 * saved.total, True), (2 * saved.total - 1, False)):
        plan = LayerPlan(Recompute("auto", budget_bytes=budget), layer, 3)
        assert not plan.takes_apart(1)
        plan.run(1, layer, x)
        assert [plan.takes_apart(i) for i in (2, 3)] == [apart, apart]


def test_auto_measures_the_first_layer_that_is_not_dropped() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    plan = LayerPlan(Recompute("auto", budget_bytes=1), layer, 4)
    plan.run(2, layer, x)
    assert [plan.takes_apart(i) for i in (2, 3, 4)] == [True, False, False]


def test_what_is_not_saved_inside_the_attention_is_not_the_attentions() -> None:
    attention, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(4, 8, requires_grad=True)
    saved = SavedBytes(attention)
    with saved.hooks():
        saved.attention(attention, x).exp()
    assert (saved.total, saved.in_attention) == (3 * x.nbytes, x.nbytes)
