"""Weights between files and models: names, older layouts, and what does not fit."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.checkpoints import (
    CLASSES,
    SMALL,
    assert_equal,
    load_base,
    load_ctc,
    ours,
    rewrite,
    saved_ctc,
    theirs,
)
from w2vbert_fast import models
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.checkpoints.weights import Checkpoint, CheckpointError, find_checkpoint
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig


@pytest.fixture
def ctc(tmp_path: Path) -> tuple[models.Wav2Vec2BertForCTC, Path]:
    """A small CTC model and the folder it is saved in."""
    return saved_ctc(tmp_path / "ctc"), tmp_path / "ctc"


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
    assert all(parameter.requires_grad for parameter in again.parameters())
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
    modules = {key.partition(".")[0] for key in head}
    assert all(module in warnings[0].getMessage() for module in modules)
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


def test_another_kind_of_head_is_left_out_and_the_own_one_initialised(
    ctc: tuple[nn.Module, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = ctc
    loaded = models.Wav2Vec2BertForSequenceClassification.from_pretrained(folder)
    assert_equal(loaded.wav2vec2_bert.state_dict(), model.wav2vec2_bert.state_dict())
    assert "newly initialised: projector, classifier" in caplog.text
    assert "no use for lm_head" in caplog.text


def test_a_head_of_which_a_part_is_missing_is_an_error_unless_not_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours("Wav2Vec2BertForSequenceClassification").save_pretrained(tmp_path)
    load = models.Wav2Vec2BertForXVector.from_pretrained
    with pytest.raises(CheckpointError, match=r"(?s)wrong shape .*missing .*tdnn\.0") as info:
        load(tmp_path)
    assert "strict=False" in str(info.value)
    load(tmp_path, strict=False, ignore_mismatched_sizes=True)
    assert "tdnn" in caplog.text


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

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".layers." in key]:
            del tensors[key]

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as info:
        load_ctc(folder)
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


def test_first_layout_counts(ctc: tuple[nn.Module, Path]) -> None:
    model, folder = ctc
    (folder / "pytorch_model.bin").write_bytes(b"stale")
    (folder / "model.safetensors.index.json").write_text("stale", encoding="utf-8")
    assert find_checkpoint(Repository(folder)).tensors.keys() == model.state_dict().keys()


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
        ({"attn_implementation": "none"}, ValueError, "attn_implementation is 'none'; it must be"),
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
