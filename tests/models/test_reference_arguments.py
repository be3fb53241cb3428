"""`from_pretrained` and `save_pretrained` as code that was written for transformers calls them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import w2vbert_fast
from tests.helpers.checkpoints import (
    SMALL,
    assert_equal,
    load_base,
    load_ctc,
    ours,
    rewrite,
    theirs,
)
from w2vbert_fast.checkpoints import keywords as _keywords
from w2vbert_fast.checkpoints.weights import CheckpointError
from w2vbert_fast.training.config import FinetuneConfig
from w2vbert_fast.training.model import make_parts

# What the caller's configuration adds and takes away.

# Hugging Face's recipe for fine-tuning Wav2Vec2-BERT, in its words.
RECIPE = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "ctc_loss_reduction": "mean",
    "add_adapter": True,
    "pad_token_id": 0,
    "vocab_size": 12,
}
ENCODER = "Wav2Vec2BertModel"
CTC = "Wav2Vec2BertForCTC"
CLASSIFIER = "Wav2Vec2BertForSequenceClassification"
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2}

# Class and fields of what is stored, class that is loaded, overrides, and what the warning names.
OVERRIDES: list[tuple[str, dict[str, Any], str, dict[str, Any], list[str]]] = [
    (ENCODER, {"vocab_size": None}, CTC, RECIPE, ["wav2vec2_bert.adapter", "lm_head"]),
    (CTC, {}, CTC, {"add_adapter": True}, ["wav2vec2_bert.adapter"]),
    (ENCODER, {}, ENCODER, {"num_hidden_layers": 1}, ["encoder.layers.1"]),
    (CTC, {}, CTC, {"num_hidden_layers": 4}, ["encoder.layers.2", "encoder.layers.3"]),
    (CTC, {"mask_time_prob": 0.0}, CTC, {"mask_time_prob": 0.1}, []),
    (CTC, ADAPTER, CTC, {"num_adapter_layers": 1}, ["wav2vec2_bert.adapter.layers.1"]),
    (CTC, ADAPTER, CTC, {"add_adapter": False}, ["wav2vec2_bert.adapter"]),
    (
        CTC,
        ADAPTER,
        CTC,
        {"use_intermediate_ffn_before_adapter": True},
        ["wav2vec2_bert.intermediate_ffn"],
    ),
    (
        ENCODER,
        {},
        ENCODER,
        {"position_embeddings_type": "relative"},
        ["self_attn.distance_embedding", "self_attn.linear_pos", "self_attn.pos_bias_u"],
    ),
    (ENCODER, {}, ENCODER, {"position_embeddings_type": None}, ["self_attn.distance_embedding"]),
    (CLASSIFIER, {}, CLASSIFIER, {"use_weighted_layer_sum": True}, ["layer_weights"]),
    (ENCODER, {}, CLASSIFIER, {"num_hidden_layers": 1, "num_labels": 5}, ["projector"]),
]


def _as_keywords(cls: Any, folder: Path, overrides: dict[str, Any]) -> Any:
    return cls.from_pretrained(folder, **overrides, output_loading_info=True)


def _as_config(cls: Any, folder: Path, overrides: dict[str, Any]) -> Any:
    config = w2vbert_fast.AutoConfig.from_pretrained(folder)
    config.update(overrides)
    return cls.from_pretrained(folder, config=config, output_loading_info=True)


def _as_their_config(cls: Any, folder: Path, overrides: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder, **overrides)
    return cls.from_pretrained(
        pretrained_model_name_or_path=folder, config=config, output_loading_info=True
    )


@pytest.mark.parametrize("way", [_as_keywords, _as_config, _as_their_config])
@pytest.mark.parametrize(("stored", "fields", "name", "overrides", "named"), OVERRIDES)
def test_overrides_add_and_take_away_modules(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    way: Callable[..., Any],
    stored: str,
    fields: dict[str, Any],
    name: str,
    overrides: dict[str, Any],
    named: list[str],
) -> None:
    ours(stored, **fields).save_pretrained(tmp_path)
    model, info = way(getattr(w2vbert_fast, name), tmp_path, overrides)
    expected, their_info = _as_keywords(getattr(transformers, name), tmp_path, overrides)
    assert info["missing_keys"] == their_info["missing_keys"]
    assert info["unexpected_keys"] == their_info["unexpected_keys"]
    shapes, their_shapes = (
        {key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, expected)
    )
    assert shapes == their_shapes
    new = info["missing_keys"]
    kept, their_kept = (
        {key: tensor for key, tensor in m.state_dict().items() if key not in new}
        for m in (model, expected)
    )
    assert_equal(kept, their_kept)
    for key in new:
        tensor = model.state_dict()[key]
        assert torch.isfinite(tensor).all()
        assert tensor.dim() < 2 or tensor.std() > 0
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("w2vbert_fast")]
    assert all(any(module in warning for warning in warnings) for module in named), warnings
    assert bool(named) == bool(warnings)


def test_what_the_override_does_not_explain_stays_an_error(tmp_path: Path) -> None:
    ours(CTC).save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda tensors: tensors.pop("wav2vec2_bert.feature_projection.layer_norm.bias")
    )
    with pytest.raises(CheckpointError) as error:
        load_ctc(tmp_path, add_adapter=True, num_hidden_layers=1)
    assert "missing (1): wav2vec2_bert.feature_projection.layer_norm.bias" in str(error.value)
    assert "unexpected (" not in str(error.value)


@pytest.mark.parametrize("given", ["overrides", "config"])
def test_without_an_override_a_mismatch_stays_an_error(tmp_path: Path, given: str) -> None:
    ours(CTC).save_pretrained(tmp_path)
    w2vbert_fast.Wav2Vec2BertConfig(**{**SMALL, **ADAPTER}).save_pretrained(tmp_path)
    config = w2vbert_fast.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing \(44\): wav2vec2_bert\.adapter"):
        load_ctc(tmp_path, **({"layerdrop": 0.0} if given == "overrides" else {"config": config}))


def test_other_numbers_of_classes_need_ignore_mismatched_sizes(tmp_path: Path) -> None:
    ours(CLASSIFIER).save_pretrained(tmp_path)
    load = w2vbert_fast.Wav2Vec2BertForSequenceClassification.from_pretrained
    with pytest.raises(
        CheckpointError, match=r"classifier\.weight is \[3, 16\], \[5, 16\] is need"
    ):
        load(tmp_path, num_labels=5)
    arguments = {"num_labels": 5, "ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = load(tmp_path, **arguments)
    _, expected = getattr(transformers, CLASSIFIER).from_pretrained(tmp_path, **arguments)
    assert {tuple(map(str, entry)) for entry in info["mismatched_keys"]} == {
        (name, str(tuple(stored)), str(tuple(here)))
        for name, stored, here in expected["mismatched_keys"]
    }
    assert not info["missing_keys"]
    assert list(info["error_msgs"]) == list(expected["error_msgs"]) == []


# Keywords.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ctc")
    torch.manual_seed(0)
    ours(CTC).save_pretrained(path)
    return path


ACCEPTED = [
    {"attn_implementation": "eager"},
    {"attn_implementation": "flash_attention_2"},
    {"attn_implementation": {"": "sdpa"}},
    {"device_map": "auto"},
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}, "device": "cpu"},
    {"device_map": {"wav2vec2_bert": torch.device("cpu"), "lm_head": "cpu"}},
    {"low_cpu_mem_usage": True, "offload_folder": "x", "max_memory": {0: "1GB"}},
    {"use_safetensors": True, "weights_only": False},
    {"trust_remote_code": True, "code_revision": "main", "_from_auto": True},
    {"force_download": True, "resume_download": True, "proxies": {"https": "x"}},
    {"variant": None, "quantization_config": None, "from_tf": False, "tp_plan": None},
    {"use_auth_token": "t", "_commit_hash": "0", "mirror": "x"},
    {"torch_dtype": "float32", "revision": "main", "cache_dir": "x", "subfolder": ""},
    {"finetuning_task": "ctc", "gradient_checkpointing": False},
]


@pytest.mark.parametrize("keywords", ACCEPTED, ids=str)
def test_keywords_without_a_meaning_here_are_taken(folder: Path, keywords: dict) -> None:
    assert_equal(load_ctc(folder, **keywords).state_dict(), load_ctc(folder).state_dict())


REFUSED = [
    ({"quantization_config": {"load_in_8bit": True}}, 'dtype="int8" quantises'),
    ({"load_in_4bit": True}, "load_in_4bit is True; "),
    ({"from_tf": True}, "convert them first"),
    ({"gguf_file": "model.gguf"}, "gguf_file is 'model.gguf'"),
    ({"tp_plan": "auto"}, "whole, onto one device"),
    ({"key_mapping": {"a": "b"}}, "rename the tensors"),
    ({"state_dict": {"a": 1}}, "load_state_dict"),
    ({"attn_implementation": "fast"}, "it must be one of eager, sdpa"),
    ({"device_map": {"wav2vec2_bert": "cpu", "lm_head": "meta"}}, "device_map names cpu, meta"),
    ({"device_map": "disk!"}, r"device_map is 'disk!'"),
    ({"device_map": "meta", "device": "cpu"}, "pass one of them"),
    ({"token": "a", "use_auth_token": "b"}, "use_auth_token is the older name of token"),
    ({"torchscript": True}, "return_dict=False"),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=str)
def test_keywords_that_would_change_an_answer_are_refused(
    folder: Path, keywords: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_ctc(folder, **keywords)


def test_every_keyword_of_the_reference_has_a_rule() -> None:
    """Its `from_pretrained` names some in the signature and takes others out of `kwargs`."""
    reference = transformers.PreTrainedModel.from_pretrained
    own = set(inspect.signature(load_ctc).parameters)
    popped = re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(reference))
    assert len(popped) > 20
    known = own | _keywords.LOADING.keys() | {"model_args", "kwargs", "use_auth_token"}
    assert {*inspect.signature(reference).parameters, *popped} <= known
    saved = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
    known = {*inspect.signature(ours(CTC).save_pretrained).parameters, *_keywords.SAVING, "token"}
    assert saved.keys() - {"self"} <= known


def test_unknown_keywords_are_still_errors(folder: Path) -> None:
    with pytest.raises(TypeError, match="did you mean 'hidden_size'"):
        load_ctc(folder, hidden_sise=3)


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_and_formats_of_weights(tmp_path: Path, sharded: bool) -> None:
    """The files are the reference's own."""
    model = theirs(ENCODER)
    size = "30KB" if sharded else "5GB"
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert_equal(load_base(tmp_path, variant="fp16").state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, "):
        load_base(tmp_path)
    torch.save(
        {key: tensor + 1 for key, tensor in model.state_dict().items()},
        tmp_path / "pytorch_model.bin",
    )
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, \S+index\.json$"):
        load_base(tmp_path, use_safetensors=True)
    ours(ENCODER).save_pretrained(tmp_path)
    loaded = load_base(tmp_path, use_safetensors=False).state_dict()
    assert_equal(loaded, {key: tensor + 1 for key, tensor in model.state_dict().items()})


def test_downloads_are_forced_for_every_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls = []

    def download(repository: str, filename: str, **arguments: Any) -> str:
        calls.append((filename, arguments["force_download"], arguments["token"]))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load_ctc("org/model", force_download=True, use_auth_token="t")
    assert calls == [("config.json", True, "t"), ("model.safetensors", True, "t")]


@pytest.mark.parametrize("cls", [w2vbert_fast.Wav2Vec2BertModel, w2vbert_fast.Wav2Vec2BertForCTC])
def test_models_are_made_of_a_configuration_of_the_reference(cls: type) -> None:
    config = transformers.Wav2Vec2BertConfig(**SMALL, layerdrop=0.25)
    model = cls(config)
    assert isinstance(model.config, w2vbert_fast.Wav2Vec2BertConfig)
    assert model.config.layerdrop == 0.25
    expected = getattr(transformers, cls.__name__)(config).state_dict()
    assert {k: t.shape for k, t in model.state_dict().items()} == {
        k: t.shape for k, t in expected.items()
    }


def test_configurations_of_other_models_are_refused(folder: Path) -> None:
    other = transformers.Wav2Vec2Config()
    with pytest.raises(ValueError, match="model_type 'wav2vec2'; it must be 'wav2vec2-bert'"):
        load_ctc(folder, config=other)
    assert load_ctc(folder, config=str(folder)).config.vocab_size == SMALL["vocab_size"]


def test_configuration_keywords(folder: Path) -> None:
    config, unused = w2vbert_fast.AutoConfig.from_pretrained(
        pretrained_model_name_or_path=folder,
        trust_remote_code=True,
        attn_implementation="sdpa",
        layerdrop=0.5,
        ctc_loss_reductions="sum",
        return_unused_kwargs=True,
    )
    assert config.layerdrop == 0.5
    assert unused == {"ctc_loss_reductions": "sum"}


# Saving.


def _save_recipe(model: nn.Module, folder: Path, **further: Any) -> None:
    """Accelerate's recipe."""
    model.save_pretrained(
        folder,
        is_main_process=True,
        save_function=torch.save,
        state_dict=model.state_dict(),
        safe_serialization=True,
        **further,
    )


def test_accelerates_recipe_saves_what_both_libraries_load(tmp_path: Path) -> None:
    model = ours(CTC)
    _save_recipe(model, tmp_path)
    assert_equal(load_ctc(tmp_path).state_dict(), model.state_dict())
    again = transformers.Wav2Vec2BertForCTC.from_pretrained(tmp_path)
    assert_equal(again.state_dict(), model.state_dict())


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    ours(CTC).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_saving_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = ours(CTC)
    with pytest.raises(ValueError, match="variant is 'fp16'; weights of a variant are read"):
        model.save_pretrained(tmp_path / "out", variant="fp16")
    with pytest.raises(TypeError, match="max_shard: no argument of save_pretrained"):
        model.save_pretrained(tmp_path / "out", max_shard="1GB")
    assert not (tmp_path / "out").exists()


class _Hub:
    """Takes the place of `huggingface_hub.HfApi`, and keeps what it is given."""

    uploads: list[dict[str, Any]]

    def __init__(self, token: str | bool | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.private = private
        return type("Url", (), {"repo_id": f"me/{repo_id}" if "/" not in repo_id else repo_id})

    def upload_folder(self, folder_path: Path, allow_patterns: list[str], **rest: Any) -> Any:
        assert all((folder_path / name).is_file() for name in allow_patterns)
        entry = {"token": self.token, "private": self.private, "files": allow_patterns, **rest}
        self.uploads.append(entry)
        return type("Commit", (), {"commit_url": "https://hub/commit", "pr_url": "https://hub/pr"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[_Hub]:
    _Hub.uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi", _Hub)
    return _Hub


def test_pushing_uploads_what_is_saved(hub: type[_Hub], tmp_path: Path) -> None:
    model = ours(CTC)
    address = model.push_to_hub("org/model", private=True, token="t", max_shard_size="30KB")
    assert address == "https://hub/commit"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not to be uploaded")
    _save_recipe(model, tmp_path / "mine", push_to_hub=True, create_pr=True)
    first, second = hub.uploads
    assert first["repo_id"] == "org/model"
    assert (first["token"], first["private"]) == ("t", True)
    assert len([name for name in first["files"] if name.startswith("model-0")]) > 1
    assert second["repo_id"] == "me/mine"
    assert second["create_pr"]
    assert second["files"] == ["config.json", "model.safetensors"]
    model.config.push_to_hub("org/model", commit_message="Configuration")
    assert hub.uploads[2]["files"] == ["config.json"]
    assert hub.uploads[2]["commit_message"] == "Configuration"
    with pytest.raises(TypeError, match="repo: no argument of save_pretrained or push_to_hub"):
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo="a")


# Auto classes.

AUTO = [
    "AutoModel",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModelForAudioFrameClassification",
    "AutoModelForAudioXVector",
]


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_make_the_class_that_the_reference_makes(folder: Path, name: str) -> None:
    theirs = getattr(transformers, name)
    own = getattr(w2vbert_fast, name)
    expected = theirs.from_config(transformers.AutoConfig.from_pretrained(folder))
    for model in (
        own.from_pretrained(folder, trust_remote_code=True),
        own.from_config(w2vbert_fast.AutoConfig.from_pretrained(folder), dtype="bfloat16"),
    ):
        assert type(model).__name__ == type(expected).__name__
        assert isinstance(model, w2vbert_fast.Wav2Vec2BertPreTrainedModel)
        assert {k: t.shape for k, t in model.state_dict().items()} == {
            k: t.shape for k, t in expected.state_dict().items()
        }
    assert model.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="vocab: no argument of from_config"):
        own.from_config(model.config, vocab=3)


@pytest.mark.parametrize("name", ["AutoConfig", *AUTO])
def test_auto_classes_name_the_other_model_that_they_found(tmp_path: Path, name: str) -> None:
    transformers.Wav2Vec2Config(architectures=["Wav2Vec2ForCTC"]).save_pretrained(tmp_path)
    message = r"config\.json: model_type is 'wav2vec2'.*\(Wav2Vec2ForCTC\); it must be 'wav2vec2-b"
    with pytest.raises(ValueError, match=message):
        getattr(w2vbert_fast, name).from_pretrained(tmp_path)
    config = w2vbert_fast.AutoConfig.for_model("wav2vec2-bert", layerdrop=0.5)
    assert config.layerdrop == 0.5


def test_fine_tuning_adds_an_adapter_to_a_checkpoint_of_the_encoder(tmp_path: Path) -> None:
    ours(ENCODER, vocab_size=None).save_pretrained(tmp_path)
    w2vbert_fast.SeamlessM4TFeatureExtractor().save_pretrained(tmp_path)
    config = FinetuneConfig(
        model=str(tmp_path),
        out=str(tmp_path / "out"),
        train="train.jsonl",
        eval="eval.jsonl",
        task="ctc",
        model_overrides={"add_adapter": True, "num_hidden_layers": 1},
    )
    model: Any = make_parts(config, ["hello", "world"]).core
    assert len(model.wav2vec2_bert.adapter.layers) == len(model.wav2vec2_bert.encoder.layers) == 1
