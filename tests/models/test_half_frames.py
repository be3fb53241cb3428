"""The half frame that an utterance with an odd number of mel frames ends in (`layout`).

transformers, called with the utterance by itself, gives it a value, and so must every path here, in
every batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.graph_models import graphed
from tests.helpers.reference import CLASSES, POSITIONS, TINY, pair, relative_error
from tests.models.optimized.test_int8 import Rounded, needs_int8
from tests.ops.test_gradients import gradients, leaf, plain_form
from tests.ops.test_operation import arguments
from w2vbert_fast import ops
from w2vbert_fast.export.graph import ExportGraph
from w2vbert_fast.integrations.transformers import accelerate
from w2vbert_fast.layout import PackedBatch, half_frames
from w2vbert_fast.models.optimized.int8 import quantize_encoder
from w2vbert_fast.ops import dispatch

BINS = TINY["feature_projection_input_dim"] // 2
MEL_FRAMES = tuple(range(198, 215))
FEW = (30, 31, 33, 35, 38)
TWO_LAYERS = {"add_adapter": True, "num_adapter_layers": 2}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CLASSES),
    *(("Wav2Vec2BertModel", {"position_embeddings_type": kind}) for kind in POSITIONS[1:]),
    ("Wav2Vec2BertForCTC", {"add_adapter": True}),
    ("Wav2Vec2BertForCTC", {**TWO_LAYERS, "output_hidden_size": 24}),
    ("Wav2Vec2BertModel", {**TWO_LAYERS, "use_intermediate_ffn_before_adapter": True}),
    ("Wav2Vec2BertForXVector", {"tdnn_dilation": (1, 1, 1)}),
    ("Wav2Vec2BertForXVector", {"tdnn_dilation": (1, 3, 1), "use_weighted_layer_sum": True}),
    ("Wav2Vec2BertForXVector", {"add_adapter": True}),
]


def batch(mel_frames: tuple[int, ...], padding_value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Features and mask as the extractor makes them of utterances of so many mel frames."""
    frames = max(n + 1 for n in mel_frames) // 2
    features = torch.full((len(mel_frames), 2 * frames, BINS), padding_value)
    mask = torch.zeros(len(mel_frames), frames, dtype=torch.long)
    for row, count in enumerate(mel_frames):
        generator = torch.Generator().manual_seed(count)
        features[row, :count] = torch.randn(count, BINS, generator=generator)
        mask[row, : count // 2] = 1
    return features.view(len(mel_frames), frames, 2 * BINS), mask


def largest_error(ours: Tensor, expected: Tensor) -> float:
    """Of any frame, relative to it; frames that are zero must be."""
    difference = (ours - expected).norm(dim=-1)
    return float((difference / expected.norm(dim=-1).clamp_min(1e-30)).max().detach())


def compare(got: Any, row: int, alone: Any) -> None:
    """Every frame of an utterance's own answer, and nothing behind it."""
    names = ("last_hidden_state", "extract_features", "logits", "embeddings")
    pairs = [
        (getattr(got, n), getattr(alone, n)) for n in names if getattr(alone, n, None) is not None
    ]
    pairs += zip(got.hidden_states, alone.hidden_states, strict=True)
    for ours, expected in pairs:
        frames = expected.shape[1]
        if expected.dim() == 2:
            assert largest_error(ours[row], expected[0]) <= 1e-5
            continue
        assert largest_error(ours[row, :frames], expected[0]) <= 1e-5
        if expected.shape[2] != TINY["vocab_size"]:
            assert not ours[row, frames:].any()
        elif ours.shape[1] > frames:
            assert (ours[row, frames:].argmax(-1) == TINY.get("pad_token_id", 0)).all()


@pytest.mark.parametrize(("class_name", "config"), CONFIGS)
@torch.no_grad()
def test_every_frame_of_the_answer_alone(class_name: str, config: dict[str, Any]) -> None:
    reference, ours = pair(class_name, **config)
    features = {value: batch(MEL_FRAMES, value) for value in (0.0, 1.0)}
    alone = [reference(*batch((n,)), output_hidden_states=True) for n in MEL_FRAMES]
    for fast in (False, True):
        ours.use_fast_kernels = fast
        for inputs in features.values():
            together = ours(*inputs, output_hidden_states=True)
            for row, expected in enumerate(alone):
                if hasattr(expected, "extract_features"):
                    expected.extract_features = None  # knows the padding value
                compare(together, row, expected)
        for count, expected in zip(MEL_FRAMES[:4], alone, strict=False):
            compare(ours(*batch((count,)), output_hidden_states=True), 0, expected)


@torch.no_grad()
def test_extract_features_of_a_half_frame() -> None:
    reference, ours = pair("Wav2Vec2BertModel")
    together = ours(*batch(FEW, 1.0)).extract_features
    for row, count in enumerate(FEW):
        expected = reference(*batch((count,), 1.0)).extract_features[0]
        assert largest_error(together[row, : len(expected)], expected) <= 1e-5


@torch.no_grad()
def test_attention_maps() -> None:
    reference, ours = pair("Wav2Vec2BertModel")
    reference.set_attn_implementation("eager")
    together = ours(*batch(FEW), output_attentions=True).attentions
    for row, count in enumerate(FEW):
        expected = reference(*batch((count,)), output_attentions=True).attentions
        frames = (count + 1) // 2
        for maps, wanted in zip(together, expected, strict=True):
            own = maps[row, :, :frames, :frames]
            torch.testing.assert_close(own, wanted[0], rtol=0, atol=1e-6)
            assert maps[row].count_nonzero() == own.count_nonzero()


@torch.no_grad()
def test_encode() -> None:
    reference, ours = pair("Wav2Vec2BertModel")
    mean, variance = torch.randn(TINY["hidden_size"]), torch.rand(TINY["hidden_size"]) + 0.1
    inputs = batch(FEW)
    ours.use_fast_kernels = True
    states = ours.encode(*inputs, layer=1, stats=(mean, variance))
    means = ours.encode(*inputs, layer=1, pool="mean")
    for row, count in enumerate(FEW):
        expected = reference(*batch((count,)), output_hidden_states=True).hidden_states[1][0]
        normed = (expected - mean) / variance.sqrt()
        assert largest_error(states[row, : len(expected)], normed) <= 1e-5
        assert relative_error(means[row], expected[: count // 2].mean(0)) <= 1e-5


def half_frames_of(states: Tensor) -> Tensor:
    """The half frames in the states of the batch `MEL_FRAMES`, `[number, C]`."""
    odd = [(row, n // 2) for row, n in enumerate(MEL_FRAMES) if n % 2]
    return torch.stack([states[row, frame] for row, frame in odd])


def half_frames_alone(reference: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same from the reference, utterance by utterance."""
    rows = []
    for count in MEL_FRAMES[1::2]:
        features, mask = batch((count,))
        rows.append(reference(features.to(dtype), mask).last_hidden_state[0, -1])
    return torch.stack(rows)


WIDE = {"hidden_size": 256, "intermediate_size": 512}


@torch.no_grad()
def test_packed_weights() -> None:
    reference, ours = pair("Wav2Vec2BertModel", **WIDE)
    ours.use_fast_kernels = True
    ours.pack_weights()
    got = half_frames_of(ours(*batch(MEL_FRAMES)).last_hidden_state)
    assert largest_error(got, half_frames_alone(reference)) <= 1e-5


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_the_reference() -> None:
    reference, ours = pair("Wav2Vec2BertModel", **WIDE)
    exact = half_frames_alone(copy.deepcopy(reference).double(), torch.float64)
    theirs = half_frames_alone(reference.bfloat16(), torch.bfloat16)
    ours.bfloat16().use_fast_kernels = True
    features, mask = batch(MEL_FRAMES)
    got = half_frames_of(ours(features.bfloat16(), mask).last_hidden_state)
    errors = [relative_error(states.double(), exact) for states in (got, theirs)]
    assert errors[0] <= 1.1 * errors[1], errors


@needs_int8
@torch.no_grad()
def test_int8_is_that_of_rounded_weights_and_activations() -> None:
    reference, ours = pair("Wav2Vec2BertModel", **WIDE)
    unrounded = half_frames_alone(reference)
    for layer in reference.encoder.layers:
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                path, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(path), attribute, Rounded(module))
    expected = half_frames_alone(reference)
    quantize_encoder(ours)
    ours.use_fast_kernels = True
    got = half_frames_of(ours(*batch(MEL_FRAMES)).last_hidden_state)
    errors = [relative_error(states, expected) for states in (got, unrounded)]
    # A value on the border between two levels falls to one side or the other.
    assert errors[0] <= 0.2 * errors[1], errors


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("config", [{}, {**TWO_LAYERS, "output_hidden_size": 24}])
def test_gradients_of_what_reads_a_half_frame(fast: bool, config: dict[str, Any]) -> None:
    reference, ours = pair("Wav2Vec2BertModel", **config)
    ours.use_fast_kernels = fast
    got = ours(*batch(FEW)).last_hidden_state
    total, expected_total = torch.zeros(()), torch.zeros(())
    for row, count in enumerate(FEW):
        expected = reference(*batch((count,))).last_hidden_state[0]
        weights = torch.randn_like(expected).index_fill(0, torch.arange(len(expected) - 2), 0.1)
        total = total + (got[row, : len(expected)] * weights).sum()
        expected_total = expected_total + (expected * weights).sum()
    total.backward()
    expected_total.backward()
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    largest = max(grad.norm() for grad in wanted.values())
    for name, parameter in ours.named_parameters():
        assert (name in wanted) == (parameter.grad is not None)
        if name in wanted:
            # Those of the keys' biases are zero but for rounding.
            error = (parameter.grad - wanted[name]).norm()
            assert error <= 1e-5 * max(wanted[name].norm(), 1e-2 * largest), name


def test_losses_leave_half_frames_out() -> None:
    reference, ours = pair("Wav2Vec2BertForCTC", add_adapter=True, ctc_loss_reduction="sum")
    labels = torch.tensor([[1, 2, 3]])
    together = ours(*batch(FEW), labels=labels.expand(len(FEW), -1)).loss
    alone = sum(reference(*batch((count,)), labels=labels).loss for count in FEW)
    assert relative_error(together, alone) <= 1e-5
    _, ours = pair("Wav2Vec2BertForAudioFrameClassification")
    features, mask = batch(FEW)
    classes = torch.randint(0, 3, mask.shape)
    output = ours(features, mask, labels=classes)
    expected = nn.functional.cross_entropy(output.logits[mask.bool()], classes[mask.bool()])
    assert relative_error(output.loss, expected) <= 1e-6


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("Wav2Vec2BertModel", {**TWO_LAYERS, "use_intermediate_ffn_before_adapter": True}),
        ("Wav2Vec2BertForCTC", {}),
        ("Wav2Vec2BertForXVector", {"tdnn_dilation": (1, 1, 1)}),
    ],
)
@torch.no_grad()
def test_accelerated(class_name: str, config: dict[str, Any]) -> None:
    reference, _ = pair(class_name, **config)
    ours = accelerate(copy.deepcopy(reference))
    together = [ours(*batch(FEW, value), output_hidden_states=True) for value in (0.0, 1.0)]
    names = [n for n in ("last_hidden_state", "logits", "embeddings") if n in together[0]]
    for row, count in enumerate(FEW):
        expected = reference(*batch((count,)), output_hidden_states=True)
        alone = ours(*batch((count,)), output_hidden_states=True)
        for got, place in ((together[0], row), (together[1], row), (alone, 0)):
            for name in names:
                wanted = expected[name][0]
                assert largest_error(got[name][place][: len(wanted)], wanted) <= 1e-5
            for states, wanted in zip(got.hidden_states, expected.hidden_states, strict=True):
                assert largest_error(states[place, : wanted.shape[1]], wanted[0]) <= 1e-5


@torch.no_grad()
def test_adapter_behind_an_encoder_that_runs_the_code_of_transformers() -> None:
    reference, _ = pair("Wav2Vec2BertModel", add_adapter=True)
    reference.set_attn_implementation("eager")
    ours = accelerate(copy.deepcopy(reference))
    together = ours(*batch(FEW), output_attentions=True)
    for row, count in enumerate(FEW):
        expected = reference(*batch((count,))).last_hidden_state[0]
        assert largest_error(together[0][row, : len(expected)], expected) <= 1e-5


@pytest.mark.parametrize(
    ("class_name", "config"), [CONFIGS[i] for i in (0, 1, 3, 4, 5, 6, 9, 11, 12)]
)
@torch.no_grad()
def test_exported_graphs(class_name: str, config: dict[str, Any]) -> None:
    _, ours = pair(class_name, **config)
    graph = ExportGraph(ours)
    for inputs in (batch(FEW), batch(FEW, 1.0), *(batch((count,)) for count in FEW)):
        for got, expected in zip(graph(*inputs), graph.answers_of_the_model(*inputs), strict=True):
            assert relative_error(got.double(), expected.double()) <= 1e-5


@torch.no_grad()
def test_cuda_graphs() -> None:
    plain, ours, device = graphed()
    for mel_frames, captures in ((FEW, 1), ((31,), 2), ((30,), 3), ((36, 32), 3), ((33,), 3)):
        for _ in range(2):
            got = ours(*batch(mel_frames)).last_hidden_state
            expected = plain(*batch(mel_frames)).last_hidden_state
            assert largest_error(got, expected) <= 1e-5
        assert device.captures == captures


def test_cost() -> None:
    """One token more an utterance; `test_fast_path` counts the launches, which are as many."""
    layouts = [
        PackedBatch.from_attention_mask(mask, *mask.shape, mask.device, features)
        for features, mask in map(batch, ((30, 32, 38), (31, 33, 39)))
    ]
    assert [layout.num_tokens for layout in layouts] == [50, 53]
    assert layouts[0].seqused_k is None
    assert layouts[1].seqused_k is not None and layouts[1].seqused_k.tolist() == [15, 16, 19]


def test_layout() -> None:
    features, mask = batch((7, 6, 9))
    layout = PackedBatch.from_attention_mask(mask, 3, 5, mask.device, features)
    assert layout.lengths == (4, 3, 5) and layout.valid_lengths == (3, 3, 4)
    assert layout.cu_seqlens.tolist() == [0, 4, 7, 12] and layout.max_seqlen == 5
    packed = layout.pack(features)
    assert torch.equal(packed[3], features[0, 3])
    assert torch.equal(layout.unpack(packed)[0, :4], features[0, :4])
    zeroed = layout.zero_half_frames(packed)
    assert zeroed.any(1).tolist() == [row not in (3, 11) for row in range(12)]
    valid, shorter = layout.valid_part(packed)
    assert torch.equal(valid, features[mask.bool()])
    assert shorter.lengths == (3, 3, 4) and shorter.seqused_k is None
    shifted = layout.right_padded()
    assert shifted.valid_lengths == (3, 3, 4) and shifted.lengths == layout.lengths


def stack(first: Tensor | float, second: Tensor | float) -> Tensor:
    return torch.cat([torch.zeros(BINS) + first, torch.zeros(BINS) + second])


MEL = torch.linspace(-1, 2, BINS)


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        (stack(MEL, 0.0), True),
        (stack(MEL, 1.0), True),
        (stack(MEL, -3.5), True),
        (stack(0.0, 1.0), True),  # silence, normalised
        (stack(0.0, 0.0), False),
        (stack(1.0, 1.0), False),
        (stack(MEL, MEL.flip(0)), False),  # a valid frame that the mask cuts off
        (stack(MEL, float("nan")), False),
        (stack(float("nan"), float("nan")), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_rows_end_in_a_half_frame(behind: Tensor, expected: bool, dtype: torch.dtype) -> None:
    features, mask = batch((12, 6, 6, 6))
    features[1, 3] = behind  # right-padded
    mask[2] = torch.tensor([0, 1, 1, 1, 0, 0])  # padding on both sides
    features[2, 4] = behind
    mask[3] = torch.tensor([0, 0, 0, 1, 1, 1])  # padding in front
    features[3, 0] = behind
    found = half_frames(features.to(dtype), mask.bool())
    assert found.tolist() == [False, expected, expected, False]
    # A row by itself, with one frame behind the valid ones.
    alone = half_frames(features[1:2, :4].to(dtype), mask[1:2, :4].bool())
    assert alone.tolist() == [True]
    assert not half_frames(features, torch.zeros_like(mask, dtype=torch.bool)).any()
    without_features = PackedBatch.from_attention_mask(mask[1:2, :4], 1, 4, mask.device)
    assert (without_features.lengths, without_features.valid_lengths) == ((4,), (3,))


@torch.no_grad()
def test_a_batch_padded_by_hand() -> None:
    """Rows of an extractor that pads with ones, put together with zeros."""
    reference, ours = pair("Wav2Vec2BertForCTC", add_adapter=True)
    features, mask = torch.zeros(len(FEW), 21, 2 * BINS), torch.zeros(len(FEW), 21)
    for row, count in enumerate(FEW):
        one, one_mask = batch((count,), 1.0)
        features[row, : one.shape[1]], mask[row, : one.shape[1]] = one[0], one_mask[0]
    together = ours(features, mask, output_hidden_states=True)
    for row, count in enumerate(FEW):
        compare(together, row, reference(*batch((count,)), output_hidden_states=True))


LENGTHS, USED = (5, 0, 7), (4, 0, 3)
SEQUSED = torch.tensor(USED, dtype=torch.int32)


def with_seqused(name: str) -> tuple[Any, ...]:
    given = arguments(name)
    if name == "shaw_attention":
        given = (*given, None, False, 0.0, None)
    return (*given, SEQUSED)


def spans() -> Iterator[tuple[int, int, int]]:
    """Start, end of the valid part and end of each utterance."""
    start = 0
    for length, used in zip(LENGTHS, USED, strict=True):
        yield start, start + used, start + length
        start += length


@pytest.mark.parametrize("name", ["shaw_attention", "conv_norm_act"])
def test_operations_by_definition(name: str) -> None:
    given = with_seqused(name)
    for implementation in ("plain", "cpu"):
        with dispatch.force(implementation):
            got = getattr(torch.ops.w2vbert, name)(*given)
        got = got[0] if isinstance(got, tuple) else got
        for start, used, end in spans():
            if name == "conv_norm_act":
                x = given[0][start:end].clone()
                x[used - start :] = 0.0
                cu_seqlens = torch.tensor([0, end - start], dtype=torch.int32)
                expected = ops.conv_norm_act(x, *given[1:6], cu_seqlens)
            else:
                q, k, v = (x[start:end].transpose(0, 1) for x in given[:3])
                frames = torch.arange(end - start)
                distance = (frames[None, :] - frames[:, None]).clamp(-3, 2) + 3
                scores = q @ k.transpose(1, 2) + (q @ given[5].t()).gather(
                    2, distance.expand(2, -1, -1)
                )
                weights = torch.softmax(scores[..., : used - start] / 2.0, -1)
                expected = (weights @ v[:, : used - start]).transpose(0, 1)
            torch.testing.assert_close(got[start:end], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["cpu", "plain"])
@pytest.mark.parametrize("name", ["shaw_attention", "conv_norm_act"])
def test_opcheck_and_gradients(name: str, implementation: dispatch.Implementation) -> None:
    given = with_seqused(name)

    def plain(*args: Any) -> Any:
        if name == "conv_norm_act":
            return plain_form(name)(*args)
        q, k, v, cu_seqlens, longest, embedding = args[:6]
        return ops.shaw_attention(
            q, k, v, cu_seqlens, longest, distance_embedding=embedding,
            left_max_position=3, right_max_position=2, seqused_k=args[-1],
        )[0]  # fmt: skip

    operation = getattr(torch.ops.w2vbert, name).default
    with dispatch.force(implementation):
        result = torch.library.opcheck(operation, tuple(map(leaf, given)))
        assert set(result.values()) == {"SUCCESS"}
        backward = getattr(torch.ops.w2vbert, f"{name}_backward").default
        example = "attention, dropout" if name == "shaw_attention" else f"{name}_backward"
        torch.library.opcheck(backward, (*arguments(example)[:-1], SEQUSED))
        exact = gradients(plain, tuple(leaf(arg, torch.float64) for arg in given))
        got = gradients(operation, tuple(map(leaf, given)))
    for mine, expected in zip(got, exact, strict=True):
        assert relative_error(mine.double(), expected) <= 2e-6


@pytest.mark.parametrize("length", [41, 300, 700])
def test_blocked_attention_with_keys_that_end_early(length: int) -> None:
    """Several blocks, of which the last ones are behind all keys and beyond the band."""
    torch.manual_seed(0)
    starts = torch.tensor([0, length, length + 20], dtype=torch.int32)
    used = torch.tensor([length - length // 2, 19], dtype=torch.int32)
    given = (*torch.randn(3, length + 20, 2, 64), torch.randn(73, 64))
    place = {"left_max_position": 64, "right_max_position": 8, "seqused_k": used}

    def attend(dtype: torch.dtype, fast: bool) -> list[Tensor]:
        leaves = [leaf(x, dtype) for x in given]
        output = ops.shaw_attention(
            *leaves[:3], starts, length, distance_embedding=leaves[3], fast=fast, **place
        )[0]
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        return [output.detach(), *(x.grad for x in leaves)]

    exact = attend(torch.float64, False)
    with dispatch.force("cpu"):
        got = attend(torch.float32, True)
    for mine, expected in zip(got, exact, strict=True):
        assert relative_error(mine.double(), expected) <= 2e-6
