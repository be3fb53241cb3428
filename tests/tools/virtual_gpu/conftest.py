"""Compiled kernels of these tests are kept for the session and thrown away after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton_cache")


@pytest.fixture(autouse=True)
def compiled_not_interpreted(triton_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton_cache))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
