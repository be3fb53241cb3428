"""`accelerate`: transformers' models on our operations give transformers' answers."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.reference import CLASSES, POSITIONS, TINY, padded_batch, pair, relative_error
from w2vbert_fast.integrations import transformers as integration
from w2vbert_fast.integrations.transformers import accelerate, classes, restore

FEATURES = TINY["feature_projection_input_dim"]
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 40}
NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "mask_time_prob": 0.0,
}


def both(class_name: str = "Wav2Vec2BertForCTC", **config: Any) -> tuple[Any, Any]:
    """(reference, the same accelerated)."""
    reference, _ = pair(class_name, **config)
    return reference, accelerate(copy.deepcopy(reference))


def flat(output: Any) -> list[Tensor]:
    values = output.values() if hasattr(output, "values") else output
    return [
        tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))
    ]


def assert_equal(ours: Any, reference: Any, tolerance: float = 1e-5) -> None:
    ours, reference = flat(ours), flat(reference)
    assert len(ours) == len(reference)
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) <= tolerance


def encoder_of(model: Any) -> Any:
    (encoder,) = (m for m in model.modules() if type(m).__name__.endswith("Encoder"))
    return encoder


@pytest.fixture
def always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a call runs transformers' own code."""

    def fail(module: nn.Module, reason: str) -> None:
        raise AssertionError(f"{type(module).__name__} fell back: {reason}")

    monkeypatch.setattr(classes, "_say_once", fail)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why calls ran transformers' own code."""
    reasons: list[str] = []
    monkeypatch.setattr(classes, "_say_once", lambda module, reason: reasons.append(reason))
    return reasons


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("class_name", CLASSES)
@torch.no_grad()
def test_all_outputs_are_the_references(
    class_name: str, positions: str | None, always_fast: None
) -> None:
    reference, fast = both(class_name, position_embeddings_type=positions)
    x, _ = padded_batch((37, 37), FEATURES)
    full = torch.ones(2, 37, dtype=torch.long)
    for options in (
        {},
        {"attention_mask": full},
        {"output_hidden_states": True},
        {"return_dict": False, "output_hidden_states": True},
        {},  # after hooks for hidden states were installed
    ):
        theirs, mine = reference(x, **options), fast(x, **options)
        assert type(mine) is type(theirs)
        assert_equal(mine, theirs)


@torch.no_grad()
def test_an_encoder_called_by_itself(always_fast: None) -> None:
    reference, fast = (encoder_of(model) for model in both("Wav2Vec2BertModel"))
    x, _ = padded_batch((20, 20), TINY["hidden_size"])
    for options in ({}, {"return_dict": False}):
        theirs, mine = reference(x, **options), fast(x, **options)
        assert type(mine) is type(theirs)
        assert_equal(mine, theirs)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_valid_frames_of_a_padded_batch_are_the_references(
    positions: str | None, left: bool, always_fast: None
) -> None:
    if left and positions == "rotary":
        pytest.skip("the reference rotates by the column, so that left padding changes its answer")
    reference, fast = both("Wav2Vec2BertModel", position_embeddings_type=positions)
    x, mask = padded_batch((37, 20, 3), FEATURES)
    mask = mask.flip(1) if left else mask
    valid = mask.bool()
    theirs = reference(x, attention_mask=mask, output_hidden_states=True)
    for options in ({"output_hidden_states": True}, {}):
        mine = fast(x, attention_mask=mask, **options)
        for name in mine:
            pairs = zip(flat([mine[name]]), flat([theirs[name]]), strict=True)
            assert all(relative_error(a[valid], b[valid]) <= 1e-5 for a, b in pairs)
        # Padding repeats the nearest frame.
        nearest = [int(row.nonzero()[0 if left else -1]) for row in mask]
        for row, frame in enumerate(nearest):
            held = mine.last_hidden_state[row][~valid[row]]
            assert torch.equal(held, mine.last_hidden_state[row, frame].expand_as(held))
        assert all(state[~valid].eq(0).all() for state in mine.get("hidden_states", ())[:-1])


@torch.no_grad()
def test_heads_in_a_padded_batch(always_fast: None) -> None:
    x, mask = padded_batch((37, 20), FEATURES)
    for name in ("Wav2Vec2BertForCTC", "Wav2Vec2BertForSequenceClassification"):
        reference, fast = both(name, use_weighted_layer_sum=name != "Wav2Vec2BertForCTC")
        mine = fast(x, attention_mask=mask).logits
        theirs = reference(x, attention_mask=mask).logits
        if name == "Wav2Vec2BertForCTC":
            mine, theirs = mine[mask.bool()], theirs[mask.bool()]
        assert relative_error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("config", [{}, ADAPTER])
@torch.no_grad()
def test_rows_without_frames(config: dict[str, Any], always_fast: None) -> None:
    _, fast = both("Wav2Vec2BertModel", **config)
    x, mask = padded_batch((20, 12, 7), FEATURES)
    for empty in (0, 1, 2):
        some = mask.clone()
        some[empty] = 0
        kept = [row for row in range(3) if row != empty]
        mine = fast(x, attention_mask=some)[0]
        assert mine[empty].eq(0).all()
        # Not equal bits: products of other numbers of tokens may be rounded otherwise.
        assert relative_error(mine[kept], fast(x, attention_mask=mask)[0][kept]) <= 1e-6
    assert fast(x, attention_mask=torch.zeros_like(mask))[0].eq(0).all()


@torch.no_grad()
def test_behind_an_adapter_each_utterance_gets_its_own_answer(always_fast: None) -> None:
    reference, fast = both(**ADAPTER, use_intermediate_ffn_before_adapter=True)
    lengths = (37, 20, 6)
    x, mask = padded_batch(lengths, FEATURES)
    assert_equal(fast(x), reference(x))
    mine = fast(x, attention_mask=mask).logits
    assert mine.shape == reference(x, attention_mask=mask).logits.shape
    for row, length in enumerate(lengths):
        alone = reference(x[row : row + 1, :length]).logits[0]
        assert relative_error(mine[row, : len(alone)], alone) <= 1e-5


def training_step(model: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Gradients of the parameters and of the input, and the outputs."""
    model.train()
    model.zero_grad()
    torch.manual_seed(4)
    x = x.clone().requires_grad_()
    output = model(x, **options)
    hidden = output.last_hidden_state
    if "attention_mask" in options:
        hidden = hidden[options["attention_mask"].bool()]
    (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    outputs = {f"output {i}": tensor.detach() for i, tensor in enumerate(flat(output)[1:])}
    assert x.grad is not None
    return {**named, **outputs, "hidden": hidden.detach(), "input": x.grad}


def assert_same_step(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert ours.keys() == reference.keys()
    scale = max(float(value.norm()) for value in reference.values())
    for name, value in reference.items():
        error = float((ours[name] - value).norm())
        assert error <= 1e-4 * float(value.norm()) + 1e-6 * scale, name


@pytest.mark.parametrize("positions", POSITIONS)
def test_gradients_are_the_references(positions: str | None, always_fast: None) -> None:
    options = {"position_embeddings_type": positions, **NO_DROPOUT}
    x, mask = padded_batch((37, 21), FEATURES)
    reference, fast = both("Wav2Vec2BertModel", **options)
    theirs = training_step(reference, x, attention_mask=mask)
    assert_same_step(training_step(fast, x, attention_mask=mask), theirs)
    reference, fast = both("Wav2Vec2BertModel", **options, **ADAPTER)
    assert_same_step(training_step(fast, x), training_step(reference, x))


def test_layerdrop_leaves_out_the_same_layers(always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel", layerdrop=0.5, num_hidden_layers=6, **NO_DROPOUT)
    x, _ = padded_batch((20,), FEATURES)
    theirs = training_step(reference, x, output_hidden_states=True)
    assert sum(name.endswith("ffn1_layer_norm.weight") for name in theirs) in range(1, 6)
    assert_same_step(training_step(fast, x, output_hidden_states=True), theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel", **NO_DROPOUT)
    x, _ = padded_batch((20, 20), FEATURES)
    theirs = training_step(reference, x)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    for module in (encoder_of(fast), *encoder_of(fast).layers):
        if inner := getattr(module, "_gradient_checkpointing_func", None):
            module._gradient_checkpointing_func = lambda *args, inner=inner: (
                calls.append(args) or inner(*args)
            )
    assert_same_step(training_step(fast, x), theirs)
    assert len(calls) == TINY["num_hidden_layers"]
    encoder_of(fast).layers[0].register_forward_hook(lambda *args: None)
    assert_same_step(training_step(fast, x), theirs)
    assert len(calls) == 2 * TINY["num_hidden_layers"]


def test_dropout_drops(always_fast: None) -> None:
    _, fast = both("Wav2Vec2BertModel", **{**NO_DROPOUT, "attention_dropout": 0.3})
    x, _ = padded_batch((20,), FEATURES)
    fast.train()
    assert relative_error(fast(x)[0], fast(x)[0]) > 1e-3
    encoder_of(fast).eval()
    assert torch.equal(fast(x)[0], fast(x)[0])


@torch.no_grad()
def test_attention_maps_come_from_the_original_which_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reference, fast = both(attn_implementation="eager")
    x, mask = padded_batch((30, 20), FEATURES)
    classes._said.clear()
    with caplog.at_level(logging.WARNING, logger=integration.__name__):
        for _ in range(2):
            options = {"output_attentions": True, "attention_mask": mask}
            theirs, mine = reference(x, **options), fast(x, **options)
            assert len(mine.attentions) == TINY["num_hidden_layers"]
            assert all(map(torch.equal, mine.attentions, theirs.attentions))
            assert torch.equal(mine.logits[mask.bool()], theirs.logits[mask.bool()])
    (record,) = (r for r in caplog.records if r.name == integration.__name__)
    assert "attention maps" in record.getMessage()
    fast.config.output_attentions = reference.config.output_attentions = True
    assert all(map(torch.equal, flat(fast(x)), flat(reference(x))))


@torch.no_grad()
def test_other_dtypes_and_moves(always_fast: None) -> None:
    reference, fast = both()
    x, mask = padded_batch((30, 20), FEATURES)
    valid = mask.bool()
    exact = reference.to(torch.float64)(x.double(), attention_mask=mask).logits[valid]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        theirs = reference.to(dtype)(x.to(dtype), attention_mask=mask).logits
        mine = fast.to(dtype)(x.to(dtype), attention_mask=mask).logits
        assert mine.dtype == theirs.dtype == dtype
        # Both models have been rounded to the dtypes before.
        own = relative_error(theirs[valid].double(), exact)
        assert relative_error(mine[valid].double(), exact) <= max(1.1 * own, 1e-12)
    fast, reference = fast.float(), reference.float()
    with torch.autocast("cpu", torch.bfloat16):
        mine = fast(x, attention_mask=mask).logits
        theirs = reference(x, attention_mask=mask).logits
    assert mine.dtype == theirs.dtype
    assert relative_error(mine[valid].float(), theirs[valid].float()) <= 3e-2


def test_parameters_are_shared_and_classes_left_alone() -> None:
    model, _ = pair("Wav2Vec2BertForCTC", **ADAPTER)
    other = copy.deepcopy(model)
    classes = {type(module): type(module).forward for module in model.modules()}
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys, text = list(model.state_dict()), repr(model)
    assert accelerate(model) is model and accelerate(model) is model
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert list(model.state_dict()) == keys and repr(model) == text
    assert isinstance(encoder_of(model), classes_of("Wav2Vec2BertEncoder"))
    for module, name in zip(other.modules(), dict(model.named_modules()), strict=True):
        assert type(module).__module__ != integration.__name__, name
    assert all(kind.forward is forward for kind, forward in classes.items())


def classes_of(name: str) -> type[nn.Module]:
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert

    kind: type[nn.Module] = getattr(modeling_wav2vec2_bert, name)
    return kind


@torch.no_grad()
def test_restore_undoes_it() -> None:
    reference, fast = both(**ADAPTER)
    x, mask = padded_batch((30, 20), FEATURES)
    assert not torch.equal(fast(x, attention_mask=mask)[0], reference(x, attention_mask=mask)[0])
    assert restore(fast) is fast
    assert [type(m) for m in fast.modules()] == [type(m) for m in reference.modules()]
    assert torch.equal(fast(x, attention_mask=mask)[0], reference(x, attention_mask=mask)[0])
    restore(nn.Linear(2, 2))


@torch.no_grad()
def test_copies_pickles_and_checkpoints(tmp_path: Any, always_fast: None) -> None:
    reference, fast = both(**ADAPTER)
    x, _ = padded_batch((30,), FEATURES)
    expected = fast(x)
    file = io.BytesIO()
    torch.save(fast, file)  # transformers' hooks for hidden states cannot be pickled
    file.seek(0)
    fast(x, output_hidden_states=True)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert type(encoder_of(twin)) is type(encoder_of(fast))
        assert_equal(twin(x), expected, 0.0)
        assert_equal(twin(x, output_hidden_states=True), fast(x, output_hidden_states=True), 0.0)
        for parameter in twin.parameters():
            parameter.zero_()  # the original has its own
    assert_equal(fast(x), expected, 0.0)
    fast.save_pretrained(tmp_path)
    loaded = type(reference).from_pretrained(tmp_path)
    assert type(encoder_of(loaded)) is type(encoder_of(reference))
    assert all(map(torch.equal, flat(loaded(x)), flat(reference(x))))
    other, _ = pair("Wav2Vec2BertForCTC", seed=5, **ADAPTER)
    fast.load_state_dict(other.state_dict())
    assert_equal(fast(x), other(x))


@torch.no_grad()
def test_hooks_on_layers_see_what_they_see_in_transformers(always_fast: None) -> None:
    reference, fast = both("Wav2Vec2BertModel", num_hidden_layers=3)
    x, mask = padded_batch((30, 20), FEATURES)
    valid = mask.bool()
    seen: dict[int, list[Tensor]] = {}
    for number, model in enumerate((reference, fast)):
        kept = seen.setdefault(number, [])
        layers = encoder_of(model).layers
        layers[0].register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))

        def double(module: Any, args: Any, output: Any, kept: Any = kept) -> Any:
            kept.append(output[0] if isinstance(output, tuple) else output)
            return (2 * kept[-1], *output[1:]) if isinstance(output, tuple) else 2 * output

        layers[1].register_forward_hook(double)
    theirs = reference(x, attention_mask=mask, output_hidden_states=True)
    mine = fast(x, attention_mask=mask, output_hidden_states=True)
    for name in theirs:
        for a, b in zip(flat([mine[name]]), flat([theirs[name]]), strict=True):
            assert relative_error(a[valid], b[valid]) <= 1e-5
    for a, b in zip(seen[1], seen[0], strict=True):
        assert relative_error(a[valid], b[valid]) <= 1e-5
    # A hook that stays does not slow down or change calls without hidden states.
    assert (
        relative_error(
            fast(x, attention_mask=mask)[0][valid], reference(x, attention_mask=mask)[0][valid]
        )
        <= 1e-5
    )


PARTS = (
    "ffn1",
    "ffn1.intermediate_dense",
    "ffn1.intermediate_act_fn",
    "ffn1.intermediate_dropout",
    "ffn1.output_dropout",
    "self_attn_dropout",
    "conv_module.dropout",
    "ffn2_layer_norm",
    "self_attn",
    "self_attn.linear_q",
    "self_attn.distance_embedding",
    "conv_module",
    "conv_module.glu",
    "conv_module.pointwise_conv1",
    "conv_module.depthwise_layer_norm",
    "conv_module.activation",
    "final_layer_norm",
)


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_hooks_inside_layers_are_never_bypassed(part: str, said: list[str]) -> None:
    reference, fast = both("Wav2Vec2BertModel")
    x, _ = padded_batch((20,), FEATURES)
    counts = []
    for model in (reference, fast):
        count: list[int] = []

        def double(module: Any, args: Any, output: Any, count: list[int] = count) -> Any:
            count.append(1)
            return (
                tuple(2 * o if o is not None else o for o in output)
                if isinstance(output, tuple)
                else 2 * output
            )

        encoder_of(model).layers[1].get_submodule(part).register_forward_hook(double)
        counts.append(count)
    assert_equal(fast(x), reference(x))
    assert len(counts[0]) == len(counts[1]) > 0
    called = part.split(".")[-1] in (
        "intermediate_dense",
        "intermediate_act_fn",
        "activation",
        "output_dropout",
        "self_attn_dropout",
        "dropout",
        "linear_q",
    )
    assert said == ([] if called else [f"layers.1.{part} was replaced or is hooked"])


class Doubled(Tensor):
    """A weight that is twice what it holds, as a quantised one is something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            return 2 * value.as_subclass(Tensor) if isinstance(value, Doubled) else value

        with torch._C.DisableTorchFunctionSubclass():
            named = {name: plain(value) for name, value in (kwargs or {}).items()}
            return func(*map(plain, args), **named)


@pytest.mark.parametrize(
    "part", ["ffn2.output_dense", "self_attn.linear_k", "final_layer_norm", "conv_module.glu"]
)
@torch.no_grad()
def test_replaced_parts_are_never_bypassed(part: str, said: list[str]) -> None:
    reference, fast = both("Wav2Vec2BertModel")
    x, _ = padded_batch((20,), FEATURES)
    plain = fast(x)
    for model in (reference, fast):
        owner = encoder_of(model).layers[0].get_submodule(part)
        if hasattr(owner, "weight"):
            owner._parameters["weight"] = owner.weight.detach().as_subclass(Doubled)
        else:
            encoder_of(model).layers[0].conv_module.glu = nn.Sequential(owner, nn.Tanh())
    assert relative_error(fast(x)[0], plain[0]) > 1e-3
    assert_equal(fast(x), reference(x))
    assert len(said) == (0 if "linear" in part or "dense" in part else 2)


@torch.no_grad()
def test_calls_that_only_the_original_can_do(said: list[str]) -> None:
    reference, fast = both(**ADAPTER)
    x, mask = padded_batch((30, 20), FEATURES)
    mask[0, 5] = 0
    assert all(map(torch.equal, flat(fast(x, mask)), flat(reference(x, mask))))
    assert len(said) == 2 and all("contiguous" in reason for reason in said)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert all(map(torch.equal, flat(fast(x)), flat(reference(x))))
    finally:
        handle.remove()
    assert said[2:] == ["there are hooks for all modules"] * 2
    encoder_of(fast).layers[0] = nn.Sequential(encoder_of(fast).layers[0])
    with pytest.raises(TypeError):  # transformers' own: its layers take more than one argument
        fast(x)
    assert said[4:] == ["layers.0 was replaced"]


def test_what_cannot_be_accelerated() -> None:
    with pytest.raises(TypeError, match=r"model is str; it must be a torch.nn.Module"):
        accelerate("model")
    with pytest.raises(TypeError, match=r"model is int"):
        restore(3)
    with pytest.raises(ValueError, match=r"Linear, which contains no Wav2Vec2BertEncoder"):
        accelerate(nn.Linear(2, 2))
    model, _ = pair("Wav2Vec2BertForCTC")
    types = [type(module) for module in model.modules()]
    encoder = encoder_of(model)
    encoder.layers[1].forward = encoder.layers[1].forward
    with pytest.raises(ValueError, match=r"Wav2Vec2BertEncoderLayer in model has a forward"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == types
    encoder.__class__ = type("Mine", (type(encoder),), {"forward": lambda *args: None})
    with pytest.raises(ValueError, match=r"Mine derive from transformers' classes"):
        accelerate(model)
