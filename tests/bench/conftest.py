"""What tests of the ledger share."""

from __future__ import annotations

import pytest

from bench.ledger import kernels
from bench.ledger.cost import Cost


def launches_move_nothing(patch: pytest.MonkeyPatch) -> None:
    """So that none needs a row."""
    patch.setattr(kernels.Kernels, "cost", lambda self, request: Cost(launches=1))
    patch.setattr(kernels, "_open", [])


@pytest.fixture
def without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    launches_move_nothing(monkeypatch)
