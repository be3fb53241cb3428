"""The best checkpoint on the hub: asked for before the training, uploaded after it."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tests.helpers.training import STILL, RandomSource, config, make_model
from w2vbert_fast.training import finetune


class Hub:
    """What `HfApi` is asked for."""

    asked: list[tuple[str, Any]]
    failing: bool

    def __init__(self, token: Any = None) -> None: ...

    def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
        # Where it is there, nothing is asked for.
        if self.asked:
            return SimpleNamespace(repo_id=f"me/{repo_id}")
        assert exist_ok
        self.asked.append((repo_id, private))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(
        self, repo_id: str, folder_path: Path, allow_patterns: list[str], **rest: Any
    ) -> Any:
        if self.failing:
            raise OSError("no network")
        names = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        matched = [n for n in names if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        self.asked.append((repo_id, sorted(matched)))
        return SimpleNamespace(commit_url="https://hub/commit")


def test_the_best_checkpoint_is_uploaded_and_again_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.asked, Hub.failing = [], True
    source = RandomSource(4)
    model = make_model(tmp_path / "model", **STILL)
    options = config(model, tmp_path / "out", steps=1, push_to_hub="new", hub_private=True, lora=1)
    steps: list[int] = []

    def watch(report: Any) -> None:
        assert Hub.asked == [("new", True)]
        steps.append(report.step)

    with pytest.raises(OSError, match="no network"):
        finetune(options, train=source, evaluation=source, on_step=watch)
    assert steps == [1] and (tmp_path / "out" / "best" / "config.json").is_file()
    Hub.failing = False
    # The run is at its end: only the upload is done.
    result = finetune(options, train=source, evaluation=source, on_step=watch)
    assert steps == [1] and result.uploaded == "https://hub/commit"
    repository, names = Hub.asked[-1]
    assert repository == "me/new"
    assert {"config.json", "model.safetensors", "vocab.json"} < set(names)
    assert "adapter/adapter_config.json" in names


def test_a_hub_that_is_not_reached_is_said_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = huggingface_hub.errors.HfHubHTTPError.__bases__
    error = next(base for base in bases if not issubclass(base, OSError))

    def fails(*arguments: Any, **options: Any) -> Any:
        raise error("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
    source = RandomSource(4)
    model = make_model(tmp_path / "model", **STILL)
    options = config(model, tmp_path / "out", steps=1, push_to_hub="me/new")
    with pytest.raises(OSError, match=r"^me/new: the hub cannot be reached: \[Errno -2\]"):
        finetune(options, train=source, evaluation=source, on_step=lambda _: pytest.fail())
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda *a, **o: SimpleNamespace(repo_id="me/new")
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fails)
    with pytest.raises(OSError, match=r"^me/new: the hub cannot be reached"):
        finetune(options, train=source, evaluation=source)


def test_privacy_without_an_upload_has_no_effect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hub_private needs push_to_hub"):
        config(tmp_path, tmp_path, hub_private=True)
