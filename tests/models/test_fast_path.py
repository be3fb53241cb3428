"""`use_fast_kernels=True`: the same answers as the reference, and one launch for each operation."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import w2vbert_fast
from tests.helpers.reference import CLASSES, POSITIONS, TINY, padded_batch, pair, relative_error
from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.ops import dispatch

LENGTHS = (31, 24, 1, 13)
FEATURES = TINY["feature_projection_input_dim"]
PER_LAYER = {
    "linear": 6,
    "linear_glu": 1,
    "linear_stacked": 1,
    "feed_forward": 0,
    "shaw_attention": 1,
    "conv_norm_act": 1,
    "residual_layer_norm": 3,
    "residual_double_layer_norm": 1,
}
PRODUCTS = ("linear", "linear_glu", "linear_stacked")
VIEWS = {"view", "squeeze", "split", "transpose", "unbind", "detach"}


class Calls(TorchDispatchMode):
    """Counts operations, but for those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split(".")[0].split("::")
        if namespace == "w2vbert" or (namespace == "aten" and name not in VIEWS):
            self.counts[name if namespace == "w2vbert" else f"{namespace}::{name}"] += 1
        return func(*args, **(kwargs or {}))


def gpu_calls(num_layers: int, *, has_half_frames: bool = False) -> Counter[str]:
    """What the encoder's layers call on a GPU, counted on tensors without memory."""
    values = {**TINY, "num_hidden_layers": num_layers}
    model = w2vbert_fast.Wav2Vec2BertModel(w2vbert_fast.Wav2Vec2BertConfig(**values)).eval()
    model.use_fast_kernels = True
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16)
                setattr(module, name, nn.Parameter(fake))
        x = torch.empty(14, values["hidden_size"], dtype=torch.bfloat16)
        seqused_k = torch.empty(2, dtype=torch.int32) if has_half_frames else None
        cu_seqlens = torch.empty(3, dtype=torch.int32)
        layout = PackedBatch(cu_seqlens, (7, 7), 7, None, seqused_k=seqused_k)
        with Calls() as calls:
            model.encoder(x, layout, set(), False)
    return calls.counts


def test_a_layer_is_fourteen_launches_and_nothing_else() -> None:
    by_depth = [gpu_calls(depth) for depth in (2, 3, 4)]
    for shallow, deep in itertools.pairwise(by_depth):
        one_layer = {name: deep[name] - shallow[name] for name in deep}
        assert +Counter(one_layer) == +Counter(PER_LAYER)
        assert sum(one_layer.values()) == 14
        assert sum(one_layer[name] for name in PRODUCTS if name in one_layer) == 8
    assert gpu_calls(2, has_half_frames=True) == by_depth[0]


def test_around_the_layers_there_is_one_norm_one_work_list_and_one_copy_of_the_taps() -> None:
    calls = gpu_calls(3)
    calls.subtract({name: 3 * count for name, count in PER_LAYER.items()})
    # The last layer's final norm joins no other.
    assert +calls == Counter(
        {
            "layer_norm": 1,
            "residual_layer_norm": 1,
            "attention_tile_map": 1,
            "aten::stack": 1,
            "aten::clone": 1,
        }
    )


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("class_name", "adapter"),
    [
        *((name, {}) for name in CLASSES),
        ("Wav2Vec2BertModel", {"add_adapter": True, "output_hidden_size": 24}),
        ("Wav2Vec2BertForCTC", {"add_adapter": True, "output_hidden_size": 24}),
        ("Wav2Vec2BertForXVector", {"add_adapter": True}),
    ],
)
def test_answers_are_those_of_the_reference(
    class_name: str, position: str | None, adapter: dict[str, Any]
) -> None:
    reference, ours = pair(class_name, position_embeddings_type=position, **adapter)
    ours.use_fast_kernels = True
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 37, FEATURES, generator=generator)
    with torch.no_grad():
        expected = reference(features, output_hidden_states=True)
        got = ours(features, output_hidden_states=True)
    assert relative_error(got[0], expected[0]) <= 1e-5
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(mine, theirs) <= 1e-5


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("add_adapter", [False, True])
def test_padded_rows_are_what_the_reference_gives_for_them_alone(
    position: str | None, add_adapter: bool
) -> None:
    reference, ours = pair(
        "Wav2Vec2BertModel", position_embeddings_type=position, add_adapter=add_adapter
    )
    ours.use_fast_kernels = True
    features, mask = padded_batch(LENGTHS, FEATURES)
    with torch.no_grad():
        got = ours(features, mask).last_hidden_state
        for row, length in enumerate(LENGTHS):
            alone = reference(features[row : row + 1, :length]).last_hidden_state[0]
            assert relative_error(got[row, : len(alone)], alone) <= 1e-5
            assert not got[row, len(alone) :].any()


def test_bfloat16_is_as_accurate_as_the_reference() -> None:
    reference, ours = pair("Wav2Vec2BertForCTC")
    features = torch.randn(2, 60, FEATURES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = reference.double()(features.double()).logits
        reference, ours = reference.bfloat16(), ours.bfloat16()
        ours.use_fast_kernels = True
        theirs = relative_error(reference(features.bfloat16()).logits.double(), exact)
        mine = relative_error(ours(features.bfloat16()).logits.double(), exact)
    assert mine <= 1.1 * theirs


@pytest.mark.parametrize("position", [*POSITIONS])
def test_hidden_states_do_not_depend_on_which_are_kept(position: str | None) -> None:
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=3, position_embeddings_type=position)
    ours.use_fast_kernels = True
    features, mask = padded_batch(LENGTHS, FEATURES)
    with torch.no_grad():
        every = ours(features, mask, output_hidden_states=True).hidden_states
        for index in range(4):
            one = ours(features, mask, output_hidden_states=[index]).hidden_states
            assert torch.equal(one[index], every[index])


def watched(ours: nn.Module, layer: int, kind: str) -> list[Tensor]:
    """A layer's inputs or outputs, as a hook sees them."""
    seen: list[Tensor] = []
    module = ours.encoder.layers[layer]
    if kind == "input":
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        module.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
    return seen


@pytest.mark.parametrize("fast", [False, True])
def test_hooks_on_layers_see_and_replace_what_they_always_did(fast: bool) -> None:
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=3)
    ours.use_fast_kernels = fast
    features, mask = padded_batch(LENGTHS, FEATURES)
    with torch.no_grad():
        states = ours(features, mask, output_hidden_states=True).hidden_states
        seen = watched(ours, 1, "input"), watched(ours, 1, "output")
        ours(features, mask)
        layout = PackedBatch.from_attention_mask(mask, 4, 31, torch.device("cpu"))
        for (got,), index in zip(seen, (1, 2), strict=True):
            assert relative_error(got, layout.pack(states[index])) <= 1e-6
        handle = ours.encoder.layers[1].register_forward_hook(
            lambda _, inputs, output: (torch.zeros_like(output[0]), output[1])
        )
        replaced = ours(features, mask, output_hidden_states=True).hidden_states
        assert not replaced[2].any()
        layer = ours.encoder.layers[2]
        expected = layer(torch.zeros_like(layout.pack(states[2])), layout)[0]
        assert relative_error(layout.pack(replaced[3]), expected) <= 1e-6
        handle.remove()
        assert relative_error(ours(features, mask)[0], states[3]) <= 1e-6


def test_attention_maps_come_along() -> None:
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=3)
    features, mask = padded_batch(LENGTHS, FEATURES)
    with torch.no_grad():
        expected = ours(features, mask, output_attentions=True).attentions
        ours.use_fast_kernels = True
        got = ours(features, mask, output_attentions=True).attentions
    assert len(got) == 3
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_autocast_is_as_accurate_as_the_plain_form() -> None:
    _, ours = pair("Wav2Vec2BertModel")
    features, mask = padded_batch(LENGTHS, FEATURES)
    with torch.no_grad():
        exact = ours(features, mask)[0]
        with torch.autocast("cpu", torch.bfloat16):
            plain = ours(features, mask)[0]
            ours.use_fast_kernels = True
            got = ours(features, mask)[0]
    assert 0.0 < relative_error(got, exact) <= 1.1 * relative_error(plain, exact)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_encoder_compiles_without_a_graph_break(position: str | None) -> None:
    _, ours = pair("Wav2Vec2BertModel", num_hidden_layers=3, position_embeddings_type=position)
    ours.use_fast_kernels = True
    encoder = ours.encoder

    def run(x: Tensor, layout: PackedBatch) -> Tensor:
        return encoder(x, layout, {1}, False)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for lengths in ((5, 7), (3, 9, 1)):
            layout = PackedBatch.from_lengths(lengths, max(lengths), "cpu")
            x = torch.randn(sum(lengths), TINY["hidden_size"])
            torch.testing.assert_close(compiled(x, layout), run(x, layout))


def test_the_implementation_follows_the_tensor(caplog: pytest.LogCaptureFixture) -> None:
    cpu = "cpu" if dispatch.explain("cpu").startswith("fast") else "plain"
    assert dispatch.implementation(torch.empty(0)) == cpu
    assert dispatch.implementation(torch.empty(0, dtype=torch.float64)) == "plain"
    with dispatch.force("plain"):
        assert dispatch.implementation(torch.empty(0)) == "plain"
    dispatch._logged.clear()
    dispatch._implementation.cache_clear()
    with caplog.at_level("INFO", logger=dispatch.__name__):
        for _ in range(2):
            assert dispatch.implementation(torch.empty(0, device="meta")) == "plain"
    assert [record.getMessage() for record in caplog.records] == [
        "operations on meta run in plain PyTorch: there are no kernels for this type of device"
    ]
    assert dispatch.explain("mps").startswith("plain PyTorch: there are no kernels")
    with pytest.raises(ValueError, match="implementation is 'fast'"), dispatch.force("fast"):
        pass


@pytest.mark.parametrize(
    ("capability", "version", "warned"),
    [
        ((9, 0), "3.6.0", True),
        ((9, 0), "3.7.1", False),
        ((9, 0), "3.10.0+git1", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", True),
        ((12, 0), "3.6.0", False),
    ],
)
def test_a_triton_that_leaves_out_a_fence_is_told(
    capability: tuple[int, int],
    version: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By `explain`, and once by the log: of linear layers and of attention."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(dispatch, "_triton_problem", lambda _: None)
    monkeypatch.setattr(dispatch, "_logged", set())
    said = "triton 3.7.1 .* linear layers and attention"
    text = dispatch.explain("cuda")
    assert text.startswith(f"Triton kernels: triton {version} is installed")
    assert bool(re.search(said, text)) == warned
    dispatch._implementation.cache_clear()
    try:
        with caplog.at_level("WARNING", logger=dispatch.__name__):
            for dtype in (torch.bfloat16, torch.float16):
                device = torch.device("cuda", 0)
                assert dispatch._implementation(device, dtype, None) == "triton"
    finally:
        dispatch._implementation.cache_clear()
    assert len(caplog.records) == warned
    assert all(re.search(said, record.getMessage()) for record in caplog.records)


def test_without_triton_a_gpu_runs_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (dispatch._triton_problem, dispatch._implementation):
        function.cache_clear()
    monkeypatch.setattr(dispatch, "_TRITON_OBSTACLE", "Triton is not installed")
    try:
        assert dispatch.explain("cuda") == "plain PyTorch: Triton is not installed"
        with FakeTensorMode():
            x = torch.empty(1, device="cuda")
            assert dispatch.implementation(x) == "plain"
            assert not dispatch.on_triton_device(x)
    finally:
        for function in (dispatch._triton_problem, dispatch._implementation):
            function.cache_clear()


@pytest.mark.parametrize(
    ("version", "obstacle"),
    [
        ("3.4.0", "Triton 3.4.0 is installed; the kernels need 3.5, which comes with PyTorch 2.9"),
        ("3.1.0+rocm", "Triton 3.1.0+rocm is installed; the kernels need 3.5"),
        ("3.5.0", None),
        ("3.10.0.dev1", None),
        ("4.0.0", None),
    ],
)
def test_an_old_triton_is_none(
    version: str, obstacle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "__init__.py"
    origin.write_text(f"from . import knobs\n__version__ = '{version}'\n")
    spec = SimpleNamespace(origin=str(origin))
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: spec)
    found = dispatch._triton_obstacle()
    assert found is obstacle or (obstacle is not None and str(found).startswith(obstacle))


def test_layers_of_one_input_side_by_side() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    biases = torch.randn(3, 6, dtype=torch.float64)
    expected = torch.einsum("ni,koi->nko", x, weights).flatten(1)
    for fast in (False, True):
        torch.testing.assert_close(ops.linear_stacked(x, list(weights), [], fast=fast), expected)
        with_bias = ops.linear_stacked(x, list(weights), list(biases), fast=fast)
        torch.testing.assert_close(with_bias, expected + biases.flatten())
    with pytest.raises(ValueError, match="weights has 3 entries and biases 1"):
        ops.linear_stacked(x, list(weights), [biases[0]])
    with pytest.raises(ValueError, match=r"weights have shapes \(6, 4\), \(5, 4\)"):
        ops.linear_stacked(x, [weights[0], weights[1, :5]], [])


def test_double_norm_by_definition() -> None:
    torch.manual_seed(0)
    residual, x = torch.randn(2, 5, 6, dtype=torch.float64)
    first, second = torch.randn(2, 2, 6, dtype=torch.float64)

    def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = y - y.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias

    expected = norm(residual + x / 2, *first)
    for fast in (False, True):
        z1, z2 = ops.residual_double_layer_norm(residual, x, 0.5, *first, *second, 1e-5, fast=fast)
        torch.testing.assert_close(z1, expected)
        torch.testing.assert_close(z2, norm(expected, *second))


def test_stacks_of_normalised_frames() -> None:
    torch.manual_seed(0)
    lengths = (5, 0, 1, 4)
    features = torch.randn(10, 3)
    offsets = torch.tensor([0, 5, 5, 6, 10], dtype=torch.int32)
    normed = ops.normalize_utterances(features, offsets)
    for fast in (False, True):
        for stride in (1, 2, 3):
            stacks, starts = ops.normalize_and_stack(features, offsets, stride, fast=fast)
            expected = []
            for first, length in zip(offsets.tolist(), lengths, strict=False):
                for row in range(length // stride):
                    start = first + row * stride
                    expected.append(normed[start : start + stride].flatten())
            torch.testing.assert_close(stacks, torch.stack(expected))
            counts = [length // stride for length in lengths]
            assert starts.diff().tolist() == counts and starts.dtype == torch.int32
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        ops.normalize_and_stack(features, offsets, 0)
