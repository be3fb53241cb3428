"""Checkpoints of several files, their index, and the hub's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from tests.helpers.checkpoints import assert_equal, load_ctc, saved_ctc
from w2vbert_fast import models
from w2vbert_fast.checkpoints.weights import Checkpoint, CheckpointError, write_checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[models.Wav2Vec2BertForCTC, Path]:
    """A small CTC model and the folder it is saved in, in several files."""
    folder = tmp_path / "sharded"
    return saved_ctc(folder, max_shard_size="60KB"), folder


# Shards and their index.


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


def test_duplicate_tensors_over_files(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"x is both in a\.safetensors and in b\.safetensors"):
        Checkpoint("two", sorted(tmp_path.iterdir()))


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


def test_cached_repository_loads_where_the_hub_is_out_of_reach(
    sharded: tuple[nn.Module, Path], cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = load_ctc("org/model", cache_dir=cached)
    assert_equal(loaded.state_dict(), sharded[0].state_dict())
    with pytest.raises(OSError, match=r"'org/other' is no local folder.*cannot be reached"):
        load_ctc("org/other", cache_dir=cached)


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
