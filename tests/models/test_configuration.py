"""The configuration: the reference's fields and file, and errors for values no model can have."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st

from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.fields import fields_of

# The keys of a published ASR fine-tune of 2024 that differ from the defaults or are not fields.
PUBLISHED = {
    "_name_or_path": "facebook/w2v-bert-2.0",
    "add_adapter": True,
    "apply_spec_augment": False,
    "architectures": ["Wav2Vec2BertForCTC"],
    "codevector_dim": 768,
    "contrastive_logits_temperature": 0.1,
    "ctc_loss_reduction": "mean",
    "diversity_loss_weight": 0.1,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "model_type": "wav2vec2-bert",
    "num_codevector_groups": 2,
    "num_codevectors_per_group": 320,
    "num_negatives": 100,
    "output_hidden_size": 1024,
    "pad_token_id": 61,
    "proj_codevector_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.37.0",
    "vocab_size": 64,
}


def without_version(entries: dict) -> dict:
    """A dictionary of either library, without what only the reference writes."""
    return {
        name: value
        for name, value in json.loads(json.dumps(entries)).items()
        if name not in ("transformers_version", "_name_or_path")
    }


def write_json(folder: Path, entries: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file


def test_fields_and_defaults_are_those_of_the_reference() -> None:
    expected = without_version(transformers.Wav2Vec2BertConfig().to_dict())
    assert without_version(Wav2Vec2BertConfig().to_dict()) == expected


def test_positional_arguments_are_in_the_documented_order() -> None:
    config = Wav2Vec2BertConfig(32, 64, 2, 4, 128, 80, "gelu")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (32, 64, 2)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 128)
    assert (config.feature_projection_input_dim, config.hidden_act) == (80, "gelu")


def test_the_constructor_is_what_the_rows_say() -> None:
    parameters = inspect.signature(Wav2Vec2BertConfig).parameters
    rows = fields_of(Wav2Vec2BertConfig)
    assert [*parameters] == [*rows, "kwargs"]
    assert len(rows) > 50
    assert {name: p.default for name, p in parameters.items() if name in rows} == {
        name: row.default for name, row in rows.items()
    }
    by_name_only = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert by_name_only[0] == "output_hidden_states"
    assert "conformer_conv_dropout" not in by_name_only
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    # What is given as one type and read as another.
    assert parameters["hidden_size"].annotation == "int"
    assert parameters["dtype"].annotation == "torch.dtype | str | None"
    documented = Wav2Vec2BertConfig.__doc__ or ""
    assert all(f"\n        {name}: {row.__doc__}\n" in documented for name, row in rows.items())
    with pytest.raises(TypeError, match="too many positional arguments"):
        Wav2Vec2BertConfig(*range(len(rows)))
    with pytest.raises(TypeError, match="multiple values for argument 'vocab_size'"):
        Wav2Vec2BertConfig(3, vocab_size=3)


def test_json_of_the_defaults_is_that_of_the_reference() -> None:
    expected = without_version(json.loads(transformers.Wav2Vec2BertConfig().to_json_string()))
    assert without_version(json.loads(Wav2Vec2BertConfig().to_json_string())) == expected


HEADS = st.integers(1, 8)
PROBABILITY = st.floats(0, 1)
SIZE = st.integers(1, 4096)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "vocab_size": st.none() | SIZE,
        "num_hidden_layers": st.integers(0, 48),
        "intermediate_size": SIZE,
        "hidden_act": st.sampled_from(["gelu", "relu", "swish", "gelu_new"]),
        "hidden_dropout": PROBABILITY,
        "layerdrop": st.sampled_from([0, 1, 0.25]),
        "initializer_range": st.floats(0, 1),
        "layer_norm_eps": st.floats(1e-12, 1),
        "apply_spec_augment": st.booleans(),
        "mask_time_prob": PROBABILITY,
        "mask_time_length": SIZE,
        "mask_feature_min_masks": st.integers(0, 10),
        "ctc_loss_reduction": st.sampled_from(["sum", "mean"]),
        "ctc_zero_infinity": st.booleans(),
        "pad_token_id": st.none() | st.integers(0, 100),
        "eos_token_id": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1),
        "add_adapter": st.just(True),
        "num_adapter_layers": st.integers(0, 4),
        "adapter_stride": st.integers(1, 4),
        "position_embeddings_type": st.sampled_from(["relative_key", "relative", "rotary", None]),
        "left_max_position_embeddings": st.integers(0, 200),
        "conv_depthwise_kernel_size": st.integers(0, 31).map(lambda half: 2 * half + 1),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "num_labels": st.integers(1, 5),
        "output_hidden_states": st.booleans(),
        "return_dict": st.booleans(),
        "problem_type": st.sampled_from(["regression", "multi_label_classification"]),
        "num_negatives": st.integers(),
        "a_key_of_nobody": st.none() | st.text() | st.dictionaries(st.text(), st.integers()),
    },
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(fields=FIELDS, heads=HEADS, width=st.integers(1, 64))
def test_files_go_both_ways(tmp_path: Path, fields: dict, heads: int, width: int) -> None:
    fields = {**fields, "num_attention_heads": heads, "hidden_size": 2 * heads * width}
    ours = Wav2Vec2BertConfig(**fields)
    ours.save_pretrained(tmp_path)
    assert Wav2Vec2BertConfig.from_pretrained(tmp_path) == ours
    theirs = transformers.Wav2Vec2BertConfig.from_pretrained(tmp_path)
    assert without_version(theirs.to_dict()) == without_version(ours.to_dict())
    assert theirs.inputs_to_logits_ratio == ours.inputs_to_logits_ratio

    theirs.save_pretrained(tmp_path)
    again = Wav2Vec2BertConfig.from_pretrained(tmp_path)
    assert without_version(again.to_dict()) == without_version(ours.to_dict())


def test_published_file_loads_and_keeps_its_unknown_keys(tmp_path: Path) -> None:
    write_json(tmp_path, PUBLISHED)
    config = Wav2Vec2BertConfig.from_pretrained(tmp_path)
    assert config.num_negatives == 100
    assert config.dtype == config.torch_dtype == torch.float32
    assert config.name_or_path == str(tmp_path)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    expected = {**PUBLISHED, "dtype": PUBLISHED["torch_dtype"]}
    del expected["_name_or_path"], expected["torch_dtype"]
    assert {name: written.get(name) for name in expected} == expected
    assert "torch_dtype" not in written


@pytest.mark.parametrize(
    "key", ["to_dict", "validate", "use_return_dict", "_private", "num_layers"]
)
def test_unknown_keys_neither_vanish_nor_shadow(tmp_path: Path, key: str) -> None:
    config = Wav2Vec2BertConfig.from_pretrained(write_json(tmp_path, {key: [1, None]}))
    config.validate()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))[key] == [1, None]


IMPOSSIBLE = [
    ("vocab_size", 0),
    ("vocab_size", "32"),
    ("hidden_size", 0),
    ("hidden_size", "1024"),
    ("hidden_size", 1024.0),
    ("hidden_size", True),
    ("hidden_size", None),
    ("hidden_size", 1000),
    ("num_hidden_layers", -1),
    ("num_attention_heads", 0),
    ("intermediate_size", 0),
    ("feature_projection_input_dim", 0),
    ("hidden_act", "swoosh"),
    ("hidden_act", None),
    ("adapter_act", 3),
    ("hidden_dropout", 1.5),
    ("activation_dropout", -0.1),
    ("attention_dropout", float("nan")),
    ("feat_proj_dropout", "0.1"),
    ("final_dropout", 2),
    ("layerdrop", True),
    ("conformer_conv_dropout", -1),
    ("initializer_range", -0.02),
    ("initializer_range", float("inf")),
    ("layer_norm_eps", 0),
    ("layer_norm_eps", -1e-5),
    ("apply_spec_augment", 1),
    ("mask_time_prob", 1.01),
    ("mask_time_length", 0),
    ("mask_time_min_masks", -1),
    ("mask_feature_prob", -0.5),
    ("mask_feature_length", 0),
    ("mask_feature_min_masks", -2),
    ("ctc_loss_reduction", "avg"),
    ("ctc_zero_infinity", None),
    ("use_weighted_layer_sum", "yes"),
    ("classifier_proj_size", 0),
    ("tdnn_dim", []),
    ("tdnn_dim", 512),
    ("tdnn_dim", "512"),
    ("tdnn_kernel", (5, 3, 3, 1, 0)),
    ("tdnn_kernel", (5, 3)),
    ("tdnn_dilation", [1, 2, 3]),
    ("tdnn_dilation", [1, 2, 3, 1, "1"]),
    ("xvector_output_dim", 0),
    ("pad_token_id", "0"),
    ("eos_token_id", [1, "2"]),
    ("add_adapter", 1),
    ("adapter_kernel_size", 0),
    ("adapter_stride", 0),
    ("num_adapter_layers", -1),
    ("use_intermediate_ffn_before_adapter", True),
    ("output_hidden_size", 0),
    ("position_embeddings_type", "absolute"),
    ("rotary_embedding_base", 0),
    ("max_source_positions", 0),
    ("left_max_position_embeddings", -1),
    ("right_max_position_embeddings", -1),
    ("conv_depthwise_kernel_size", 0),
    ("conv_depthwise_kernel_size", 30),
    ("dtype", "floaty"),
    ("dtype", "int64"),
    ("problem_type", "ranking"),
    ("architectures", "Wav2Vec2BertForCTC"),
    ("return_dict", "no"),
    ("num_labels", 0),
    ("num_labels", "2"),
    ("id2label", ["a", "b"]),
    ("id2label", {}),
    ("id2label", {"first": "a"}),
    ("id2label", {"1": "a", 1: "b"}),
    ("label2id", {"a": "first"}),
]


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_impossible_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^\W*\w*{field}.* is .*; it must be "):
        Wav2Vec2BertConfig(**{field: value})
    config = Wav2Vec2BertConfig()
    with pytest.raises(ValueError, match=field):
        config.update({field: value})


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("hidden_size", {"hidden_size": 6, "num_attention_heads": 2, "position": "rotary"}),
        ("hidden_size", {"hidden_size": 9, "num_attention_heads": 3, "position": "relative"}),
        ("output_hidden_size", {"add_adapter": True, "output_hidden_size": 1000}),
        ("problem_type", {"problem_type": "single_label_classification", "num_labels": 1}),
        ("hidden_size", {"num_attention_heads": 7}),
        ("model_type", {"model_type": "wav2vec2"}),
    ],
)
def test_values_that_exclude_each_other(field: str, fields: dict) -> None:
    fields = dict(fields)
    if "position" in fields:
        fields["position_embeddings_type"] = fields.pop("position")
    with pytest.raises(ValueError, match=f"^{field} is "):
        Wav2Vec2BertConfig(**fields)


def test_bad_value_set_later_is_refused_and_leaves_the_old_one() -> None:
    config = Wav2Vec2BertConfig()
    with pytest.raises(ValueError, match="layerdrop is 2"):
        config.layerdrop = 2
    assert config.layerdrop == 0.1


def test_bad_value_in_a_file_names_file_and_field(tmp_path: Path) -> None:
    file = write_json(tmp_path, {"hidden_size": "1024"})
    with pytest.raises(ValueError, match=r"config\.json: hidden_size is '1024'"):
        Wav2Vec2BertConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: hidden_size is '1024'"):
        Wav2Vec2BertConfig.from_json_file(file)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"hidden_size": 10', b"\xff\xfe{}", b'["hidden_size"]', b"null"]
)
def test_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        Wav2Vec2BertConfig.from_pretrained(tmp_path)


def test_file_is_read_as_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"id2label": {"0": "añ", "1": "日本"}}'.encode())
    config = Wav2Vec2BertConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "añ", 1: "日本"}


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Wav2Vec2BertConfig.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        Wav2Vec2BertConfig.from_pretrained(tmp_path / "nowhere")


def test_output_hidden_size_defaults_to_hidden_size() -> None:
    assert Wav2Vec2BertConfig(hidden_size=64).output_hidden_size == 64
    assert Wav2Vec2BertConfig(hidden_size=64, output_hidden_size=32).output_hidden_size == 32


def test_labels() -> None:
    config = Wav2Vec2BertConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config = Wav2Vec2BertConfig(id2label={"0": "no", "1": "yes", "2": "maybe"})
    assert config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert config.num_labels == 3
    config.num_labels = 3
    assert config.id2label[0] == "no"
    config.num_labels = 1
    assert config.label2id == {"LABEL_0": 0}
    config = Wav2Vec2BertConfig(id2label={0: "a"}, label2id={"a": "0"})
    assert config.label2id == {"a": 0}


def test_labels_that_disagree_with_their_number_warn(caplog: pytest.LogCaptureFixture) -> None:
    config = Wav2Vec2BertConfig(num_labels=3, id2label={0: "a"})
    assert config.num_labels == 1
    assert "num_labels is 3" in caplog.text


def test_overrides_replace_the_values_of_the_file(tmp_path: Path) -> None:
    write_json(tmp_path, {**PUBLISHED, "id2label": {"0": "a", "1": "b"}})
    load = Wav2Vec2BertConfig.from_pretrained
    assert load(tmp_path, layerdrop=0.3).layerdrop == 0.3
    assert load(tmp_path, num_labels=2).id2label == {0: "a", 1: "b"}
    assert load(tmp_path, num_labels=4).num_labels == 4
    renamed = load(tmp_path, id2label={0: "x", 1: "y", 2: "z"})
    assert renamed.label2id == {"x": 0, "y": 1, "z": 2}
    assert load(tmp_path, dtype="float16").dtype == torch.float16
    assert load(tmp_path, torch_dtype=torch.float64).dtype == torch.float64
    assert load(tmp_path, num_negatives=7).num_negatives == 7
    with pytest.raises(TypeError, match=r"'layer_drop' is no field .* did you mean 'layerdrop'"):
        load(tmp_path, layer_drop=0.3)


def test_from_dict_leaves_its_argument_alone() -> None:
    entries = {"tdnn_dim": [8, 8, 8, 8, 8], "extra": {"a": [1]}}
    before = copy.deepcopy(entries)
    config = Wav2Vec2BertConfig.from_dict(entries, layerdrop=0.0)
    config.tdnn_dim.append(1)
    config.extra["a"].append(2)
    config.to_dict()["extra"]["a"].append(3)
    assert entries == before
    assert config.extra == {"a": [1, 2]}


def test_callable_activation_works_and_cannot_be_written(tmp_path: Path) -> None:
    config = Wav2Vec2BertConfig(hidden_act=torch.tanh)
    assert config.hidden_act is torch.tanh
    assert "tanh" in repr(config)
    with pytest.raises(ValueError, match="hidden_act"):
        config.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_copies_are_equal_and_independent() -> None:
    config = Wav2Vec2BertConfig(layerdrop=0.4, unknown={"a": 1}, _private=2)
    for other in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        Wav2Vec2BertConfig.from_dict(config.to_dict()),
    ):
        assert other == config
        other.layerdrop = 0.5
        assert other != config
        assert config.layerdrop == 0.4
    assert config != "a string"


def test_older_names() -> None:
    config = Wav2Vec2BertConfig(torch_dtype="bfloat16", return_dict=False)
    assert config.dtype == torch.bfloat16
    assert config.use_return_dict is False
    config.torch_dtype = "torch.float16"
    assert config.dtype == torch.float16


def test_to_json_string_without_diff_holds_everything() -> None:
    entries = json.loads(Wav2Vec2BertConfig().to_json_string(use_diff=False))
    assert entries == without_version(transformers.Wav2Vec2BertConfig().to_dict())


def test_save_into_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="file"):
        Wav2Vec2BertConfig().save_pretrained(tmp_path / "file")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Wav2Vec2BertConfig(layerdrop=0.25).save_pretrained(tmp_path)

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        Wav2Vec2BertConfig(layerdrop=0.75).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert Wav2Vec2BertConfig.from_pretrained(tmp_path).layerdrop == 0.25
