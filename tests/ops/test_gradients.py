"""Gradients of the registered operations on a CPU, and of a tiny encoder that trains on them."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.operations import plain_form
from tests.helpers.reference import POSITIONS, TINY, padded_batch, pair, relative_error
from tests.ops.test_operation import DIFFERENTIABLE, arguments
from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops import dispatch

FEATURES = TINY["feature_projection_input_dim"]
RAGGED = (1, 2, 31, 0, 63, 64, 65, 217, 300)
LENGTHS = (31, 24, 1, 13)
STILL = {"apply_spec_augment": False}


def leaf(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A floating-point tensor as a leaf that asks for its gradient; others as they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype or value.dtype).clone().requires_grad_()


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


def gradients(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Of the sum of random multiples of the results, with respect to all leaves."""
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.requires_grad:
            total = total + (output * torch.randn(output.shape, generator=generator)).sum()
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    return list(torch.autograd.grad(total, leaves))


def check(name: str, args: tuple[Any, ...], tolerance: float = 2e-6) -> None:
    """Of the registered operation in fp32 against autograd of the plain form in float64."""
    exact = gradients(plain_form(name), tuple(leaf(arg, torch.float64) for arg in args))
    operation = getattr(torch.ops.w2vbert, name).default
    got = gradients(operation, tuple(leaf(arg) for arg in args))
    assert len(got) == len(exact) > 0
    for mine, expected in zip(got, exact, strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine.double(), expected) <= tolerance


@pytest.mark.parametrize("implementation", ["cpu", "plain"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name: str, implementation: dispatch.Implementation) -> None:
    operation = getattr(torch.ops.w2vbert, name).default
    with dispatch.force(implementation):
        result = torch.library.opcheck(operation, tuple(leaf(arg) for arg in arguments(name)))
        assert result["test_autograd_registration"] == "SUCCESS"
        assert set(result.values()) == {"SUCCESS"}
        check(name, arguments(name))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_is_refused(name: str) -> None:
    args = tuple(leaf(arg) for arg in arguments(name))
    outputs = getattr(torch.ops.w2vbert, name).default(*args)
    output = outputs[-1] if name.startswith("residual") else outputs
    output = output[0] if isinstance(output, tuple) else output
    (first,) = torch.autograd.grad(output.square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_backward is a gradient.*double backward"):
        first.square().sum().backward()


@pytest.mark.parametrize("activation", [None, "silu", "swish", "gelu", "gelu_new", "relu", "selu"])
def test_linear(activation: str | None) -> None:
    torch.manual_seed(0)
    for tokens in (1, 63, 217):
        x, weight, bias = torch.randn(tokens, 40), 0.2 * torch.randn(48, 40), torch.randn(48)
        check("linear", (x, weight, bias, activation))
        check("linear", (x, weight, None, activation))
        check("linear_glu", (x, weight, bias))


def test_linear_without_outputs_has_a_gradient_of_its_bias() -> None:
    x, weight, bias = (torch.ones(*shape, requires_grad=True) for shape in ((3, 4), (0, 4), (0,)))
    ops.linear(x, weight, bias, fast=True).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros(3, 4))
    assert weight.grad is not None and weight.grad.shape == (0, 4)
    assert bias.grad is not None and bias.grad.shape == (0,)


@pytest.mark.parametrize("name", ["linear", "linear_glu", "feed_forward"])
def test_only_wanted_gradients_are_computed(name: str) -> None:
    args = arguments(name)
    for position, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            continue
        ours = [*args[:position], leaf(arg), *args[position + 1 :]]
        with Calls() as calls:
            getattr(torch.ops.w2vbert, name)(*ours).sum().backward()
        wanted = [i == position for i, a in enumerate(args) if a is None or isinstance(a, Tensor)]
        assert calls.needs == [wanted[: len(calls.needs[0])]]  # a residual's is not computed
        assert ours[position].grad is not None


@pytest.mark.parametrize("width", [7, 160, 1024])
def test_norms(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2vbert_fast.ops.cpu.norm._BLOCK_ELEMENTS", 10_000)
    torch.manual_seed(0)
    vectors = [*torch.randn(4, width)]
    for tokens in (1, 63, 217):
        residual, x = torch.randn(2, tokens, width)
        check("layer_norm", (x, *vectors[:2], 1e-5))
        for scale in (0.5, 1.0):
            check("residual_layer_norm", (residual, x, scale, *vectors[:2], 1e-5))
            check("residual_double_layer_norm", (residual, x, scale, *vectors, 1e-5), 5e-6)


def test_norms_of_which_one_result_is_used() -> None:
    torch.manual_seed(0)
    residual, x = torch.randn(2, 9, 16)
    vectors = [*torch.randn(4, 16)]
    for name, count in (("residual_layer_norm", 2), ("residual_double_layer_norm", 4)):
        args = (residual, x, 0.5, *vectors[:count], 1e-5)
        for index in (0, 1):
            results = []
            for form, dtype in (
                (plain_form(name), torch.float64),
                (getattr(torch.ops.w2vbert, name), torch.float32),
            ):
                leaves = tuple(leaf(arg, dtype) for arg in args)
                form(*leaves)[index].square().sum().backward()
                results.append([p.grad for p in leaves if isinstance(p, Tensor)])
            for expected, got in zip(*results, strict=True):
                expected = torch.zeros_like(got) if expected is None else expected
                got = torch.zeros_like(expected) if got is None else got
                torch.testing.assert_close(got.double(), expected.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("taps", [1, 3, 31])
@pytest.mark.parametrize("lengths", [RAGGED, (217,), (0, 5, 0)])
@pytest.mark.parametrize("block", [1 << 17, 200])
def test_conv_norm_act(
    taps: int, lengths: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("w2vbert_fast.ops.cpu.conv._BLOCK_ELEMENTS_BACKWARD", block)
    torch.manual_seed(0)
    width = 40
    x, conv = torch.randn(sum(lengths), width), torch.randn(width, taps)
    vectors = torch.randn(2, width)
    for activation in ("silu", "gelu", "linear"):
        check("conv_norm_act", (x, conv, *vectors, 1e-5, activation, cumulative(lengths)), 5e-6)


def test_an_activation_without_a_known_derivative_is_named() -> None:
    args = [leaf(arg) for arg in arguments("conv_norm_act")]
    args[5] = "mish"
    with pytest.raises(ValueError, match="activation is 'mish'"):
        torch.ops.w2vbert.conv_norm_act(*args).sum().backward()


@pytest.mark.parametrize("reach", [(64, 8), (5, 3), (0, 8), (8, 0), (2, 40), (0, 0), (1000, 900)])
@pytest.mark.parametrize("lengths", [RAGGED, (700,), (3,)])
def test_shaw_attention(reach: tuple[int, int], lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [*torch.randn(3, sum(lengths), 3, 16)]
    embedding = torch.randn(sum(reach) + 1, 16)
    layout = (cumulative(lengths), max(lengths))
    if reach == (0, 0):
        # Its exact gradient is zero.
        args = (*tensors, *layout, embedding, *reach)
        operation = torch.ops.w2vbert.shaw_attention.default
        assert not gradients(operation, tuple(leaf(arg) for arg in args))[3].any()
        embedding = None
    check("shaw_attention", (*tensors, *layout, embedding, *reach), 5e-6)


def test_attention_of_large_scores() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 300, 2, 16)
    query[:, 1] *= 50
    args = (query, key, value, cumulative((300,)), 300, torch.randn(10, 16), 6, 3)
    check("shaw_attention", args, 1e-4)


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_bfloat16_attention_is_as_accurate_as_the_plain_form(offset: float) -> None:
    """Also with values whose common part, far larger, is nothing to the gradient of the scores."""
    torch.manual_seed(0)
    lengths = (217, 300, 5)
    query, key, value = torch.randn(3, sum(lengths), 2, 64)
    tensors = [x.bfloat16() for x in (query, key, value + offset)]
    args = (*tensors, cumulative(lengths), 300, torch.randn(73, 64).bfloat16(), 64, 8)
    exact = gradients(plain_form("shaw_attention"), tuple(leaf(arg, torch.float64) for arg in args))
    plain = gradients(plain_form("shaw_attention"), tuple(map(leaf, args)))
    got = gradients(torch.ops.w2vbert.shaw_attention.default, tuple(map(leaf, args)))
    for mine, theirs, expected in zip(got, plain, exact, strict=True):
        limit = 1.1 * relative_error(theirs.double(), expected)
        assert relative_error(mine.double(), expected) <= limit


@pytest.mark.parametrize("length", [40, 300])  # products of several heads, and head by head
@pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.float32, (1e-5, 5e-6)), (torch.bfloat16, (8e-3, 1e-2))]
)
def test_attention_dropout_is_the_same_forwards_and_backwards(
    length: int, dtype: torch.dtype, limits: tuple[float, float]
) -> None:
    """With a value of one at one key the output is that key's weight: which were kept is seen."""
    torch.manual_seed(0)
    query, key = torch.randn(2, length, 2, 64).to(dtype)
    embedding, p, seed = torch.randn(9, 64).to(dtype), 0.3, torch.tensor([11, 5])
    layout = (cumulative((length,)), length)

    def attend(value: Tensor, q: Tensor = query, k: Tensor = key, e: Tensor = embedding) -> Tensor:
        dropout = {"dropout_p": p, "dropout_seed": seed}
        return torch.ops.w2vbert.shaw_attention(q, k, value, *layout, e, 5, 3, **dropout)[0]

    def weights(q: Tensor, k: Tensor, e: Tensor) -> Tensor:
        frames = torch.arange(length)
        distance = (frames[None] - frames[:, None]).clamp(-5, 3) + 5
        scores = torch.einsum("ihd,jhd->hij", q, k)
        scores = scores + torch.einsum("ihd,ijd->hij", q, e[distance])
        return (scores / 8).softmax(-1)

    columns = []
    for first in range(0, length, 64):
        value = torch.zeros(length, 2, 64, dtype=dtype)
        for column in range(min(64, length - first)):
            value[first + column, :, column] = 1.0
        columns.append(attend(value)[..., : min(64, length - first)])
    dropped = torch.cat(columns, dim=-1).permute(1, 0, 2)  # [H, T, T]
    kept = dropped > 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 0.02
    exact_weights = weights(query.double(), key.double(), embedding.double())
    expected = torch.where(kept, exact_weights / (1 - p), 0.0)
    assert relative_error(dropped.double(), expected) <= limits[0]

    value = torch.randn(length, 2, 64).to(dtype)
    got = gradients(attend, tuple(map(leaf, (value, query, key, embedding))))

    def plain(v: Tensor, q: Tensor, k: Tensor, e: Tensor) -> Tensor:
        masked = weights(q, k, e) * kept / (1 - p)
        return torch.einsum("hij,jhd->ihd", masked, v)

    wide = tuple(leaf(t, torch.float64) for t in (value, query, key, embedding))
    for mine, exact in zip(got, gradients(plain, wide), strict=True):
        assert relative_error(mine.double(), exact) <= limits[1]


PEAK = """
import resource, torch
T, H = 8000, 4
def train(q, k, v):
    n = q.shape[0]
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, torch.randn(73, 64).to(q))]
    out = torch.ops.w2vbert.shaw_attention(*leaves[:3], cu_seqlens, n, leaves[3], 64, 8)
    out[0].sum().backward()
import w2vbert_fast.ops
for dtype in (torch.float32, torch.bfloat16):
    tensors = torch.randn(3, T, H, 64).to(dtype)
    train(*tensors[:, :300])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(*tensors)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_memory_of_attention_is_linear_in_the_length() -> None:
    assert resource.getpagesize() > 0
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    for kib in map(int, done.stdout.split()):
        # Scores of one head alone are 256 MB in fp32.
        assert kib <= 200 * 1024


class Calls(TorchDispatchMode):
    """Counts the calls of this project's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.needs: list[list[bool]] = []
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "w2vbert":
            self.counts[name] = self.counts.get(name, 0) + 1
            floating = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
            self.dtypes.setdefault(name, set()).update(a.dtype for a in floating)
            if name.endswith("_backward") and isinstance(args[-1], list):
                self.needs.append(args[-1])
        return func(*args, **(kwargs or {}))


def train_step(model: nn.Module, **kwargs: Any) -> list[Tensor | None]:
    """The gradient of every parameter of one step on a padded batch, seeded."""
    features, mask = padded_batch(LENGTHS, FEATURES)
    torch.manual_seed(5)  # LayerDrop skips the second of four layers, and not the third
    model.zero_grad()
    output = model(features, mask, **kwargs)[0]
    generator = torch.Generator().manual_seed(5)
    (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_close(model: nn.Module, got: list[Tensor | None], expected: list[Any]) -> None:
    largest = max(float(g.norm()) for g in expected if g is not None)
    for (name, _), mine, theirs in zip(model.named_parameters(), got, expected, strict=True):
        assert (mine is None) == (theirs is None), name
        if theirs is None:
            continue
        if float(theirs.norm()) < 1e-6 * largest:  # exactly zero, such as a key's bias
            assert float(mine.norm()) < 1e-5 * largest, name
            continue
        assert relative_error(mine, theirs) <= 1e-4, name


TRAINING: dict[str, dict[str, Any]] = {
    "still": STILL,
    "layerdrop": {**STILL, "layerdrop": 0.5, "num_hidden_layers": 4},
    "spec_augment": {"mask_time_prob": 0.3, "mask_time_length": 3, "mask_feature_prob": 0.2},
    "dropout": {**STILL, "hidden_dropout": 0.1, "activation_dropout": 0.1},
    "adapter": {**STILL, "add_adapter": True, "output_hidden_size": 24},
    "no_positions": {**STILL, "position_embeddings_type": None},
    "rotary": {**STILL, "position_embeddings_type": "rotary"},
    "relative": {**STILL, "position_embeddings_type": "relative"},
    "mish": {**STILL, "hidden_act": "mish"},
    "gelu": {**STILL, "hidden_act": "gelu"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TRAINING)
def test_every_gradient_of_a_training_step_is_that_of_the_plain_path(
    name: str, checkpointing: bool
) -> None:
    _, ours = pair("Wav2Vec2BertModel", **TRAINING[name])
    ours.train()
    expected = train_step(ours)
    if checkpointing:
        ours.gradient_checkpointing_enable()
    ours.use_fast_kernels = True
    assert_close(ours, train_step(ours), expected)
    again = train_step(ours)
    repeated = train_step(ours)
    for first, second in zip(again, repeated, strict=True):
        assert (first is None and second is None) or torch.equal(first, second), "not the same bits"


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_reference(training: bool) -> None:
    reference, ours = pair("Wav2Vec2BertForCTC", **STILL)
    features = torch.randn(2, 37, FEATURES, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 2, 2], [3, 4, -100]])
    ours.use_fast_kernels = True
    for model in (reference, ours):
        model.train(training)
        model(features, labels=labels).loss.backward()
    theirs = dict(reference.named_parameters())
    expected = [theirs[name].grad for name, _ in ours.named_parameters()]
    assert_close(ours, [p.grad for p in ours.parameters()], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_of_a_padded_batch_are_those_of_the_reference(
    position: str | None, checkpointing: bool
) -> None:
    """Every parameter, with LayerDrop and masked frames, which both draw or get alike."""
    changes = {"num_hidden_layers": 4, "layerdrop": 0.5, "position_embeddings_type": position}
    reference, ours = pair("Wav2Vec2BertModel", **changes)
    features, mask = padded_batch(LENGTHS, FEATURES)
    masked = torch.zeros(mask.shape, dtype=torch.bool)
    masked[0, 3:9] = masked[1, 20:28] = masked[3, :2] = True  # row 1 has 24 frames
    weights = torch.randn(*mask.shape, TINY["hidden_size"]) * mask[..., None]
    ours.use_fast_kernels = True
    if checkpointing:
        ours.gradient_checkpointing_enable()
    outputs = []
    for model in (reference, ours):
        torch.manual_seed(5)  # skips the second of the four layers, and not the third
        output = model.train()(features, mask, mask_time_indices=masked).last_hidden_state
        (output * weights).sum().backward()
        outputs.append(output.detach() * mask[..., None])
    assert relative_error(outputs[1], outputs[0]) <= 1e-5
    theirs = dict(reference.named_parameters())
    expected = [theirs[name].grad for name, _ in ours.named_parameters()]
    dropped = {name.split(".")[2] for name, p in ours.named_parameters() if p.grad is None}
    assert "1" in dropped and "2" not in dropped
    assert ours.masked_spec_embed.grad is not None and bool(ours.masked_spec_embed.grad.any())
    assert_close(ours, [p.grad for p in ours.parameters()], expected)


def test_training_calls_the_registered_operations() -> None:
    _, ours = pair("Wav2Vec2BertModel", **STILL)
    ours.train().use_fast_kernels = True
    with Calls() as calls:
        train_step(ours)
    for name in ("layer_norm", "residual_layer_norm", "residual_double_layer_norm", "linear"):
        assert calls.counts[f"{name}_backward"] == calls.counts[name]
    assert calls.counts["shaw_attention_backward"] == calls.counts["shaw_attention"] == 2
    assert calls.counts["conv_norm_act_backward"] == calls.counts["conv_norm_act"] == 2


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_attention_dropout_is_unbiased_and_drawn_anew(p: float) -> None:
    torch.manual_seed(0)
    lengths = (20, 12)
    tensors = [*torch.randn(3, sum(lengths), 2, 8)]
    call = (*tensors, cumulative(lengths), 20)
    exact, _ = ops.shaw_attention(*call, fast=True)
    runs = torch.stack([ops.shaw_attention(*call, dropout_p=p, fast=True)[0] for _ in range(400)])
    assert not torch.equal(runs[0], runs[1])
    deviation = runs.std(0).clamp_min(1e-3) / 400**0.5
    assert float(((runs.mean(0) - exact) / deviation).abs().max()) < 5.5


@pytest.mark.parametrize("kind", ["train", "eval", "no_grad"])
def test_autocast_takes_the_fast_path_in_its_dtypes(kind: str) -> None:
    _, ours = pair("Wav2Vec2BertModel", **STILL)
    ours.train(kind == "train").use_fast_kernels = True
    features, mask = padded_batch(LENGTHS, FEATURES)
    with (
        Calls() as calls,
        torch.autocast("cpu", torch.bfloat16),
        torch.set_grad_enabled(kind != "no_grad"),
    ):
        ours(features, mask)
    lower, full = {torch.bfloat16}, {torch.float32}
    for name in ("linear", "conv_norm_act", "shaw_attention"):
        assert calls.dtypes[name] == lower, name
    for name in ("layer_norm", "residual_layer_norm", "residual_double_layer_norm"):
        assert calls.dtypes[name] == full, name


def test_autocast_is_as_accurate_as_the_plain_path() -> None:
    _, ours = pair("Wav2Vec2BertModel", **STILL)
    exact = train_step(ours.train())
    gradients_of = {}
    for fast in (False, True):
        ours.use_fast_kernels = fast
        with torch.autocast("cpu", torch.bfloat16):
            gradients_of[fast] = train_step(ours)
    errors = {fast: 0.0 for fast in gradients_of}
    for fast, found in gradients_of.items():
        for mine, theirs in zip(found, exact, strict=True):
            if theirs is not None:
                errors[fast] += float((mine - theirs).square().sum())
    assert all(g is None or g.dtype == torch.float32 for g in gradients_of[True])
    assert errors[True] ** 0.5 <= 1.1 * errors[False] ** 0.5


def test_a_layer_trains_compiled() -> None:
    _, ours = pair("Wav2Vec2BertModel", **STILL)
    ours.train().use_fast_kernels = True
    layer = ours.encoder.layers[0]
    layout = PackedBatch.from_lengths((5, 7), 7, "cpu")
    x = torch.randn(12, TINY["hidden_size"])

    def run(x: Tensor) -> Tensor:
        return layer(x, layout)[0]

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)):
        layer.zero_grad()
        function(x).square().sum().backward()
        results.append([p.grad for p in layer.parameters()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
