"""Finding the files of a checkpoint: in a local folder, or through the Hugging Face hub."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def resolve_file(
    path_or_id: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    subfolder: str = "",
    force_download: bool = False,
) -> Path | None:
    """Find one file of a checkpoint.

    A local folder comes first. Anything else is a repository id of the hub: its file is downloaded
    into the cache, or taken from the cache when the hub cannot be reached.

    Args:
        path_or_id: a folder, or an id such as `facebook/w2v-bert-2.0`.
        filename: the file's name within the folder or repository.
        revision: branch, tag or commit of the repository; ignored for a folder.
        cache_dir: the hub's cache folder, where it is not the usual one.
        local_files_only: never ask the hub, use the cache alone.
        token: the hub's access token, as `huggingface_hub` takes it.
        subfolder: folder within the folder or repository that holds the file.
        force_download: download the file though it is in the cache.

    Returns:
        The file's path, or None when the folder or repository has no such file. With the hub out
        of reach, None means that the revision is in the cache and this file of it is not.

    Raises:
        OSError: `path_or_id` is neither a folder nor a repository that can be had: a file, a path
            that does not exist, an unknown id or revision, or an id that is not in the cache while
            the hub cannot be reached.
    """
    path = Path(path_or_id)
    if not os.fspath(path_or_id):
        raise FileNotFoundError("the path or hub id is empty")
    if path.is_dir():
        candidate = path / subfolder / filename
        return candidate if candidate.is_file() else None
    if path.exists():
        raise NotADirectoryError(
            f"{path} is a file; a folder that holds {filename} or a hub id is needed"
        )
    if not isinstance(path_or_id, str) or not _REPOSITORY_ID.fullmatch(path_or_id):
        raise FileNotFoundError(f"{os.fspath(path_or_id)!r} is no folder, and no hub id either")
    return _resolve_on_hub(
        path_or_id,
        filename,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        subfolder=subfolder,
        force_download=force_download,
    )


def resolve_folder(
    path_or_id: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    beside: Sequence[str] = (),
) -> Path | None:
    """Find a folder of a checkpoint, with the files in it.

    Args:
        path_or_id: a folder, or a hub id.
        name: the folder's name within the folder or repository.
        revision: branch, tag or commit of the repository; ignored for a folder.
        beside: files next to the folder that are wanted too, where there are any.

    Returns:
        The folder's path, or None when the checkpoint has no such folder. With the hub out of
        reach, what the cache has of it counts.

    Raises:
        OSError: as `resolve_file`.
    """
    config = resolve_file(path_or_id, "config.json", revision=revision)
    if config is None:
        folder = Path(path_or_id)
        return folder / name if (folder / name).is_dir() else None
    commit = pinned_revision(config)
    if commit is not None and not Path(path_or_id).is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        # Out of reach: what the cache has.
        with contextlib.suppress(LocalEntryNotFoundError):
            snapshot_download(
                os.fspath(path_or_id), revision=commit, allow_patterns=[f"{name}/*", *beside]
            )
    folder = config.parent / name
    return folder if folder.is_dir() else None


def pinned_revision(path: Path) -> str | None:
    """The commit of a file in the hub's cache, from `.../snapshots/COMMIT/FILE`, else None.

    Asking for the other files of a checkpoint by this commit keeps them from different states of
    a branch that moves meanwhile.
    """
    parts = path.parts
    for index in range(len(parts) - 2, 0, -1):
        if parts[index - 1] == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", parts[index]):
            return parts[index]
    return None


def _resolve_on_hub(
    repository: str,
    filename: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
    subfolder: str,
    force_download: bool,
) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        found = hf_hub_download(
            repository,
            filename,
            subfolder=subfolder or None,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
    except LocalEntryNotFoundError as error:
        # A subclass of EntryNotFoundError that says less: the hub was not asked, or did not answer.
        if _has_cached_snapshot(repository, revision, cache_dir):
            return None
        reason = "local_files_only is set" if local_files_only else "the hub cannot be reached"
        raise OSError(
            f"{repository!r} is no local folder, its files{at} are not in the hub's cache, "
            f"and {reason}"
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise OSError(
            f"hub repository {repository!r} is gated: accept its terms on its page and pass token="
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"hub repository {repository!r} has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise OSError(
            f"{repository!r} is no local folder, and no hub repository that can be seen"
            " (a private one needs token=)"
        ) from error
    return Path(found)


def _has_cached_snapshot(
    repository: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> bool:
    """Whether any file of this revision of the repository is in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(cache_dir if cache_dir is not None else HF_HUB_CACHE)
    folder = root / ("models--" + repository.replace("/", "--"))
    reference = folder / "refs" / (revision or "main")
    commit = revision or "main"
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot.is_dir() and any(snapshot.iterdir())


class HubMixin:
    """`push_to_hub` for what has `save_pretrained`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_arguments: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub.

        Args:
            repo_id: the repository, which is made where there is none.
            commit_message: of the commit; by default it names what is uploaded.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: the hub's access token.
            revision: the branch.
            create_pr: open a pull request instead of changing the branch.
            **save_arguments: for `save_pretrained`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_arguments)  # type: ignore[attr-defined]
            return upload_folder(
                folder,
                sorted(os.listdir(folder)),
                repo_id=repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def upload_folder(
    folder: str | os.PathLike[str],
    filenames: Sequence[str],
    *,
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload some files of a folder; see `HubMixin.push_to_hub`."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = hub.upload_folder(
        repo_id=repository,
        folder_path=Path(folder),
        allow_patterns=list(filenames),
        commit_message=commit_message or "Upload a model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.pr_url if create_pr else commit.commit_url)


def upload_arguments(
    folder: str | os.PathLike[str], push_to_hub: bool, given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments of `upload_folder` among those of a `save_pretrained`, None without an upload.

    Raises:
        TypeError: one is unknown.
    """
    known = list(inspect.signature(upload_folder).parameters)[2:]
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no argument of save_pretrained or push_to_hub")
    return {"repo_id": Path(folder).resolve().name, **given} if push_to_hub else None
