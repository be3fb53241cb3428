"""The model family against the reference: answers, losses, gradients, for every kind of config."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from torch import Tensor, nn

import w2vbert_fast
from tests.helpers.reference import CLASSES, POSITIONS, TINY, padded_batch, pair, relative_error

LENGTHS = (31, 24, 13)
ADAPTERS = {
    "no adapter": {},
    "adapter": {"add_adapter": True},
    "two narrow adapters": {
        "add_adapter": True,
        "num_adapter_layers": 2,
        "output_hidden_size": 24,
        "use_intermediate_ffn_before_adapter": True,
    },
    "adapter of kernel 5, stride 4": {
        "add_adapter": True,
        "adapter_kernel_size": 5,
        "adapter_stride": 4,
        "adapter_act": "gelu_new",
    },
    # The reference counts this adapter's frames with another padding than its convolutions have:
    # its CTC loss refuses to run, its outputs are as long as the convolutions say.
    "adapter of kernel 5, stride 3": {
        "add_adapter": True,
        "adapter_kernel_size": 5,
        "adapter_stride": 3,
    },
}


def labels_for(class_name: str, lengths: tuple[int, ...]) -> Tensor | None:
    generator = torch.Generator().manual_seed(2)
    if class_name == "Wav2Vec2BertForCTC":
        labels = torch.randint(1, 13, (len(lengths), 4), generator=generator)
        labels[-1, 2:] = -100
        return labels
    if class_name == "Wav2Vec2BertForAudioFrameClassification":
        ids = torch.randint(0, 3, (len(lengths), max(lengths)), generator=generator)
        return nn.functional.one_hot(ids, 3)
    if class_name == "Wav2Vec2BertModel":
        return None
    return torch.randint(0, 3, (len(lengths),), generator=generator)


def has_class(class_name: str, adapter: dict) -> bool:
    """Whether the reference has this class with this adapter."""
    if not adapter:
        return True
    if class_name == "Wav2Vec2BertForXVector":
        return "output_hidden_size" not in adapter
    return class_name in ("Wav2Vec2BertModel", "Wav2Vec2BertForCTC")


def main_output(outputs: object, class_name: str) -> Tensor:
    return outputs.last_hidden_state if class_name == "Wav2Vec2BertModel" else outputs.logits


def loss_of(outputs: object, class_name: str) -> Tensor:
    """The model's loss, or for the bare model a fixed projection of its output."""
    if class_name != "Wav2Vec2BertModel":
        return outputs.loss
    hidden = outputs.last_hidden_state
    weights = torch.linspace(-1, 1, hidden.shape[1] * hidden.shape[2]).view(hidden.shape[1:])
    return (hidden + weights).square().mean()


def assert_equal_gradients(reference: nn.Module, ours: nn.Module, tolerance: float = 1e-4) -> None:
    theirs = dict(reference.named_parameters())
    largest = max(float(p.grad.norm()) for p in theirs.values() if p.grad is not None)
    compared = 0
    for name, parameter in ours.named_parameters():
        expected = theirs[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        if float(expected.norm()) < 1e-6 * largest:
            # Zero in exact arithmetic (a key's bias shifts all scores alike): rounding only.
            assert float(parameter.grad.norm()) < 1e-5 * largest, name
            continue
        assert relative_error(parameter.grad, expected) <= tolerance, name
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_full_batch_equals_reference(class_name: str, position: str | None, adapter: str) -> None:
    """Without padding: outputs, hidden states, loss and the gradient of every parameter."""
    if not has_class(class_name, ADAPTERS[adapter]):
        with pytest.raises((ValueError, RuntimeError)):
            _, model = pair(class_name, position_embeddings_type=position, **ADAPTERS[adapter])
            model(torch.randn(1, 31, 20))
        return
    reference, ours = pair(class_name, position_embeddings_type=position, **ADAPTERS[adapter])
    assert {k: v.shape for k, v in reference.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    features, _ = padded_batch((31, 31), TINY["feature_projection_input_dim"])
    labels = labels_for(class_name, (31, 31))
    if adapter.endswith("stride 3") and class_name == "Wav2Vec2BertForCTC":
        labels = None
    kwargs = {} if labels is None else {"labels": labels}
    expected = reference(features, output_hidden_states=True, **kwargs)
    got = ours(features, output_hidden_states=True, **kwargs)
    assert relative_error(main_output(got, class_name), main_output(expected, class_name)) <= 1e-5
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for mine, theirs in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(mine, theirs) <= 1e-5
    if class_name == "Wav2Vec2BertModel":
        assert relative_error(got.extract_features, expected.extract_features) <= 1e-5
    if class_name == "Wav2Vec2BertForXVector":
        assert relative_error(got.embeddings, expected.embeddings) <= 1e-5
    if labels is None and class_name != "Wav2Vec2BertModel":
        return
    loss, expected_loss = loss_of(got, class_name), loss_of(expected, class_name)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected_loss.backward()
    assert_equal_gradients(reference, ours)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_name", CLASSES)
def test_padded_batch_equals_reference_alone(
    class_name: str, position: str | None, adapter: str
) -> None:
    """With padding: each utterance's answer is the reference's for it alone, padding is zero."""
    if not has_class(class_name, ADAPTERS[adapter]):
        return
    # The TDNN needs 8 frames behind the adapter.
    lengths = (61, 48, 37) if class_name == "Wav2Vec2BertForXVector" else LENGTHS
    reference, ours = pair(class_name, position_embeddings_type=position, **ADAPTERS[adapter])
    features, mask = padded_batch(lengths, TINY["feature_projection_input_dim"])
    got = ours(features, attention_mask=mask, output_hidden_states=True)
    whole = main_output(got, class_name)
    if whole.dim() == 3:
        assert whole.shape[:2] == main_output(reference(features, mask), class_name).shape[:2]
    valid = ours.valid_lengths(mask)
    for row, length in enumerate(lengths):
        alone = reference(
            features[row : row + 1, :length],
            attention_mask=mask[row : row + 1, :length],
            output_hidden_states=True,
        )
        expected = main_output(alone, class_name)[0]
        mine = whole[row]
        if mine.dim() == 2:
            assert len(expected) == int(valid[row])
            padding = mine[len(expected) :]
            if class_name == "Wav2Vec2BertForCTC":
                assert bool((padding.argmax(-1) == ours.config.pad_token_id).all())
            else:
                assert not padding.any()
            mine = mine[: len(expected)]
        assert relative_error(mine, expected) <= 1e-5
        for state, expected_state in zip(got.hidden_states, alone.hidden_states, strict=True):
            assert relative_error(state[row, :length], expected_state[0]) <= 1e-5
            assert not state[row, length:].any()


@pytest.mark.parametrize("class_name", CLASSES[1:])
def test_padded_loss_and_gradients_equal_the_reference_on_each_alone(class_name: str) -> None:
    reference, ours = pair(class_name, ctc_loss_reduction="sum")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    labels = labels_for(class_name, LENGTHS)
    loss = ours(features, attention_mask=mask, labels=labels).loss
    total = torch.zeros(())
    frames = sum(LENGTHS)
    for row, length in enumerate(LENGTHS):
        row_labels = labels[row : row + 1]
        weight = {"Wav2Vec2BertForCTC": 1.0}.get(class_name, 1 / len(LENGTHS))
        if class_name == "Wav2Vec2BertForAudioFrameClassification":
            row_labels, weight = row_labels[:, :length], length / frames
        total = total + weight * reference(features[row : row + 1, :length], labels=row_labels).loss
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    loss.backward()
    total.backward()
    assert_equal_gradients(reference, ours)


@pytest.mark.parametrize("class_name", ["Wav2Vec2BertModel", "Wav2Vec2BertForCTC"])
def test_an_answer_does_not_depend_on_the_batch(class_name: str) -> None:
    _, ours = pair(class_name, add_adapter=True)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    together = main_output(ours(features, mask), class_name)
    for row, length in enumerate(LENGTHS):
        alone = main_output(ours(features[row : row + 1, :length]), class_name)[0]
        assert relative_error(together[row, : len(alone)], alone) <= 1e-6


def left_padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A right-padded batch of utterances of `LENGTHS`, padded in front instead."""
    left_features, left_mask = torch.zeros_like(features), torch.zeros_like(mask)
    for row, length in enumerate(LENGTHS):
        left_features[row, -length:] = features[row, :length]
        left_mask[row, -length:] = 1
    return left_features, left_mask


def test_left_padding_gives_the_same_tokens_and_loss() -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    labels = labels_for("Wav2Vec2BertForCTC", LENGTHS)
    right = ours(features, mask, labels=labels)
    left_features, left_mask = left_padded(features, mask)
    left = ours(left_features, left_mask, labels=labels)
    torch.testing.assert_close(left.loss, right.loss)
    blank = ours.config.pad_token_id
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(left.logits[row, -length:], right.logits[row, :length])
        assert (left.logits[row, :-length].argmax(-1) == blank).all()


def test_left_padding_gives_the_same_answers() -> None:
    _, ours = pair("Wav2Vec2BertModel", add_adapter=True)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    right = ours(features, mask, output_hidden_states=True)
    left_features, left_mask = left_padded(features, mask)
    left = ours(left_features, left_mask, output_hidden_states=True)
    torch.testing.assert_close(left.last_hidden_state, right.last_hidden_state)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            left.hidden_states[1][row, -length:], right.hidden_states[1][row, :length]
        )


def test_empty_utterance_gives_zeros_and_leaves_the_others_alone() -> None:
    _, ours = pair("Wav2Vec2BertModel", add_adapter=True)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    expected = ours(features, mask).last_hidden_state
    mask[1] = 0
    got = ours(features, mask).last_hidden_state
    assert not got[1].any()
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("position", POSITIONS)
def test_attention_maps_equal_the_eager_reference(position: str | None) -> None:
    reference, ours = pair("Wav2Vec2BertModel", position_embeddings_type=position)
    reference.set_attn_implementation("eager")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    maps = ours(features, mask, output_attentions=True).attentions
    assert len(maps) == 2
    for row, length in enumerate(LENGTHS):
        alone = reference(features[row : row + 1, :length], output_attentions=True).attentions
        for mine, theirs in zip(maps, alone, strict=True):
            assert mine.shape == (3, 4, 31, 31)
            assert relative_error(mine[row, :, :length, :length], theirs[0]) <= 1e-5
            assert not mine[row, :, length:].any() and not mine[row, :, :, length:].any()


@pytest.mark.parametrize("class_name", CLASSES[2:])
def test_weighted_layer_sum(class_name: str) -> None:
    reference, ours = pair(class_name, use_weighted_layer_sum=True)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    got = ours(features, mask).logits
    for row, length in enumerate(LENGTHS):
        alone = reference(features[row : row + 1, :length]).logits[0]
        assert relative_error(got[row, : len(alone)] if got.dim() == 3 else got[row], alone) <= 1e-5
    assert ours(features, mask).hidden_states is None


@pytest.mark.parametrize(
    "activation", ["gelu", "relu", "swish", "silu", "gelu_new", "quick_gelu", "relu2", "mish"]
)
def test_activations(activation: str) -> None:
    reference, ours = pair(
        "Wav2Vec2BertModel", hidden_act=activation, add_adapter=True, adapter_act=activation
    )
    features, _ = padded_batch((31,), TINY["feature_projection_input_dim"])
    expected = reference(features).last_hidden_state
    assert relative_error(ours(features).last_hidden_state, expected) <= 1e-5


def test_mask_time_indices_replace_frames() -> None:
    reference, ours = pair("Wav2Vec2BertModel")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    indices = torch.zeros(mask.shape, dtype=torch.bool)
    indices[0, 3:9] = indices[2, 10:20] = True
    got = ours(features, mask, mask_time_indices=indices).last_hidden_state
    assert relative_error(got, ours(features, mask).last_hidden_state) > 0.01
    for row, length in enumerate(LENGTHS):
        alone = reference(
            features[row : row + 1, :length], mask_time_indices=indices[row : row + 1, :length]
        )
        assert relative_error(got[row, :length], alone.last_hidden_state[0]) <= 1e-5


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_semantics(reduction: str, zero_infinity: bool) -> None:
    """-100 and blanks among the labels, a blank that is not 0, labels longer than the input."""
    reference, ours = pair(
        "Wav2Vec2BertForCTC",
        pad_token_id=5,
        ctc_loss_reduction=reduction,
        ctc_zero_infinity=zero_infinity,
    )
    features, _ = padded_batch((9, 9), TINY["feature_projection_input_dim"])
    labels = torch.tensor(
        [[1, -100, 2, 5, 3] + [-100] * 8, [1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4]]
    )
    expected = reference(features, labels=labels).loss
    assert torch.isfinite(expected) == zero_infinity
    torch.testing.assert_close(ours(features, labels=labels).loss, expected)
    half = ours.bfloat16()(features.bfloat16(), labels=labels).loss
    assert half.dtype == torch.float32


def test_regression_with_one_label() -> None:
    for class_name in CLASSES[2:4]:
        _, ours = pair(class_name, num_labels=1)
        features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
        logits = ours(features, mask).logits
        labels = torch.randn(logits.shape[:-1])
        loss = ours(features, mask, labels=labels).loss
        squares = (logits.squeeze(-1) - labels).square()
        if logits.dim() == 3:
            squares = squares[mask.bool()]
        torch.testing.assert_close(loss, squares.mean())


def test_frame_labels_as_class_ids() -> None:
    _, ours = pair("Wav2Vec2BertForAudioFrameClassification")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    one_hot = labels_for("Wav2Vec2BertForAudioFrameClassification", LENGTHS)
    ids = one_hot.argmax(-1)
    expected = ours(features, mask, labels=one_hot).loss
    torch.testing.assert_close(ours(features, mask, labels=ids).loss, expected)
    ids[mask == 0] = -100
    torch.testing.assert_close(ours(features, mask, labels=ids).loss, expected)


def test_outputs_index_by_name_attribute_and_position() -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
    output = ours(features, output_hidden_states=True)
    assert list(output.keys()) == ["logits", "hidden_states"]
    assert output["logits"] is output.logits is output[0] is output.to_tuple()[0]
    assert output[1] is output.hidden_states and output[:1] == (output.logits,)
    assert output.loss is None and "loss" not in output
    with pytest.raises(KeyError, match="loss"):
        output["loss"]
    assert dict(**output).keys() == {"logits", "hidden_states"}
    as_tuple = ours(features, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 2
    ours.config.return_dict = False
    assert isinstance(ours(features), tuple)


def test_selected_hidden_states() -> None:
    _, ours = pair("Wav2Vec2BertModel")
    features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
    every = ours(features, output_hidden_states=True).hidden_states
    for request, kept in ((1, {1}), ([0, -1], {0, 2})):
        some = ours(features, output_hidden_states=request).hidden_states
        assert {i for i, state in enumerate(some) if state is not None} == kept
        assert all(torch.equal(some[i], every[i]) for i in kept)
    with pytest.raises(ValueError, match="output_hidden_states"):
        ours(features, output_hidden_states=[3])


def test_layerdrop_hands_on_the_input_and_is_off_in_evaluation() -> None:
    _, ours = pair("Wav2Vec2BertModel", layerdrop=1.0, apply_spec_augment=False, add_adapter=True)
    features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
    ours.train()
    output = ours(features, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.last_hidden_state, output.hidden_states[0])
    assert output.last_hidden_state.shape[1] == 9
    ours.eval()
    assert ours(features).last_hidden_state.shape[1] == 5


def test_dropout_only_in_training() -> None:
    for name in ("hidden", "activation", "attention", "feat_proj", "conformer_conv", "final"):
        key = name + "_dropout"
        _, ours = pair("Wav2Vec2BertForCTC", **{key: 0.5}, apply_spec_augment=False)
        features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
        expected = ours(features).logits
        assert torch.equal(ours(features).logits, expected)
        ours.train()
        assert not torch.equal(ours(features).logits, expected), key


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        _, ours = pair("Wav2Vec2BertForCTC", attention_dropout=0.1, apply_spec_augment=False)
        features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
        if checkpointing:
            ours.gradient_checkpointing_enable()
        calls: list[int] = []
        ours.wav2vec2_bert.encoder.layers[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        ours.train()
        torch.manual_seed(3)
        ours(features, mask, labels=labels_for("Wav2Vec2BertForCTC", LENGTHS)).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in ours.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_freeze_base_model() -> None:
    for class_name in CLASSES[1:]:
        _, ours = pair(class_name)
        ours.freeze_base_model()
        trainable = {name for name, p in ours.named_parameters() if p.requires_grad}
        assert trainable and not any(name.startswith("wav2vec2_bert") for name in trainable)


def test_models_copy_and_pickle() -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
    expected = ours(features).logits
    assert torch.equal(copy.deepcopy(ours)(features).logits, expected)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(features).logits, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, k: m(x[:, :, :7]), r"input_features has shape \(3, 31, 7\)"),
        (lambda m, x, k: m(x[0]), "input_features has shape"),
        (lambda m, x, k: m(x, k[:, :5]), "attention_mask has shape"),
        (lambda m, x, k: m(x, k.index_fill(1, torch.tensor([4]), 0)), "contiguous"),
        (lambda m, x, k: m(x, labels=torch.full((3, 2), 13)), "labels holds 13"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    _, ours = pair("Wav2Vec2BertForCTC")
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    with pytest.raises(ValueError, match=message):
        call(ours, features, mask)


def test_mask_time_indices_need_an_embedding() -> None:
    _, ours = pair("Wav2Vec2BertModel", mask_time_prob=0.0)
    features, mask = padded_batch(LENGTHS, TINY["feature_projection_input_dim"])
    with pytest.raises(ValueError, match="masked_spec_embed"):
        ours(features, mask, mask_time_indices=mask.bool())


def test_xvector_names_an_utterance_that_is_too_short() -> None:
    _, ours = pair("Wav2Vec2BertForXVector")
    features, mask = padded_batch((31, 7), TINY["feature_projection_input_dim"])
    with pytest.raises(ValueError, match=r"7 valid frames in row 1.*at least 8"):
        ours(features, mask)


def test_ctc_needs_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        w2vbert_fast.Wav2Vec2BertForCTC(
            w2vbert_fast.Wav2Vec2BertConfig(**{**TINY, "vocab_size": None})
        )


def test_replaced_linear_layers_are_called() -> None:
    """LoRA and quantisation put other modules in place of `nn.Linear`."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    _, ours = pair("Wav2Vec2BertModel")
    features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
    before = ours(features).last_hidden_state
    dense = ours.encoder.layers[0].ffn1.intermediate_dense
    doubled = Doubled(dense.in_features, dense.out_features)
    doubled.load_state_dict(dense.state_dict())
    ours.encoder.layers[0].ffn1.intermediate_dense = doubled
    assert relative_error(ours(features).last_hidden_state, before) > 1e-3


@pytest.mark.parametrize("touch", ["hook", "pre-hook", "backward hook", "forward"])
def test_touched_linear_layers_are_called(touch: str) -> None:
    """Hooks run, and a `forward` that an offloading library puts in place is used."""
    _, ours = pair("Wav2Vec2BertModel")
    features, _ = padded_batch((9,), TINY["feature_projection_input_dim"])
    dense = ours.encoder.layers[0].ffn1.intermediate_dense
    calls: list[str] = []
    if touch == "hook":
        dense.register_forward_hook(lambda *_: calls.append(touch))
    elif touch == "pre-hook":
        dense.register_forward_pre_hook(lambda *_: calls.append(touch))
    elif touch == "backward hook":
        dense.register_full_backward_hook(lambda *_: calls.append(touch))
    else:
        original = dense.forward
        dense.forward = lambda x: calls.append(touch) or original(x)
    ours(features).last_hidden_state.sum().backward()
    assert calls == [touch]


def test_initial_weights_follow_the_reference() -> None:
    """Same mean and spread of every parameter, drawn anew for each model."""
    values = {**TINY, "hidden_size": 128, "position_embeddings_type": "relative"}
    values |= {"add_adapter": True, "output_hidden_size": 64}
    for class_name in ("Wav2Vec2BertForCTC", "Wav2Vec2BertForXVector"):
        extra = {} if class_name.endswith("CTC") else {"add_adapter": False}
        config = {**values, **extra, "use_weighted_layer_sum": True}
        reference = getattr(transformers, class_name)(transformers.Wav2Vec2BertConfig(**config))
        ours = getattr(w2vbert_fast, class_name)(w2vbert_fast.Wav2Vec2BertConfig(**config))
        for name, theirs in reference.named_parameters():
            mine = ours.get_parameter(name).detach()
            spread = 6 / theirs.numel() ** 0.5
            std = float(theirs.detach().std(correction=0))
            assert abs(float(mine.mean() - theirs.detach().mean())) <= spread * std + 1e-7, name
            assert float(mine.std(correction=0)) == pytest.approx(std, rel=spread + 1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_reference(dtype: torch.dtype) -> None:
    reference, ours = pair("Wav2Vec2BertModel", hidden_size=128, num_attention_heads=4)
    features, _ = padded_batch((63, 63), TINY["feature_projection_input_dim"])
    exact = copy.deepcopy(reference).double()(features.double()).last_hidden_state
    theirs = reference.to(dtype)(features.to(dtype)).last_hidden_state.double()
    mine = ours.to(dtype)(features.to(dtype)).last_hidden_state.double()
    assert relative_error(mine, exact) <= 1.1 * relative_error(theirs, exact)


def test_full_size_forward_equals_the_reference() -> None:
    """24 layers of width 1024, the size of `facebook/w2v-bert-2.0`."""
    with torch.device("meta"):
        reference = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig()).eval()
        ours = w2vbert_fast.Wav2Vec2BertModel(w2vbert_fast.Wav2Vec2BertConfig()).eval()
    reference.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
            if "norm.weight" in name:
                parameter.add_(1.0)
    ours.load_state_dict(reference.state_dict(), assign=True)
    features, mask = padded_batch((57, 33), 160)
    with torch.no_grad():
        got = ours(features, mask).last_hidden_state
        for row, length in enumerate((57, 33)):
            alone = reference(features[row : row + 1, :length]).last_hidden_state[0]
            assert relative_error(got[row, :length], alone) <= 1e-5
