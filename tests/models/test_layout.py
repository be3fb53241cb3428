"""Packed layout: maps to and from padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.helpers.reference import TINY, padded_batch
from w2vbert_fast import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
from w2vbert_fast.layout import PackedBatch, positions_in_sequence, sequence_ids


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=5), st.integers(0, 3))
def test_pack_and_unpack_are_inverse(lengths: list[int], extra: int) -> None:
    frames = max(lengths, default=0) + extra
    layout = PackedBatch.from_lengths(lengths, frames, "cpu")
    packed = torch.randn(sum(lengths), 3)
    padded = layout.unpack(packed)
    assert padded.shape == (len(lengths), frames, 3)
    start = 0
    for row, length in enumerate(lengths):
        assert torch.equal(padded[row, :length], packed[start : start + length])
        assert not padded[row, length:].any()
        start += length
    garbage = padded.clone()
    for row, length in enumerate(lengths):
        garbage[row, length:] = float("nan")
    assert torch.equal(layout.pack(garbage), packed)
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert layout.num_tokens == sum(lengths)
    assert layout.max_seqlen == max(lengths, default=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=4))
def test_attention_mask_with_padding_on_either_side(rows: list[tuple[int, int]]) -> None:
    frames = max(left + length for left, length in rows) + 2
    mask = torch.zeros(len(rows), frames, dtype=torch.long)
    for row, (left, length) in enumerate(rows):
        mask[row, left : left + length] = 1
    layout = PackedBatch.from_attention_mask(mask, len(rows), frames, torch.device("cpu"))
    values = torch.arange(len(rows) * frames).view(len(rows), frames)
    assert layout.lengths == tuple(length for _, length in rows)
    assert torch.equal(layout.pack(values), values[mask.bool()])
    assert torch.equal(layout.unpack(layout.pack(values)), values * mask)


def test_gradients_flow_through_pack_and_unpack() -> None:
    layout = PackedBatch.from_lengths([3, 1], 4, "cpu")
    padded = torch.randn(2, 4, 2, requires_grad=True)
    (layout.unpack(layout.pack(padded)) * 2).sum().backward()
    expected = torch.zeros(2, 4, 2)
    expected[0, :3] = expected[1, :1] = 2
    assert torch.equal(padded.grad, expected)


def test_sequence_ids_and_positions() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert sequence_ids(cu_seqlens, 5).tolist() == [0, 0, 2, 2, 2]
    assert positions_in_sequence(cu_seqlens, 5).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 4, 1)])
def test_mask_of_the_wrong_shape(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape .* needs \(2, 4\)"):
        PackedBatch.from_attention_mask(mask, 2, 4, torch.device("cpu"))


def test_mask_with_a_hole_names_the_row() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        PackedBatch.from_attention_mask(mask, 2, 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("mask", "is_right_padded"),
    [
        ([[1, 1, 1], [1, 0, 0]], True),
        ([[1, 1, 0], [0, 0, 0]], True),
        ([[1, 1, 1], [0, 1, 1]], False),
        ([[0, 1, 0], [1, 1, 0]], False),
    ],
)
def test_padding_in_front_is_known(mask: list[list[int]], is_right_padded: bool) -> None:
    valid = torch.tensor(mask)
    layout = PackedBatch.from_attention_mask(valid, 2, 3, torch.device("cpu"))
    assert layout.is_right_padded == is_right_padded
    values = torch.randn(layout.num_tokens, 2)
    shortest = layout.right_padded()
    assert shortest.is_right_padded
    assert shortest.right_padded() is shortest
    assert (shortest is layout) == (is_right_padded and layout.max_seqlen == 3)
    padded = shortest.unpack(values)
    assert padded.shape == (2, layout.max_seqlen, 2)
    for row, utterance in zip(padded, values.split(list(layout.lengths)), strict=True):
        assert torch.equal(row[: len(utterance)], utterance)
        assert not row[len(utterance) :].any()


@pytest.mark.parametrize(("in_front", "layouts"), [(False, 1), (True, 2)])
def test_the_ctc_loss_reads_the_logits_that_are_returned(
    in_front: bool, layouts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**{**TINY, "pad_token_id": 0})).eval()
    features, mask = padded_batch((12, 5), TINY["feature_projection_input_dim"])
    if in_front:
        features, mask = features.flip(1), mask.flip(1)
    unpack, widths = PackedBatch.unpack, []

    def counted(layout: PackedBatch, packed: torch.Tensor) -> torch.Tensor:
        widths.append(packed.shape[-1])
        return unpack(layout, packed)

    monkeypatch.setattr(PackedBatch, "unpack", counted)
    model(features, mask, labels=torch.tensor([[1, 2, 3], [4, 5, -100]]))
    assert widths.count(TINY["vocab_size"]) == layouts
