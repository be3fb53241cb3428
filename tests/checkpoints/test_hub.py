"""Finding files: folders, and the hub's cache without a network."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from w2vbert_fast.checkpoints.repository import Repository, pinned_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds config.json of org/model at one commit of main."""
    folder = tmp_path / "hub" / "models--org--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (folder / "blobs").mkdir()
    (folder / "blobs" / "abc").write_text("{}", encoding="utf-8")
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(Path("../../blobs/abc"))
    return tmp_path / "hub"


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}", encoding="utf-8")
    found = tmp_path / "inner" / "config.json"
    assert Repository(tmp_path / "inner").find("config.json") == found
    assert Repository(str(tmp_path), subfolder="inner").find("config.json") == found
    assert Repository(tmp_path).find("config.json") is None
    assert Repository(tmp_path).find("inner") is None


def test_folder_comes_before_a_repository_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert Repository("org/model", local_files_only=True).find("config.json") is None


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(OSError, match=r"model\.safetensors is a file; a folder"):
        Repository(file).find("config.json")


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./model", "../model", "a/b/c", "~/model", "org/", "", "a b", "-x"]
)
def test_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no hub id either|empty"):
        Repository(path, local_files_only=True).find("config.json")


def test_path_object_is_never_a_hub_id(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        Repository(Path("org/model"), cache_dir=cache, local_files_only=True).find("config.json")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_file_works_offline(cache: Path, revision: str | None) -> None:
    found = Repository("org/model", revision=revision, cache_dir=cache, local_files_only=True).find(
        "config.json"
    )
    assert found is not None
    assert found.read_text(encoding="utf-8") == "{}"
    assert pinned_revision(found) == COMMIT


def test_file_that_a_cached_snapshot_lacks(cache: Path) -> None:
    for revision in (None, COMMIT):
        place = Repository("org/model", revision, os.fspath(cache), local_files_only=True)
        assert place.find("model.safetensors") is None


@pytest.mark.parametrize(
    ("repository", "revision"), [("org/other", None), ("org/model", "v2"), ("other", "main")]
)
def test_uncached_repository_is_named(cache: Path, repository: str, revision: str | None) -> None:
    with pytest.raises(OSError, match=f"'{repository}' is no local folder.*local_files_only"):
        Repository(repository, revision=revision, cache_dir=cache, local_files_only=True).find(
            "config.json"
        )


def http_error(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("from the hub", response=response)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "'org/model' is no local folder, and no hub repository"),
        (errors.GatedRepoError, "'org/model' is gated"),
        (errors.RevisionNotFoundError, "'org/model' has no revision 'v3'"),
    ],
)
def test_answers_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise http_error(kind)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(OSError, match=message):
        Repository("org/model", revision="v3").find("config.json")


def test_file_that_the_repository_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise http_error(errors.RemoteEntryNotFoundError)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert Repository("org/model").find("config.json") is None


def test_unreachable_hub_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert Repository("org/model", cache_dir=cache).find("model.safetensors") is None
    with pytest.raises(OSError, match=r"'org/other'.*the hub cannot be reached"):
        Repository("org/other", cache_dir=cache).find("config.json")


def test_pinned_revision_of_other_paths() -> None:
    assert pinned_revision(Path("/models/snapshots/latest/config.json")) is None
    assert pinned_revision(Path("config.json")) is None
    nested = Path("/cache/models--a--b/snapshots") / COMMIT / "inner" / "config.json"
    assert pinned_revision(nested) == COMMIT


def test_a_folder_of_a_checkpoint(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache / "models--org--model" / "snapshots" / COMMIT
    asked: list[object] = []

    def download(
        repository: str, *, revision: str, allow_patterns: list[str], **where: object
    ) -> str:
        asked.append((repository, revision, allow_patterns))
        assert where == {"cache_dir": cache, "local_files_only": True, "token": None}
        (snapshot / "lm").mkdir()
        return str(snapshot)

    def unreachable(*arguments: object, **options: object) -> str:
        raise errors.LocalEntryNotFoundError("no connection")

    def place() -> Repository:
        return Repository("org/model", cache_dir=cache, local_files_only=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert place().find_folder("lm") is None
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert place().find_folder("lm", beside=("alphabet.json",)) == snapshot / "lm"
    assert asked == [("org/model", COMMIT, ["lm/*", "alphabet.json"])]
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert place().find_folder("lm") == snapshot / "lm"


def test_a_folder_in_a_local_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert Repository(tmp_path).find_folder("lm") is None
    (tmp_path / "lm").mkdir()
    assert Repository(tmp_path).find_folder("lm") == tmp_path / "lm"
    with pytest.raises(OSError, match="no hub id either"):
        Repository(tmp_path / "no").find_folder("lm")
