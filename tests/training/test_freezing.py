"""What is left out of the training, and adapters on an encoder that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.training import STILL, RandomSource, config, make_model
from w2vbert_fast.training import finetune
from w2vbert_fast.training.model import make_parts

FROZEN = "wav2vec2_bert.feature_projection."


def layer(name: str) -> int | None:
    """The number of the encoder's layer that a parameter is of."""
    _, found, rest = name.partition("wav2vec2_bert.encoder.layers.")
    return int(rest.partition(".")[0]) if found else None


@pytest.mark.parametrize("freeze", [1, "encoder"])
def test_frozen_layers_stay_and_the_others_learn(freeze: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", **STILL)
    source = RandomSource(4)
    options = config(model, tmp_path / "out", steps=2, freeze=freeze)
    result = finetune(options, train=source, evaluation=source)
    before, after = (load_file(f / "model.safetensors") for f in (model, result.last))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert "lm_head.weight" in changed and not any(n.startswith(FROZEN) for n in changed)
    layers = {layer(name) for name in changed} - {None}
    assert layers == (set() if freeze == "encoder" else {1})


def test_an_adapter_on_an_encoder_without_one_is_new_and_learns(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "Wav2Vec2BertModel")
    overrides = {"add_adapter": True, "num_adapter_layers": 1}
    options = config(model, tmp_path / "out", model_overrides=overrides, freeze="encoder")
    core: Any = make_parts(options, ["one two"]).core
    assert core.config.add_adapter and core.wav2vec2_bert.adapter is not None
    trained = {name for name, p in core.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith(("wav2vec2_bert.adapter.", "lm_head.")) for n in trained)
    assert any(n.startswith("wav2vec2_bert.adapter.") for n in trained)
    stored = load_file(model / "model.safetensors")
    for name, tensor in core.wav2vec2_bert.state_dict().items():
        if not name.startswith("adapter."):
            assert tensor.equal(stored[name]), name


def test_what_cannot_be_frozen_is_named(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(ValueError, match="freeze is 9, and the encoder has 2 layers"):
        make_parts(config(model, tmp_path / "out", freeze=9))
    for freeze in (-1, True, "all", 1.5):
        with pytest.raises(ValueError, match="freeze must be a number of layers or 'encoder'"):
            config(model, tmp_path / "out", freeze=freeze)
    with pytest.raises(ValueError, match="freeze has no effect with lora"):
        config(model, tmp_path / "out", freeze=1, lora=2)
