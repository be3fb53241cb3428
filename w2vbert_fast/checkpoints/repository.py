"""The small files of one checkpoint, from a local folder or the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.hub import pinned_revision, resolve_file
from w2vbert_fast.checkpoints.json_files import read_json
from w2vbert_fast.checkpoints.keywords import READING, take


@dataclass
class Repository:
    """Where the files of a checkpoint are.

    Attributes:
        path_or_id: A folder or a hub id.
        revision: Branch, tag or commit on the hub. Once a file is found it is the commit of that
            file, so that all files come from one state of the repository.
        cache_dir: Folder of the hub's cache.
        local_files_only: Whether to look in the cache only.
        token: Hub access token.
        subfolder: Folder inside the repository.
        force_download: Whether to download files that are in the cache.
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
        of `_keywords.READING`, which have no effect.

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
        """The path of a file, or None if the repository has no such file.

        Raises:
            OSError: There is no such repository.
        """
        path = resolve_file(
            self.path_or_id,
            filename,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            token=self.token,
            subfolder=self.subfolder,
            force_download=self.force_download,
        )
        if path is not None:
            self.revision = pinned_revision(path) or self.revision
        return path

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """The content of a JSON file, or None if the repository has no such file.

        Raises:
            OSError: There is no such repository, or the file cannot be read.
            ValueError: The file is no JSON object.
        """
        path = self.find(filename)
        return None if path is None else read_json(path)
