"""The files of one checkpoint: in a local folder, or through the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.files import read_json
from w2vbert_fast.checkpoints.keywords import READING, take

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


@dataclass
class Repository:
    """Where the files of a checkpoint are.

    A local folder comes first. Anything else is a repository id of the hub, whose files are
    downloaded into its cache, or taken from there when it cannot be reached.

    Attributes:
        path_or_id: a folder, or a hub id such as `facebook/w2v-bert-2.0`.
        revision: branch, tag or commit on the hub. Once a file is found it is the commit of that
            file, so that all files come from one state of the repository.
        cache_dir: the hub's cache folder, where it is not the usual one.
        local_files_only: never ask the hub, use its cache alone.
        token: the hub's access token, as `huggingface_hub` takes it.
        subfolder: folder within the folder or repository that holds the files.
        force_download: download files though they are in the cache.
    """

    path_or_id: str | os.PathLike[str]
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    subfolder: str = ""
    force_download: bool = False

    @property
    def name(self) -> str:
        """The path or id as a string."""
        return os.fspath(self.path_or_id)

    def take(self, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """Follow the keywords of transformers that say how files are had; return the others.

        These are `force_download`, `use_auth_token`, which is the older name of `token`, and those
        of `keywords.READING`, which have no effect.

        Raises:
            ValueError: `use_auth_token` and another `token` are given.
        """
        rest = take(keywords, READING)
        self.force_download = bool(rest.pop("force_download", self.force_download))
        older = rest.pop("use_auth_token", None)
        if older is not None:
            if self.token not in (None, older):
                raise ValueError("use_auth_token is the older name of token; pass one of them")
            self.token = older
        return rest

    def find(self, filename: str) -> Path | None:
        """The path of a file, or None when the folder or repository has no such file.

        With the hub out of reach, None means that the revision is in the cache and this file of it
        is not.

        Raises:
            OSError: `path_or_id` is neither a folder nor a repository that can be had: a file, a
                path that does not exist, an unknown id or revision, or an id that is not in the
                cache while the hub cannot be reached.
        """
        path = Path(self.path_or_id)
        if not self.name:
            raise FileNotFoundError("the path or hub id is empty")
        if path.is_dir():
            candidate = path / self.subfolder / filename
            found = candidate if candidate.is_file() else None
        elif path.exists():
            raise NotADirectoryError(
                f"{path} is a file; a folder that holds {filename} or a hub id is needed"
            )
        elif not isinstance(self.path_or_id, str) or not _REPOSITORY_ID.fullmatch(self.path_or_id):
            raise FileNotFoundError(f"{self.name!r} is no folder, and no hub id either")
        else:
            found = _find_on_hub(self, filename)
        if found is not None:
            self.revision = pinned_revision(found) or self.revision
        return found

    def find_folder(self, name: str, beside: Sequence[str] = ()) -> Path | None:
        """The path of a folder with the files in it, or None when there is no such folder.

        With the hub out of reach, what the cache has of it counts.

        Args:
            name: the folder's name within the folder or repository.
            beside: files next to the folder that are wanted too, where there are any.

        Raises:
            OSError: as `find`.
        """
        config = self.find("config.json")
        local = Path(self.path_or_id)
        folder = (local if config is None else config.parent) / name
        commit = None if config is None else pinned_revision(config)
        if commit is not None and not local.is_dir():
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import LocalEntryNotFoundError

            # Out of reach: what the cache has.
            with contextlib.suppress(LocalEntryNotFoundError):
                snapshot_download(
                    self.name,
                    revision=commit,
                    cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                    local_files_only=self.local_files_only,
                    token=self.token,
                    allow_patterns=[f"{name}/*", *beside],
                )
        return folder if folder.is_dir() else None

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """The content of a JSON file, or None if the repository has no such file.

        Raises:
            OSError: there is no such repository, or the file cannot be read.
            ValueError: the file is no JSON object.
        """
        path = self.find(filename)
        return None if path is None else read_json(path)


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


def _find_on_hub(place: Repository, filename: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = str(place.path_or_id), place.revision
    at = f" at revision {revision!r}" if revision else ""
    try:
        found = hf_hub_download(
            repository,
            filename,
            subfolder=place.subfolder or None,
            revision=revision,
            cache_dir=None if place.cache_dir is None else Path(place.cache_dir),
            local_files_only=place.local_files_only,
            token=place.token,
            force_download=place.force_download,
        )
    except LocalEntryNotFoundError as error:
        # A subclass of EntryNotFoundError that says less: the hub was not asked, or did not answer.
        if _has_cached_snapshot(place):
            return None
        reason = (
            "local_files_only is set" if place.local_files_only else "the hub cannot be reached"
        )
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


def _has_cached_snapshot(place: Repository) -> bool:
    """Whether any file of this revision of the repository is in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(place.cache_dir if place.cache_dir is not None else HF_HUB_CACHE)
    folder = root / ("models--" + place.name.replace("/", "--"))
    commit = place.revision or "main"
    reference = folder / "refs" / commit
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot.is_dir() and any(snapshot.iterdir())
