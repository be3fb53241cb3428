"""Reading and writing weights: every layout, every kind of damage, and the memory it takes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from w2vbert_fast import models
from w2vbert_fast.checkpoint import Checkpoint, CheckpointError, find_checkpoint, write_checkpoint
from w2vbert_fast.configuration import Wav2Vec2BertConfig

CLASSES = [
    "Wav2Vec2BertModel",
    "Wav2Vec2BertForCTC",
    "Wav2Vec2BertForSequenceClassification",
    "Wav2Vec2BertForAudioFrameClassification",
    "Wav2Vec2BertForXVector",
]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 11,
    "classifier_proj_size": 16,
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 2],
    "xvector_output_dim": 16,
    "num_labels": 3,
}


def ours(name: str, **fields: object) -> models.Wav2Vec2BertPreTrainedModel:
    return getattr(models, name)(Wav2Vec2BertConfig(**{**SMALL, **fields}))


def theirs(name: str, **fields: object) -> transformers.PreTrainedModel:
    return getattr(transformers, name)(transformers.Wav2Vec2BertConfig(**{**SMALL, **fields}))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    tensors = safetensors.torch.load(Path(folder, "model.safetensors").read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def ctc(tmp_path: Path) -> tuple[models.Wav2Vec2BertForCTC, Path]:
    """A small CTC model and the folder it is saved in."""
    model = ours("Wav2Vec2BertForCTC")
    model.save_pretrained(tmp_path / "ctc")
    return model, tmp_path / "ctc"


load_ctc = models.Wav2Vec2BertForCTC.from_pretrained
load_base = models.Wav2Vec2BertModel.from_pretrained


# Both ways between this package and the reference.


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_ours_to_reference_to_ours(tmp_path: Path, name: str, max_shard_size: str) -> None:
    model = ours(name)
    model.save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    reference, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_equal(reference.state_dict(), model.state_dict())
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    again = getattr(models, name).from_pretrained(tmp_path / "theirs")
    assert_equal(again.state_dict(), model.state_dict())
    assert not again.training
    assert again.config.architectures == [name]


VARIANTS = [
    {"position_embeddings_type": "relative"},
    {"position_embeddings_type": "rotary"},
    {"position_embeddings_type": None},
    {"add_adapter": True},
    {"add_adapter": True, "output_hidden_size": 24, "num_adapter_layers": 2},
    {"add_adapter": True, "use_intermediate_ffn_before_adapter": True},
    {"mask_time_prob": 0.0},
    {"use_weighted_layer_sum": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_reference_to_ours(tmp_path: Path, name: str, fields: dict) -> None:
    if "Classification" in name or "XVector" in name:
        # The classifiers of the reference refuse an adapter.
        fields = {key: value for key, value in fields.items() if "adapter" not in key}
    reference = theirs(name, **fields)
    reference.save_pretrained(tmp_path)
    model = getattr(models, name).from_pretrained(tmp_path)
    assert_equal(model.state_dict(), reference.state_dict())


# Encoder into head, head into encoder.


@pytest.mark.parametrize("name", CLASSES[1:])
def test_encoder_into_head(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = theirs("Wav2Vec2BertModel")
    base.save_pretrained(tmp_path)
    model = getattr(models, name).from_pretrained(tmp_path, vocab_size=11)
    assert_equal(model.wav2vec2_bert.state_dict(), base.state_dict())
    head = [key for key in model.state_dict() if not key.startswith("wav2vec2_bert.")]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert all(key in warnings[0].getMessage() for key in head)
    for key in head:
        tensor = model.state_dict()[key]
        assert torch.isfinite(tensor).all()
        assert key.endswith("bias") or tensor.std() > 0


@pytest.mark.parametrize("name", CLASSES[1:])
def test_head_into_encoder(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    reference = theirs(name)
    reference.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="w2vbert_fast"):
        model = load_base(tmp_path)
    assert_equal(model.state_dict(), reference.wav2vec2_bert.state_dict())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    head = next(key for key in reference.state_dict() if not key.startswith("wav2vec2_bert."))
    assert head in caplog.text


def test_other_head_is_an_error_unless_not_strict(
    ctc: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = ctc
    load = models.Wav2Vec2BertForSequenceClassification.from_pretrained
    with pytest.raises(
        CheckpointError, match=r"(?s)missing \(4\): .*unexpected \(2\): lm_head"
    ) as info:
        load(folder)
    assert "strict=False" in str(info.value)
    loaded = load(folder, strict=False)
    assert_equal(loaded.wav2vec2_bert.state_dict(), model.wav2vec2_bert.state_dict())
    assert "projector.weight" in caplog.text
    assert "lm_head.weight" in caplog.text


def test_mask_embedding_may_be_missing_or_unused(
    ctc: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = ctc
    key = "wav2vec2_bert.masked_spec_embed"
    assert key not in load_ctc(folder, mask_time_prob=0.0).state_dict()
    rewrite(folder, lambda tensors: tensors.pop(key))
    embedding = load_ctc(folder).state_dict()[key]
    # Drawn uniformly from 0 to 1.
    assert embedding.min() >= 0
    assert embedding.max() <= 1
    assert embedding.std() > 0.1
    assert not caplog.records


@pytest.mark.parametrize("prefix", ["", "wav2vec2_bert."])
def test_pretraining_heads_are_left_out(tmp_path: Path, prefix: str) -> None:
    base = ours("Wav2Vec2BertModel")
    base.save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[prefix + key] = tensors.pop(key)
        for key in ("quantizer.codevectors", "project_q.weight", "project_hid.bias"):
            tensors[key] = torch.zeros(2)

    rewrite(tmp_path, change)
    assert_equal(load_base(tmp_path).state_dict(), base.state_dict())
    assert_equal(load_ctc(tmp_path).wav2vec2_bert.state_dict(), base.state_dict())


# Older layouts and names.


def save_torch(folder: Path, tensors: dict[str, Tensor], **options: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file(ctc: tuple[nn.Module, Path], zipped: bool) -> None:
    model, folder = ctc
    save_torch(folder, model.state_dict(), _use_new_zipfile_serialization=zipped)
    assert_equal(load_ctc(folder).state_dict(), model.state_dict())


def test_sharded_torch_files(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    (folder / "model.safetensors").unlink()
    tensors = model.state_dict()
    weight_map = {}
    for number, parity in ((1, 0), (2, 1)):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = {key: tensors[key] for key in list(tensors)[parity::2]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_equal(load_ctc(folder).state_dict(), tensors)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_torch_file_with_code_is_refused_and_not_run(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    target = folder / "touched"
    save_torch(folder, {**model.state_dict(), "extra": Malicious(target)})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_ctc(folder)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))  # the trap itself works
    assert target.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": torch.zeros(2), "b": 3}])
def test_torch_file_that_is_no_state_dict(ctc: tuple[nn.Module, Path], content: object) -> None:
    _, folder = ctc
    save_torch(folder, content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no state dict"):
        load_ctc(folder)


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("style", ["functional", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_pairs_become_weights(tmp_path: Path, dim: int | None, style: str) -> None:
    model = ours("Wav2Vec2BertModel")
    model.save_pretrained(tmp_path)
    key = "encoder.layers.1.conv_module.pointwise_conv1"
    shape = model.state_dict()[key + ".weight"].shape
    layer = nn.Conv1d(shape[1], shape[0], shape[2], bias=False)
    if style == "functional":
        layer = nn.utils.weight_norm(layer, dim=dim)
    else:
        layer = nn.utils.parametrizations.weight_norm(layer, dim=dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    layer(torch.zeros(1, shape[1], 8))  # the functional style sets the weight in a hook
    halves = {f"{key}.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert len(halves) == 2

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[key + ".weight"]
        tensors |= halves

    rewrite(tmp_path, change)
    loaded = load_ctc(tmp_path).state_dict()["wav2vec2_bert." + key + ".weight"]
    torch.testing.assert_close(loaded, layer.weight.detach(), rtol=1e-6, atol=1e-7)


def test_weight_norm_halves_must_fit(tmp_path: Path) -> None:
    ours("Wav2Vec2BertModel").save_pretrained(tmp_path)
    key = "encoder.layers.0.conv_module.pointwise_conv1.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key + "_v"] = tensors.pop(key)
        tensors[key + "_g"] = torch.ones(5, 1, 1)

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"weight_g is \[5, 1, 1\], no magnitude"):
        load_base(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(key + "_g"))
    with pytest.raises(CheckpointError, match=r"missing \(1\).*\n.*unexpected \(1\): .*weight_v"):
        load_base(tmp_path)


def test_gamma_and_beta_become_weight_and_bias(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    stem = "wav2vec2_bert.encoder.layers.0.final_layer_norm."

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[stem + "gamma"] = tensors.pop(stem + "weight")
        tensors[stem + "beta"] = tensors.pop(stem + "bias")

    rewrite(folder, change)
    assert_equal(load_ctc(folder).state_dict(), model.state_dict())


# What does not fit or is damaged.


def test_all_that_does_not_fit_is_listed(ctc: tuple[nn.Module, Path]) -> None:
    _, folder = ctc

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.bias"]
        del tensors["wav2vec2_bert.encoder.layers.0.ffn1.output_dense.weight"]
        tensors["lm_head.weight"] = torch.zeros(12, 32)
        tensors["wav2vec2_bert.encoder.extra"] = torch.zeros(1)
        tensors["wav2vec2_bert.feature_projection.projection.bias"] = torch.zeros(32).to(torch.int8)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as info:
        load_ctc(folder)
    message = str(info.value)
    assert str(folder) in message
    assert "Wav2Vec2BertForCTC" in message
    assert "missing (2): " in message
    assert "lm_head.bias" in message
    assert "layers.0.ffn1.output_dense.weight" in message
    assert "unexpected (1): wav2vec2_bert.encoder.extra" in message
    assert "wrong shape (1): lm_head.weight is [12, 32], [11, 32] is needed" in message
    assert "projection.bias is I8, a floating point type is needed" in message
    assert isinstance(info.value, ValueError)


def test_long_lists_are_cut(ctc: tuple[nn.Module, Path]) -> None:
    _, folder = ctc
    with pytest.raises(CheckpointError) as info:
        load_ctc(folder, num_hidden_layers=4)
    missing = next(line for line in str(info.value).splitlines() if "missing" in line)
    layer = [key for key in ours("Wav2Vec2BertModel").state_dict() if "layers.0." in key]
    assert f"missing ({2 * len(layer)})" in missing
    assert missing.endswith(f" and {2 * len(layer) - 20} more")
    assert missing.count("encoder.layers.") == 20


def test_nothing_is_read_before_all_is_checked(
    ctc: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = ctc
    rewrite(folder, lambda tensors: tensors.pop("lm_head.bias"))

    def read(*args: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(CheckpointError, match="missing"):
        load_ctc(folder)


def test_mismatched_sizes_can_be_ignored(
    ctc: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = ctc
    with pytest.raises(CheckpointError, match=r"lm_head\.bias is \[11\], \[9\] is needed"):
        load_ctc(folder, vocab_size=9, strict=False)
    loaded = load_ctc(folder, vocab_size=9, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (9, 32)
    assert 0.01 < loaded.lm_head.weight.std() < 0.04
    assert "lm_head.weight is [11, 32], [9, 32] is needed" in caplog.text
    assert_equal(loaded.wav2vec2_bert.state_dict(), model.wav2vec2_bert.state_dict())


def test_tensor_given_twice(ctc: tuple[nn.Module, Path]) -> None:
    _, folder = ctc
    stem = "wav2vec2_bert.encoder.layers.0.conv_module.pointwise_conv1.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[stem + "_v"] = tensors[stem].clone()
        tensors[stem + "_g"] = torch.ones(64, 1, 1)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"{stem} is given twice"):
        load_ctc(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(ctc: tuple[nn.Module, Path], keep: int) -> None:
    _, folder = ctc
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        load_ctc(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20000, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_file(ctc: tuple[nn.Module, Path], keep: int, zipped: bool) -> None:
    model, folder = ctc
    save_torch(folder, model.state_dict(), _use_new_zipfile_serialization=zipped)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_ctc(folder)


def test_no_weights(ctc: tuple[nn.Module, Path]) -> None:
    _, folder = ctc
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: none of model\.safetensors"):
        load_ctc(folder)


def test_no_config(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_ctc(folder)
    assert_equal(load_ctc(folder, config=model.config).state_dict(), model.state_dict())


# Shards and their index.


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[models.Wav2Vec2BertForCTC, Path]:
    model = ours("Wav2Vec2BertForCTC")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return model, tmp_path / "sharded"


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    change(index)
    file.write_text(json.dumps(index), encoding="utf-8")


def test_shards_and_index_are_as_the_reference_writes_them(
    sharded: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, folder = sharded
    transformers.Wav2Vec2BertForCTC.from_pretrained(folder).save_pretrained(
        tmp_path / "theirs", max_shard_size="60KB"
    )
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "theirs"))
    name = "model.safetensors.index.json"
    index, expected = (
        json.loads((path / name).read_text(encoding="utf-8"))
        for path in (folder, tmp_path / "theirs")
    )
    assert index["weight_map"].keys() == expected["weight_map"].keys()
    assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]
    for file in folder.glob("*.safetensors"):
        assert file.stat().st_size < 60_000 + 10_000
        with safetensors.safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "path",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/../../s.safetensors", "c:\\s.bin"],
)
def test_index_that_points_outside(sharded: tuple[nn.Module, Path], path: str) -> None:
    model, folder = sharded
    write_checkpoint(model.state_dict(), folder.parent / "elsewhere")
    os.replace(
        folder.parent / "elsewhere" / "model.safetensors", folder.parent / "secret.safetensors"
    )
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.bias": path}))
    with pytest.raises(CheckpointError, match=r"index\.json names .* outside of its folder"):
        load_ctc(folder)


def test_shard_that_is_a_link_out_of_the_folder(sharded: tuple[nn.Module, Path]) -> None:
    _, folder = sharded
    shard = sorted(folder.glob("*.safetensors"))[1]
    target = folder.parent / "target"
    shard.rename(target)
    shard.symlink_to(target)
    with pytest.raises(CheckpointError, match=r"a link to .* outside of its folder"):
        load_ctc(folder)


def test_link_within_the_folder_and_to_the_folder_work(sharded: tuple[nn.Module, Path]) -> None:
    model, folder = sharded
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(folder / "moved")
    shard.symlink_to("moved")
    (folder.parent / "link").symlink_to(folder)
    assert_equal(load_ctc(folder.parent / "link").state_dict(), model.state_dict())


def test_subfolders_of_the_folder_work(sharded: tuple[nn.Module, Path]) -> None:
    model, folder = sharded
    shard = sorted(folder.glob("*.safetensors"))[1]
    (folder / "part").mkdir()
    shard.rename(folder / "part" / shard.name)

    def change(index: dict) -> None:
        weight_map = index["weight_map"]
        for key, name in weight_map.items():
            if name == shard.name:
                weight_map[key] = f"part/{name}"

    edit_index(folder, change)
    assert_equal(load_ctc(folder).state_dict(), model.state_dict())
    nested = folder.parent
    assert_equal(load_ctc(nested, subfolder=folder.name).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "null"]
)
def test_broken_index(sharded: tuple[nn.Module, Path], text: str) -> None:
    _, folder = sharded
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_ctc(folder)


def test_index_that_names_something_else(sharded: tuple[nn.Module, Path]) -> None:
    _, folder = sharded
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.bias": "config.json"}))
    with pytest.raises(CheckpointError, match=r"'config\.json', which is no file of weights"):
        load_ctc(folder)


def test_missing_shard_and_misplaced_tensor(sharded: tuple[nn.Module, Path]) -> None:
    _, folder = sharded
    first, *_, last = sorted(folder.glob("*.safetensors"))
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.bias": first.name}))
    with pytest.raises(CheckpointError, match=rf"lack them: lm_head\.bias \({first.name}\)"):
        load_ctc(folder)
    last.unlink()
    with pytest.raises(CheckpointError, match=f"names {last.name}, which is not there"):
        load_ctc(folder)


def test_truncated_shard(sharded: tuple[nn.Module, Path]) -> None:
    _, folder = sharded
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{last.name} is damaged or truncated"):
        load_ctc(folder)


# The hub's cache.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(sharded: tuple[models.Wav2Vec2BertForCTC, Path], tmp_path: Path) -> Path:
    """A hub cache that holds the sharded model as org/model, its files links to blobs."""
    repository = tmp_path / "cache" / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for number, file in enumerate(sharded[1].iterdir()):
        file.rename(repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    return tmp_path / "cache"


def test_cached_repository_loads_offline(sharded: tuple[nn.Module, Path], cached: Path) -> None:
    model = sharded[0]
    for revision in (None, "main", COMMIT):
        loaded = load_ctc("org/model", revision=revision, cache_dir=cached, local_files_only=True)
        assert_equal(loaded.state_dict(), model.state_dict())
        assert loaded.config.name_or_path == "org/model"
    snapshot = cached / "models--org--model" / "snapshots" / COMMIT
    assert_equal(load_ctc(snapshot).state_dict(), model.state_dict())
    (cached / "link").symlink_to(snapshot)
    assert_equal(load_ctc(cached / "link").state_dict(), model.state_dict())


def test_all_files_come_from_one_commit(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = huggingface_hub.hf_hub_download
    asked = []

    def record(repository: str, filename: str, **options: object) -> str:
        asked.append((filename, options["revision"]))
        return download(repository, filename, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", record)
    load_ctc("org/model", revision="main", cache_dir=cached, local_files_only=True)
    assert asked[0] == ("config.json", "main")
    assert {revision for _, revision in asked[1:]} == {COMMIT}
    assert len(asked) > 4


def test_cached_repository_without_weights(cached: Path) -> None:
    (cached / "models--org--model" / "snapshots" / COMMIT / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="org/model holds no weights"):
        load_ctc("org/model", cache_dir=cached, local_files_only=True)
    with pytest.raises(OSError, match="'org/other' is no local folder"):
        load_ctc("org/other", cache_dir=cached, local_files_only=True)


# Dtypes, devices and other arguments.


def test_dtype(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    for dtype in (torch.bfloat16, "bfloat16"):
        loaded = load_ctc(folder, dtype=dtype)
        assert loaded.dtype == loaded.config.dtype == torch.bfloat16
        assert_equal(loaded.state_dict(), copy.deepcopy(model).bfloat16().state_dict())
    assert load_ctc(folder, torch_dtype="float64").dtype == torch.float64
    load_ctc(folder, dtype="float16").save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    reference = transformers.Wav2Vec2BertForCTC.from_pretrained(folder)
    for dtype in (None, "auto"):
        loaded = load_ctc(folder, dtype=dtype)
        assert loaded.dtype == reference.dtype == torch.float16
    # The configuration counts before the weights, which count where it says nothing.
    config = Wav2Vec2BertConfig.from_pretrained(folder)
    for named, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float16)):
        config.dtype = named
        config.save_pretrained(folder)
        reference = transformers.Wav2Vec2BertForCTC.from_pretrained(folder)
        loaded = load_ctc(folder)
        assert loaded.dtype == loaded.config.dtype == reference.dtype == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "float99"}, ValueError, "dtype is 'float99'"),
        ({"dtype": torch.int8}, ValueError, r"dtype is torch\.int8"),
        ({"device": "toaster"}, ValueError, "device is 'toaster'"),
        ({"attn_implementation": "sdpa"}, TypeError, "'attn_implementation' is no field"),
        ({"hidden_sise": 3}, TypeError, "did you mean 'hidden_size'"),
        ({"layerdrop": 3}, ValueError, "layerdrop is 3"),
    ],
)
def test_bad_arguments(
    ctc: tuple[nn.Module, Path], arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_ctc(ctc[1], **arguments)


def test_config_argument_is_copied(ctc: tuple[nn.Module, Path]) -> None:
    _, folder = ctc
    config = Wav2Vec2BertConfig(**SMALL)
    before = copy.deepcopy(config)
    loaded = load_ctc(folder, config=config, dtype="float64")
    assert loaded.config.dtype == torch.float64
    assert load_ctc(folder, config=config, layerdrop=0.5).config.layerdrop == 0.5
    assert config == before


def test_parameters_own_their_memory(ctc: tuple[nn.Module, Path]) -> None:
    """The file may be overwritten while the model lives."""
    model, folder = ctc
    loaded = load_ctc(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    assert_equal(loaded.state_dict(), model.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_device(sharded: tuple[nn.Module, Path], dtype: str | None) -> None:
    model, folder = sharded
    loaded = load_ctc(folder, device="cuda", dtype=dtype)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cuda"}
    expected = copy.deepcopy(model).to(loaded.dtype).state_dict()
    assert_equal({k: v.cpu() for k, v in loaded.state_dict().items()}, expected)
    loaded.save_pretrained(folder)
    assert_equal(load_ctc(folder).state_dict(), expected)


# Writing.


def test_earlier_files_are_replaced(tmp_path: Path) -> None:
    model = ours("Wav2Vec2BertForCTC")
    other = ours("Wav2Vec2BertForCTC")
    (tmp_path / "notes-00001-of-00002.safetensors").write_bytes(b"mine")
    for saved, size in ((other, "20KB"), (model, "60KB"), (other, "5GB"), (model, "20KB")):
        saved.save_pretrained(tmp_path, max_shard_size=size)
        assert_equal(load_ctc(tmp_path).state_dict(), saved.state_dict())
        files = {file.name for file in tmp_path.iterdir()}
        files -= {"config.json", "notes-00001-of-00002.safetensors"}
        if size == "5GB":
            assert files == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            expected = {"model.safetensors.index.json", *index["weight_map"].values()}
            assert files == expected
    assert (tmp_path / "notes-00001-of-00002.safetensors").read_bytes() == b"mine"


def test_failed_write_keeps_the_earlier_checkpoint(
    ctc: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = ctc
    before = sorted(os.listdir(folder))

    def write_half(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("w2vbert_fast.checkpoint.save_file", write_half)
    for size in ("5GB", "60KB"):
        with pytest.raises(OSError, match="no space left"):
            ours("Wav2Vec2BertForCTC").save_pretrained(folder, max_shard_size=size)
        assert sorted(os.listdir(folder)) == before
        assert_equal(load_ctc(folder).state_dict(), model.state_dict())


def test_save_cut_short_never_mixes_two_checkpoints(
    sharded: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = sharded
    replace = os.replace
    renamed = []

    def replace_once(source: Path, target: Path) -> None:
        if renamed:
            raise OSError("killed")
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr("os.replace", replace_once)
    with pytest.raises(OSError, match="killed"):
        ours("Wav2Vec2BertForCTC").save_pretrained(folder, max_shard_size="60KB")
    assert len(renamed) == 1
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_ctc(folder)


def test_configuration_that_cannot_be_written_leaves_the_earlier_checkpoint(
    ctc: tuple[nn.Module, Path],
) -> None:
    model, folder = ctc
    other = ours("Wav2Vec2BertForCTC", hidden_act=torch.tanh)
    with pytest.raises(ValueError, match="hidden_act"):
        other.save_pretrained(folder)
    assert_equal(load_ctc(folder).state_dict(), model.state_dict())


def test_views_of_one_buffer_are_saved_as_tensors_of_their_own(
    ctc: tuple[models.Wav2Vec2BertForCTC, Path],
) -> None:
    model, folder = ctc
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attention = model.wav2vec2_bert.encoder.layers[0].self_attn
    linears = (attention.linear_q, attention.linear_k, attention.linear_v)
    packed = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, packed.chunk(3), strict=True):
        linear.weight = nn.Parameter(part)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())
    # The same tensor under two names.
    norms = model.wav2vec2_bert.encoder.layers[0]
    norms.ffn1_layer_norm.weight = norms.ffn2_layer_norm.weight
    for size in ("5GB", "60KB"):
        model.save_pretrained(folder, max_shard_size=size)
        assert_equal(load_ctc(folder).state_dict(), expected)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size < 1.2 * sum(tensor.numel() * 4 for tensor in expected.values())


def test_state_dict_argument(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=doubled)
    assert_equal(load_ctc(folder).state_dict(), doubled)


def test_state_dict_must_hold_tensors(ctc: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model = ctc[0]
    with pytest.raises(TypeError, match=r"extra is a list; state_dict must hold tensors"):
        model.save_pretrained(tmp_path / "new", state_dict={**model.state_dict(), "extra": [1]})
    with pytest.raises(ValueError, match="state_dict is empty"):
        model.save_pretrained(tmp_path / "new", state_dict={})
    assert not (tmp_path / "new").exists()


def test_save_has_the_permissions_of_any_new_file(ctc: tuple[nn.Module, Path]) -> None:
    _, folder = ctc
    (folder / "new").write_text("x", encoding="utf-8")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("size", ["5", "five GB", 0, -1, None, "0KB", True, 5e9])
def test_bad_shard_size(ctc: tuple[nn.Module, Path], size: object) -> None:
    model, folder = ctc
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match="max_shard_size is"):
        model.save_pretrained(folder, max_shard_size=size)
    assert sorted(os.listdir(folder)) == before


def test_meta_tensors_cannot_be_written(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = ours("Wav2Vec2BertModel")
    with pytest.raises(ValueError, match="meta device"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_save_into_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="file"):
        ours("Wav2Vec2BertModel").save_pretrained(tmp_path / "file")


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = ours("Wav2Vec2BertForCTC")
    before = copy.deepcopy(model.config)
    model.save_pretrained(tmp_path)
    assert model.config == before


def test_duplicate_tensors_over_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x is both in a\.safetensors and in b\.safetensors"):
        Checkpoint("two", sorted(tmp_path.iterdir()))


def test_first_layout_counts(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "model.safetensors.index.json").write_text("stale", encoding="utf-8")
    assert find_checkpoint(folder).tensors.keys() == model.state_dict().keys()


# Memory.

MEASURE = """
import gc, sys, torch
from w2vbert_fast.models import Wav2Vec2BertModel

def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return 1024 * int(line.split()[1])

gc.collect()
before = memory("VmRSS")
model = Wav2Vec2BertModel.from_pretrained(sys.argv[1], dtype=sys.argv[2])
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, (memory("VmHWM") - before) / weights)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> models.Wav2Vec2BertModel:
    """290 MB in float32: three layers of the published width."""
    with torch.device("meta"):
        model = models.Wav2Vec2BertModel(Wav2Vec2BertConfig(num_hidden_layers=3))
    return model.to_empty(device="cpu")


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("whole", "bfloat16"), ("sharded", "float32"), ("torch", "float32")],
)
def test_peak_memory_of_loading(
    large: models.Wav2Vec2BertModel, tmp_path: Path, layout: str, dtype: str
) -> None:
    if layout == "torch":
        large.config.save_pretrained(tmp_path)
        torch.save(large.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        size = "100MB" if layout == "sharded" else "5GB"
        large.save_pretrained(tmp_path, max_shard_size=size)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    weights, ratio = done.stdout.split()
    assert int(weights) > (280e6 if dtype == "float32" else 140e6)
    assert 0.95 < float(ratio) <= 1.1
