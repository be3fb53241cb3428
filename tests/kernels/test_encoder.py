"""A whole tiny model on the kernels: waveform to text, against the plain path."""

from __future__ import annotations

import pytest
import torch

import w2vbert_fast
from tests.reference import TINY, padded_batch, pair, relative_error
from tests.signals import speech_like
from w2vbert_fast.ops.dispatch import force_triton


@pytest.mark.parametrize("position", ["relative_key", "rotary", None])
def test_encoder_on_kernels_equals_the_plain_path(position: str | None) -> None:
    _, ours = pair("Wav2Vec2BertModel", position_embeddings_type=position, add_adapter=True)
    features, mask = padded_batch((33, 1, 18), TINY["feature_projection_input_dim"])
    with torch.no_grad():
        expected = ours(features, mask, output_hidden_states=True)
        ours.use_fast_kernels = True
        with force_triton():
            got = ours(features, mask, output_hidden_states=True)
    assert relative_error(got.last_hidden_state, expected.last_hidden_state) <= 1e-5
    for mine, plain in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(mine, plain) <= 1e-5


def test_waveform_to_token_ids() -> None:
    from csrc_triton.ctc import ctc_greedy

    _, ours = pair("Wav2Vec2BertForCTC", feature_projection_input_dim=160)
    extractor = w2vbert_fast.SeamlessM4TFeatureExtractor(padding_value=1)
    speech = [speech_like(seconds, 16_000, seed) for seed, seconds in enumerate((0.6, 0.31))]
    inputs = extractor(speech, sampling_rate=16_000, return_tensors="pt")
    lengths = ours.valid_lengths(inputs["attention_mask"])
    with torch.no_grad():
        expected = ours(**inputs).logits
        ours.use_fast_kernels = True
        with force_triton():
            logits = ours(**inputs).logits
    assert relative_error(logits, expected) <= 1e-5
    packed = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ids, counts = ctc_greedy(packed, cu_seqlens, ours.config.pad_token_id)
    plain = w2vbert_fast.ops.ctc.greedy_decode(expected, lengths, blank=ours.config.pad_token_id)
    for row, start in enumerate(cu_seqlens[:-1].tolist()):
        assert ids[start : start + int(counts[row])].tolist() == plain[row]
    assert all(plain), "the model must say something for the comparison to mean anything"
