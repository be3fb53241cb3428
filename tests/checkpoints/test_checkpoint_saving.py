"""Writing checkpoints, and the memory that loading them takes."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.checkpoints import assert_equal, load_ctc, ours, saved_ctc
from w2vbert_fast import models
from w2vbert_fast.checkpoints.weights import CheckpointError
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig


@pytest.fixture
def ctc(tmp_path: Path) -> tuple[models.Wav2Vec2BertForCTC, Path]:
    """A small CTC model and the folder it is saved in."""
    return saved_ctc(tmp_path / "ctc"), tmp_path / "ctc"


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[models.Wav2Vec2BertForCTC, Path]:
    """A small CTC model and the folder it is saved in, in several files."""
    folder = tmp_path / "sharded"
    return saved_ctc(folder, max_shard_size="60KB"), folder


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

    monkeypatch.setattr("w2vbert_fast.checkpoints.weights.save_file", write_half)
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
