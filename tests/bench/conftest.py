"""What tests of the ledger share."""

from __future__ import annotations

import pytest

from bench.ledger import kernels
from bench.ledger.cost import Cost


@pytest.fixture
def without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches move nothing, so that none needs a row."""
    monkeypatch.setattr(kernels.Kernels, "cost", lambda self, request: Cost(launches=1))
    monkeypatch.setattr(kernels, "_open", [])
