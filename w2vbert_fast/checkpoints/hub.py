"""`from_pretrained`, `save_pretrained` and `push_to_hub`, said once for all that have them."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from w2vbert_fast.checkpoints.keywords import Rule, take
from w2vbert_fast.checkpoints.repository import Repository

_T = TypeVar("_T", bound="HubMixin")


class HubMixin:
    """What comes from a folder or the hub, and goes there."""

    _keywords: ClassVar[Mapping[str, Rule]] = {}
    """Keywords of transformers that `from_pretrained` knows, besides those of `Repository.take`."""

    @classmethod
    def from_pretrained(
        cls: type[_T],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str = "",
        **overrides: Any,
    ) -> _T:
        """Load what a folder or a repository of the hub holds.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id such as `facebook/w2v-bert-2.0`;
                of configurations and feature extractors also the file itself.
            revision: branch, tag or commit on the hub.
            cache_dir: the hub's cache folder, where it is not the usual one.
            force_download: download files though they are in the cache.
            local_files_only: never ask the hub, use its cache alone.
            token: the hub's access token.
            subfolder: folder within the folder or repository that holds the files.
            **overrides: values that replace those of the files. Arguments of transformers that say
                how something is loaded (`trust_remote_code`, `use_fast`, ...) are taken too.

        Raises:
            OSError: there is no such folder or repository, or what is wanted is not in it.
            TypeError: an override is unknown.
            ValueError: a file is broken, belongs to something else or holds impossible values, or
                an argument of transformers cannot be followed.
        """
        repository = Repository(
            pretrained_model_name_or_path,
            revision,
            cache_dir,
            local_files_only,
            token,
            subfolder,
            force_download,
        )
        return cls._from_repository(repository, take(repository.take(overrides), cls._keywords))

    @classmethod
    def _from_repository(cls: type[_T], repository: Repository, overrides: dict[str, Any]) -> _T:
        raise NotImplementedError

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
            OSError: the hub cannot be reached, or refuses: `huggingface_hub.errors.HfHubHTTPError`.
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


class FilesMixin(HubMixin):
    """`HubMixin` for what is a few small files, and `save_pretrained` writes no others."""

    _shared_files: ClassVar[tuple[str, ...]] = ()
    """Files of other parts that an upload takes along, where they are there."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the files into a folder, which is made if it is missing.

        Args:
            save_directory: the folder.
            push_to_hub: also upload the files that were written.
            **kwargs: for the upload, `repo_id` (by default the folder's name) and the arguments of
                `push_to_hub`.

        Returns:
            The paths of the files.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            TypeError: a keyword argument is unknown.
        """
        upload = upload_arguments(save_directory, push_to_hub, kwargs)
        paths = self._write_files(Path(save_directory))
        if upload is not None:
            names = [*map(os.path.basename, paths), *self._shared_files]
            upload_folder(save_directory, names, **upload)
        return paths

    def _write_files(self, folder: Path) -> list[str]:
        """Make the folder, once all is known to be right, and write the files; their paths."""
        raise NotImplementedError


@contextlib.contextmanager
def _reached(repo_id: str) -> Iterator[None]:
    """An error of the connection is an `OSError`, also where the hub's client has its own kind."""
    from huggingface_hub.errors import HfHubHTTPError

    # Those of the HTTP client that it is made for.
    errors: tuple[type[Any], ...] = HfHubHTTPError.__bases__
    try:
        yield
    except OSError:
        raise
    except errors as error:
        raise OSError(f"{repo_id}: the hub cannot be reached: {error}") from error


def make_repository(repo_id: str, private: bool | None = None) -> None:
    """Makes a repository of the hub where there is none.

    Raises:
        OSError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    with _reached(repo_id):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


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
    with _reached(repo_id):
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
