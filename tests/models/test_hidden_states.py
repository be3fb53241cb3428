"""Hidden states as callers use them: of encoders that were cut, and with gradients through them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import w2vbert_fast
from w2vbert_fast.export.graph import ExportGraph

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 11,
    "pad_token_id": 0,
    "num_labels": 3,
    "classifier_proj_size": 16,
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 1],
    "xvector_output_dim": 16,
}
LENGTHS = (24, 17)
PATHS = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
CLASSIFIERS = [
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForXVector",
]


def pair(name: str, fast: bool = False, **fields: object) -> tuple[nn.Module, nn.Module]:
    """transformers' model and ours, with the same weights, for inference."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(**SIZES, **fields)
    reference = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    ours = getattr(w2vbert_fast, name)(w2vbert_fast.Wav2Vec2BertConfig(**SIZES, **fields))
    ours.load_state_dict(reference.state_dict())
    ours.use_fast_kernels = fast
    return reference.eval(), ours.eval()


def batch(left: bool = False) -> tuple[Tensor, Tensor]:
    features = torch.randn(2, LENGTHS[0], 160, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, LENGTHS[0], dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        begin = LENGTHS[0] - length if left else 0
        mask[row, begin : begin + length] = 1
    return features, mask


def encoder_of(model: nn.Module) -> nn.Module:
    return getattr(model, "wav2vec2_bert", model).encoder


def cut(model: nn.Module, count: int) -> None:
    encoder_of(model).layers = encoder_of(model).layers[:count]


@PATHS
@pytest.mark.parametrize("count", [1, 2])
def test_a_cut_encoder_has_the_states_of_the_layers_left(count: int, fast: bool) -> None:
    reference, ours = pair("Wav2Vec2BertModel", fast)
    cut(reference, count)
    cut(ours, count)
    features, _ = batch()
    with torch.no_grad():
        wanted = reference(features, output_hidden_states=True)
        found = ours(features, output_hidden_states=True)
    assert len(found.hidden_states) == len(wanted.hidden_states) == count + 1
    for ours_state, state in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours_state, state, rtol=1e-5, atol=1e-5)
    assert found.hidden_states[-1] is found.last_hidden_state
    assert wanted.hidden_states[-1] is wanted.last_hidden_state
    for layer in (-1, count):
        torch.testing.assert_close(ours.encode(features, layer=layer), found.last_hidden_state)
    with pytest.raises(ValueError, match=f"a model of {count} layers has hidden states 0 to"):
        ours.encode(features, layer=count + 1)
    with pytest.raises(ValueError, match=f"output_hidden_states is {count + 1}"):
        ours(features, output_hidden_states=[count + 1])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_mix_of_layers_in_a_cut_encoder(name: str) -> None:
    reference, ours = pair(name, use_weighted_layer_sum=True)
    features, _ = batch()
    for model in (reference, ours):
        cut(model, 1)
    with pytest.raises(RuntimeError):
        reference(features)
    with pytest.raises(ValueError, match="layer_weights has 4 weights; an encoder of 1 layers"):
        ours(features)
    for model in (reference, ours):
        model.layer_weights = nn.Parameter(torch.tensor([0.3, -0.2]))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(features).logits, reference(features).logits, rtol=1e-5, atol=1e-5
        )


def test_a_cut_model_is_saved_and_exported_as_it_is(tmp_path) -> None:
    reference, ours = pair("Wav2Vec2BertForCTC")
    features, mask = batch()
    for model in (reference, ours):
        cut(model, 2)
    ours.save_pretrained(tmp_path)
    again = w2vbert_fast.Wav2Vec2BertForCTC.from_pretrained(tmp_path)
    theirs = transformers.Wav2Vec2BertForCTC.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == theirs.config.num_hidden_layers == 2
    with torch.no_grad():
        wanted = reference(features[:1]).logits
        found = [model(features[:1]).logits for model in (ours, again, theirs)]
        found.append(ExportGraph(again)(features[:1], mask[:1])[0])
        found.append(ExportGraph(ours)(features[:1], mask[:1])[0])
    for logits in found:
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


@PATHS
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"add_adapter": True}, {"position_embeddings_type": "rotary"}],
    ids=["plain", "adapter", "rotary"],
)
def test_the_gradient_of_the_output_reaches_hidden_states(fields, left: bool, fast: bool) -> None:
    reference, ours = pair("Wav2Vec2BertModel", fast, **fields)
    features, mask = batch(left)
    found = ours(features, attention_mask=mask, output_hidden_states=True)
    gradients = torch.autograd.grad(found.last_hidden_state.pow(3).sum(), found.hidden_states)
    for row, length in enumerate(LENGTHS):
        begin = LENGTHS[0] - length if left else 0
        alone = features[row : row + 1, begin : begin + length]
        wanted = reference(alone, output_hidden_states=True)
        output = wanted.last_hidden_state.pow(3).sum()
        for ours_gradient, gradient in zip(
            gradients, torch.autograd.grad(output, wanted.hidden_states), strict=True
        ):
            valid = ours_gradient[row : row + 1, begin : begin + length]
            torch.testing.assert_close(valid, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Wav2Vec2BertForCTC", *CLASSIFIERS])
@pytest.mark.parametrize("mixes", [False, True], ids=["last", "mix"])
def test_the_gradient_of_the_loss_reaches_what_a_head_returns(name: str, mixes: bool) -> None:
    reference, ours = pair(name, use_weighted_layer_sum=mixes)
    features, _ = batch()
    frames = torch.arange(2 * LENGTHS[0]).view(2, -1) % 3
    labels = {
        "Wav2Vec2BertForCTC": torch.tensor([[1, 2], [3, 4]]),
        "Wav2Vec2BertForAudioFrameClassification": nn.functional.one_hot(frames, 3),
    }.get(name, torch.tensor([0, 2]))
    gradients = []
    for model in (reference, ours):
        output = model(features, labels=labels, output_hidden_states=True)
        returned = (output.logits, *output.hidden_states)
        gradients.append(torch.autograd.grad(output.loss, returned))
    for ours_gradient, gradient in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours_gradient, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_gradient_of_the_loss_reaches_logits_in_a_padded_batch(left: bool) -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    features, mask = batch(left)
    output = ours(features, attention_mask=mask, labels=torch.tensor([[1, 2], [3, 4]]))
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    assert (gradient.abs().sum(-1) > 0).equal(mask.bool())


def test_the_gradient_of_the_output_reaches_attention_maps_in_a_padded_batch() -> None:
    reference, ours = pair("Wav2Vec2BertModel")
    features, mask = batch()
    found = ours(features, attention_mask=mask, output_attentions=True)
    gradients = torch.autograd.grad(found.last_hidden_state.pow(3).sum(), found.attentions)
    for row, length in enumerate(LENGTHS):
        wanted = reference(features[row : row + 1, :length], output_attentions=True)
        output = wanted.last_hidden_state.pow(3).sum()
        for ours_gradient, gradient in zip(
            gradients, torch.autograd.grad(output, wanted.attentions), strict=True
        ):
            valid = ours_gradient[row : row + 1, :, :length, :length]
            torch.testing.assert_close(valid, gradient, rtol=1e-4, atol=1e-4)


@PATHS
def test_asking_for_hidden_states_changes_no_gradient(fast: bool) -> None:
    _, ours = pair("Wav2Vec2BertForCTC", fast)
    other = copy.deepcopy(ours)
    features, mask = batch()
    labels = torch.tensor([[1, 2], [3, 4]])
    ours(features, attention_mask=mask, labels=labels).loss.backward()
    other(features, attention_mask=mask, labels=labels, output_hidden_states=True).loss.backward()
    for (name, parameter), twin in zip(ours.named_parameters(), other.parameters(), strict=True):
        if parameter.grad is None:
            assert twin.grad is None, name
            continue
        torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("frames", [1, 12])
def test_a_hook_replaces_what_a_layer_gives(frames: int) -> None:
    reference, ours = pair("Wav2Vec2BertModel")
    features = batch()[0][:, :frames]
    reference.encoder.layers[1].register_forward_hook(lambda module, given, output: output * 0.5)
    for change in (
        lambda module, given, output: output[0] * 0.5,
        lambda module, given, output: (output[0] * 0.5, *output[1:]),
    ):
        handle = ours.encoder.layers[1].register_forward_hook(change)
        with torch.no_grad():
            found = ours(features).last_hidden_state
            wanted = reference(features).last_hidden_state
        handle.remove()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_of_an_older_configuration(tmp_path) -> None:
    fields = {**SIZES, "gradient_checkpointing": True}
    reference = transformers.Wav2Vec2BertForCTC(transformers.Wav2Vec2BertConfig(**fields))
    ours = w2vbert_fast.Wav2Vec2BertForCTC(w2vbert_fast.Wav2Vec2BertConfig(**fields))
    for model in (reference, ours):
        assert not hasattr(model.config, "gradient_checkpointing")
    assert encoder_of(ours).gradient_checkpointing
    assert any(getattr(m, "gradient_checkpointing", False) for m in reference.modules())
    config = w2vbert_fast.Wav2Vec2BertConfig(**fields)
    ours.save_pretrained(tmp_path)
    again = w2vbert_fast.Wav2Vec2BertForCTC.from_pretrained(tmp_path, config=config)
    assert encoder_of(again).gradient_checkpointing
    assert config.gradient_checkpointing  # the caller's is a copy
    off = w2vbert_fast.Wav2Vec2BertConfig(**SIZES, gradient_checkpointing=False)
    assert not encoder_of(w2vbert_fast.Wav2Vec2BertForCTC(off)).gradient_checkpointing
