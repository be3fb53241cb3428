"""transformers' `Trainer` with models of this package, beside the same run of transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import w2vbert_fast
from tests.helpers.checkpoints import SMALL, assert_equal

STILL = {
    "layerdrop": 0.0,
    "final_dropout": 0.0,
    "conformer_conv_dropout": 0.0,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean",
    "pad_token_id": 0,
}
NAME = "Wav2Vec2BertForCTC"


def _rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([1] * 30 + [0] * 10)
    return [
        {
            "input_features": torch.randn(40, 160, generator=generator),
            "attention_mask": mask if index % 2 else torch.ones_like(mask),
            "labels": torch.randint(1, 11, (6,), generator=generator),
        }
        for index in range(4)
    ]


def _trainer(model: Any, out: Path, **arguments: Any) -> transformers.Trainer:
    settings = {
        "max_steps": 2,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(out), **settings),
        train_dataset=_rows(),
        eval_dataset=_rows(),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Any, Path]]:
    """Two steps of either library from the same weights: the trainer and its folder."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2BertConfig(**{**SMALL, **STILL})
    start = transformers.Wav2Vec2BertForCTC(config).state_dict()
    done = {}
    for library in (transformers, w2vbert_fast):
        out = tmp_path_factory.mktemp(library.__name__)
        model = getattr(library, NAME)(config)
        model.load_state_dict(start)
        trainer = _trainer(model, out, load_best_model_at_end=True)
        trainer.train()
        trainer.save_model(out / "final")
        done[library] = trainer, out
    return done


def test_training_is_that_of_the_reference(runs: dict) -> None:
    (theirs, _), (ours, _) = runs[transformers], runs[w2vbert_fast]
    expected = theirs.model.state_dict()
    assert ours.model.state_dict().keys() == expected.keys()
    for key, tensor in ours.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric, rel=1e-5)
    assert ours.state.best_global_step == theirs.state.best_global_step
    assert ours.state.total_flos == theirs.state.total_flos > 0


@pytest.mark.parametrize("folder", ["final", "checkpoint-1", "checkpoint-2"])
def test_both_libraries_load_what_was_saved(runs: dict, folder: str) -> None:
    _, out = runs[w2vbert_fast]
    own = w2vbert_fast.AutoModelForCTC.from_pretrained(out / folder)
    theirs, info = transformers.AutoModelForCTC.from_pretrained(
        out / folder, output_loading_info=True
    )
    assert not any(info.values())
    assert_equal(own.state_dict(), theirs.state_dict())
    written = json.loads((out / folder / "config.json").read_text(encoding="utf-8"))
    assert written["architectures"] == [NAME]
    assert written["dtype"] == "float32"
    if folder == "final":
        assert_equal(own.state_dict(), runs[w2vbert_fast][0].model.state_dict())


def test_prediction(runs: dict) -> None:
    (theirs, _), (ours, _) = runs[transformers], runs[w2vbert_fast]
    expected, found = theirs.predict(_rows()), ours.predict(_rows())
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    # In padded frames the logits are the blank's here.
    valid = torch.stack([row["attention_mask"] for row in _rows()]).bool().numpy()
    torch.testing.assert_close(
        torch.tensor(found.predictions[valid]),
        torch.tensor(expected.predictions[valid]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_run_is_taken_up_again_from_its_checkpoint(runs: dict, tmp_path: Path) -> None:
    ours, out = runs[w2vbert_fast]
    model = w2vbert_fast.AutoModelForCTC.from_config(ours.model.config)
    again = _trainer(model, tmp_path)
    again.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert again.state.global_step == 2
    expected = w2vbert_fast.AutoModelForCTC.from_pretrained(out / "checkpoint-2")
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, msg=key)


def test_a_model_that_was_there_before_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = w2vbert_fast.AutoModelForCTC.from_config(w2vbert_fast.AutoConfig(**SMALL))
    save = transformers.Trainer._save
    monkeypatch.setattr(transformers.Trainer, "_save", getattr(save, "__wrapped__", save))
    _trainer(model, tmp_path).save_model(tmp_path)
    again = transformers.AutoModelForCTC.from_pretrained(tmp_path)
    assert_equal(again.state_dict(), model.state_dict())


def test_models_of_the_reference_are_saved_as_ever(runs: dict) -> None:
    trainer, out = runs[transformers]
    again = transformers.AutoModelForCTC.from_pretrained(out / "final")
    assert_equal(again.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("only_trainable", [False, True])
@pytest.mark.parametrize("exclude_embeddings", [False, True])
@pytest.mark.parametrize("positions", ["relative_key", "relative"])
def test_numbers_of_parameters(
    positions: str, only_trainable: bool, exclude_embeddings: bool
) -> None:
    fields = {**SMALL, "position_embeddings_type": positions}
    counts = []
    for library in (transformers, w2vbert_fast):
        model = getattr(library, NAME)(library.Wav2Vec2BertConfig(**fields))
        model.wav2vec2_bert.encoder.layers[0].requires_grad_(False)
        counts.append(model.num_parameters(only_trainable, exclude_embeddings=exclude_embeddings))
    assert counts[0] == counts[1]


def test_frozen_layers_behind_reentrant_checkpoints_pass_gradients_on() -> None:
    """As under LoRA: a part of a layer learns, nothing in front of it does."""
    model: Any = w2vbert_fast.AutoModelForCTC.from_config(
        w2vbert_fast.AutoConfig(**{**SMALL, **STILL})
    )
    model.requires_grad_(False)
    part = model.wav2vec2_bert.encoder.layers[0].ffn1.output_dense.requires_grad_(True)
    assert not model.is_activation_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.is_activation_checkpointing
    model.train()
    batch = {key: torch.stack([row[key] for row in _rows()]) for key in _rows()[0]}
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert part.weight.grad is not None
    with torch.no_grad():
        model(**batch)
    model.disable_input_require_grads()
    assert not model(**batch).loss.requires_grad


def test_what_models_say_of_themselves_is_what_the_reference_says() -> None:
    config = transformers.Wav2Vec2BertConfig(**SMALL)
    for library in (transformers, w2vbert_fast):
        model = getattr(library, NAME)(config)
        assert model.can_generate() is False
        assert model.get_output_embeddings() is None
        assert set(model._no_split_modules) == {"Wav2Vec2BertEncoderLayer"}
        assert model.main_input_name == "input_features"
        model.tie_weights()
        with pytest.raises(NotImplementedError):
            model.get_input_embeddings()
